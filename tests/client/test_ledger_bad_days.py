"""The ledger's files on bad days: flipped, cut short, deleted, put back from a copy.

Whatever happens to them, it gives either everything that was recorded or an error that names the file: never fewer
entries, never a smaller epsilon, and a ledger that is refused is left as it was found.
"""

import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from client.ledger import Budget, Entry, Ledger, OrderKey
from metarisk_common.errors import ConfigError, IntegrityError
from metarisk_common.privacy import PrivacyEvent

BUDGET = Budget(epsilon=3.0, delta=1e-5)
EVENT = PrivacyEvent("poisson_gaussian", 50.0, 1.0, 5)

Files = dict[str, bytes]
NAMES = ["ledger.sqlite", "ledger.sqlite-wal", "ledger.head", "ledger.key"]


@dataclass(frozen=True)
class Used:
    """The files of a ledger after real use, and what they say."""

    files: Files
    entries: list[Entry]
    spent: float


def key(number: int) -> OrderKey:
    return OrderKey(run_id="run", round=number, plan_hash="plan", order_digest="digest")


def open_ledger(path: Path) -> Ledger:
    ledger = Ledger.open(path, source="loans", budget=BUDGET)
    ledger.approve("plan")
    return ledger


def turn(ledger: Ledger, number: int) -> None:
    ledger.release(ledger.reserve(key(number), EVENT), b"report %d " % number * 100)


def files_in(folder: Path) -> Files:
    """What a power cut would leave, while a ledger is open and at rest; SQLite makes its index anew."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith("-shm")}


def put(folder: Path, files: Files) -> Path:
    """Fill a folder with these files and no others; gives the ledger's path."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)
    return folder / "ledger.sqlite"


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Used:
    """Closed in good order: everything is in the main file."""
    path = tmp_path_factory.mktemp("closed") / "ledger.sqlite"
    with open_ledger(path) as ledger:
        for number in range(8):
            turn(ledger, number)
        entries, spent = ledger.entries(), ledger.spent()
    return Used(files_in(path.parent), entries, spent)


@pytest.fixture(scope="module")
def in_use(closed: Used, tmp_path_factory: pytest.TempPathFactory) -> Used:
    """Killed at work: the newest entries are in the log, the last one a reservation."""
    path = put(tmp_path_factory.mktemp("in_use"), closed.files)
    with open_ledger(path) as ledger:
        for number in range(8, 12):
            turn(ledger, number)
        ledger.reserve(key(12), EVENT)
        return Used(files_in(path.parent), ledger.entries(), ledger.spent())


def refusals_of(path: Path, used: Used) -> int:
    """Open damaged files both ways; each refuses, or says all. Gives how many of the two refused."""
    refusals = 0
    for attempt in (Ledger.read, open_ledger):
        ledger, error = None, ""
        try:
            ledger = attempt(path)
        except (IntegrityError, ConfigError) as refusal:
            error = str(refusal)
        if ledger is None:
            # The ledger, its key or its head: they share their stem.
            assert error.startswith(f"{path.with_suffix('')}."), error
            refusals += 1
            continue
        with ledger:
            assert (ledger.entries(), ledger.spent()) == (used.entries, used.spent)
    return refusals


def test_the_files_as_they_were_left_say_all(closed: Used, in_use: Used, tmp_path: Path) -> None:
    assert (set(closed.files), set(in_use.files)) == ({*NAMES} - {"ledger.sqlite-wal"}, {*NAMES})
    assert len(in_use.entries) == len(closed.entries) + 9
    for used in (closed, in_use):
        assert refusals_of(put(tmp_path / "bank", used.files), used) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_harmless_or_refused(closed: Used, in_use: Used, tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(list(name.encode()))
    for used in (closed, in_use):
        if name in used.files:
            refusals = 0
            for bit in random.integers(0, 8 * len(used.files[name]), 40):
                content = bytearray(used.files[name])
                content[bit // 8] ^= 1 << int(bit % 8)
                refusals += refusals_of(put(tmp_path / "bank", {**used.files, name: bytes(content)}), used)
            # In a main file whose pages are in the log anew, or in pages that are free, a bit says nothing.
            assert refusals > 10 or (used is in_use and name == "ledger.sqlite")


def test_a_flip_that_garbles_the_reason_too_is_refused(closed: Used, tmp_path: Path) -> None:
    # SQLite names the word that it stumbled over, and Python cannot read that.
    content = closed.files["ledger.sqlite"].replace(b"CREATE TABLE outbox", b"CREATE TABL\xc5 outbox")
    path = put(tmp_path / "bank", {**closed.files, "ledger.sqlite": content})
    assert refusals_of(path, closed) == 2
    with pytest.raises(IntegrityError, match="is damaged: its text is garbled; restore its newest copy"):
        Ledger.read(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_short_is_refused(closed: Used, in_use: Used, tmp_path: Path, name: str) -> None:
    used = in_use if name.endswith("wal") else closed
    size = len(used.files[name])
    for length in sorted({0, 1, 31, size // 2, size - 1, *range(4096, size, 4096), *range(4120 - 24, size, 4120)}):
        path = put(tmp_path / "bank", {**used.files, name: used.files[name][:length]})
        # A reader needs no key, and the last character of a text file only ends its last line.
        harmless = length == size - 1 and name in {"ledger.head", "ledger.key"}
        assert refusals_of(path, used) == (0 if harmless else 1 if name == "ledger.key" else 2), length


def test_a_file_cut_short_beside_its_log_is_harmless_or_refused(in_use: Used, tmp_path: Path) -> None:
    for length in range(0, len(in_use.files["ledger.sqlite"]), 1000):
        cut = {**in_use.files, "ledger.sqlite": in_use.files["ledger.sqlite"][:length]}
        refusals_of(put(tmp_path / "bank", cut), in_use)


@pytest.mark.parametrize("name", NAMES)
def test_a_deleted_file_is_missed(in_use: Used, tmp_path: Path, name: str) -> None:
    left = {other: content for other, content in in_use.files.items() if other != name}
    path = put(tmp_path / "bank", left)
    assert refusals_of(path, in_use) == (1 if name in {"ledger.head", "ledger.key"} else 2)
    assert files_in(path.parent) in (left, {**left, "ledger.sqlite-wal": b""})


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_an_older_copy_beside_a_newer_head_is_refused_and_left_alone(in_use: Used, tmp_path: Path, kept: float) -> None:
    log = in_use.files["ledger.sqlite-wal"]
    older = {**in_use.files, "ledger.sqlite-wal": log[: int(len(log) * kept)]}
    path = put(tmp_path / "bank", older)
    assert refusals_of(path, in_use) == 2
    with pytest.raises(IntegrityError, match=r"is older than its signed head, .*; restore the newest copy"):
        open_ledger(path)
    assert files_in(path.parent) == older
    assert refusals_of(put(path.parent, in_use.files), in_use) == 0


def test_a_refused_ledger_keeps_the_log_that_may_mend_it(in_use: Used, tmp_path: Path) -> None:
    for name, at in (("ledger.sqlite", 0), ("ledger.sqlite-wal", 9000), ("ledger.key", 60), ("ledger.head", 40)):
        content = bytearray(in_use.files[name])
        content[at] ^= 1
        # SQLite takes an empty file for a new one, and would delete its log.
        damaged = {**in_use.files, name: bytes(content) if at > 0 else b""}
        path = put(tmp_path / "bank", damaged)
        assert refusals_of(path, in_use) > 0
        if name != "ledger.key":  # with which a ledger may be read, and the log be put away
            assert files_in(path.parent) == damaged


def test_a_ledger_deleted_beside_its_head_is_not_started_afresh(closed: Used, tmp_path: Path) -> None:
    head = {name: content for name, content in closed.files.items() if name in {"ledger.head", "ledger.key"}}
    path = put(tmp_path / "bank", head)
    with pytest.raises(IntegrityError, match="is gone but its signed head is not; restore the newest copy"):
        open_ledger(path)
    assert files_in(path.parent) == head


def test_a_ledger_of_the_first_format_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE entries (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, digest TEXT NOT NULL) STRICT")
    content = '{"format":"metarisk ledger 1","source":"loans","budget":{"epsilon":3.0,"delta":1e-05}}'
    body = f'{{"content":{content},"kind":"create","salt":"00","time_seconds":1.0}}'
    db.execute("INSERT INTO entries VALUES (0, ?, ?)", (body, "0" * 64))
    db.commit()
    db.close()
    for attempt in (open_ledger, Ledger.read):
        with pytest.raises(IntegrityError, match=rf"{path}: is of the format 'metarisk ledger 1', .* use the version"):
            attempt(path)
