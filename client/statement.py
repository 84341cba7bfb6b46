"""The statement of a bank's ledger: what its risk officer can sign, on one page, and what anybody can compute again.

Pure functions of the ledger's entries. An epsilon here is always that of all the events named, accounted together by
`metarisk_common.privacy`: epsilons of runs or months are never added. Times are those that the bank's clock gave;
events are put in the order of their times, so a clock that was set back moves an event, but loses none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Final

from metarisk_common.plan import Plan
from metarisk_common.privacy import PrivacyEvent, epsilon

from .chain import Approval, Budget, Entry
from .charges import Charge, Outcome, Tally, charges_of
from .plain_words import ONE_RECORD, remaining, unit_text

_ROWS: Final = 12  # Rows of a table: what is older is one row more, so that a ledger of years still fits its pages.


@dataclass(frozen=True)
class RunRow:
    """What one run was charged: `alone` is its own epsilon, `after` that of everything up to its last event."""

    run_id: str
    plan_hash: str
    title: str
    released: int
    reserved: int
    abandoned: int
    first_seconds: float
    last_seconds: float
    alone: float
    after: float


@dataclass(frozen=True)
class MonthRow:
    """What one calendar month (UTC, `2026-11`) was charged, and the epsilon of everything up to its end."""

    month: str
    events: int
    after: float


@dataclass(frozen=True)
class SegmentRow:
    """What the records of one segment were charged, with what was read of all records; the empty name: all of them."""

    name: str
    events: int
    steps: int
    spent: float


@dataclass(frozen=True)
class MechanismRow:
    """Releases of one kind with the same noise and sampling, and their epsilon as if nothing else had happened."""

    kind: str
    mechanism: str
    noise_multiplier: float
    sample_rate: float
    events: int
    steps: int
    alone: float


@dataclass(frozen=True)
class ApprovalRow:
    """An approved plan: its cap, if it has one, what it was charged of it, and whether it is in force."""

    plan_hash: str
    title: str
    cap: float | None
    spent: float
    until_seconds: float | None
    in_force: bool


@dataclass(frozen=True)
class Statement:
    """Everything that the page and the export say, as plain values.

    `seeded`: whether the bank's noise can be repeated; none where only the ledger is known. `earlier_runs` and
    `earlier_months` count what the tables leave out. `curve` and `limits` are (seconds, value from then on).
    """

    source: str
    budget: Budget
    unit: str
    spent: float
    seeded: bool | None
    made_seconds: float
    since_seconds: float
    entries: int
    head: str
    public_key: str
    fingerprint: str
    clock_set_back: int
    charges: tuple[Charge, ...]
    runs: tuple[RunRow, ...]
    earlier_runs: int
    months: tuple[MonthRow, ...]
    earlier_months: int
    segments: tuple[SegmentRow, ...]
    mechanisms: tuple[MechanismRow, ...]
    approvals: tuple[ApprovalRow, ...]
    curve: tuple[tuple[float, float], ...]
    limits: tuple[tuple[float, float], ...]

    @property
    def not_private(self) -> bool:
        """Whether nothing here protects anybody: the noise is seeded, or something left without any."""
        return bool(self.seeded) or math.isinf(self.spent)

    @property
    def remaining(self) -> float:
        """How far the epsilon of everything may still rise."""
        return remaining(self.budget.epsilon, self.spent)

    def count(self, outcome: Outcome) -> int:
        """How many charges came to this end."""
        return sum(charge.outcome == outcome for charge in self.charges)


def statement(
    entries: Sequence[Entry],
    *,
    source: str,
    budget: Budget,
    public_key: str,
    fingerprint: str,
    made_seconds: float,
    approvals: Mapping[str, Approval],
    plans: Mapping[str, Plan],
    seeded: bool | None,
) -> Statement:
    """State what a verified ledger says.

    Args:
        entries: every entry, from the first.
        source: whose records the ledger protects.
        budget: the budget as it stands.
        public_key: of the key that signs the ledger, hexadecimal; empty where there is none.
        fingerprint: of that key, as people compare it.
        made_seconds: the time of the statement, in seconds since 1970.
        approvals: the approved plans by hash.
        plans: the plans that the bank still has, by hash; they give the runs their names and the unit of protection.
        seeded: whether the bank's noise is seeded, if that is known.

    """
    charges = charges_of(entries)
    tally = Tally(charges, budget.delta)
    # As the ledger does: what has ended stays ended, wherever the clock stands.
    now = max([made_seconds, *(entry.time_seconds for entry in entries)])
    runs = run_rows(tally, plans)
    months = _months(tally)
    spent = tally.after(len(charges))
    curve, since = tally.curve(), entries[0].time_seconds
    return Statement(
        source=source,
        budget=budget,
        unit=_unit({charge.key.plan_hash for charge in charges}, plans),
        spent=spent,
        seeded=seeded,
        made_seconds=made_seconds,
        since_seconds=since,
        entries=len(entries),
        head=entries[-1].digest,
        public_key=public_key,
        fingerprint=fingerprint,
        clock_set_back=sum(b.time_seconds < a.time_seconds for a, b in pairwise(entries)),
        charges=charges,
        runs=tuple(runs),
        earlier_runs=len({charge.key.run_id for charge in charges}) - len(runs),
        months=tuple(months),
        earlier_months=len({month_of(charge.time_seconds) for charge in charges}) - len(months),
        segments=_segments(charges, budget.delta),
        mechanisms=_mechanisms(charges, budget.delta),
        approvals=approval_rows(approvals, charges, plans, budget.delta, now),
        curve=((min([since, *(step[0] for step in curve[:1])]), 0.0), *curve),
        limits=_limits(entries),
    )


def month_of(seconds: float) -> str:
    """Name the calendar month of a time, in UTC: `2026-11`."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m}"


def run_rows(tally: Tally, plans: Mapping[str, Plan]) -> list[RunRow]:
    """Give a row for each of the latest runs, the last one last; `plans`, by hash, give them their titles."""
    ordered = tally.charges
    by_run: dict[str, list[int]] = {}
    for index, charge in enumerate(ordered):
        by_run.setdefault(charge.key.run_id, []).append(index)
    latest = sorted(by_run.values(), key=lambda indexes: indexes[-1])[-_ROWS:]
    rows = []
    for indexes in latest:
        charges = [ordered[index] for index in indexes]
        outcomes = [charge.outcome for charge in charges]
        plan_hash = charges[-1].key.plan_hash
        row = RunRow(
            run_id=charges[0].key.run_id,
            plan_hash=plan_hash,
            title=plans[plan_hash].name if plan_hash in plans else "",
            released=outcomes.count("released"),
            reserved=outcomes.count("reserved"),
            abandoned=outcomes.count("abandoned"),
            first_seconds=charges[0].time_seconds,
            last_seconds=charges[-1].time_seconds,
            alone=epsilon([charge.event for charge in charges], tally.delta),
            after=tally.after(indexes[-1] + 1),
        )
        rows.append(row)
    return rows


def _months(tally: Tally) -> list[MonthRow]:
    last: dict[str, int] = {}
    events: dict[str, int] = {}
    for index, charge in enumerate(tally.charges):
        month = month_of(charge.time_seconds)
        last[month], events[month] = index, events.get(month, 0) + 1
    return [MonthRow(month, events[month], tally.after(last[month] + 1)) for month in sorted(last)[-_ROWS:]]


def _segments(charges: Sequence[Charge], delta: float) -> tuple[SegmentRow, ...]:
    rows = []
    for name in sorted({charge.event.segment for charge in charges}):
        seen = [charge.event for charge in charges if charge.event.segment in {"", name}]
        own = [event for event in seen if event.segment == name]
        rows.append(SegmentRow(name, len(own), sum(event.steps for event in own), epsilon(seen, delta)))
    return tuple(rows)


def _mechanisms(charges: Sequence[Charge], delta: float) -> tuple[MechanismRow, ...]:
    groups: dict[tuple[str, str, float, float], list[PrivacyEvent]] = {}
    for charge in charges:
        event = charge.event
        key = (charge.key.kind, event.mechanism, event.noise_multiplier, event.sample_rate)
        groups.setdefault(key, []).append(event)
    return tuple(
        MechanismRow(*key, len(events), sum(event.steps for event in events), epsilon(events, delta))
        for key, events in sorted(groups.items())
    )


def approval_rows(
    approvals: Mapping[str, Approval], charges: Sequence[Charge], plans: Mapping[str, Plan], delta: float, now: float
) -> tuple[ApprovalRow, ...]:
    """Give a row for each approved plan; `now` in seconds since 1970."""
    return tuple(
        ApprovalRow(
            plan_hash=plan_hash,
            title=plans[plan_hash].name if plan_hash in plans else "",
            cap=approval.epsilon,
            spent=epsilon([charge.event for charge in charges if charge.key.plan_hash == plan_hash], delta),
            until_seconds=approval.until_seconds,
            in_force=not approval.is_expired(now),
        )
        for plan_hash, approval in approvals.items()
    )


def _unit(used: set[str], plans: Mapping[str, Plan]) -> str:
    """Name the unit of protection: that of every plan used, or else a record, which each of them protects."""
    found = {unit_text(plans[plan_hash].data) if plan_hash in plans else ONE_RECORD for plan_hash in used}
    return found.pop() if len(found) == 1 else ONE_RECORD


def _limits(entries: Sequence[Entry]) -> tuple[tuple[float, float], ...]:
    budgets = [
        (entry.time_seconds, entry.content["budget"] if entry.kind == "create" else entry.content)
        for entry in entries
        if entry.kind in {"create", "budget"}
    ]
    found = [(when, float(str(fields["epsilon"]).replace("unlimited", "inf"))) for when, fields in budgets]
    return tuple(sorted(found, key=lambda limit: limit[0]))
