"""How a run stands, as one value made from its folder, and as tables for people."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from metarisk_common.flower_deployment import RunStatus
from metarisk_common.plan import read_plan

from .app import is_not_private
from .checkpoint import load_checkpoint
from .journal import read_journal
from .rounds import CHECKPOINT, JOURNAL

STAMP = "NOT PRIVATE: the noise of this run was seeded or switched off"
_SHOWN = 10
_NONE = "-"
_RECENT = 5


@dataclass(frozen=True)
class BankView:
    """One bank in a run. `online` is none where nobody can tell; counts are rounds."""

    online: bool | None = None
    admitted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    absent: int = 0
    last_round: int = 0
    last_update_norm: float | None = None


@dataclass(frozen=True)
class Overview:
    """A run. `state`: waiting, running, completed, failed, stopped, or "unknown" where the hub can't be asked."""

    run: str
    plan: str
    plan_hash: str
    not_private: bool
    state: str
    details: str
    round: int
    rounds: int
    quorum: int
    seconds_left: float | None
    banks: dict[str, BankView]
    journal: list[dict[str, Any]]


def overview(
    folder: Path, online: Mapping[str, bool] | None, status: RunStatus | None = None, *, hub_down: bool = False
) -> Overview:
    """Read a run's folder.

    Args:
        folder: the run's folder.
        online: of every enrolled bank whether it is online; none for a simulation, or where the hub is down.
        status: what the hub says of the run.
        hub_down: the hub could not be asked.

    Raises:
        ConfigError: the folder is not that of a run.
        IntegrityError: its checkpoint or journal is damaged.

    """
    plan = read_plan(folder / "plan.json")
    found = load_checkpoint(folder / CHECKPOINT)
    done = 0 if found is None else found[0].round
    records = read_journal(folder / JOURNAL)
    recent = [record["seconds"] for record in records[-_RECENT:]]
    left = sum(recent) / len(recent) * (plan.outer.rounds - done) if recent else None
    return Overview(
        run=folder.name,
        plan=plan.name,
        plan_hash=plan.hash(),
        not_private=is_not_private(folder),
        state=_state(status, complete=done == plan.outer.rounds, hub_down=hub_down),
        details="" if status is None else status.details,
        round=done,
        rounds=plan.outer.rounds,
        quorum=plan.outer.min_reports,
        seconds_left=left,
        banks=_banks(records, online),
        journal=records,
    )


def _state(status: RunStatus | None, *, complete: bool, hub_down: bool) -> str:
    if complete:
        return "completed"
    if hub_down:
        return "unknown"
    if status is None:
        return "waiting"
    if status.status == "finished":
        return status.sub_status
    return "running" if status.status == "running" else "waiting"


def _banks(records: list[dict[str, Any]], online: Mapping[str, bool] | None) -> dict[str, BankView]:
    names = set(online or ())
    for record in records:
        names |= {*record["admitted"], *record["refused"], *record["rejected"], *record["absent"]}
    found = {}
    for name in sorted(names):
        admitted = [record for record in records if name in record["admitted"]]
        norms = [record.get("update_norms", {}).get(name) for record in admitted]
        found[name] = BankView(
            online=None if online is None else online.get(name, False),
            admitted=len(admitted),
            refused=dict(Counter(record["refused"][name] for record in records if name in record["refused"])),
            rejected=dict(Counter(record["rejected"][name] for record in records if name in record["rejected"])),
            absent=sum(name in record["absent"] for record in records),
            last_round=admitted[-1]["round"] if admitted else 0,
            last_update_norm=norms[-1] if norms else None,
        )
    return found


def tables(seen: Overview) -> Group:
    """Lay a run out for a terminal: a headline, its banks, its last rounds."""
    left = "" if seen.seconds_left is None or seen.state != "running" else f", about {_time(seen.seconds_left)} left"
    lines = [f"{seen.plan}: round {seen.round} of {seen.rounds}, {seen.state}{left}", f"plan {seen.plan_hash}"]
    if seen.details:
        lines.append(seen.details)
    if seen.not_private:
        lines.append(STAMP)
    return Group(Text("\n".join(lines)), _bank_table(seen), _round_table(seen))


def _bank_table(seen: Overview) -> Table:
    table = Table(title=f"Banks, with the norm of their last update (quorum {seen.quorum})", title_justify="left")
    table.add_column("bank")
    for heading in ("online", "reports", "refused", "rejected", "absent", "last", "norm"):
        table.add_column(heading, justify="right")
    for name, bank in seen.banks.items():
        here = _NONE if bank.online is None else ("yes" if bank.online else "no")
        norm = _NONE if bank.last_update_norm is None else f"{bank.last_update_norm:.4f}"
        table.add_row(
            escape(name), here, str(bank.admitted), _codes(bank.refused), _codes(bank.rejected), str(bank.absent),
            str(bank.last_round or _NONE), norm,
        )  # fmt: skip
    return table


def _round_table(seen: Overview) -> Table:
    title = "Rounds" if len(seen.journal) <= _SHOWN else f"The last {_SHOWN} rounds"
    table = Table(title=f"{title}, with the mean norm of their updates", title_justify="left")
    for heading in ("round", "cohort", "reports", "quorum", "refused", "rejected", "norm", "seconds"):
        table.add_column(heading, justify="right")
    for record in seen.journal[-_SHOWN:]:
        norm = record["mean_update_norm"]
        table.add_row(
            str(record["round"]), str(record["cohort"]), str(len(record["admitted"])),
            "yes" if record["quorum"] else "MISSED", _named(record["refused"]), _named(record["rejected"]),
            _NONE if norm is None else f"{norm:.4f}", f"{record['seconds']:.1f}",
        )  # fmt: skip
    return table


def _codes(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{code} {count}" for code, count in sorted(counts.items())) or _NONE


def _named(items: Mapping[str, str]) -> str:
    if not items:
        return _NONE
    name, code = next(iter(items.items()))
    return f"{escape(name)}: {code}" + (f" and {len(items) - 1} more" if len(items) > 1 else "")


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
