"""The operator's folder: `server.toml`, certificates, secrets, the allow-list of banks, Flower's state, the runs."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from metarisk_common.config import Frozen, load_toml
from metarisk_common.errors import ConfigError

CONFIG_FILE = "server.toml"
LOOPBACK = "127.0.0.1"


class OutsideConfig(Frozen):
    """Where banks' nodes reach the hub: TLS, node authentication, nothing but the fleet's paths and health."""

    host: str = Field(default="0.0.0.0", min_length=1)  # noqa: S104 - it is the one door meant for everyone
    port: int = Field(default=9092, ge=1, le=65535)
    names: tuple[str, ...] = Field(default=(), max_length=100)
    """Host names and addresses by which banks reach the hub: the certificate names them, besides localhost."""


class InsideConfig(Frozen):
    """The loopback door for this machine's own commands and for the processes of a run."""

    port: int = Field(default=9093, ge=1, le=65535)


class MetricsConfig(Frozen):
    """Prometheus metrics, on loopback only; port 0 turns them off."""

    port: int = Field(default=9094, ge=0, le=65535)


class ServerConfig(Frozen):
    """`server.toml`."""

    name: str = Field(min_length=1, max_length=100)
    outside: OutsideConfig = OutsideConfig()
    inside: InsideConfig = InsideConfig()
    metrics: MetricsConfig = MetricsConfig()


@dataclass(frozen=True)
class ServerFolder:
    """Where everything lies in an operator's folder."""

    path: Path

    @property
    def config_file(self) -> Path:
        """`server.toml`."""
        return self.path / CONFIG_FILE

    @property
    def ca_certificate(self) -> Path:
        """The consortium's own certificate authority: what every bank trusts."""
        return self.path / "certificates" / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """The authority's private key; the hub never reads it, and it may be kept elsewhere."""
        return self.path / "certificates" / "ca.key"

    @property
    def certificate(self) -> Path:
        """The hub's certificate, followed by the authority's."""
        return self.path / "certificates" / "server.pem"

    @property
    def certificate_key(self) -> Path:
        """The hub's private key."""
        return self.path / "certificates" / "server.key"

    @property
    def superexec_secret(self) -> Path:
        """What a process must know to be handed a run."""
        return self.path / "secrets" / "superexec.secret"

    @property
    def signing_key(self) -> Path:
        """Ed25519 key that signs exports."""
        return self.path / "signing.key"

    @property
    def signing_public_key(self) -> Path:
        """Its public half, for the banks."""
        return self.path / "signing.pub"

    @property
    def enrolment(self) -> Path:
        """The allow-list of banks."""
        return self.path / "enrolment.json"

    @property
    def database(self) -> Path:
        """Flower's SQLite state."""
        return self.path / "superlink.sqlite"

    @property
    def home(self) -> Path:
        """FLWR_HOME of every Flower process."""
        return self.path / "home"

    @property
    def runs(self) -> Path:
        """One folder a run."""
        return self.path / "runs"


@dataclass(frozen=True)
class Server:
    """An operator's folder and what its configuration says."""

    folder: ServerFolder
    config: ServerConfig

    @property
    def inside_address(self) -> str:
        """Where this machine's own processes reach the hub."""
        return f"{LOOPBACK}:{self.config.inside.port}"


def load_server(path: Path) -> Server:
    """Read an operator's folder.

    Raises:
        ConfigError: it is none, or `server.toml` is wrong.

    """
    folder = ServerFolder(path.resolve())
    if not folder.config_file.is_file():
        raise ConfigError(
            f"{path}: holds no {CONFIG_FILE}; make a consortium's folder with: metarisk-server init FOLDER"
        )
    config = load_toml(folder.config_file, ServerConfig)
    ports = [config.outside.port, config.inside.port, *filter(None, [config.metrics.port])]
    if len(set(ports)) < len(ports):
        raise ConfigError(f"{folder.config_file}: outside.port, inside.port and metrics.port must differ")
    return Server(folder, config)
