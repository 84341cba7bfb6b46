"""A bank's statement as a page for people, and as JSON for machines.

The page is one HTML file that loads nothing and runs no script: it can be mailed, archived and printed. Every text
that comes from data is escaped. The words live in `statement.html.j2`.
"""

import math
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any, Final

from metarisk_common.charts import Layout, Words
from metarisk_common.pages import page_environment

from .charges import Charge
from .plain_words import delta_text, epsilon_text, remaining_text, until_text
from .statement import Statement
from .statement_chart import spending_chart

_LAYOUTS: Final = (Layout("wide", 976, 280), Layout("narrow", 358, 260))
_SHORT: Final = 12
_KINDS: Final = {"train": "model updates", "evaluate": "score histograms", "constants": "bins and shares"}
_MECHANISMS: Final = {
    "poisson_gaussian": "clipped sum of a random sample, Gaussian noise",
    "gaussian_histograms": "counts by score or by value, Gaussian noise",
}


def render(statement: Statement) -> str:
    """Return the page of a statement; the same values give the same text."""
    environment = page_environment()
    environment.filters.update(
        epsilon=epsilon_text,
        day=day,
        minute=minute,
        delta=delta_text,
        short=_short,
        until=until_text,
        number="{:,}".format,
    )
    template = environment.from_string(files(__package__).joinpath("statement.html.j2").read_text(encoding="utf-8"))
    return template.render(
        statement=statement,
        limited=math.isfinite(statement.budget.epsilon),
        bounded=math.isfinite(statement.spent),
        remaining=remaining_text(statement.budget.epsilon, statement.spent),
        chart=_chart(statement),
        kinds=_KINDS,
        mechanisms=_MECHANISMS,
    )


def to_json(statement: Statement) -> dict[str, Any]:
    """Give everything that the statement says, and every event, from which anybody can compute the totals again.

    Times are ISO 8601 in UTC. An epsilon without a bound is null.
    """
    return {
        "format": "metarisk statement 1",
        "source": statement.source,
        "unit": statement.unit,
        "adjacency": "zero-out: neighbours agree in all units but one, which in one of them contributes nothing",
        "made": _iso(statement.made_seconds),
        "since": _iso(statement.since_seconds),
        "budget": {"epsilon": bounded(statement.budget.epsilon), "delta": statement.budget.delta},
        "spent": bounded(statement.spent),
        "remaining": bounded(statement.remaining),
        "not_private": statement.not_private,
        "noise_seeded": statement.seeded,
        "ledger": {
            "entries": statement.entries,
            "head": statement.head,
            "public_key": statement.public_key,
            "fingerprint": statement.fingerprint,
        },
        "runs": [plain(asdict(row)) for row in statement.runs],
        "months": [plain(asdict(row)) for row in statement.months],
        "segments": [plain(asdict(row)) for row in statement.segments],
        "mechanisms": [plain(asdict(row)) for row in statement.mechanisms],
        "approvals": [plain(asdict(row)) for row in statement.approvals],
        "events": [_event(charge) for charge in statement.charges],
    }


def day(seconds: float) -> str:
    """Write a time as its day in UTC: 2026-11-23."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"


def minute(seconds: float) -> str:
    """Write a time to the minute: 2026-11-23 13:50 UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Give fields as JSON has them: times as text, and null where an epsilon has no bound."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name.endswith("_seconds"):
            found[name.removesuffix("_seconds")] = None if value is None else _iso(value)
        else:
            found[name] = bounded(value) if isinstance(value, float) else value
    return found


def bounded(value: float) -> float | None:
    """Give a number, or null for no bound: JSON has no infinity."""
    return value if math.isfinite(value) else None


def _chart(statement: Statement) -> str:
    words = Words(
        "spent",
        "Epsilon spent over time",
        f"{epsilon_text(statement.spent)} was spent by {day(statement.curve[-1][0])}; "
        f"{remaining_text(statement.budget.epsilon, statement.spent)} remained. The tables have the numbers.",
        y_label="epsilon of everything released so far",
    )
    return "\n".join(spending_chart(statement.curve, statement.limits, words, layout) for layout in _LAYOUTS)


def _event(charge: Charge) -> dict[str, Any]:
    fields = {"seq": charge.seq, "time_seconds": charge.time_seconds, "outcome": charge.outcome}
    return {**plain(fields), **asdict(charge.key), **asdict(charge.event)}


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}\u2026"
