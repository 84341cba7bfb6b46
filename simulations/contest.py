"""Initializations against joint training, each plus the same adaptation, on the same draws of the same institutions."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
from rich.table import Table

from client.dataset import Dataset
from client.training import tasks_for
from metarisk_common.adapters import adapt_params, predict
from metarisk_common.evaluation import (
    EpisodeScore,
    EvaluationSet,
    PairedDifference,
    Predictor,
    paired_difference,
    run_episodes,
    summarise,
)
from metarisk_common.params import Params
from metarisk_common.plan import ModelSpec, Plan

from . import vector

Matrix = npt.NDArray[Any]
_OF_EACH_OUTCOME: Final = 2


@dataclass(frozen=True)
class Entrant:
    """An initialization and how it is adapted; a `Method` of `metarisk_common.evaluation`.

    `learned` names the initialization; `adaptation` is one of `metarisk_common.adapters.METHODS`, `prior_variance` its
    tau2.
    """

    learned: str
    spec: ModelSpec
    params: Params
    prior_variance: float
    adaptation: str = "head"
    needs_support: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The initialization's name with the prior variance."""
        return named(self.learned, self.prior_variance)

    def fit(self, x: Matrix, _raw: Matrix, y: Matrix) -> Predictor:
        """Adapt to `x: (k, width)`; k = 0 keeps the initialization."""
        adapted = adapt_params(self.spec, self.params, x, y, method=self.adaptation, prior_variance=self.prior_variance)
        return partial(_probabilities, self.spec, adapted.params)


@dataclass(frozen=True)
class Row:
    """One entrant at one k: mean AUC, and its paired difference from the rival.

    `same` is less the rival with the same adaptation at the same k; `best` less the rival's strongest at that k, over
    all of its prior variances and over not adapting at all, chosen on the judged institutions in the rival's favour.
    Each is `(mean, low, high)`, 95% over institutions; None for the rival itself.
    """

    method: str
    prior_variance: float
    k: int
    auc: float
    same: tuple[float, float, float] | None
    best: tuple[float, float, float] | None


def named(learned: str, prior_variance: float) -> str:
    """Name an entrant."""
    return f"{learned}, tau2 {prior_variance:g}"


def learn(
    plan: Plan, datasets: Iterable[Dataset], *, seed: int, on_round: Callable[[int], None] | None = None
) -> Params:
    """Train a plan on the vector engine; a bank's declared size is its number of records, as in a simulation's run."""
    datasets = list(datasets)
    banks = {dataset.institution: tasks_for(plan, dataset) for dataset in datasets}
    sizes = {dataset.institution: len(dataset.y) for dataset in datasets}
    width = datasets[0].x.shape[1]
    return vector.train(plan, banks, sizes, width=width, seed=seed, on_round=on_round)


def entrants(
    learned: Mapping[str, tuple[Plan, Params]], variances: Sequence[float], *, adaptation: str = "head"
) -> list[Entrant]:
    """Adapt every initialization with every prior variance."""
    return [
        Entrant(name, plan.model, params, variance, adaptation)
        for name, (plan, params) in learned.items()
        for variance in variances
    ]


def can_be_judged(dataset: Dataset, room: int) -> bool:
    """Whether an unseen institution has `room` records, and of each outcome one to adapt to and one to judge by."""
    rarer = min(dataset.y.sum(), len(dataset.y) - dataset.y.sum())
    return len(dataset.y) >= room and rarer >= _OF_EACH_OUTCOME


def judging_sets(datasets: Iterable[Dataset]) -> list[EvaluationSet]:
    """Make evaluation sets of encoded data sets; no entrant asks for inputs without bins."""
    return [EvaluationSet(each.institution, each.x, each.x, each.y) for each in datasets]


def judge(
    methods: Sequence[Entrant], rival: str, sets: Sequence[EvaluationSet], ks: Sequence[int], *, draws: int, seed: int
) -> list[Row]:
    """Score all entrants on the same draws and compare each with the rival of the same adaptation, and of the best.

    Raises:
        DataError: an institution has too few records for the largest k.
        ValueError: the rival is not among the entrants with each prior variance.

    """
    scores = run_episodes(sets, methods, ks, draws=draws, seed=seed)
    summary = summarise(scores)

    def auc(name: str, k: int) -> float:
        return float(summary[name][str(k)]["auc"]["mean"])

    rivals = [method.name for method in methods if method.learned == rival]
    rows = []
    for method in methods:
        for k in ks:
            same = best = None
            if method.learned != rival:
                choices = [(name, at) for name in rivals for at in {0, k} & set(ks)]
                strongest, at = max(choices, key=lambda choice: auc(*choice))
                same = _difference(scores, method.name, named(rival, method.prior_variance), k, k)
                best = _difference(scores, method.name, strongest, k, at)
            rows.append(Row(method.learned, method.prior_variance, k, auc(method.name, k), same, best))
    return rows


def wins(rows: Iterable[Row]) -> list[Row]:
    """Rows whose interval lies above 0 against the rival's best as well."""
    return [row for row in rows if row.same and row.best and row.same[1] > 0 and row.best[1] > 0]


def table(title: str, rows: Sequence[Row], rival: str) -> Table:
    """Lay the rows out; a star marks an interval above 0, a minus one below."""
    shown = Table(title=title)
    for heading in ("initialization", "tau2", "k", "AUC", f"less {rival}, same adaptation", f"less {rival}'s best"):
        shown.add_column(heading, justify="left" if heading == "initialization" else "right")
    previous = None
    for row in rows:
        if previous is not None and row.method != previous:
            shown.add_section()
        previous = row.method
        shown.add_row(
            row.method, f"{row.prior_variance:g}", str(row.k), f"{row.auc:.3f}", _text(row.same), _text(row.best)
        )
    return shown


def verdict(rows: Sequence[Row], rival: str) -> str:
    """Say in a line who beats the rival, at which k, and who loses to it: by the best of what the rival has."""

    def listed(found: Sequence[Row]) -> str:
        return "; ".join(f"{named(row.method, row.prior_variance)}, k = {row.k}" for row in found) or "none"

    losses = [row for row in rows if row.same and row.best and row.same[2] < 0 and row.best[2] < 0]
    return f"Interval above 0 against {rival}, its best included: {listed(wins(rows))}. Below 0: {listed(losses)}."


def _difference(scores: Sequence[EpisodeScore], a: str, b: str, k: int, k_b: int) -> tuple[float, float, float]:
    found: PairedDifference = paired_difference(scores, a, b, k, k_b=k_b)
    low, high = found["ci95"]
    # One institution says nothing of how institutions differ: its interval is open.
    return found["mean"], -math.inf if low is None else low, math.inf if high is None else high


def _text(interval: tuple[float, float, float] | None) -> str:
    if interval is None:
        return ""
    mean, low, high = interval
    mark = "*" if low > 0 else "-" if high < 0 else " "
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] {mark}"


def _probabilities(spec: ModelSpec, params: Params, x: Matrix, _raw: Matrix) -> Matrix:
    return np.asarray(predict(spec, params, x))
