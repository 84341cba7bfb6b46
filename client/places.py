"""Which ledger a path names, and whose: a bank's folder, or a ledger's file by itself."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from metarisk_common.errors import ConfigError, RefusedError
from metarisk_common.plan import Plan

from .config import CONFIG_FILE, Institution, load_institution


@dataclass(frozen=True)
class Found:
    """A ledger, and the bank's folder around it if there is one."""

    path: Path
    institution: Institution | None

    @property
    def seeded(self) -> bool | None:
        """Whether the bank's noise is seeded; none where nothing around the ledger says so."""
        return None if self.institution is None else self.institution.config.simulation is not None

    def plans(self, hashes: set[str]) -> dict[str, Plan]:
        """Read those of the plans that the bank still has."""
        plans: dict[str, Plan] = {}
        if self.institution is None:
            return plans
        for plan_hash in hashes:
            with suppress(RefusedError):
                plans[plan_hash] = self.institution.approved_plan(plan_hash)
        return plans


def find(place: Path) -> Found:
    """Find the ledger that a folder or a path names.

    Raises:
        ConfigError: there is none.

    """
    folder = place if place.is_dir() else place.parent
    institution = load_institution(folder) if (folder / CONFIG_FILE).exists() else None
    path = place
    if place.is_dir():
        path = institution.ledger_path if institution else place / "ledger.sqlite"
    if not path.is_file():
        raise ConfigError(f"{path}: there is no ledger here; name a bank's folder or the ledger itself")
    if institution is not None and institution.ledger_path.resolve() != path.resolve():
        institution = None  # A copy from elsewhere that happens to lie here.
    return Found(path, institution)
