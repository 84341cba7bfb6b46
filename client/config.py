"""A bank's folder: `institution.toml`, its table, its ledger, and the plans that it has approved."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from metarisk_common.config import Frozen, load_toml, toml_text
from metarisk_common.errors import ConfigError, RefusedError
from metarisk_common.plan import Plan, read_plan

from .ledger import Budget
from .source_config import TableSection, table_toml

CONFIG_FILE = "institution.toml"
APPROVED_FOLDER = "approved"
CA_FILE = "ca.pem"
_EXAMPLE_ADDRESS = "hub.example.org:9092"
_MOST_PORT = 65535


class PolicyConfig(Frozen):
    """What the bank's risk officer has decided: the budget of the data source over its whole life."""

    epsilon: float = Field(gt=0)
    """Budget; `inf` declares that the records need no protection, and is for simulations and public data."""
    delta: float = Field(gt=0, lt=1e-2)
    min_noise_multiplier: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """Least noise of any release; less than this protects little, whatever the budget says."""
    max_grad_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest clip norm; none: whatever the plan says, for the noise grows with it."""
    max_local_steps: int = Field(default=10_000, ge=1)
    max_sample_rate: float = Field(default=1.0, gt=0, le=1)


class SimulationConfig(Frozen):
    """Present in simulations only: reproducible noise protects nobody, and a production client refuses it."""

    seed: int = Field(ge=0)


def _host_and_port(text: str) -> str:
    host, _, port = text.rpartition(":")
    # A name, an IPv4 address, or an IPv6 address in brackets; no scheme, no path, no user.
    named = re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]", host)
    if not named or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= _MOST_PORT:
        raise ValueError("must be host:port, such as hub.example.org:9092, without https:// before it")
    return text


class ServerSection(Frozen):
    """Where the consortium's hub is; without it the folder serves local commands and simulations only."""

    address: Annotated[str, Field(max_length=300), AfterValidator(_host_and_port)]
    """Host and port of the hub's outside door, reached over TLS."""
    ca: str = Field(default=CA_FILE, min_length=1)
    """The operator's certificate authority, relative to the folder: the hub's certificate must come from it."""
    bundles: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = ()
    """SHA-256 of app bundles that are accepted besides the installed version's own."""


class MetricsSection(Frozen):
    """Prometheus metrics of the bank's own processes, on loopback only; port 0 turns them off."""

    port: int = Field(default=0, ge=0, le=_MOST_PORT)


class InstitutionConfig(Frozen):
    """`institution.toml`.

    `declared_size` is a public constant: how many privacy units (records, or customers where the schema protects
    those) the bank says its portfolio has. `source` names the data for its ledger, by default as the bank. Folders of
    several consortia over one data source name the same `source` and the same `ledger`, relative to the folder. The
    table is `data`, a file in the plan's own words, or section `table`.
    """

    name: str = Field(min_length=1, max_length=200)
    data: str | None = Field(default=None, min_length=1)
    table: TableSection | None = None
    declared_size: int = Field(ge=1)
    source: str = Field(default="", max_length=200)
    ledger: str = Field(default="ledger.sqlite", min_length=1)
    policy: PolicyConfig
    server: ServerSection | None = None
    metrics: MetricsSection = MetricsSection()
    simulation: SimulationConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.data is None) == (self.table is None):
            raise ValueError(
                "key 'data' is missing, and so is section 'table': say where the bank's table is"
                if self.data is None
                else "give one of data and section 'table', not both"
            )
        return self

    @property
    def metrics_port(self) -> int:
        """Loopback port of the metrics; 0 for none."""
        return self.metrics.port


@dataclass(frozen=True)
class Institution:
    """A bank's folder and what its configuration says."""

    folder: Path
    config: InstitutionConfig

    @property
    def data_path(self) -> Path:
        """The bank's table, where `data` names it; else the folder of the section that does."""
        return self.folder / (self.config.data or "")

    @property
    def table_title(self) -> str:
        """What messages call the bank's table: a path, or a name in a database without its address."""
        table = self.config.table
        if table is None:
            return str(self.data_path)
        return table.title if table.file is None else str(self.folder / table.file)

    @property
    def ledger_path(self) -> Path:
        """The bank's privacy ledger."""
        return self.folder / self.config.ledger

    @property
    def node_key(self) -> Path:
        """The private key by which the hub knows this bank's node."""
        return self.folder / "node.key"

    @property
    def node_public_key(self) -> Path:
        """Its public half, for the operator."""
        return self.folder / "node.pub"

    @property
    def superexec_secret(self) -> Path:
        """What the bank's worker must know to be handed an order by the bank's node."""
        return self.folder / "superexec.secret"

    @property
    def ca_certificate(self) -> Path | None:
        """The operator's certificate authority, where a hub is named."""
        return None if self.config.server is None else self.folder / self.config.server.ca

    @property
    def home(self) -> Path:
        """FLWR_HOME of every Flower process."""
        return self.folder / "home"

    @property
    def daemon_lock(self) -> Path:
        """Locked (flock) by the daemon for as long as it runs."""
        return self.folder / "daemon.lock"

    @property
    def source(self) -> str:
        """Name of the data whose ledger this is."""
        return self.config.source or self.config.name

    @property
    def budget(self) -> Budget:
        """What the ledger may spend."""
        return Budget(epsilon=self.config.policy.epsilon, delta=self.config.policy.delta)

    def approved_plan(self, plan_hash: str) -> Plan:
        """Return the approved plan of this hash, read from the bank's own disk: no message can alter it.

        Raises:
            RefusedError: no such plan is approved, or its file was changed after it was.

        """
        path = self.folder / APPROVED_FOLDER / f"{plan_hash}.json"
        # Checked first: the name comes in a message, and must not lead out of the folder.
        if not re.fullmatch("[0-9a-f]{64}", plan_hash) or not path.is_file():
            raise RefusedError("the order's plan is not among the approved ones", code="plan")
        try:
            plan = read_plan(path)
        except ConfigError as error:
            raise RefusedError(str(error), code="plan") from None
        if plan.hash() != plan_hash:
            raise RefusedError(f"{path}: does not hash to its name; approve the plan again", code="plan")
        return plan


def load_institution(folder: Path) -> Institution:
    """Read a bank's folder.

    Raises:
        ConfigError: `institution.toml` is missing or wrong.

    """
    return Institution(folder, load_toml(folder / CONFIG_FILE, InstitutionConfig))


def institution_toml(config: InstitutionConfig) -> str:
    """Write a configuration, but for `simulation`, with every key explained; it reads as the same configuration."""
    policy, server = config.policy, config.server
    clip = "# max_grad_norm = 1.0" if policy.max_grad_norm is None else f"max_grad_norm = {policy.max_grad_norm!r}"
    address, ca, bundles = (
        (_EXAMPLE_ADDRESS, CA_FILE, ()) if server is None else (server.address, server.ca, server.bundles)
    )
    hub = f"""
# The consortium's hub. To change it, edit this and start `metarisk-client up` again.
[server]
address = {toml_text(address)}   # host:port, reached over TLS
ca = {toml_text(ca)}   # the operator's certificate authority, relative to this folder
# SHA-256 of app bundles that are accepted besides the installed version's own: for while versions change.
bundles = [{", ".join(map(toml_text, bundles))}]
"""
    data = "# The table is described in section [table], at the end.\n"
    if config.data is not None:
        data = f"""\
# The table: CSV (UTF-8, commas, a header) or Parquet. Absolute, or relative to this folder. It is only ever read here.
data = {toml_text(config.data)}
"""
    if server is None:
        hub = re.sub(r"^(?=[^#\n])", "# ", hub, flags=re.MULTILINE)
    return f"""\
# A bank's folder, as `metarisk-client init` made it. Every key is explained; unknown keys are refused.

# The bank's name, as the other parties read it: it goes with every report.
name = {toml_text(config.name)}

{data}
# How many records (or customers, where the plan protects those) the bank SAYS that it has. This number is public: it
# goes with every report and sets the bank's weight. Give a rounded one that anybody may know, never the exact count.
declared_size = {config.declared_size}

# What the ledger calls the data, by default the bank's name; and the ledger's file, relative to this folder. Folders
# of several consortia over the same records must give the same source and the same ledger, so that all is counted.
# A ledger keeps the source that it was made with.
source = {toml_text(config.source)}
ledger = {toml_text(config.ledger)}

# What the risk officer has decided.
[policy]
# The most that may ever be spent of these records' privacy, over all plans, runs and consortia. To change it, edit it
# here, and then say: metarisk-client budget FOLDER --epsilon NEW
epsilon = {policy.epsilon!r}
# The chance with which epsilon may not hold; at most 1 / (10 * declared_size). It stays as the ledger was made with it.
delta = {policy.delta!r}
# Limits that every plan is held to, before it is approved and at every order.
min_noise_multiplier = {policy.min_noise_multiplier!r}   # the least noise of anything that leaves
max_local_steps = {policy.max_local_steps}   # the most steps of learning in one round
max_sample_rate = {policy.max_sample_rate!r}   # the largest share of records in one step
{clip}   # the largest clip norm; left out: whatever the plan says, for the noise grows with it
{hub}
# Prometheus metrics of this bank's processes, on this machine only; 0: none.
[metrics]
port = {config.metrics.port}

{table_toml(config.table)}"""
