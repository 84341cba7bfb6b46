"""A plan in plain words, for whoever decides at a bank and is no engineer: what is learned, what leaves, what it costs.

Pure functions of a plan and of numbers. Every epsilon in print is rounded up and every remainder down, so that no
page claims more protection than the ledger has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from metarisk_common.plan import OuterLoop, Plan
from metarisk_common.privacy import PrivacyEvent, epsilon
from metarisk_common.schema import NumericLabel, Schema

from .chain import Budget
from .forecast import for_plan

ONE_RECORD: Final = "record"
NO_BOUND: Final = "no bound"

_HALF: Final = 0.5
_LISTED: Final = 12


@dataclass(frozen=True)
class Fact:
    """One thing to know about a plan: a heading of a few words, and a sentence or two."""

    heading: str
    text: str


@dataclass(frozen=True)
class Terms:
    """What a plan is approved with.

    `cap`: the most epsilon that all runs under it may spend together; none: only the budget limits them. `until`: the
    last day, as people write it; none: it has no end.
    """

    cap: float | None = None
    until: str | None = None


@dataclass(frozen=True)
class Cost:
    """What one whole run of a plan would cost a bank, in epsilons at the budget's delta.

    `plan`: of the plan by itself. `spent`, `after`: of everything the ledger holds, without the plan and with it.
    `rounds_within`: how many of its rounds the budget and the cap allow, at most all; `stopped_by`: "budget" or
    "cap", which refuses the next one, or nothing.
    """

    plan: float
    spent: float
    after: float
    budget: Budget
    rounds_within: int
    stopped_by: str = ""


@dataclass(frozen=True)
class PlainPlan:
    """A plan in plain words."""

    facts: tuple[Fact, ...]
    warnings: tuple[str, ...]


def epsilon_text(value: float, digits: int = 4) -> str:
    """Write an epsilon rounded up."""
    if not math.isfinite(value):
        return NO_BOUND
    scale = 10**digits
    return f"{math.ceil(value * scale - 1e-7) / scale:.{digits}f}"


def remaining(budget: float, spent: float) -> float:
    """Give how far the epsilon of everything may still rise; infinite without a limit."""
    return budget if math.isinf(budget) else max(0.0, budget - spent)


def remaining_text(budget: float, spent: float, digits: int = 4) -> str:
    """Write what is left of a budget: it and what is spent, both as written, add up."""
    if not math.isfinite(budget):
        return "no limit"
    if not math.isfinite(spent):
        return epsilon_text(0.0, digits)
    return f"{max(0.0, budget - float(epsilon_text(spent, digits))):.{digits}f}"


def delta_text(value: float) -> str:
    """Write a delta as people do: 1e-5."""
    return f"{value:g}".replace("e-0", "e-")


def until_text(seconds: float) -> str:
    """Write the end of an approval: the last day that it covers, or the very minute where it is not a day's end."""
    last = datetime.fromtimestamp(seconds - 1, UTC)
    is_day = (last.hour, last.minute, last.second) == (23, 59, 59)
    return f"{last:%Y-%m-%d}" if is_day else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


def unit_text(schema: Schema) -> str:
    """Name what is protected as one, in the singular."""
    if schema.privacy_unit is None:
        return ONE_RECORD
    most = schema.max_records_per_unit
    return f"{schema.privacy_unit} (with all its records, of which at most {most} {'is' if most == 1 else 'are'} used)"


def cost_of(
    plan: Plan,
    *,
    budget: Budget,
    cap: float | None,
    spent: Sequence[PrivacyEvent],
    under_plan: Sequence[PrivacyEvent],
) -> Cost:
    """Account for one whole run of a plan on top of what was spent.

    Args:
        plan: the plan.
        budget: the bank's.
        cap: of all runs under the plan together, or none.
        spent: every event of the ledger.
        under_plan: those among them that earlier runs under this plan have spent.

    """
    within_budget = for_plan(plan, epsilon=budget.epsilon, delta=budget.delta, spent=spent)
    rounds, stopped = within_budget.rounds_affordable, "" if within_budget.fits else "budget"
    if cap is not None:
        within_cap = for_plan(plan, epsilon=cap, delta=budget.delta, spent=under_plan).rounds_affordable
        rounds, stopped = (within_cap, "cap") if within_cap < rounds else (rounds, stopped)
    return Cost(
        plan=epsilon(plan.events(), budget.delta),
        spent=within_budget.spent,
        after=within_budget.spent_after[-1][1],
        budget=budget,
        rounds_within=rounds,
        stopped_by=stopped,
    )


def _asked(plan: Plan, rounds: int) -> int:
    return sum(plan.evaluates_after(number) for number in range(1, rounds + 1))


def describe(plan: Plan, cost: Cost, *, size: int, terms: Terms, standing: Terms | None = None) -> PlainPlan:
    """Say in plain words what a bank would agree to.

    Args:
        plan: the plan.
        cost: what one whole run would cost this bank.
        size: numbers in one update: the parameters of the model.
        terms: what it would be approved with.
        standing: what it is approved with already.

    """
    facts = (
        Fact("Plan", f"{plan.name}, hash {plan.hash()}"),
        Fact("What is learned", _learned(plan)),
        Fact("From which columns", _columns(plan.data)),
        Fact("Who is protected", _protected(plan)),
        Fact("How often", _schedule(plan)),
        Fact("Noise", _noise(plan)),
        Fact("What leaves the bank", _leaves(plan, size)),
        Fact("What never leaves", _STAYS),
        Fact("What the server makes of it", _aggregated(plan.outer)),
        Fact("What it costs", _costs(cost)),
        Fact("Limits of this approval", _limits(terms)),
    )
    return PlainPlan(facts, tuple(_warnings(plan, cost, terms, standing)))


_STAYS: Final = (
    "The records; how many there really are; losses, accuracies and timings; error messages; the update "
    "before its noise; and any model that the bank adapts to its own records."
)


def _aggregated(outer: OuterLoop) -> str:
    weighted = "weighted by declared size" if outer.weighting == "declared_size" else "each counting the same"
    folded = {
        "mean": f"The mean of the banks' updates, {weighted}.",
        "norm_bounded_mean": f"The mean of the banks' updates, {weighted}, none larger than {outer.max_update_norm:g}."
        if outer.max_update_norm is not None
        else "",
        "median": "Of each number, the median over the banks: one that lies cannot move it far.",
        "trimmed_mean": f"Of each number, the mean over the banks without the {outer.trim:.0%} lowest and highest.",
    }[outer.aggregator]
    return f"{folded} A round counts from {outer.min_reports} banks on."


def _learned(plan: Plan) -> str:
    label = plan.data.label
    outcome, what = label.title or label.name, ""
    if not isinstance(label, NumericLabel):
        outcome, what = f"{outcome} = {label.positive}", "the chance that "
    if plan.model.kind == "scorecard":
        model = "a scorecard, which adds up one number for each input"
    else:
        widths = " and ".join(str(width) for width in plan.model.hidden)
        model = f"a small neural network with hidden layers of {widths}"
    if plan.inner.algorithm == "fedavg":
        return f"One model, shared by all banks, of {what}{outcome}: {model}."
    return (
        f"A shared starting point, from which each bank can adapt a model of {what}{outcome} to its own "
        f"records: {model}."
    )


def _columns(schema: Schema) -> str:
    names = [
        f"{column.title} ({', '.join(column.sources)})" if column.title else ", ".join(column.sources)
        for column in schema.columns
    ]
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    inputs = "1 input" if len(names) == 1 else f"{len(names)} inputs"
    outcome = f"what became of it ({schema.label.title or schema.label.name})"
    grouped = f", and {schema.segment}, which groups them" if schema.segments and schema.segment else ""
    return f"{inputs}: {'; '.join(names[:_LISTED])}{more}. Besides these, {outcome}{grouped}."


def _protected(plan: Plan) -> str:
    schema = plan.data
    clip = plan.mechanism.max_grad_norm
    if schema.privacy_unit is None:
        unit, whose = "Each record by itself.", "one record"
    else:
        most = schema.max_records_per_unit
        records = "1 record is" if most == 1 else f"{most} records are"
        unit = f"Each {schema.privacy_unit} as a whole; at most {records} used of any one, and the rest are left out."
        whose = f"one {schema.privacy_unit}"
    if clip is None:
        return f"{unit} But what {whose} can do to a step of learning is not limited."
    return (
        f"{unit} What {whose} can do to a step of learning is cut off at {clip:g} (the clip norm), whatever it holds."
    )


def _schedule(plan: Plan) -> str:
    steps, rounds, rate = plan.inner.local_steps, plan.outer.rounds, plan.mechanism.sample_rate
    whole = plan.data.privacy_unit or "record"
    share = f"every {whole} takes part" if rate == 1 else f"each {whole} takes part by chance, with {100 * rate:.4g}%"
    text = (
        f"{_counted(rounds, 'round')} of {_counted(steps, 'step')} each, {plan.total_steps:,} in all; in each {share}."
    )
    if plan.inner.by_episode:
        text += (
            f" They see about half of the records; the others judge their result, in one step more. A public rule "
            f"says which, of each {whole} by what it holds alone and for good, so none is used for both."
        )
    asked = _asked(plan, rounds)
    return f"{text} Score histograms are asked for {_counted(asked, 'time')}." if asked else text


def _noise(plan: Plan) -> str:
    noise = plan.mechanism.noise_multiplier
    if noise == 0:
        return "None: what leaves the bank is exact."
    text = f"Random noise of {noise:g} times that limit is added to each step, inside the bank, before anything leaves."
    if plan.metrics is None:
        return text
    whole = plan.data.privacy_unit or "record"
    return (
        f"{text} Each count of the score histograms gets noise of {plan.metrics.noise_multiplier:g} times what one "
        f"{whole} can change."
    )


def _leaves(plan: Plan, size: int) -> str:
    text = f"In each round, one update of {size:,} numbers, with its noise, "
    if plan.metrics is not None:
        text += f"and, where asked for, two histograms of {plan.metrics.bins} noised counts of scores, "
    return (
        f"{text}together with the bank's name, its declared size, the names of the run, the round and the plan, the "
        "settings of the noise, and a receipt of the ledger. Nothing else."
    )


def _costs(cost: Cost) -> str:
    limit = f"{cost.budget.epsilon:g}" if math.isfinite(cost.budget.epsilon) else "no limit"
    return (
        f"One whole run spends epsilon {epsilon_text(cost.plan)} by itself, at delta {delta_text(cost.budget.delta)}. "
        f"The bank's total goes from {epsilon_text(cost.spent)} to {epsilon_text(cost.after)} of {limit}; "
        f"remaining: {remaining_text(cost.budget.epsilon, cost.after)}. Epsilons of runs do not add up, and a second "
        "run under the plan is charged again."
    )


def _limits(terms: Terms) -> str:
    spend = "The bank's budget alone limits what may be spent."
    if terms.cap is not None:
        spend = f"All runs under the plan may spend epsilon {terms.cap:g} together, within the bank's budget."
    return f"{spend} {'It has no end.' if terms.until is None else f'It ends with {terms.until} (UTC).'}"


def _warnings(plan: Plan, cost: Cost, terms: Terms, standing: Terms | None) -> list[str]:
    budget = cost.budget.epsilon
    found = []
    if not math.isfinite(cost.plan):
        found.append(
            "Nothing is protected: the plan adds no noise, and what leaves the bank may give its records away."
        )
    if cost.stopped_by and cost.rounds_within == 0:
        found.append(f"The {cost.stopped_by} leaves no room for a single round: the ledger will refuse every order.")
    elif cost.stopped_by:
        found.append(
            f"A whole run passes the {cost.stopped_by}: the ledger will refuse after "
            f"{_counted(cost.rounds_within, 'round')} of {plan.outer.rounds}."
        )
    elif math.isfinite(budget) and cost.after - cost.spent > _HALF * (budget - cost.spent):
        found.append("One run uses more than half of what remains of the bank's budget.")
    if terms.cap is not None and terms.cap > budget:
        found.append(f"The cap of {terms.cap:g} is above the bank's budget of {budget:g}, which stays the limit.")
    if standing is not None and standing != terms:
        found.append(f"The plan is approved already, and this replaces the terms: {_limits(standing)}")
    return found


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
