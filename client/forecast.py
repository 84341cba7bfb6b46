"""How many rounds a bank can afford: answered before it joins, from its budget and what its ledger has spent.

Nothing here reads a record. Claimed is what `metarisk_common.privacy` claims, since every figure is its epsilon: the
rounds that are forecast to fit are rounds that the ledger accepts, if nothing else is charged in between.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from metarisk_common.calibration import affordable_steps
from metarisk_common.plan import Plan
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.privacy import epsilon as accounted

_QUARTERS = 4
_MOST_STEPS, _LEAST_ROUNDS = 100_000, 1000  # Where a search ends: beyond, a table would take long to make.
_MECHANISM = "poisson_gaussian"


@dataclass(frozen=True)
class Row:
    """The rounds affordable at one sample rate and noise multiplier, and the epsilon spent in all after them."""

    sample_rate: float
    noise_multiplier: float
    rounds: int
    spent: float


@dataclass(frozen=True)
class Forecast:
    """What a budget still buys, for every sample rate with every noise multiplier.

    `spent` is what the ledger has spent before. Searches end at `most_rounds`, which a row may therefore reach.
    """

    epsilon: float
    delta: float
    spent: float
    local_steps: int
    most_rounds: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class PlanForecast:
    """What a budget allows of one plan, answered from its first round on.

    `spent` is what the ledger has spent before; `spent_after` holds (round, epsilon spent in all) after a quarter,
    half, three quarters and all of the rounds asked for, whether they fit or not.
    """

    epsilon: float
    delta: float
    spent: float
    rounds_asked: int
    rounds_affordable: int
    spent_after: tuple[tuple[int, float], ...]

    @property
    def fits(self) -> bool:
        """Whether all of the plan's rounds stay within the budget."""
        return self.rounds_affordable == self.rounds_asked


def forecast(
    *,
    epsilon: float,
    delta: float,
    spent: Sequence[PrivacyEvent],
    sample_rates: Sequence[float],
    noise_multipliers: Sequence[float],
    local_steps: int,
) -> Forecast:
    """Find the rounds of `local_steps` steps that a budget affords, for every sample rate with every noise multiplier.

    Args:
        epsilon: the budget, over the life of the data source.
        delta: the policy's.
        spent: the ledger's events so far.
        sample_rates: Poisson sample rates to look at.
        noise_multipliers: standard deviations of the noise over the clip norm to look at.
        local_steps: private steps a round.

    Raises:
        ValueError: naming the argument that is out of its range.

    """
    if not isinstance(local_steps, int) or isinstance(local_steps, bool) or local_steps < 1:
        raise ValueError("local_steps must be a whole number of at least 1")
    spent_before = accounted(spent, delta)
    most_rounds = max(_MOST_STEPS // local_steps, _LEAST_ROUNDS)
    rows = []
    for noise_multiplier in noise_multipliers:
        for sample_rate in sample_rates:
            steps = affordable_steps(
                epsilon,
                delta,
                noise_multiplier=noise_multiplier,
                sample_rate=sample_rate,
                spent=spent,
                limit=most_rounds * local_steps,
                multiple=local_steps,
            )
            more = [PrivacyEvent(_MECHANISM, noise_multiplier, sample_rate, steps)] if steps else []
            total = accounted([*spent, *more], delta)
            rows.append(Row(sample_rate, noise_multiplier, steps // local_steps, total))
    return Forecast(epsilon, delta, spent_before, local_steps, most_rounds, tuple(rows))


def for_plan(plan: Plan, *, epsilon: float, delta: float, spent: Sequence[PrivacyEvent]) -> PlanForecast:
    """Find how many of a plan's rounds a budget affords, with the score histograms that it asks for.

    Args:
        plan: the plan, as a server proposes it.
        epsilon: the budget, over the life of the data source.
        delta: the policy's; the plan's own is not looked at.
        spent: the ledger's events so far.

    Raises:
        ValueError: naming the argument that is out of its range.

    """
    asked = plan.outer.rounds

    def after(rounds: int) -> float:
        return accounted([*spent, *_events(plan, rounds)], delta)

    spent_after = tuple((number, after(number)) for number in _quarters(asked))
    fits, fails = 0, asked + 1
    for number, total in spent_after:
        fits, fails = (number, fails) if total <= epsilon else (fits, min(fails, number))
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if after(middle) <= epsilon else (fits, middle)
    return PlanForecast(epsilon, delta, accounted(spent, delta), asked, fits, spent_after)


def table(found: Forecast) -> Table:
    """Show a forecast: a row for each noise multiplier, a column for each sample rate, in the cells the rounds."""
    rates = tuple(dict.fromkeys(row.sample_rate for row in found.rows))
    rounds = {(row.noise_multiplier, row.sample_rate): row.rounds for row in found.rows}
    each = "1 private step" if found.local_steps == 1 else f"{found.local_steps} private steps"
    shown = Table(
        title=f"Rounds that fit into epsilon {found.epsilon:g} at delta {found.delta:g}",
        caption=f"Rounds of {each} each that this bank can still answer, for ever, with any server. Epsilon "
        f"{found.spent:.3g} is spent already. More noise or a smaller sample buys more rounds; 0: not even one fits.",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("noise", justify="right")
    for rate in rates:
        shown.add_column(f"rate {rate:g}", justify="right")
    for noise in dict.fromkeys(row.noise_multiplier for row in found.rows):
        shown.add_row(f"{noise:g}", *(_cell(rounds[noise, rate], found.most_rounds) for rate in rates))
    return shown


def to_json(found: Forecast | PlanForecast) -> dict[str, Any]:
    """Give a forecast as plain values; epsilons that are infinite, where nothing is private, as None."""
    values = asdict(found)
    if isinstance(found, PlanForecast):
        after = [{"round": number, "epsilon": _finite(total)} for number, total in found.spent_after]
        return values | {"spent": _finite(found.spent), "spent_after": after, "fits": found.fits}
    rows = [row | {"spent": _finite(row["spent"])} for row in values["rows"]]
    return values | {"spent": _finite(found.spent), "rows": rows}


def _events(plan: Plan, rounds: int) -> Iterable[PrivacyEvent]:
    for number in range(1, rounds + 1):
        yield plan.train_event()
        if plan.evaluates_after(number):
            yield plan.evaluate_event()


def _quarters(rounds: int) -> list[int]:
    return sorted({-(-rounds * part // _QUARTERS) for part in range(1, _QUARTERS + 1)})


def _cell(rounds: int, most: int) -> str:
    return f"{rounds:,}" if rounds < most else f"{rounds:,} or more"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
