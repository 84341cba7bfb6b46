"""Certificates when a command is killed at any instant, or two run at once: the hub can always be started."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from server.certificates import (
    check_certificate,
    issue_certificate,
    make_authority,
    renew,
    retire_authorities,
    rotate_authority,
)
from server.config import ServerFolder

NAMES = ("hub.example.org", "192.0.2.7")


class CrashError(BaseException):
    """The process ends here."""


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    made = ServerFolder(tmp_path / "consortium")
    made.path.mkdir()
    make_authority(made, "Verbund")
    issue_certificate(made, NAMES)
    return made


def leaf_of(folder: ServerFolder) -> x509.Certificate:
    return x509.load_pem_x509_certificates(folder.certificate.read_bytes())[0]


def is_pair(folder: ServerFolder) -> bool:
    key = load_pem_private_key(folder.certificate_key.read_bytes(), None)
    return leaf_of(folder).public_key() == key.public_key()


def is_trusted(folder: ServerFolder, trusted: bytes) -> bool:
    leaf, *chain = x509.load_pem_x509_certificates(folder.certificate.read_bytes())
    policy = PolicyBuilder().store(Store(x509.load_pem_x509_certificates(trusted)))
    try:
        policy.build_server_verifier(x509.DNSName("localhost")).verify(leaf, chain)
    except VerificationError:
        return False
    return is_pair(folder)


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int, counter: list[int]) -> None:
    """Let the `number`-th change of a name in any folder, and every later one, end the process."""

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counter[0] += 1
            if counter[0] >= number:
                raise CrashError
            return original(*arguments, **options)

        return call

    for name in ("replace", "unlink", "mkdir", "symlink_to"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))


def as_files(folder: ServerFolder) -> None:
    """Make the links files, as a backup does that knows no links, or an operator who brings a certificate along."""
    contents = {path: path.read_bytes() for path in (folder.certificate, folder.certificate_key)}
    (folder.certificate.parent / "current").unlink()
    for version in folder.certificate.parent.glob("version-*"):
        shutil.rmtree(version)
    for path, content in contents.items():
        path.unlink()
        path.write_bytes(content)
        path.chmod(0o600)


@pytest.mark.parametrize("stands_as", ["links", "files"])
def test_whenever_renewal_is_cut_short_key_and_certificate_belong_together(
    tmp_path: Path, folder: ServerFolder, monkeypatch: pytest.MonkeyPatch, stands_as: str
) -> None:
    if stands_as == "files":
        as_files(folder)
    serials, number, done = set(), 0, False
    while not done:
        number += 1
        copy = ServerFolder(tmp_path / f"copy-{number}")
        shutil.copytree(folder.path, copy.path, symlinks=True)
        with monkeypatch.context() as patch:
            crash_at(patch, number, [0])
            try:
                renew(copy, NAMES)
                done = True
            except CrashError:
                pass
        assert is_pair(copy)
        check_certificate(copy)
        serials.add(leaf_of(copy).serial_number)
        renew(copy, NAMES)
        assert is_pair(copy)
        assert len(list(copy.certificate.parent.glob("version-*"))) == 1
    assert number > 8
    assert len(serials) > 1


def test_whenever_a_change_is_cut_short_the_hub_goes_on_and_the_change_can_be_made_again(
    tmp_path: Path, folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, number, done = folder.ca_certificate.read_bytes(), 0, False
    while not done:
        number += 1
        copy = ServerFolder(tmp_path / f"copy-{number}")
        shutil.copytree(folder.path, copy.path, symlinks=True)
        with monkeypatch.context() as patch:
            crash_at(patch, number, [0])
            try:
                rotate_authority(copy)
                done = True
            except CrashError:
                pass
        assert is_trusted(copy, old)
        assert is_trusted(copy, copy.ca_certificate.read_bytes())
        renew(copy, NAMES)
        assert is_trusted(copy, copy.ca_certificate.read_bytes())
        rotate_authority(copy)
        renew(copy, NAMES)
        retire_authorities(copy)
        assert is_trusted(copy, copy.ca_certificate.read_bytes())
    assert number > 2


def test_two_commands_at_once_leave_a_pair(folder: ServerFolder) -> None:
    threads = [threading.Thread(target=renew, args=(folder, NAMES)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_pair(folder)
    # ca.pem, ca.key, the two links, current, one version, and the lock.
    assert len(list(folder.certificate.parent.iterdir())) == 7
