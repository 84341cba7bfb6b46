"""A bank's word on a plan: the plan itself on the bank's disk, the approval and its terms in the ledger."""

from pathlib import Path

from metarisk_common.errors import ConfigError
from metarisk_common.files import write_atomically
from metarisk_common.plan import Plan

from .config import APPROVED_FOLDER, Institution, load_institution
from .ledger import Ledger
from .policy import check_plan


def open_ledger(institution: Institution) -> Ledger:
    """Open the ledger of the bank's data source for writing, and create it where there is none.

    Raises:
        ConfigError: the configuration contradicts the ledger, or it cannot be created.
        IntegrityError: the ledger is damaged or belongs to another data source.

    """
    return Ledger.open(institution.ledger_path, source=institution.source, budget=institution.budget)


def approve(folder: Path, plan: Plan, *, epsilon: float | None = None, until_seconds: float | None = None) -> None:
    """Approve a plan: orders under it may be answered from now on.

    Args:
        folder: the bank's folder.
        plan: the plan; its hash is what orders name.
        epsilon: the most that all orders under this plan may spend together, besides the ledger's own budget.
        until_seconds: since 1970, UTC: when the approval ends.

    Raises:
        RefusedError: the plan passes a limit of the bank's policy; nothing was written.
        ConfigError: the folder's configuration is wrong, or the plan cannot be written into it.
        IntegrityError: the ledger is damaged.

    """
    institution = load_institution(folder)
    check_plan(plan, institution.config)
    with open_ledger(institution) as ledger:
        path = folder / APPROVED_FOLDER / f"{plan.hash()}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, plan.to_json().encode())
        except OSError as error:
            raise ConfigError(f"{path}: the plan cannot be written here: {error.strerror}") from None
        ledger.approve(plan.hash(), epsilon=epsilon, until_seconds=until_seconds)


def revoke(folder: Path, plan_hash: str) -> None:
    """Take an approval back: nothing more leaves under the plan. What was spent stays spent.

    Raises:
        RefusedError: no such plan is approved.
        ConfigError: the folder's configuration is wrong.
        IntegrityError: the ledger is damaged.

    """
    with open_ledger(load_institution(folder)) as ledger:
        ledger.revoke(plan_hash)
