"""The allow-list: which banks may take part, each under its name and pinned by its public key.

`enrolment.json` holds every enrolment there ever was, in order; one that was revoked stays, for its key may never come
back. The file's digest is in it, and a list that is missing is not taken for an empty one: either would let a revoked
bank in again.
"""

import difflib
import hashlib
import json
import re
import unicodedata
from base64 import b64encode
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
    ssh_key_fingerprint,
)
from pydantic import Field, ValidationError, field_validator, model_validator

from metarisk_common.config import Frozen
from metarisk_common.errors import ConfigError, IntegrityError

from .config import ServerFolder
from .private_files import locked, read_public, write_private

MAX_NAME: Final = 200
_MAX_KEY_FILE_BYTES: Final = 16_384
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_KEY_LINE: Final = re.compile(rb"ecdsa-sha2-nistp(256|384|521)[ \t]+[A-Za-z0-9+/=]+([ \t].*)?")
_WANTED: Final = (
    "a bank's public key is one line that begins with ecdsa-sha2-nistp, in the node.pub of the bank's folder"
)
_RESTORE: Final = "put back its newest copy, and no older one: that would let revoked banks in again"


class Bank(Frozen):
    """One enrolment. Times are ISO 8601 in UTC."""

    name: str = Field(min_length=1, max_length=MAX_NAME)
    public_key: str
    """The bytes by which Flower knows the node, PEM SubjectPublicKeyInfo, hexadecimal."""
    enrolled: str
    revoked: str | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not name.isprintable() or name != name.strip() or name != unicodedata.normalize("NFC", name):
            raise ValueError("must be printable text that neither begins nor ends with a space")
        return name

    @field_validator("public_key")
    @classmethod
    def _check_key(cls, public_key: str) -> str:
        key = load_pem_public_key(bytes.fromhex(public_key))
        if not isinstance(key, ec.EllipticCurvePublicKey) or _to_bytes(key).hex() != public_key:
            raise ValueError("must be a public key as it was enrolled")
        return public_key

    @field_validator("enrolled", "revoked")
    @classmethod
    def _check_time(cls, time: str | None) -> str | None:
        if time is not None and datetime.fromisoformat(time).tzinfo is None:
            raise ValueError("must be a time with its zone")
        return time

    @property
    def in_force(self) -> bool:
        """Whether the bank may take part under this key."""
        return self.revoked is None

    @property
    def key_bytes(self) -> bytes:
        """The public key as Flower wants it."""
        return bytes.fromhex(self.public_key)


class _List(Frozen):
    format: Literal[1] = 1
    banks: tuple[Bank, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        keys = [bank.public_key for bank in self.banks]
        names = [bank.name.casefold() for bank in self.banks if bank.in_force]
        if len(set(keys)) < len(keys) or len(set(names)) < len(names):
            raise ValueError("names a key, or a bank in force, twice")
        return self

    def digest(self) -> str:
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


# Keys.


def read_public_key(path: Path) -> bytes:
    """Read a node's public key from a file in OpenSSH's format.

    Returns:
        The bytes by which Flower knows the node: PEM SubjectPublicKeyInfo.

    Raises:
        ConfigError: the file is missing, holds a private key, or is no EC key on a NIST curve. Nothing that the file
            holds is repeated.

    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_KEY_FILE_BYTES + 1).strip()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"{path}: is a private key, which never leaves its bank; delete it, have the bank make a new pair, and ask "
            "for the file that ends in .pub"
        )
    if not _KEY_LINE.fullmatch(content):
        raise ConfigError(f"{path}: is not a public key that can be enrolled; {_WANTED}")
    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise ConfigError(f"{path}: is a damaged public key; have it sent again")
    return _to_bytes(key)


def fingerprint(public_key: str) -> str:
    """Shorten a key to what two people compare over the telephone, as `ssh-keygen -l` prints it.

    Args:
        public_key: as `Bank` holds it, hexadecimal.

    """
    key = load_pem_public_key(bytes.fromhex(public_key))
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TypeError("a bank's key is an EC key")
    return "SHA256:" + b64encode(ssh_key_fingerprint(key, hashes.SHA256())).decode().rstrip("=")


def _to_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


# The list.


def create_list(folder: ServerFolder) -> None:
    """Write the empty allow-list of a new folder.

    Raises:
        ConfigError: there is a list already.

    """
    if folder.enrolment.exists():
        raise ConfigError(f"{folder.enrolment}: exists already")
    _write(folder, _List())


def enroll(folder: ServerFolder, name: str, key_path: Path, now: datetime, *, replace: bool = False) -> Bank:
    """Put a bank on the allow-list; one that is on it with this very key stays as it is.

    Args:
        folder: the operator's folder.
        name: the bank's name, as its `institution.toml` says it.
        key_path: its node's public key, in OpenSSH's format.
        now: the moment, with its zone.
        replace: the bank has a new key: the old one is revoked, and this one takes its place.

    Raises:
        ConfigError: the name or the key cannot be meant, the name has another key, the key another name, or the key was
            revoked before.
        IntegrityError: the list is missing or damaged.

    """
    key = read_public_key(key_path).hex()
    name = unicodedata.normalize("NFC", name)
    with _lock(folder):
        known = _read(folder)
        for bank in known.banks:
            if bank.public_key != key:
                continue
            if not bank.in_force:
                raise ConfigError(
                    f"{key_path}: this key was enrolled for '{bank.name}' and revoked, which is for ever; have the "
                    "bank make a new pair"
                )
            if bank.name != name:
                raise ConfigError(f"{key_path}: this key is that of '{bank.name}'; every bank has a key of its own")
            return bank
        before = next((bank for bank in known.banks if bank.in_force and _alike(bank.name, name)), None)
        if before is not None and (not replace or before.name != name):
            raise ConfigError(
                f"'{before.name}' is enrolled with another key; if that bank itself has told you its new key's "
                f"fingerprint, enrol '{before.name}' with --replace"
            )
        if before is None and replace:
            raise ConfigError(f"'{name}' has no key to replace{_suggest(name, known)}")
        added = _bank(name, key, now)
        kept = tuple(_revoked(bank, now) if bank is before else bank for bank in known.banks)
        _write(folder, _List(banks=(*kept, added)))
    return added


def revoke(folder: ServerFolder, name: str, now: datetime) -> Bank:
    """Take a bank off the allow-list; its key can never be enrolled again.

    Raises:
        ConfigError: no bank of that name is on it.
        IntegrityError: the list is missing or damaged.

    """
    name = unicodedata.normalize("NFC", name)
    with _lock(folder):
        known = _read(folder)
        found = next((bank for bank in known.banks if bank.in_force and bank.name == name), None)
        if found is None:
            raise ConfigError(f"'{name}' is not enrolled{_suggest(name, known)}")
        gone = _revoked(found, now)
        _write(folder, _List(banks=tuple(gone if bank is found else bank for bank in known.banks)))
    return gone


def banks(folder: ServerFolder) -> dict[str, Bank]:
    """The banks that may take part, by name, in the order of their enrolment.

    Raises:
        IntegrityError: the list is missing or damaged.

    """
    return {bank.name: bank for bank in _read(folder).banks if bank.in_force}


def history(folder: ServerFolder) -> tuple[Bank, ...]:
    """Every enrolment there ever was, the revoked ones too, oldest first.

    Raises:
        IntegrityError: the list is missing or damaged.

    """
    return _read(folder).banks


def _bank(name: str, key: str, now: datetime) -> Bank:
    try:
        return Bank(name=name, public_key=key, enrolled=_text(now))
    except ValidationError:
        raise ConfigError(
            f"a bank's name is printable text of at most {MAX_NAME} characters, with no space at either end"
        ) from None


def _revoked(bank: Bank, now: datetime) -> Bank:
    return bank.model_copy(update={"revoked": _text(now)})


def _text(now: datetime) -> str:
    return now.astimezone(UTC).isoformat(timespec="seconds")


def _alike(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()


def _suggest(name: str, known: _List) -> str:
    close = difflib.get_close_matches(name, [bank.name for bank in known.banks if bank.in_force], n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _lock(folder: ServerFolder) -> AbstractContextManager[None]:
    return locked(folder.path / ".enrolment.lock")


def _read(folder: ServerFolder) -> _List:
    content = read_public(folder.enrolment, f"{_RESTORE}; a new folder's list is made by init")
    try:
        values = json.loads(content)
        digest = values.pop("sha256")
        found = _List.model_validate(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UnsupportedAlgorithm):
        found, digest = None, None
    if found is None or found.digest() != digest:
        raise IntegrityError(f"{folder.enrolment}: is damaged or was changed by hand; {_RESTORE}")
    return found


def _write(folder: ServerFolder, banks: _List) -> None:
    values = {**banks.model_dump(mode="json"), "sha256": banks.digest()}
    write_private(folder.enrolment, json.dumps(values, indent=1, ensure_ascii=False).encode() + b"\n")
