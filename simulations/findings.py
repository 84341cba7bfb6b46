"""The words and numbers in which a run's metrics are told: their types, their print, and what they allow to be said."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from metarisk_common import charts
from metarisk_common.yardsticks import CREDIT, YARDSTICKS, Field, Yardstick

ABSENT = "\u2013"
PAIRED_DIGITS = 4


class Method(TypedDict):
    """How a method is called in print, who holds the data it learns from, and whether it learns privately."""

    title: str
    kind: Literal["federated", "local", "pooled"]
    private: bool


class Estimate(TypedDict):
    """A mean over unseen lenders and draws with the two ends of its 95% interval."""

    mean: float | None
    ci95: Sequence[float | None]


Cell = Mapping[str, Any]
"""One method after k labels: an `Estimate` for each measure, `worst_decile` and `institutions`; see `evaluation`."""


class Paired(TypedDict):
    """Difference in the headline measure, method less baseline, on the same lenders, draws and labels."""

    method: str
    baseline: str
    k: int
    mean: float | None
    ci95: Sequence[float | None]
    wins: int
    losses: int


class Gains(TypedDict):
    """Difference in the headline measure of each unseen lender after k labels, method less baseline."""

    k: int
    baseline: str
    method: str
    gains: Mapping[str, float]


class Metrics(TypedDict):
    """The content of a run's `metrics.json`; in `summary`: method, then k as text.

    `field`: whose yardstick was used, credit where absent; `judged`: "tasks" where institutions that took part are
    judged too, on records that nobody learned from; `min_positives`: what a support was selected to hold;
    `base_rate`: the share of positives to which all that learned from such supports was corrected.
    """

    ks: Sequence[int]
    draws: int
    methods: Mapping[str, Method]
    summary: Mapping[str, Mapping[str, Cell]]
    paired: Sequence[Paired]
    gain_by_institution: Gains | None
    share_harmed: Mapping[str, float]
    field: NotRequired[Field]
    judged: NotRequired[Literal["institutions", "tasks"]]
    min_positives: NotRequired[int]
    base_rate: NotRequired[float]


@dataclass(frozen=True)
class Told:
    """The words of a run: its yardstick, who takes part, and who is judged, in the singular and in the plural."""

    yardstick: Yardstick
    one: str
    many: str
    judged_one: str
    judged: str
    tasks: bool


def told(metrics: Metrics) -> Told:
    """Return the words in which a run is told."""
    yardstick = YARDSTICKS[metrics.get("field", CREDIT.name)]
    words, tasks = yardstick.words, metrics.get("judged") == "tasks"
    one, many = ("task", "tasks") if tasks else words.unseen or (words.institution, words.institutions)
    return Told(yardstick, words.institution, words.institutions, one, many, tasks)


class Account(TypedDict):
    """What one lender's ledger says at the end of the run."""

    spent: float
    declared_size: int
    entries: int


class Privacy(TypedDict):
    """The run's claim, and every participating lender's account."""

    epsilon_budget: float
    delta: float
    unit: str
    by_institution: Mapping[str, Account]


class FederatedMetrics(TypedDict):
    """What the lenders' summed score histograms say; the figures are absent where the noise leaves nothing to judge."""

    admitted: list[str]
    noise_std: float
    auc: NotRequired[float]
    auc_noise_std: NotRequired[float]
    ks: NotRequired[float]
    base_rate: NotRequired[float]
    expected: NotRequired[list[float]]
    observed: NotRequired[list[float | None]]


class Round(TypedDict):
    """One line of the journal. `cohort`, `admitted`: counts or names.

    `refused` and `rejected`: name to code, of a lender that declined and of a report that the server did not take;
    `absent`: names without an answer; `quorum`: whether enough reports came for a step.
    """

    round: int
    seconds: float
    cohort: int | Sequence[str]
    admitted: int | Sequence[str]
    refused: Mapping[str, str]
    rejected: NotRequired[Mapping[str, str]]
    absent: NotRequired[Sequence[str]]
    quorum: NotRequired[bool]
    mean_update_norm: float | None
    server_learning_rate: float | None
    federated_metrics: NotRequired[FederatedMetrics]


def fixed(value: float | None, digits: int = 3) -> str:
    """Write a number with a real minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return ABSENT
    text = f"{value:.{digits}f}"
    return text.replace("-", charts.MINUS) if float(text) else f"{0:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """Write a difference with its sign; one that rounds to zero has none."""
    text = fixed(value, digits)
    return text if value is None or not math.isfinite(value) or round(value, digits) <= 0 else f"+{text}"


def interval(ends: Sequence[float | None], digits: int = 3) -> str:
    """Write both ends of an interval; a dash where it is unknown."""
    texts = [fixed(end, digits) for end in ends]
    return ABSENT if ABSENT in texts or not texts else " to ".join(texts)


def spent(epsilon: float, digits: int = 2) -> str:
    """Write a privacy loss rounded up, so that print never claims more protection than the ledger does."""
    if not math.isfinite(epsilon):
        return "no bound"
    if 0 < epsilon < 0.1:  # noqa: PLR2004 - two digits after the point would say little, or more than there is
        digits = min(6, 1 - math.floor(math.log10(epsilon)))
    scale = 10**digits
    return f"{math.ceil(epsilon * scale - 1e-9) / scale:.{digits}f}"


def power(value: float) -> str:
    """Write a small number as people do: 1e-5."""
    return f"{value:g}".replace("e-0", "e-")


def estimate(metrics: Metrics, method: str, k: int, measure: str | None = None) -> Estimate | None:
    """Return what was measured of a method after k labels, of the headline by default; None where nothing was."""
    name = told(metrics).yardstick.headline if measure is None else measure
    found: Estimate | None = metrics["summary"].get(method, {}).get(str(k), {}).get(name)
    if found is None or found["mean"] is None or not math.isfinite(found["mean"]):
        return None
    return found


def paired_with(metrics: Metrics, method: str, baseline: str, k: int) -> Paired | None:
    """Return the paired difference of two methods after k labels, or None where it was not computed."""
    wanted = (method, baseline, k)
    return next((pair for pair in metrics["paired"] if (pair["method"], pair["baseline"], pair["k"]) == wanted), None)


def gains_of(metrics: Metrics, main_method: str) -> Gains:
    """Return the headline's comparison, or an empty one at the middle k where the run had no local method."""
    found = metrics["gain_by_institution"]
    if found is not None:
        known = {name: gain for name, gain in found["gains"].items() if math.isfinite(gain)}
        return Gains(k=found["k"], baseline=found["baseline"], method=found["method"], gains=known)
    positive = [k for k in metrics["ks"] if k > 0] or [0]
    return Gains(k=positive[len(positive) // 2], baseline="", method=main_method, gains={})


def ordered_methods(metrics: Metrics, main_method: str) -> list[tuple[str, Method]]:
    """Return the methods with the main one first, then federated, local and pooled ones, each in the file's order."""
    kinds = ("federated", "local", "pooled")
    return sorted(metrics["methods"].items(), key=lambda item: (item[0] != main_method, kinds.index(item[1]["kind"])))


def verdict(pair: Paired | None) -> Literal["better", "worse", "not told apart", "not compared"]:
    """Say what an interval allows: a direction only where all of it, as printed, lies on one side of zero."""
    if pair is None:
        return "not compared"
    ends = [round(end, PAIRED_DIGITS) for end in pair["ci95"] if end is not None and math.isfinite(end)]
    if len(ends) == len(pair["ci95"]) and ends and (min(ends) > 0 or max(ends) < 0):
        return "better" if min(ends) > 0 else "worse"
    return "not told apart"


def strongest_local(metrics: Metrics, k: int) -> str | None:
    """Return the local method that does best after k labels, by the headline: an honest claim must beat that one."""
    found = {
        name: estimate(metrics, name, k) for name, method in metrics["methods"].items() if method["kind"] == "local"
    }
    means = {name: value["mean"] or 0.0 for name, value in found.items() if value is not None}
    return max(means, key=lambda name: means[name], default=None)


def finding(metrics: Metrics, main_method: str) -> str:
    """Return the headline: one sentence that the paired intervals allow, against the strongest local method as well."""
    gains = gains_of(metrics, main_method)
    method, baseline, k = gains["method"], gains["baseline"], gains["k"]
    first = verdict(paired_with(metrics, method, baseline, k))
    words = told(metrics)
    question = words.yardstick.words.question
    start = f"With {k} labels, a {words.one} the model has never seen {question}"
    if words.tasks:
        start = f"With {k} labels of a kind that nobody learned from, a {words.one} {question}"
    sentence = {
        "better": f"{start} better from the shared start than alone",
        "worse": f"{start} worse from the shared start than alone",
        "not told apart": f"{start} from the shared start no better or worse than alone, as far as this run can tell",
        "not compared": f"This run did not compare the shared start with a {words.one} on its own",
    }[first]
    strongest = strongest_local(metrics, k)
    if first == "better" and strongest not in {None, baseline}:
        rival = verdict(paired_with(metrics, method, str(strongest), k))
        if rival != "better":
            sentence += {
                "worse": ", but worse than with the strongest local method",
                "not told apart": ", but not demonstrably better than with the strongest local method",
                "not compared": "; the strongest local method was not compared",
            }[rival]
    return sentence + "."


def pairs(metrics: Metrics) -> list[list[Paired]]:
    """Return the comparisons by method and baseline, in the file's order, each by number of labels."""
    groups: dict[tuple[str, str], list[Paired]] = {}
    for pair in metrics["paired"]:
        groups.setdefault((pair["method"], pair["baseline"]), []).append(pair)
    return [sorted(group, key=lambda pair: pair["k"]) for group in groups.values()]
