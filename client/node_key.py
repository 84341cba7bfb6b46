"""The key by which a consortium's hub knows a bank's node: EC P-384 in OpenSSH's format, as Flower wants it.

The private key is what counts; the public file follows from it. To change keys, in this order: stop the daemon; make
the new pair, which keeps the old one as `node.key.old`; have the operator enrol the new public key in place of the
old one; start the daemon; and once it is connected, delete `node.key.old`. Until the operator has enrolled the new
key the bank cannot connect with it, and putting the old files back undoes all of it.
"""

import hashlib
import os
import re
import unicodedata
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from metarisk_common.errors import ConfigError
from metarisk_common.files import read_private, write_atomically, write_new_private
from metarisk_common.supervise import only_instance

from .config import Institution

_MOST_COMMENT: Final = 64


@dataclass(frozen=True)
class PublicKey:
    """The public half of a node's key. `line`: as it stands in `node.pub`; `comment`: whose it is, unproven."""

    line: str
    comment: str

    @property
    def fingerprint(self) -> str:
        """What two people compare: SHA256 and the digest of the key in base64 without padding, as OpenSSH writes it."""
        digest = hashlib.sha256(b64decode(self.line.split()[1])).digest()
        return f"SHA256:{b64encode(digest).decode().rstrip('=')}"

    @property
    def listing(self) -> str:
        """The fingerprint as `ssh-keygen -lf node.pub` prints it: bits, digest, comment, kind."""
        return f"{SECP384R1.key_size} {self.fingerprint} {self.comment} (ECDSA)"


def write_pair(private_path: Path, public_path: Path, name: str) -> PublicKey:
    """Write a new pair of keys at two paths that are free; `name`, the bank's, becomes the public key's comment."""
    key = generate_private_key(SECP384R1())
    public = _public(key, name)
    write_new_private(private_path, _private_bytes(key))
    write_atomically(public_path, public.line.encode())
    return public


def read_public(institution: Institution) -> PublicKey:
    """Read the public half off the private key, and put `node.pub` right where it is another's or missing.

    Raises:
        ConfigError: there is no private key, it is not P-384 in OpenSSH's format, or it is open to others.

    """
    public = _public(_load(institution.node_key), institution.config.name)
    path = institution.node_public_key
    try:
        if not path.is_file() or path.read_bytes().split()[:2] != public.line.encode().split()[:2]:
            write_atomically(path, public.line.encode())
    except OSError as error:
        raise ConfigError(f"{path}: the public key cannot be read or written: {error.strerror}") from None
    return public


def old_path(key: Path) -> Path:
    """Where a key that was replaced is kept."""
    return key.with_name(f"{key.name}.old")


def rotate(institution: Institution) -> PublicKey:
    """Make a new pair of keys and keep the old one beside it; the module's docstring says what comes before and after.

    Whatever a crash interrupts, `node.key` is the whole old key or the whole new one, and saying it again goes on.

    Raises:
        MetariskError: the daemon runs; nothing was changed.
        ConfigError: an earlier rotation is not over, or the keys cannot be read or written; nothing was changed.

    """
    key, pub = institution.node_key, institution.node_public_key
    lock = institution.daemon_lock
    with only_instance(lock, f"{lock}: the daemon runs with the present key; stop `metarisk-client up` first"):
        before = read_public(institution)
        fresh = generate_private_key(SECP384R1())
        public = _public(fresh, institution.config.name)
        draft = key.with_name(f".{key.name}.new")
        try:
            if old_path(key).exists() and old_path(key).read_bytes() != key.read_bytes():
                raise ConfigError(
                    f"{old_path(key)}: an earlier key is kept here; when the bank has connected with "
                    f"{before.fingerprint}, delete the earlier one, and then make a new one"
                )
            draft.unlink(missing_ok=True)
            write_new_private(draft, _private_bytes(fresh))
            for path in (key, pub):
                old_path(path).unlink(missing_ok=True)  # of a rotation that was cut short: the same key
                os.link(path, old_path(path))
            # The private key first: the public file is put right from it.
            draft.replace(key)
            write_atomically(pub, public.line.encode())
        except OSError as error:
            raise ConfigError(f"{key}: a new key cannot be written here: {error.strerror}") from None
        finally:
            draft.unlink(missing_ok=True)
    return public


def _public(key: EllipticCurvePrivateKey, name: str) -> PublicKey:
    # One word of ASCII: OpenSSH prints it as it stands, and no name can break the line.
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    comment = re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:_MOST_COMMENT] or "bank"
    text = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return PublicKey(f"{text} {comment}\n", comment)


def _private_bytes(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def _load(path: Path) -> EllipticCurvePrivateKey:
    missing = ConfigError(
        f"{path}: there is no such file; restore the node's key from its backup, or make a bank's folder with: "
        "metarisk-client init FOLDER"
    )
    content = read_private(path, "the node's private key", missing)
    try:
        key = load_ssh_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
        raise ConfigError(
            f"{path}: is not an EC P-384 key in OpenSSH's format without a passphrase; restore its backup"
        )
    return key
