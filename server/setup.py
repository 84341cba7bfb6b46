"""The operator's folder, laid out: configuration, certificates, secrets, an empty allow-list, room for runs.

It is made beside its place and moved there whole: a folder that exists is complete. Only its owner may read it.
"""

import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from metarisk_common.config import toml_text, validate
from metarisk_common.errors import ConfigError, MetariskError
from metarisk_common.files import sync_folder

from .certificates import issue_certificate, make_authority
from .config import ServerConfig, ServerFolder, load_server
from .enrolment import create_list
from .private_files import private_folder, write_private

_SECRET_BYTES: Final = 32
_TEXT: Final = """\
# A consortium's hub. Start it again after a change.

# What the consortium calls itself. Its certificate authority was made under this name, and keeps it.
name = {name}

[outside]
# The one door for banks: TLS, only for nodes that were enrolled, and no paths but theirs. 0.0.0.0 stands for every
# network interface of this machine; the firewall must let banks through to the port.
host = {outside_host}
port = {outside_port}
# Host names and IP addresses by which banks reach the hub, without https:// and without a port. The certificate holds
# them, besides localhost: renew it after a change.
names = [{names}]

[inside]
# The door for this machine's own commands and for the processes of a run: always on 127.0.0.1. It asks for no password,
# so nobody should have an account on this machine who may not start runs.
port = {inside_port}

[metrics]
# Metrics for Prometheus, on 127.0.0.1 only; 0 turns them off.
port = {metrics_port}
"""
_IGNORED: Final = """\
# Only what holds no secret may enter a repository.
*
!.gitignore
!server.toml
!certificates/
!certificates/ca.pem
!signing.pub
"""


def init(
    path: Path,
    *,
    name: str,
    names: Sequence[str] = (),
    outside_host: str = "0.0.0.0",  # noqa: S104 - the door for everyone, as in the configuration
    outside_port: int = 9092,
    inside_port: int = 9093,
    metrics_port: int = 9094,
    now: datetime | None = None,
) -> ServerFolder:
    """Lay out an operator's folder.

    Args:
        path: the folder; it must not exist, or be empty.
        name: what the consortium calls itself.
        names: host names and IP addresses by which banks reach the hub.
        outside_host: the address of this machine where it listens for banks.
        outside_port: the port for banks.
        inside_port: the port for this machine's own commands.
        metrics_port: the port for Prometheus; 0 turns it off.
        now: the moment that certificates count from; by default, the clock's.

    Raises:
        ConfigError: the folder is in use, a value cannot be meant, or the folder cannot be written.

    """
    values = {
        "name": name,
        "outside": {"host": outside_host, "port": outside_port, "names": list(names)},
        "inside": {"port": inside_port},
        "metrics": {"port": metrics_port},
    }
    config = validate(values, ServerConfig, where=str(path))
    _check_place(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            _lay_out(ServerFolder(made), config, now)
            made.replace(path)
        except BaseException:
            rmtree(made, ignore_errors=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"{path}: a folder cannot be laid out here: {error.strerror}") from None
    except MetariskError as error:
        # What is wrong is named where the folder would have been, not where it was made.
        raise type(error)(str(error).replace(str(made), str(path))) from None
    return load_server(path).folder


def _lay_out(folder: ServerFolder, config: ServerConfig, now: datetime | None) -> None:
    for place in (folder.path, folder.superexec_secret.parent, folder.home, folder.runs):
        private_folder(place)
    write_private(folder.config_file, _toml(config).encode())
    if load_server(folder.path).config != config:
        raise ConfigError(f"{folder.config_file}: cannot say what was asked for; choose a simpler name")
    write_private(folder.path / ".gitignore", _IGNORED.encode())
    make_authority(folder, config.name, now=now)
    issue_certificate(folder, config.outside.names, now=now)
    # No line break at its end: Flower takes every byte of the file for the secret.
    write_private(folder.superexec_secret, secrets.token_hex(_SECRET_BYTES).encode())
    key = Ed25519PrivateKey.generate()
    write_private(folder.signing_key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_private(folder.signing_public_key, public)
    create_list(folder)


def _check_place(path: Path) -> None:
    if path.resolve() == Path.cwd():
        raise ConfigError(f"{path}: is the current folder, which cannot be replaced; name one that does not exist yet")
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{path}: the folder is not empty; name one that does not exist yet")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"{path}: is not a folder; name one that does not exist yet")


def _toml(config: ServerConfig) -> str:
    return _TEXT.format(
        name=toml_text(config.name),
        outside_host=toml_text(config.outside.host),
        outside_port=config.outside.port,
        names=", ".join(map(toml_text, config.outside.names)),
        inside_port=config.inside.port,
        metrics_port=config.metrics.port,
    )
