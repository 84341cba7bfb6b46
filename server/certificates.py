"""The consortium's own certificate authority, which every bank trusts, and the hub's certificate under it.

X.509 v3 after RFC 5280: an EC P-384 authority that may sign server certificates only, and nothing below them, and an
EC P-256 certificate for the hub. The authority's key is read to issue a certificate and at no other time, so it may be
kept elsewhere.

Changing the authority takes three steps, and no bank is cut off at any of them:

1. `rotate_authority` makes a new one and puts its certificate before the old one's in `ca.pem`. The hub still shows the
   certificate of the old one.
2. Every bank is sent the new `ca.pem`. Whoever has it trusts both.
3. `renew` gives the hub a certificate of the new authority; `retire_authorities` then takes the old one off `ca.pem`.

The hub's certificate and its key are two files that change at one instant: see `joint_files`.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from metarisk_common.errors import ConfigError, IntegrityError
from metarisk_common.files import read_private

from .config import ServerFolder
from .host_names import general_names
from .joint_files import replace_together
from .private_files import locked, private_folder, read_public, write_private

AUTHORITY_VALIDITY: Final = timedelta(days=3652)
CERTIFICATE_VALIDITY: Final = timedelta(days=397)
_CLOCKS_DIFFER: Final = timedelta(hours=1)
"""A certificate is valid from a little before it was made, for a bank whose clock is behind."""
_LONGEST: Final = 64
"""Bytes that a part of a certificate's name may have (RFC 5280, appendix A.1)."""
_NO_KEY: Final = "put the authority's key back for as long as this command takes, or change to a new authority"
_NO_AUTHORITY: Final = "put back its copy: it is what the banks trust"
_NO_CERTIFICATE: Final = "issue one by renewing it"


@dataclass(frozen=True)
class Expiry:
    """Until when the hub's certificate is valid, and until when the authority that issued it."""

    certificate: datetime
    authority: datetime


# The authority.


def make_authority(folder: ServerFolder, name: str, *, now: datetime | None = None) -> None:
    """Make the consortium's certificate authority: `ca.pem` and `ca.key`.

    Raises:
        ConfigError: there is one already, or the name cannot stand in a certificate.

    """
    private_folder(folder.ca_certificate.parent)
    with _lock(folder):
        for path in (folder.ca_certificate, folder.ca_key):
            if path.exists():
                raise ConfigError(f"{path}: exists already; an authority that banks trust is changed by rotating it")
        _add_authority(folder, name, [], now or datetime.now(UTC))


def rotate_authority(folder: ServerFolder, *, now: datetime | None = None) -> None:
    """Make a new authority beside the present one: banks are sent `ca.pem`, and then the certificate is renewed.

    The old authority's key is not needed, and replaced where it is present.

    Raises:
        ConfigError: the folder cannot be written.
        IntegrityError: `ca.pem` is missing or damaged.

    """
    with _lock(folder):
        known = _authorities(folder)
        names = known[0].subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        name = str(names[0].value) if names else "consortium"
        _add_authority(folder, name, known, now or datetime.now(UTC))


def retire_authorities(folder: ServerFolder) -> int:
    """Take every authority off `ca.pem` but the one that issued the hub's certificate; returns how many went.

    Raises:
        ConfigError: the newest authority has not issued the hub's certificate yet.
        IntegrityError: a file is missing or damaged.

    """
    with _lock(folder):
        known, issuer = _authorities(folder), _issuer(folder)
        if issuer != known[0]:
            raise ConfigError(
                f"{folder.certificate}: was not issued by the newest authority of {folder.ca_certificate.name}; "
                "send that file to every bank, renew the certificate, and then retire the old authority"
            )
        if len(known) > 1:
            write_private(folder.ca_certificate, issuer.public_bytes(Encoding.PEM))
        return len(known) - 1


def authority_fingerprints(folder: ServerFolder) -> tuple[str, ...]:
    """SHA-256 of each authority in `ca.pem`, newest first, written as `openssl x509 -fingerprint -sha256` does.

    Raises:
        IntegrityError: `ca.pem` is missing or damaged.

    """
    return tuple(known.fingerprint(hashes.SHA256()).hex(":").upper() for known in _authorities(folder))


def _add_authority(folder: ServerFolder, name: str, known: list[x509.Certificate], now: datetime) -> None:
    if not name.strip() or not name.isprintable():
        raise ConfigError("name: an authority's name is made of characters that can be printed")
    key = ec.generate_private_key(ec.SECP384R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # No two authorities bear the same name: whoever checks a certificate finds its issuer by it.
    subject = _subject(name, f"metarisk authority {identifier.digest.hex()[:16]}")
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + AUTHORITY_VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA384())
    )
    # The bundle first: cut short here, the old key still issues certificates that it covers.
    write_private(folder.ca_certificate, b"".join(one.public_bytes(Encoding.PEM) for one in [certificate, *known]))
    write_private(folder.ca_key, _pem(key))


def _authorities(folder: ServerFolder) -> list[x509.Certificate]:
    return _read_certificates(folder.ca_certificate, _NO_AUTHORITY)


def _signing_authority(folder: ServerFolder, now: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = _read_key(folder.ca_key, _NO_KEY)
    for authority in _authorities(folder):
        if authority.public_key() == key.public_key():
            if authority.not_valid_after_utc <= now:
                raise ConfigError(f"{folder.ca_certificate}: the authority is no longer valid; rotate it")
            return key, authority
    raise IntegrityError(
        f"{folder.ca_key}: is the key of none of the authorities in {folder.ca_certificate.name}; put back the one "
        "that belongs to it"
    )


# The hub's certificate.


def issue_certificate(folder: ServerFolder, names: Iterable[str], *, now: datetime | None = None) -> None:
    """Issue the hub's first certificate.

    Args:
        folder: the operator's folder, with its authority.
        names: host names and IP addresses by which banks reach the hub, besides localhost.
        now: the moment that validity counts from; by default, the clock's.

    Raises:
        ConfigError: there is one already, a name cannot stand in a certificate, or the authority's key is not here.
        IntegrityError: the authority's files are damaged.

    """
    with _lock(folder):
        if folder.certificate.exists():
            raise ConfigError(f"{folder.certificate}: exists already; renew it")
        _issue(folder, names, now or datetime.now(UTC))


def renew(folder: ServerFolder, names: Iterable[str], *, now: datetime | None = None) -> None:
    """Replace the hub's key and certificate, both at one instant; a hub that runs keeps those it has read.

    Raises:
        ConfigError: a name cannot stand in a certificate, or the authority's key is not here.
        IntegrityError: the authority's files are damaged.

    """
    with _lock(folder):
        _issue(folder, names, now or datetime.now(UTC))


def expiry(folder: ServerFolder) -> Expiry:
    """Read until when the hub's certificate and its authority are valid; no key is needed.

    Raises:
        IntegrityError: the certificate is missing or damaged.

    """
    chain = _chain(folder)
    return Expiry(chain[0].not_valid_after_utc, chain[-1].not_valid_after_utc)


def days_left(folder: ServerFolder, *, now: datetime | None = None) -> int:
    """Whole days for which the hub's certificate is still valid; negative where it no longer is.

    Raises:
        IntegrityError: the certificate is missing or damaged.

    """
    return (expiry(folder).certificate - (now or datetime.now(UTC))).days


def certificate_names(folder: ServerFolder) -> tuple[str, ...]:
    """Names and addresses that the hub's certificate holds.

    Raises:
        IntegrityError: the certificate is missing or damaged.

    """
    try:
        names = _chain(folder)[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return (*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress)))


def check_certificate(folder: ServerFolder, *, now: datetime | None = None) -> None:
    """Check, before the hub starts, that banks will accept it: key, certificate and authority belong together.

    Raises:
        ConfigError: the key may be read by others, or the certificate is no longer valid.
        IntegrityError: a file is missing or damaged, or they do not belong together.

    """
    leaf = _chain(folder)[0]
    if _read_key(folder.certificate_key, _NO_CERTIFICATE).public_key() != leaf.public_key():
        raise IntegrityError(f"{folder.certificate_key}: is not the key of {folder.certificate.name}; renew them")
    _issuer(folder)
    if leaf.not_valid_after_utc <= (now or datetime.now(UTC)):
        raise ConfigError(f"{folder.certificate}: is no longer valid; renew it")


def _issue(folder: ServerFolder, names: Iterable[str], now: datetime) -> None:
    subjects = general_names(names)
    authority_key, authority = _signing_authority(folder, now)
    key = ec.generate_private_key(ec.SECP256R1())
    organization = authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    certificate = (
        x509.CertificateBuilder(authority.subject, None, key.public_key(), x509.random_serial_number())
        .subject_name(_subject(str(organization[0].value) if organization else "consortium", "metarisk hub"))
        .not_valid_before(max(now - _CLOCKS_DIFFER, authority.not_valid_before_utc))
        .not_valid_after(min(now + CERTIFICATE_VALIDITY, authority.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(subjects), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    chain = certificate.public_bytes(Encoding.PEM) + authority.public_bytes(Encoding.PEM)
    replace_together(
        folder.certificate.parent, {folder.certificate.name: chain, folder.certificate_key.name: _pem(key)}
    )


def _chain(folder: ServerFolder) -> list[x509.Certificate]:
    return _read_certificates(folder.certificate, _NO_CERTIFICATE)


def _issuer(folder: ServerFolder) -> x509.Certificate:
    """Find, among the authorities that banks trust, the one that issued the hub's certificate."""
    leaf = _chain(folder)[0]
    for authority in _authorities(folder):
        try:
            leaf.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return authority
    raise IntegrityError(
        f"{folder.certificate}: was issued by none of the authorities in {folder.ca_certificate.name}, so no bank "
        "would accept it; renew it"
    )


# What both are made of.


def _lock(folder: ServerFolder) -> AbstractContextManager[None]:
    return locked(folder.ca_certificate.parent / ".lock")


def _subject(organization: str, name: str) -> x509.Name:
    short = organization.encode()[:_LONGEST].decode(errors="ignore")
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, short), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read_key(path: Path, missing: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(
            read_private(path, "the key", ConfigError(f"{path}: is not here; {missing}")), password=None
        )
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IntegrityError(f"{path}: is not the private key that was written here; put back its copy")
    return key


def _read_certificates(path: Path, missing: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(read_public(path, missing))
    except ValueError:
        raise IntegrityError(f"{path}: is damaged; {missing}") from None
