"""A bank's folder: `institution.toml`, its table, its ledger, and the plans that it has approved."""

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from metarisk_common.config import Frozen, load_toml
from metarisk_common.errors import ConfigError, RefusedError
from metarisk_common.plan import Plan, read_plan

from .ledger import Budget

CONFIG_FILE = "institution.toml"
APPROVED_FOLDER = "approved"


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


class InstitutionConfig(Frozen):
    """`institution.toml`.

    `declared_size` is a public constant: how many privacy units (records, or customers where the schema protects
    those) the bank says its portfolio has. `source` names the data for its ledger, by default as the bank. Folders of
    several consortia over one data source name the same `source` and the same `ledger`, relative to the folder.
    """

    name: str = Field(min_length=1, max_length=200)
    data: str = Field(min_length=1)
    declared_size: int = Field(ge=1)
    source: str = Field(default="", max_length=200)
    ledger: str = Field(default="ledger.sqlite", min_length=1)
    policy: PolicyConfig
    simulation: SimulationConfig | None = None


@dataclass(frozen=True)
class Institution:
    """A bank's folder and what its configuration says."""

    folder: Path
    config: InstitutionConfig

    @property
    def data_path(self) -> Path:
        """The bank's table."""
        return self.folder / self.config.data

    @property
    def ledger_path(self) -> Path:
        """The bank's privacy ledger."""
        return self.folder / self.config.ledger

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
