"""The allow-list: who is on it, by which key, and that no key once revoked ever comes back."""

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes, uses_nist_ec_curve
from hypothesis import given, settings
from hypothesis import strategies as st

from metarisk_common.errors import ConfigError, IntegrityError, MetariskError
from server.config import ServerFolder
from server.enrolment import Bank, banks, create_list, enroll, fingerprint, history, read_public_key, revoke

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
LATER = NOW + timedelta(days=30)
ROOT = Path(__file__).resolve().parents[2]


def new_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve or ec.SECP384R1())


def write_key(path: Path, key: ec.EllipticCurvePrivateKey | None = None, comment: str = " bank-a") -> Path:
    line = (key or new_key()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    path.write_bytes(line + comment.encode() + b"\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    made = ServerFolder(tmp_path / "consortium")
    made.path.mkdir()
    create_list(made)
    return made


@pytest.fixture
def key_a(tmp_path: Path) -> Path:
    return write_key(tmp_path / "a.pub")


@pytest.fixture
def key_b(tmp_path: Path) -> Path:
    return write_key(tmp_path / "b.pub")


# Keys.


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
@pytest.mark.parametrize("comment", ["", " bank-a", "\tKölner Bank (node 1)"])
def test_a_key_is_read_as_flower_knows_it(tmp_path: Path, curve: ec.EllipticCurve, comment: str) -> None:
    key = new_key(curve)
    found = read_public_key(write_key(tmp_path / "node.pub", key, comment))
    assert found == public_key_to_bytes(key.public_key())
    assert uses_nist_ec_curve(bytes_to_public_key(found))


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
@pytest.mark.parametrize("bits", ["256", "384", "521"])
def test_the_fingerprint_is_the_one_that_ssh_prints(tmp_path: Path, bits: str) -> None:
    path = tmp_path / "node"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", bits, "-N", "", "-f", path], check=True)
    public = path.with_suffix(".pub")
    printed = subprocess.run(["ssh-keygen", "-lf", public], check=True, capture_output=True, text=True).stdout
    assert printed.split()[1] == fingerprint(read_public_key(public).hex())
    with pytest.raises(ConfigError, match="is a private key"):
        read_public_key(path)


def not_keys() -> dict[str, bytes]:
    rsa_key, edwards = rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()
    pem, openssh, none = Encoding.PEM, Encoding.OpenSSH, NoEncryption()
    good = new_key().public_key().public_bytes(openssh, PublicFormat.OpenSSH)
    kind, body = good.split()
    return {
        "private, OpenSSH": new_key().private_bytes(pem, PrivateFormat.OpenSSH, none),
        "private, PKCS8": new_key().private_bytes(pem, PrivateFormat.PKCS8, none),
        "private, SEC1": new_key().private_bytes(pem, PrivateFormat.TraditionalOpenSSL, none),
        "private RSA": rsa_key.private_bytes(pem, PrivateFormat.OpenSSH, none),
        "RSA": rsa_key.public_key().public_bytes(openssh, PublicFormat.OpenSSH),
        "Ed25519": edwards.public_key().public_bytes(openssh, PublicFormat.OpenSSH),
        "PEM": new_key().public_key().public_bytes(pem, PublicFormat.SubjectPublicKeyInfo),
        "another curve": new_key(ec.SECP256K1()).public_key().public_bytes(pem, PublicFormat.SubjectPublicKeyInfo),
        "empty": b"",
        "zeros": bytes(1000),
        "long": b"A" * 10_000_000,
        "cut": good[:-20],
        "not on the curve": kind + b" " + body[:-8] + b"AAAAAAAA",
        "other kind": b"ecdsa-sha2-nistp256 " + body,
        "certificate": b"ecdsa-sha2-nistp384-cert-v01@openssh.com " + body,
        "two keys": good + b"\n" + new_key().public_key().public_bytes(openssh, PublicFormat.OpenSSH),
        "options": b'command="sh" ' + good,
        "UTF-16": good.decode().encode("utf-16"),
    }


NOT_KEYS = not_keys()


@pytest.mark.parametrize("kind", NOT_KEYS)
def test_what_is_no_key_is_refused_and_not_repeated(tmp_path: Path, folder: ServerFolder, kind: str) -> None:
    path = tmp_path / "node.pub"
    path.write_bytes(NOT_KEYS[kind])
    with pytest.raises(ConfigError) as caught:
        enroll(folder, "Bank A", path, NOW)
    said = str(caught.value)
    assert said.startswith(f"{path}: is ")
    assert ("private key, which never leaves" in said) == kind.startswith("private")
    words = [word for line in NOT_KEYS[kind].splitlines() for word in line.split() if len(word) > 30]
    assert [word for word in words if word[:30].decode("latin1") in said] == []
    assert caught.value.__cause__ is None
    assert banks(folder) == {}


def test_a_key_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pub", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            read_public_key(path)


# Enrolling and revoking.


def test_an_enrolled_bank_is_pinned_by_its_key(folder: ServerFolder, key_a: Path, key_b: Path) -> None:
    bank = enroll(folder, "Bank A", key_a, NOW.astimezone(timezone(timedelta(hours=2))))
    assert bank == Bank(name="Bank A", public_key=read_public_key(key_a).hex(), enrolled="2026-03-01T12:30:00+00:00")
    assert bank.key_bytes == read_public_key(key_a)
    enroll(folder, "Kölner Bank", key_b, LATER)
    assert list(banks(folder)) == ["Bank A", "Kölner Bank"]
    assert folder.enrolment.stat().st_mode & 0o777 == 0o600


def test_enrolling_again_changes_nothing(folder: ServerFolder, key_a: Path) -> None:
    first = enroll(folder, "Bank A", key_a, NOW)
    content = folder.enrolment.read_bytes()
    for replace in (False, True):
        assert enroll(folder, "Bank A", key_a, LATER, replace=replace) == first
    assert folder.enrolment.read_bytes() == content


def test_a_new_key_takes_the_olds_place_only_when_asked(folder: ServerFolder, key_a: Path, key_b: Path) -> None:
    enroll(folder, "Bank A", key_a, NOW)
    with pytest.raises(ConfigError, match="--replace"):
        enroll(folder, "Bank A", key_b, LATER)
    assert banks(folder)["Bank A"].public_key == read_public_key(key_a).hex()
    enroll(folder, "Bank A", key_b, LATER, replace=True)
    assert banks(folder)["Bank A"].public_key == read_public_key(key_b).hex()
    old, new = history(folder)
    assert (old.revoked, old.in_force, new.in_force) == ("2026-03-31T12:30:00+00:00", False, True)
    with pytest.raises(ConfigError, match="revoked, which is for ever"):
        enroll(folder, "Bank A", key_a, LATER, replace=True)


def test_nobody_takes_anothers_key_or_name(folder: ServerFolder, key_a: Path, key_b: Path) -> None:
    enroll(folder, "Bank A", key_a, NOW)
    with pytest.raises(ConfigError, match="that of 'Bank A'"):
        enroll(folder, "Bank B", key_a, NOW)
    for replace in (False, True):
        with pytest.raises(ConfigError, match="'Bank A' is enrolled with another key"):
            enroll(folder, "BANK a", key_b, NOW, replace=replace)
    with pytest.raises(ConfigError, match="no key to replace; did you mean 'Bank A'"):
        enroll(folder, "Bank AA", key_b, NOW, replace=True)
    assert [bank.name for bank in history(folder)] == ["Bank A"]


def test_a_revoked_key_never_comes_back(folder: ServerFolder, key_a: Path, key_b: Path, tmp_path: Path) -> None:
    enroll(folder, "Bank A", key_a, NOW)
    assert revoke(folder, "Bank A", LATER).revoked == "2026-03-31T12:30:00+00:00"
    assert banks(folder) == {}
    for name in ("Bank A", "Another"):
        for replace in (False, True):
            with pytest.raises(ConfigError, match="revoked, which is for ever"):
                enroll(folder, name, key_a, LATER, replace=replace)
    # Not even with another comment, in other white space.
    kind, body, *_ = key_a.read_text(encoding="utf-8").split()
    disguised = tmp_path / "disguised.pub"
    disguised.write_text(f"\n  {kind}\t {body}   somebody else\r\n\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="revoked, which is for ever"):
        enroll(folder, "Another", disguised, LATER)
    # The bank itself may, with a new key.
    enroll(folder, "Bank A", key_b, LATER)
    assert [bank.in_force for bank in history(folder)] == [False, True]
    revoke(folder, "Bank A", LATER)
    assert banks(folder) == {}


def test_who_is_not_enrolled_cannot_be_revoked(folder: ServerFolder, key_a: Path) -> None:
    enroll(folder, "Bank A", key_a, NOW)
    with pytest.raises(ConfigError, match="'Bank Aa' is not enrolled; did you mean 'Bank A'"):
        revoke(folder, "Bank Aa", NOW)
    revoke(folder, "Bank A", NOW)
    with pytest.raises(ConfigError, match=r"'Bank A' is not enrolled$"):
        revoke(folder, "Bank A", NOW)


@pytest.mark.parametrize("name", ["", " Bank", "Bank ", "Ba\nnk", "\x1b[2J", "B\u202enk", "x" * 201])
def test_a_name_that_could_mislead_is_refused(folder: ServerFolder, key_a: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="printable"):
        enroll(folder, name, key_a, NOW)
    assert history(folder) == ()


def test_one_name_is_one_name_however_it_was_typed(folder: ServerFolder, key_a: Path) -> None:
    composed, decomposed = "K\u00f6lner Bank", "Ko\u0308lner Bank"
    first = enroll(folder, decomposed, key_a, NOW)
    assert first.name == composed
    assert enroll(folder, composed, key_a, NOW) == first
    assert revoke(folder, decomposed, NOW).name == composed


# The file.


def test_a_list_is_made_once_and_a_missing_one_is_not_an_empty_one(folder: ServerFolder, key_a: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        create_list(folder)
    enroll(folder, "Bank A", key_a, NOW)
    folder.enrolment.unlink()
    for read in (banks, history):
        with pytest.raises(IntegrityError, match="newest copy"):
            read(folder)
    with pytest.raises(IntegrityError, match="newest copy"):
        enroll(folder, "Bank B", key_a, NOW)
    assert not folder.enrolment.exists()


def test_every_damaged_byte_is_noticed(folder: ServerFolder, key_a: Path) -> None:
    enroll(folder, "Bank A", key_a, NOW)
    revoke(folder, "Bank A", LATER)
    whole = folder.enrolment.read_bytes()
    said = history(folder)
    for place in range(len(whole)):
        folder.enrolment.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        # White space between tokens means nothing; whatever else was changed must be noticed.
        try:
            assert history(folder) == said
            assert whole[place : place + 1].isspace()
        except IntegrityError as error:
            assert "newest copy" in str(error)  # noqa: PT017 - either may happen


def test_a_revocation_cannot_be_taken_out_by_hand(folder: ServerFolder, key_a: Path) -> None:
    enroll(folder, "Bank A", key_a, NOW)
    revoke(folder, "Bank A", LATER)
    whole = json.loads(folder.enrolment.read_bytes())
    again = {**whole, "banks": [{**whole["banks"][0], "revoked": None}]}
    wrong: list[object] = [
        again,
        {**whole, "banks": []},
        {**whole, "format": 2},
        {**whole, "more": 1},
        [],
        1,
        None,
        "x",
    ]
    for changed in wrong:
        folder.enrolment.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(IntegrityError, match="damaged or was changed by hand"):
            banks(folder)
    for garbage in (b"", b"\0" * 100, b"[" * 100_000, b"\xff\xfe"):
        folder.enrolment.write_bytes(garbage)
        with pytest.raises(IntegrityError, match="damaged or was changed by hand"):
            banks(folder)


def test_a_full_disk_leaves_the_old_list(
    folder: ServerFolder, key_a: Path, key_b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enroll(folder, "Bank A", key_a, NOW)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metarisk_common.files.os.fsync", full)
    with pytest.raises(MetariskError, match="No space left") as caught:
        enroll(folder, "Bank B", key_b, NOW)
    assert str(folder.path) in str(caught.value)
    assert list(banks(folder)) == ["Bank A"]
    assert [path.name for path in folder.path.iterdir() if path.name.endswith(".new")] == []


def test_commands_at_once_lose_no_bank(folder: ServerFolder, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom datetime import UTC, datetime\nfrom pathlib import Path\n"
        "from server.config import ServerFolder\nfrom server.enrolment import enroll\n"
        "for name in sys.argv[2:]:\n"
        "    enroll(ServerFolder(Path(sys.argv[1])), Path(name).stem, Path(name), datetime.now(UTC))\n"
    )
    names = [[f"bank-{process}-{number}" for number in range(8)] for process in range(3)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, folder.path, *(write_key(tmp_path / f"{name}.pub") for name in group)],
            cwd=ROOT,
        )
        for group in names
    ]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert set(banks(folder)) == {name for group in names for name in group}


KEYS = [new_key() for _ in range(4)]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("enroll"), st.sampled_from("AB"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("revoke"), st.sampled_from("AB"), st.just(0), st.just(value=False)),
    ),
    max_size=12,
)


@settings(max_examples=40)
@given(steps=STEPS)
def test_whatever_was_asked_the_list_stays_true(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int, bool]]
) -> None:
    folder = ServerFolder(tmp_path_factory.mktemp("list"))
    paths = [write_key(folder.path / f"{number}.pub", key) for number, key in enumerate(KEYS)]
    create_list(folder)
    for number, (verb, name, key, replace) in enumerate(steps):
        before, known = history(folder), banks(folder)
        moment = NOW + timedelta(hours=number)
        try:
            if verb == "enroll":
                enroll(folder, name, paths[key], moment, replace=replace)
            else:
                revoke(folder, name, moment)
        except ConfigError:
            assert (history(folder), banks(folder)) == (before, known)
            continue
        after = history(folder)
        # Nothing is ever forgotten, and what was revoked stays as it was.
        assert [(bank.name, bank.public_key, bank.enrolled) for bank in after][: len(before)] == [
            (bank.name, bank.public_key, bank.enrolled) for bank in before
        ]
        assert [bank for bank in before if not bank.in_force] == [
            now for then, now in zip(before, after, strict=False) if not then.in_force
        ]
        keys = [bank.public_key for bank in after]
        assert len(set(keys)) == len(keys)
        assert len(banks(folder)) == sum(bank.in_force for bank in after)
