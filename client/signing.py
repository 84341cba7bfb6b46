"""The ledger's signatures: its Ed25519 key, what is signed, and the head file that tells an older copy from the newest.

Every entry of a ledger is signed. Its digest holds, through the chain, all entries before it, so one signature that is
valid says that the holder of the key wrote everything up to there. The newest one is also kept outside the ledger, in
the head file: a ledger that lacks that very entry lost its end, or is an older copy.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from metarisk_common.errors import ConfigError, IntegrityError, MetariskError
from metarisk_common.files import read_private, sync_folder, write_new_private

FORMAT: Final = "metarisk ledger 2"
"""What the first entry of every ledger says that it is."""

_NO_KEY: Final = "restore the key from its backup; without it the ledger can be read, but nothing more be recorded"


@dataclass(frozen=True)
class Head:
    """A ledger's newest entry. `signature`: Ed25519 over `source`, `seq` and `digest`, hexadecimal as the digest is."""

    source: str
    seq: int
    digest: str
    signature: str


def key_path(ledger: Path) -> Path:
    """Where the private key of a ledger is kept, as PEM."""
    return ledger.resolve().with_suffix(".key")


def head_path(ledger: Path) -> Path:
    """Where the newest signed head of a ledger is kept, as JSON."""
    return ledger.resolve().with_suffix(".head")


# Signatures.


def public_hex(key: Ed25519PrivateKey) -> str:
    """Give a key's public half, hexadecimal."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def fingerprint(public_key: str) -> str:
    """Shorten a public key to what two people compare: the first 128 bits of its SHA-256, in groups."""
    digest = sha256(bytes.fromhex(public_key)).hexdigest()
    return ":".join(digest[start : start + 4] for start in range(0, 32, 4))


def sign(key: Ed25519PrivateKey, source: str, seq: int, digest: str) -> str:
    """Sign that this is entry `seq` of the ledger of `source`; hexadecimal."""
    return key.sign(_signed_text(source, seq, digest)).hex()


def is_signed(public_key: str, head: Head) -> bool:
    """Tell whether the head's signature is the one of this key over what the head says."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(head.signature), _signed_text(head.source, head.seq, head.digest))
    except (ValueError, InvalidSignature):
        return False
    return True


def _signed_text(source: str, seq: int, digest: str) -> bytes:
    # JSON, for a source may hold any character: no two heads have the same text.
    return json.dumps([FORMAT, source, seq, digest], separators=(",", ":")).encode()


# The key file.


def make_key(path: Path) -> None:
    """Write a new key at a path that is free, for the owner's eyes only, and onto the disk."""
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_new_private(path, pem)


def load_key(path: Path, public_key: str | None = None) -> Ed25519PrivateKey:
    """Read a private key; `public_key`, hexadecimal, is the one that it must belong to.

    Raises:
        ConfigError: it may be read by others, or cannot be read at all.
        IntegrityError: it is missing, damaged, or the key of another ledger.

    """
    missing = IntegrityError(f"{path}: the ledger's private key is missing; {_NO_KEY}")
    content = read_private(path, "the ledger's private key", missing)
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise IntegrityError(f"{path}: is not the private key that was written here; {_NO_KEY}")
    if public_key not in {None, public_hex(key)}:
        raise IntegrityError(f"{path}: is the private key of another ledger; {_NO_KEY}")
    return key


# The head file.


def read_head(path: Path) -> Head | None:
    """Read a head file; None where there is none. Its signature is not checked here.

    Raises:
        ConfigError: it cannot be read.
        IntegrityError: it is not what was written.

    """
    try:
        fields = json.loads(path.read_bytes())
        head = Head(fields["source"], fields["counter"], fields["digest"], fields["signature"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: the signed head cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise damaged_head(path) from None
    if [type(value) for value in asdict(head).values()] != [str, int, str, str]:
        raise damaged_head(path)
    return head


def damaged_head(path: Path) -> IntegrityError:
    """Make the error about a head file that its ledger's key has not signed."""
    return IntegrityError(
        f"{path}: is not the signed head that was written here; put back a copy of it, of which any of this ledger's "
        "will do"
    )


def write_head(path: Path, head: Head) -> None:
    """Replace the head file at once, or leave it as it was; who calls holds the ledger's lock.

    Raises:
        MetariskError: it cannot be written, the disk being full, say.

    """
    fields = {"source": head.source, "counter": head.seq, "digest": head.digest, "signature": head.signature}
    draft = path.with_name(f"{path.name}.new")
    with _telling(path):
        is_new = not path.exists()
        _write(draft, f"{json.dumps(fields)}\n".encode())
        draft.replace(path)
        # A renaming that is lost with the power leaves an older head, which is no harm; no head at all would be.
        if is_new:
            sync_folder(path.parent)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MetariskError(
            f"{path}: the signed head cannot be written: {error.strerror}; set that right and try again, the ledger "
            "itself has lost nothing"
        ) from None


def _write(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_TRUNC, 0o600)
    with open(handle, "wb") as file:  # noqa: PTH123 - a handle, not a path: no one may read it even for a moment
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
