"""The consortium's certificates, tried in real TLS handshakes on loopback as banks make them."""

import shutil
import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store

from metarisk_common.errors import ConfigError, IntegrityError
from server.certificates import (
    authority_fingerprints,
    certificate_names,
    check_certificate,
    days_left,
    expiry,
    issue_certificate,
    make_authority,
    renew,
    retire_authorities,
    rotate_authority,
)
from server.config import ServerFolder

NAMES = ("hub.example.org", "192.0.2.7", "2001:db8::7", "*.banks.example.org")


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    made = ServerFolder(tmp_path / "consortium")
    made.path.mkdir()
    make_authority(made, "Kölner Verbund")
    issue_certificate(made, NAMES)
    return made


def handshake(hub: ServerFolder, trusted: bytes, name: str) -> None:
    """Let a bank that trusts `trusted` connect over loopback to a hub that it knows as `name`.

    Raises:
        ssl.SSLError: the bank does not believe the hub.

    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(hub.certificate, hub.certificate_key)
    bank = ssl.create_default_context(cadata=trusted.decode("ascii"))
    # What later versions of Python ask of every certificate.
    bank.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(10)
                try:
                    with server.wrap_socket(connection, server_side=True) as secured:
                        secured.sendall(b"hello")
                except OSError:
                    pass  # The bank has hung up.

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as plain,
                bank.wrap_socket(plain, server_hostname=name) as secured,
            ):
                assert secured.recv(5) == b"hello"
        finally:
            thread.join()


def accepts(hub: ServerFolder, trusted: bytes, name: str = "localhost") -> bool:
    try:
        handshake(hub, trusted, name)
    except ssl.SSLCertVerificationError:
        return False
    return True


def leaf_of(folder: ServerFolder) -> x509.Certificate:
    return x509.load_pem_x509_certificates(folder.certificate.read_bytes())[0]


# What a bank accepts.


@pytest.mark.parametrize(
    "name", ["localhost", "127.0.0.1", "::1", "hub.example.org", "192.0.2.7", "2001:db8::7", "north.banks.example.org"]
)
def test_a_bank_that_has_the_authority_accepts_every_name(folder: ServerFolder, name: str) -> None:
    assert accepts(folder, folder.ca_certificate.read_bytes(), name)


@pytest.mark.parametrize("name", ["hub.example.com", "192.0.2.8", "banks.example.org", "a.b.banks.example.org"])
def test_another_name_is_refused(folder: ServerFolder, name: str) -> None:
    assert not accepts(folder, folder.ca_certificate.read_bytes(), name)


def test_a_bank_with_another_authority_of_the_same_name_refuses(folder: ServerFolder, tmp_path: Path) -> None:
    other = ServerFolder(tmp_path / "other")
    other.path.mkdir()
    make_authority(other, "Kölner Verbund")
    assert not accepts(folder, other.ca_certificate.read_bytes())


def test_a_hub_with_its_own_certificate_for_an_authority_is_refused(folder: ServerFolder) -> None:
    # Path length 0 and no CA bit: whoever steals the hub's key still cannot issue certificates.
    key = ec.generate_private_key(ec.SECP256R1())
    hub_key = load_pem_private_key(folder.certificate_key.read_bytes(), None)
    assert isinstance(hub_key, ec.EllipticCurvePrivateKey)
    now = datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "forged")])
    forged = (
        x509.CertificateBuilder(leaf_of(folder).subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(hub_key.public_key()), critical=False)
        .sign(hub_key, hashes.SHA256())
    )
    chain = forged.public_bytes(Encoding.PEM) + folder.certificate.read_bytes()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    trusted = folder.ca_certificate.read_bytes()
    folder.certificate.write_bytes(chain)
    folder.certificate_key.write_bytes(pem)
    assert not accepts(folder, trusted)


def test_a_strict_verifier_of_another_make_accepts_it(folder: ServerFolder) -> None:
    leaf, *chain = x509.load_pem_x509_certificates(folder.certificate.read_bytes())
    store = Store(x509.load_pem_x509_certificates(folder.ca_certificate.read_bytes()))
    policy = PolicyBuilder().store(store).build_server_verifier(x509.DNSName("hub.example.org"))
    assert policy.verify(leaf, chain)[0] == leaf


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_accepts_it_too_and_prints_the_same_fingerprint(folder: ServerFolder) -> None:
    strict = ["-x509_strict", "-purpose", "sslserver", "-verify_hostname", "hub.example.org"]
    command = ["openssl", "verify", *strict, "-CAfile", str(folder.ca_certificate), str(folder.certificate)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    show = ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", str(folder.ca_certificate)]
    printed = subprocess.run(show, check=True, capture_output=True, text=True).stdout
    assert printed.strip().split("=")[1] == authority_fingerprints(folder)[0]


# What the certificates say.


def test_the_authority_may_sign_certificates_of_servers_and_nothing_else(folder: ServerFolder) -> None:
    (authority,) = x509.load_pem_x509_certificates(folder.ca_certificate.read_bytes())
    leaf = leaf_of(folder)
    for certificate, is_authority in ((authority, True), (leaf, False)):
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert basic.critical
        assert usage.critical
        assert (basic.value.ca, basic.value.path_length) == ((True, 0) if is_authority else (False, None))
        assert (usage.value.key_cert_sign, usage.value.crl_sign) == (is_authority, is_authority)
        assert usage.value.digital_signature is not is_authority
    assert isinstance(authority.public_key(), ec.EllipticCurvePublicKey)
    assert [key.curve.name for key in (authority.public_key(), leaf.public_key())] == ["secp384r1", "secp256r1"]  # type: ignore[union-attr]
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert certificate_names(folder) == (
        "localhost", "hub.example.org", "*.banks.example.org", "127.0.0.1", "::1", "192.0.2.7", "2001:db8::7",
    )  # fmt: skip


def test_every_file_is_the_owners_alone(folder: ServerFolder) -> None:
    for path in (folder.ca_certificate, folder.ca_key, folder.certificate, folder.certificate_key):
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert folder.ca_certificate.parent.stat().st_mode & 0o777 == 0o700


def test_days_are_counted_without_the_authoritys_key(folder: ServerFolder) -> None:
    folder.ca_key.unlink()
    start = datetime.now(UTC)
    assert days_left(folder) in {396, 397}
    assert days_left(folder, now=start + timedelta(days=400)) < 0
    assert expiry(folder).certificate < start + timedelta(days=398) < expiry(folder).authority
    check_certificate(folder)
    with pytest.raises(ConfigError, match="no longer valid; renew"):
        check_certificate(folder, now=start + timedelta(days=400))


def test_no_certificate_outlives_its_authority(folder: ServerFolder) -> None:
    late = expiry(folder).authority - timedelta(days=20)
    renew(folder, NAMES, now=late)
    assert days_left(folder, now=late) == 20
    assert expiry(folder).certificate == expiry(folder).authority
    with pytest.raises(ConfigError, match="rotate"):
        renew(folder, NAMES, now=late + timedelta(days=21))


# Renewal.


def test_renewal_gives_a_new_key_and_new_names_under_the_same_authority(folder: ServerFolder) -> None:
    trusted, before = folder.ca_certificate.read_bytes(), folder.certificate_key.read_bytes()
    renew(folder, ["new.example.org"])
    assert folder.certificate_key.read_bytes() != before
    assert folder.ca_certificate.read_bytes() == trusted
    assert accepts(folder, trusted, "new.example.org")
    assert not accepts(folder, trusted, "hub.example.org")
    assert len(list(folder.certificate.parent.glob("version-*"))) == 1


def test_the_first_certificate_is_issued_once_and_renewed_afterwards(folder: ServerFolder) -> None:
    with pytest.raises(ConfigError, match="renew it"):
        issue_certificate(folder, NAMES)
    with pytest.raises(ConfigError, match="exists already"):
        make_authority(folder, "again")
    folder.certificate.unlink()
    with pytest.raises(IntegrityError, match="renewing"):
        expiry(folder)
    issue_certificate(folder, NAMES)
    check_certificate(folder)


# The authority's key, which may be elsewhere.


def as_files(folder: ServerFolder) -> None:
    """Make the links files, as a backup does that knows no links, or an operator who brings a certificate along."""
    for path in (folder.certificate, folder.certificate_key):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        path.chmod(0o600)


def test_without_the_authoritys_key_nothing_is_issued(folder: ServerFolder, tmp_path: Path) -> None:
    before = folder.certificate.read_bytes()
    kept = folder.ca_key.rename(tmp_path / "kept.key")
    with pytest.raises(ConfigError, match="put the authority's key back"):
        renew(folder, NAMES)
    shutil.copy(folder.certificate_key, folder.ca_key)
    with pytest.raises(IntegrityError, match="none of the authorities"):
        renew(folder, NAMES)
    folder.ca_key.write_bytes(b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
    with pytest.raises(IntegrityError, match="put back its copy") as caught:
        renew(folder, NAMES)
    assert "c2Vj" not in str(caught.value)
    shutil.copy(kept, folder.ca_key)
    folder.ca_key.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        renew(folder, NAMES)
    assert folder.certificate.read_bytes() == before
    folder.ca_key.chmod(0o600)
    renew(folder, NAMES)


def test_files_that_do_not_belong_together_are_found_before_the_hub_starts(folder: ServerFolder) -> None:
    as_files(folder)
    chain, key = folder.certificate.read_bytes(), folder.certificate_key.read_bytes()
    renew(folder, NAMES)
    as_files(folder)
    folder.certificate_key.write_bytes(key)
    with pytest.raises(IntegrityError, match="is not the key"):
        check_certificate(folder)
    folder.certificate.write_bytes(chain)
    check_certificate(folder)
    folder.ca_certificate.unlink()
    folder.ca_key.unlink()
    make_authority(folder, "another")
    with pytest.raises(IntegrityError, match="none of the authorities"):
        check_certificate(folder)
    folder.certificate.write_bytes(chain[:200])
    with pytest.raises(IntegrityError, match=r"server\.pem"):
        check_certificate(folder)


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "nul\0"])
def test_an_authority_has_a_name_that_can_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="printed"):
        make_authority(ServerFolder(tmp_path), name)


def test_a_long_name_is_cut_between_its_letters(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path)
    make_authority(folder, "ö" * 100)
    issue_certificate(folder, [])
    (organization,) = leaf_of(folder).subject.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)
    assert organization.value == "ö" * 32
    assert accepts(folder, folder.ca_certificate.read_bytes())


# A new authority.


def test_no_bank_is_cut_off_while_the_authority_changes(folder: ServerFolder) -> None:
    old = folder.ca_certificate.read_bytes()
    rotate_authority(folder)
    bundle = folder.ca_certificate.read_bytes()
    subjects = [known.subject for known in x509.load_pem_x509_certificates(bundle)]
    assert len(set(subjects)) == 2
    # The banks receive the bundle one after another: whoever has it and whoever has not yet accept the hub.
    assert accepts(folder, old)
    assert accepts(folder, bundle)
    with pytest.raises(ConfigError, match="send that file to every bank"):
        retire_authorities(folder)
    renew(folder, NAMES)
    assert accepts(folder, bundle)
    assert not accepts(folder, old)
    check_certificate(folder)
    assert retire_authorities(folder) == 1
    new = folder.ca_certificate.read_bytes()
    assert bundle == new + old
    assert accepts(folder, new)
    assert accepts(folder, bundle)
    assert retire_authorities(folder) == 0
    assert len(authority_fingerprints(folder)) == 1


def test_a_lost_authority_can_be_changed_without_its_key(folder: ServerFolder) -> None:
    folder.ca_key.unlink()
    rotate_authority(folder)
    assert len(set(authority_fingerprints(folder))) == 2
    renew(folder, NAMES)
    assert accepts(folder, folder.ca_certificate.read_bytes())
