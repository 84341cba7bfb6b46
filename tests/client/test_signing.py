"""The ledger's key, its signatures and its head file: what they prove, and what is refused without them."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from client import ledger_file
from client.chain import State, next_row
from client.ledger import Budget, Ledger, OrderKey
from client.signing import fingerprint
from metarisk_common.errors import ConfigError, IntegrityError, MetariskError
from metarisk_common.privacy import PrivacyEvent

BUDGET = Budget(epsilon=3.0, delta=1e-5)
EVENT = PrivacyEvent("poisson_gaussian", 50.0, 1.0, 5)


def key(number: int) -> OrderKey:
    return OrderKey(run_id="run", round=number, plan_hash="plan", order_digest="digest")


def open_ledger(path: Path, budget: Budget = BUDGET) -> Ledger:
    ledger = Ledger.open(path, source="loans", budget=budget)
    ledger.approve("plan")
    return ledger


def turn(ledger: Ledger, number: int) -> None:
    ledger.release(ledger.reserve(key(number), EVENT), b"report")


def head_of(path: Path) -> int:
    return int(json.loads(path.with_suffix(".head").read_text(encoding="utf-8"))["counter"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "bank").mkdir()
    return tmp_path / "bank" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with open_ledger(path) as opened:
        yield opened


# The key.


def test_the_key_is_made_with_the_ledger_and_never_again(path: Path) -> None:
    with open_ledger(path) as ledger:
        public_key = ledger.public_key
        assert ledger.entries()[0].content["public_key"] == public_key
        assert ledger.fingerprint == fingerprint(public_key) != fingerprint("00" * 32)
    pem = path.with_suffix(".key").read_bytes()
    assert pem.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert path.with_suffix(".key").stat().st_mode & 0o777 == 0o600
    with open_ledger(path) as ledger:
        assert ledger.public_key == public_key
    assert path.with_suffix(".key").read_bytes() == pem


def test_a_creation_that_was_cut_short_leaves_a_key_that_is_used(path: Path, tmp_path: Path) -> None:
    open_ledger(tmp_path / "other").close()
    pem = (tmp_path / "other.key").read_bytes()
    shutil.copy(tmp_path / "other.key", path.with_suffix(".key"))
    open_ledger(path).close()
    assert path.with_suffix(".key").read_bytes() == pem


def test_every_entry_is_signed_as_the_documents_say(ledger: Ledger, path: Path) -> None:
    turn(ledger, 1)
    public_key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(ledger.public_key))
    db = sqlite3.connect(path)
    rows = db.execute("SELECT seq, digest, signature FROM entries JOIN signatures USING (seq)").fetchall()
    db.close()
    assert len(rows) == 4
    for seq, digest, signature in rows:
        text = f'["metarisk ledger 2","loans",{seq},"{digest}"]'
        public_key.verify(bytes.fromhex(signature), text.encode())  # raises if it is not


def test_verifying_needs_the_file_alone_and_writing_the_key(path: Path, tmp_path: Path) -> None:
    with open_ledger(path) as ledger:
        turn(ledger, 1)
        expected = ledger.entries()
    alone = tmp_path / "copy.sqlite"
    shutil.copy(path, alone)
    with Ledger.read(alone) as reader:
        reader.verify()
        assert reader.entries() == expected
    with pytest.raises(IntegrityError, match=r"copy\.head: the ledger's signed head is missing; put back a copy"):
        open_ledger(alone)
    shutil.copy(path.with_suffix(".head"), tmp_path / "copy.head")
    with pytest.raises(IntegrityError, match=r"copy\.key: .* missing; restore the key from its backup; without it"):
        open_ledger(alone)
    assert not (tmp_path / "copy.key").exists()


@pytest.mark.parametrize("kind", ["foreign", "not Ed25519", "garbage", "empty"])
def test_a_key_that_is_not_the_ledgers_is_refused(path: Path, tmp_path: Path, kind: str) -> None:
    open_ledger(path).close()
    open_ledger(tmp_path / "other").close()
    exchange = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    foreign = (tmp_path / "other.key").read_bytes()
    content = {"foreign": foreign, "not Ed25519": exchange, "garbage": b"-----BEGIN", "empty": b""}[kind]
    path.with_suffix(".key").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"ledger\.key: is .*; restore the key from its backup"):
        open_ledger(path)
    Ledger.read(path).close()


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620])
def test_a_key_that_others_can_reach_is_refused(path: Path, mode: int) -> None:
    open_ledger(path).close()
    path.with_suffix(".key").chmod(mode)
    with pytest.raises(ConfigError, match=r"ledger\.key: .* open to others; .* chmod 600"):
        open_ledger(path)
    Ledger.read(path).close()


# Signatures.


def test_an_entry_of_another_hand_is_refused_and_not_believed_later(ledger: Ledger, path: Path) -> None:
    turn(ledger, 1)
    state = State()
    db = sqlite3.connect(path)
    state.follow(ledger_file.rows_from(db, 0))
    more = {"epsilon": 1000.0, "delta": 1e-5}
    ledger_file.append(db, next_row(state, Ed25519PrivateKey.generate(), "budget", more, 2e9))
    db.commit()
    db.close()
    for _ in range(2):
        with pytest.raises(IntegrityError, match="entry 4 is not signed by the ledger's key"):
            ledger.reserve(key(2), EVENT)
    for attempt in (open_ledger, Ledger.read):
        with pytest.raises(IntegrityError, match="entry 4 is not signed by the ledger's key"):
            attempt(path)


def test_verify_checks_each_signature_by_itself(path: Path) -> None:
    with open_ledger(path) as ledger:
        turn(ledger, 1)
    db = sqlite3.connect(path)
    (trigger,) = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'signatures_no_update'").fetchone()
    db.execute("DROP TRIGGER signatures_no_update")
    db.execute("UPDATE signatures SET signature = (SELECT signature FROM signatures WHERE seq = 3) WHERE seq = 2")
    db.execute(trigger)
    db.commit()
    db.close()
    # The newest signature vouches for the whole chain, so the entries can be relied on; the damage is still told.
    with Ledger.read(path) as reader, pytest.raises(IntegrityError, match="entry 2 is not signed"):
        reader.verify()


# The head file.


def test_the_head_names_the_newest_entry_whoever_wrote_it(path: Path) -> None:
    with open_ledger(path) as one, open_ledger(path) as other:
        for number in range(4):
            reservation = (one, other)[number % 2].reserve(key(number), EVENT)
            assert head_of(path) == reservation.seq == one.counter - 1
            (other, one)[number // 2].release(reservation, b"report")
            assert head_of(path) == one.counter - 1
        one.revoke("plan")
        assert head_of(path) == other.counter - 1
        one.verify()
    head = json.loads(path.with_suffix(".head").read_text(encoding="utf-8"))
    assert set(head) == {"source", "counter", "digest", "signature"}


def test_a_ledger_without_its_head_is_only_read(path: Path) -> None:
    with open_ledger(path) as ledger:
        turn(ledger, 1)
        head = path.with_suffix(".head").rename(path.with_suffix(".saved"))
        with pytest.raises(IntegrityError, match=r"ledger\.head: the ledger's signed head is missing"):
            ledger.reserve(key(2), EVENT)
    with pytest.raises(IntegrityError, match=r"ledger\.head: the ledger's signed head is missing"):
        open_ledger(path)
    with Ledger.read(path) as reader:
        assert reader.counter == 4
    head.rename(path.with_suffix(".head"))
    open_ledger(path).close()


def test_an_older_head_is_brought_up_to_date(path: Path) -> None:
    with open_ledger(path) as ledger:
        older = path.with_suffix(".head").read_bytes()
        turn(ledger, 1)
    path.with_suffix(".head").write_bytes(older)
    with Ledger.read(path) as reader:
        assert (reader.counter, head_of(path)) == (4, 1)
    with open_ledger(path) as ledger:
        assert (ledger.counter, head_of(path)) == (4, 3)


@pytest.mark.parametrize("change", ["signature", "counter", "source", "type", "no object", "empty", "another ledger's"])
def test_a_head_that_the_key_did_not_sign_is_refused(path: Path, tmp_path: Path, change: str) -> None:
    with open_ledger(path) as ledger:
        turn(ledger, 1)
    open_ledger(tmp_path / "other").close()
    head = json.loads(path.with_suffix(".head").read_text(encoding="utf-8"))
    changes = {"signature": "00", "counter": 1, "source": "cards", "type": "2"}
    if change in changes:
        head["counter" if change == "type" else change] = changes[change]
    text = {"no object": "[]", "empty": "", "another ledger's": (tmp_path / "other.head").read_text(encoding="utf-8")}
    path.with_suffix(".head").write_text(text.get(change, json.dumps(head)), encoding="utf-8")
    for attempt in (open_ledger, Ledger.read):
        with pytest.raises(IntegrityError, match=r"ledger\.head: is not the signed head .*; put back a copy of it"):
            attempt(path)


DIES_AT_THE_HEAD = """
import os, sys
from pathlib import Path
from client.ledger import Budget, Ledger, OrderKey
from metarisk_common.privacy import PrivacyEvent
path, when, budget = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
replace, seen = os.replace, []
def die(*arguments):
    seen.append(1)
    if len(seen) > when:
        os._exit(9)  # as a kill would: nothing is tidied up
    replace(*arguments)
os.replace = die
ledger = Ledger.open(path, source="loans", budget=Budget(budget, 1e-5))
ledger.approve("plan")
reservation = ledger.reserve(OrderKey("run", 1, "plan", "digest"), PrivacyEvent("poisson_gaussian", 50.0, 1.0, 5))
ledger.release(reservation, b"report")
"""


def die_at_the_head(path: Path, when: int, budget: float = 3.0) -> None:
    """Use a ledger in a process that dies when it puts its head file in place for the time after `when` others."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DIES_AT_THE_HEAD, str(path), str(when), str(budget)]
    assert subprocess.run(command, check=False, env=environment).returncode == 9


@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_process_that_dies_between_an_entry_and_its_head_loses_nothing(path: Path, when: int) -> None:
    die_at_the_head(path, when)
    with Ledger.read(path) as reader:
        assert [entry.kind for entry in reader.entries()] == ["create", "approve", "reserve", "release"][: when + 1]
    with open_ledger(path) as ledger:
        assert head_of(path) == ledger.counter - 1
        assert ledger.released_report(key(1)) == (b"report" if when == 3 else None)


def test_a_ledger_that_has_no_head_yet_gets_it_before_anything_else(path: Path) -> None:
    die_at_the_head(path, 0)
    assert not path.with_suffix(".head").exists()
    die_at_the_head(path, 0, budget=2.0)  # less epsilon, which would be the second entry
    with open_ledger(path, Budget(2.0, 1e-5)) as ledger:
        assert [entry.kind for entry in ledger.entries()] == ["create", "budget", "approve"]


def test_a_release_whose_head_cannot_be_written_is_not_sent_before_it_can(ledger: Ledger, path: Path) -> None:
    reservation = ledger.reserve(key(1), EVENT)
    path.with_suffix(".head.new").mkdir()
    for _ in range(2):
        with pytest.raises(MetariskError, match=r"ledger\.head: the signed head cannot be written: .* try again"):
            ledger.released_report(key(1)) or ledger.release(reservation, b"report")
    path.with_suffix(".head.new").rmdir()
    assert ledger.released_report(key(1)) == b"report"
    assert head_of(path) == ledger.counter - 1 == 3


def test_a_file_put_in_place_under_two_open_ledgers_lets_one_go_on(path: Path) -> None:
    with open_ledger(path) as one:
        turn(one, 1)
    twin = path.with_name("twin")
    shutil.copy(path, twin)
    with open_ledger(path) as one:
        twin.replace(path)
        for log in path.parent.glob("ledger.sqlite-*"):
            log.unlink()
        with open_ledger(path) as other:
            turn(one, 2)
            with pytest.raises(IntegrityError, match="is older than its signed head"):
                other.reserve(key(3), EVENT)
