"""The node's key: what OpenSSH and Flower make of it, and what becomes of it when it is changed."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from client import node_key
from client.cli import app
from client.config import Institution, load_institution
from client.node_key import read_public, rotate, write_pair
from client.setup import Answers, lay_out
from metarisk_common.errors import ConfigError, MetariskError

Call = Callable[..., tuple[int, str, str]]
needs_openssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed here")


@pytest.fixture
def institution(tmp_path: Path) -> Institution:
    pl.DataFrame({"a": [1]}).write_csv(tmp_path / "loans.csv")
    return lay_out(tmp_path / "bank", Answers("First Bank", tmp_path / "loans.csv", 220, 3.0, 1e-4)).institution


def private_numbers(path: Path) -> int:
    key = load_ssh_private_key(path.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.private_numbers().private_value


def public_point(path: Path) -> ec.EllipticCurvePublicNumbers:
    key = load_ssh_public_key(path.read_bytes())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key.public_numbers()


def listed(path: Path) -> str:
    return subprocess.run(["ssh-keygen", "-lf", path], check=True, capture_output=True, text=True).stdout.strip()


def test_the_pair_is_what_flower_wants(institution: Institution) -> None:
    key = load_ssh_private_key(institution.node_key.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP384R1)
    assert key.public_key().public_numbers() == public_point(institution.node_public_key)
    assert institution.node_key.read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert institution.node_key.stat().st_mode & 0o777 == 0o600


@needs_openssh
def test_the_fingerprint_is_the_one_that_openssh_prints(call: Call, institution: Institution) -> None:
    code, out, err = call(app, "node-key", institution.folder)
    assert (code, err) == (0, "")
    assert out.strip() == listed(institution.node_public_key)
    answer = json.loads(call(app, "node-key", institution.folder, "--json")[1])
    assert (answer["fingerprint"], answer["new"], answer["old_key"]) == (out.split()[1], False, None)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@needs_openssh
@settings(max_examples=25)
@given(name=st.text(max_size=80))
def test_no_name_of_a_bank_breaks_the_public_key(pairs: Path, name: str) -> None:
    for path in pairs.iterdir():
        path.unlink()
    public = write_pair(pairs / "key", pairs / "pub", name)
    assert (pairs / "pub").read_bytes().count(b"\n") == 1
    assert listed(pairs / "pub") == public.listing


def test_a_new_pair_keeps_the_old_one(call: Call, institution: Institution) -> None:
    before, line = private_numbers(institution.node_key), institution.node_public_key.read_bytes()
    code, out, err = call(app, "node-key", institution.folder, "--new")
    assert (code, err) == (0, "")
    assert private_numbers(institution.folder / "node.key.old") == before != private_numbers(institution.node_key)
    assert (institution.folder / "node.pub.old").read_bytes() == line != institution.node_public_key.read_bytes()
    assert (institution.folder / "node.key.old").stat().st_mode & 0o077 == 0
    assert institution.node_key.stat().st_mode & 0o077 == 0
    assert read_public(institution).fingerprint in out
    assert "delete" in out
    # The old key is the only one that the operator knows: nothing may take its place.
    code, out, err = call(app, "node-key", institution.folder, "--new")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "node.key.old" in err
    assert private_numbers(institution.folder / "node.key.old") == before
    assert "node.key.old" in call(app, "node-key", institution.folder)[1]
    for name in ("node.key", "node.pub"):
        (institution.folder / f"{name}.old").replace(institution.folder / name)
    assert private_numbers(institution.node_key) == before
    assert institution.node_public_key.read_bytes() == line


def test_once_the_old_one_is_deleted_there_may_be_another(institution: Institution) -> None:
    rotate(institution)
    for name in ("node.key.old", "node.pub.old"):
        (institution.folder / name).unlink()
    second = private_numbers(institution.node_key)
    rotate(institution)
    assert private_numbers(institution.folder / "node.key.old") == second
    assert sorted(path.name for path in institution.folder.glob("*node*")) == [
        "node.key", "node.key.old", "node.pub", "node.pub.old",
    ]  # fmt: skip


def test_while_the_daemon_runs_the_key_stays(call: Call, institution: Institution) -> None:
    before = institution.node_key.read_bytes()
    with institution.daemon_lock.open("a") as daemon:
        fcntl.flock(daemon, fcntl.LOCK_EX)
        code, out, err = call(app, "node-key", institution.folder, "--new")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "daemon" in err
        assert call(app, "node-key", institution.folder)[0] == 0
    assert institution.node_key.read_bytes() == before
    assert not (institution.folder / "node.key.old").exists()
    assert call(app, "node-key", institution.folder, "--new")[0] == 0


@pytest.mark.parametrize("point", ["first link", "second link", "key", "public file"])
def test_a_rotation_that_is_cut_short_can_be_said_again(
    institution: Institution, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before each thing that it does: the key is the old one or the new one, and then all goes on."""
    before = private_numbers(institution.node_key)

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    links: list[object] = []
    link, replace = os.link, Path.replace

    def cut_link(*paths: Path) -> None:
        links.append(paths)
        if len(links) > (point == "second link"):
            cut()
        link(*paths)

    def cut_replace(self: Path, target: Path) -> Path:
        if target == institution.node_key:
            cut()
        return replace(self, target)

    with monkeypatch.context() as patch:
        if "link" in point:
            patch.setattr(os, "link", cut_link)
        elif point == "key":
            patch.setattr(Path, "replace", cut_replace)
        else:
            patch.setattr(node_key, "write_atomically", cut)
        with pytest.raises(KeyboardInterrupt):
            rotate(institution)
    assert not list(institution.folder.glob(".node*"))
    changed = private_numbers(institution.node_key) != before
    assert changed == (point == "public file")
    read_public(institution)
    assert load_public(institution) == private_point(institution)
    if not changed:
        rotate(institution)
    assert private_numbers(institution.folder / "node.key.old") == before
    assert load_public(institution) == private_point(institution)


def load_public(institution: Institution) -> ec.EllipticCurvePublicNumbers:
    return public_point(institution.node_public_key)


def private_point(institution: Institution) -> ec.EllipticCurvePublicNumbers:
    key = load_ssh_private_key(institution.node_key.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.public_key().public_numbers()


def test_the_public_file_follows_from_the_private_one(institution: Institution) -> None:
    line = institution.node_public_key.read_bytes()
    institution.node_public_key.unlink()
    read_public(institution)
    assert institution.node_public_key.read_bytes() == line
    institution.node_public_key.write_bytes(line.replace(b"AAAAE2", b"AAAAE3"))
    read_public(institution)
    assert institution.node_public_key.read_bytes() == line


OTHERS: dict[str, bytes] = {
    "Ed25519": ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
    "P-256": ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
    "PKCS8": ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    "empty": b"",
    "cut short": b"-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_key_is_refused_and_left_alone(call: Call, institution: Institution, kind: str) -> None:
    institution.node_key.write_bytes(OTHERS[kind])
    for arguments in ([], ["--new"]):
        code, out, err = call(app, "node-key", institution.folder, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "node.key: is not an EC P-384 key" in err
        assert "PRIVATE" not in err
    assert institution.node_key.read_bytes() == OTHERS[kind]


@needs_openssh
def test_a_key_with_a_passphrase_is_refused_and_one_of_openssh_is_taken(institution: Institution) -> None:
    def make(passphrase: str) -> None:
        institution.node_key.unlink()
        path = str(institution.node_key)
        subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-f", path, "-N", passphrase], check=True)

    make("secret")
    with pytest.raises(ConfigError, match="passphrase"):
        read_public(institution)
    make("")
    Path(f"{institution.node_key}.pub").replace(institution.folder / "other.pub")
    fingerprint = listed(institution.folder / "other.pub").split()[1]
    assert read_public(institution).fingerprint == fingerprint == listed(institution.node_public_key).split()[1]


def test_a_key_that_is_missing_or_open_to_others_is_named(call: Call, institution: Institution) -> None:
    institution.node_key.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_public(institution)
    institution.node_key.unlink()
    code, out, err = call(app, "node-key", institution.folder)
    assert (code, out) == (2, "")
    assert "node.key: there is no such file" in err
    assert load_institution(institution.folder) == institution
    with pytest.raises(MetariskError):
        rotate(institution)
