"""Episodes on unseen institutions: every method judged on the same draws, with intervals over institutions.

An episode is one draw of one institution's records: the first k adapt a method, the rest judge it. All methods and all
k share the draw and so the judged records, which makes every comparison paired. Institutions are the sample: draws
are averaged within one first, and intervals speak of institutions like these, not of the records of these.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from .intervals import estimate, worst_decile
from .tasks import FewShotDraw, few_shot_draw, few_shot_in_time
from .yardsticks import CREDIT, YARDSTICKS, Yardstick

Matrix = npt.NDArray[Any]
Seed = tuple[str | int, ...]
PLACE = ("institution", "k", "draw", "method")
"""What a score is of: the keys beside the measures in its flat form."""
_LOWER_IS_BETTER = frozenset().union(*(each.lower_is_better for each in YARDSTICKS.values()))


@dataclass(frozen=True)
class EvaluationSet:
    """One institution's records, held out from learning, in the two forms that methods ask for.

    `x: (rows, width) float32` encoded inputs of the federated model; `raw: (rows, columns) float64` inputs without
    bins, NaN where missing, for baselines; `y: (rows,)` outcomes 0 and 1, or numbers. `extra`: (rows,) arrays by name
    that the yardstick or the draw asks for: amounts, days.
    """

    institution: str
    x: Matrix
    raw: Matrix
    y: Matrix
    extra: Mapping[str, Matrix] = field(default_factory=dict)


@dataclass(frozen=True)
class EpisodeScore:
    """How one method did on one institution's draw after `k` labels; `values` by the yardstick's names."""

    institution: str
    k: int
    draw: int
    method: str
    values: Mapping[str, float]

    def __getitem__(self, metric: str) -> float:
        """Return one measure."""
        return self.values[metric]

    def __hash__(self) -> int:
        """Hash what was judged, with the values in order."""
        return hash((self.institution, self.k, self.draw, self.method, tuple(self.values.items())))

    def to_json(self) -> dict[str, Any]:
        """Return it flat: every measure beside what it is of."""
        place = self.institution, self.k, self.draw, self.method
        return {**dict(zip(PLACE, place, strict=True)), **self.values}


class DrawRule(Protocol):
    """Which of an institution's records adapt and which judge."""

    def __call__(
        self, dataset: EvaluationSet, /, *, k_min: int, k_max: int, seed_parts: Seed, where: str
    ) -> FewShotDraw:
        """Draw once; see `metarisk_common.tasks`."""


def at_random(
    dataset: EvaluationSet, *, k_min: int, k_max: int, seed_parts: Seed, where: str, min_positives: int = 1
) -> FewShotDraw:
    """Draw as `few_shot_draw` does."""
    return few_shot_draw(
        dataset.y, k_min=k_min, k_max=k_max, seed_parts=seed_parts, where=where, min_positives=min_positives
    )


def in_time(
    dataset: EvaluationSet,
    *,
    k_min: int,  # noqa: ARG001 - supports of all sizes end at the same moment
    k_max: int,
    seed_parts: Seed,
    where: str,
    embargo: float,
    least_judged: int,
) -> FewShotDraw:
    """Draw as `few_shot_in_time` does, by `extra["day"]`."""
    return few_shot_in_time(
        dataset.extra["day"],
        k_max=k_max,
        embargo=embargo,
        least_judged=least_judged,
        seed_parts=seed_parts,
        where=where,
    )


class Predictor(Protocol):
    """What a method becomes once it has seen its labels."""

    def __call__(self, x: Matrix, raw: Matrix, /) -> Matrix:
        """Return `(rows,)` probabilities, or forecasts in the label's units, for records in both forms."""


class Method(Protocol):
    """A way to score an institution that has k labels of its own."""

    @property
    def name(self) -> str:
        """Key of the method in scores and summaries."""

    @property
    def needs_support(self) -> bool:
        """Whether it says nothing without labels, so that there is no figure at k = 0."""

    def fit(self, x: Matrix, raw: Matrix, y: Matrix, /) -> Predictor:
        """Learn from k labelled records; k = 0 comes as empty arrays. One that ignores them returns one same object."""


@dataclass(frozen=True)
class Wrapped:
    """What a method around another has of it: the name, and whether it says nothing without labels."""

    method: Method

    @property
    def name(self) -> str:
        """Key of the method."""
        return self.method.name

    @property
    def needs_support(self) -> bool:
        """Whether the method says nothing without labels."""
        return self.method.needs_support


Summary = dict[str, Any]
"""One method after k labels, over institutions: an `Estimate` for each measure, `worst_decile` and `institutions`."""


class PairedDifference(TypedDict):
    """Method less method, institution by institution; a win is an institution where the first one does better."""

    mean: float
    ci95: list[float | None]
    wins: int
    losses: int
    by_institution: dict[str, float]


def run_episodes(
    datasets: Sequence[EvaluationSet],
    methods: Sequence[Method],
    ks: Sequence[int],
    *,
    draws: int,
    seed: int,
    yardstick: Yardstick = CREDIT,
    draw: DrawRule = at_random,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[EpisodeScore]:
    """Score every method at every k on the same draws of every institution.

    Args:
        datasets: unseen institutions, each named once.
        methods: what to compare; one that `needs_support` is left out at k = 0.
        ks: numbers of labels; 0 is the initialization as it stands. The supports are nested.
        draws: draws of each institution.
        seed: public seed; with the institution's name and the draw's number it fixes the draw.
        yardstick: what to measure by.
        draw: how records to adapt to and to judge are chosen.
        on_progress: called with (draws done, draws in all).

    Raises:
        DataError: an institution, named, has too few records or outcomes for the largest k.
        ValueError: nothing to do, a name stands twice, or a method returns something other than probabilities.

    """
    _unique("institution", [dataset.institution for dataset in datasets])
    _unique("method", [method.name for method in methods])
    _unique("k", list(ks))
    if min(ks) < 0 or draws < 1:
        raise ValueError("ks must be 0 or more, and draws at least 1")
    # Without labels to learn from, the records to judge are drawn as for the smallest number of them.
    positive = [k for k in ks if k > 0] or [2]
    scores: list[EpisodeScore] = []
    for index, dataset in enumerate(datasets):
        for number in range(draws):
            chosen = draw(
                dataset,
                k_min=min(positive),
                k_max=max(positive),
                seed_parts=(seed, dataset.institution, number),
                where=f"institution '{dataset.institution}'",
            )
            for method in methods:
                found = _episode(dataset, chosen, method, ks, yardstick)
                scores.extend(EpisodeScore(dataset.institution, k, number, method.name, s) for k, s in found.items())
            if on_progress is not None:
                on_progress(index * draws + number + 1, len(datasets) * draws)
    return scores


def summarise(
    scores: Iterable[EpisodeScore], yardstick: Yardstick = CREDIT, *, cluster: Callable[[str], str] = str
) -> dict[str, dict[str, Summary]]:
    """Summarise scores by method and by k as text, ready for JSON.

    Draws are averaged within an institution; the mean and the 95% interval (Student's t) are over institutions. The
    worst decile is the mean over the tenth of the institutions (rounded up) with the lowest headline measure. A measure
    that some institution has no figure of, for want of what it needs, is left out.

    Where what is judged are several tasks of an institution, `cluster` gives the institution of a task's name, and the
    intervals are over these; see `intervals.estimate`.
    """
    cells: dict[tuple[str, int], dict[str, list[EpisodeScore]]] = defaultdict(lambda: defaultdict(list))
    for score in scores:
        cells[score.method, score.k][score.institution].append(score)
    summary: dict[str, dict[str, Summary]] = {}
    for (method, k), by_institution in sorted(cells.items()):
        known = set.intersection(*(set(score.values) for own in by_institution.values() for score in own))
        metrics = [metric for metric in yardstick.metrics if metric in known]
        ordered = [own for _, own in sorted(by_institution.items())]
        whose = [cluster(name) for name in sorted(by_institution)]
        values = {metric: np.array([_mean(own, metric) for own in ordered]) for metric in metrics}
        summary.setdefault(method, {})[str(k)] = {
            **{metric: estimate(found, whose) for metric, found in values.items()},
            "worst_decile": {yardstick.headline: worst_decile(values[yardstick.headline])},
            "institutions": len(by_institution),
        }
    return summary


def paired_difference(
    scores: Iterable[EpisodeScore],
    method_a: str,
    method_b: str,
    k: int,
    metric: str = CREDIT.headline,
    *,
    k_b: int | None = None,
    cluster: Callable[[str], str] = str,
) -> PairedDifference:
    """Compare `method_a` at `k` with `method_b` at `k_b` (the same k where none is given) on the same draws.

    Draws are averaged within an institution; mean and 95% interval (Student's t) are over institutions. The difference
    is a less b in the metric's own unit; where the smaller value is better, a win is a difference below 0. `cluster`
    as in `summarise`.

    Raises:
        ValueError: the two were not scored, or not on the same draws.

    """
    other = k if k_b is None else k_b
    a, b = _by_draw(scores := list(scores), method_a, k, metric), _by_draw(scores, method_b, other, metric)
    if not a or a.keys() != b.keys():
        raise ValueError(f"'{method_a}' at k={k} and '{method_b}' at k={other} were not scored on the same draws")
    differences: dict[str, list[float]] = defaultdict(list)
    for (institution, draw), value in sorted(a.items()):
        differences[institution].append(value - b[institution, draw])
    by_institution = {institution: float(np.mean(own)) for institution, own in differences.items()}
    values = np.array(list(by_institution.values()))
    better = -values if metric in _LOWER_IS_BETTER else values
    return {
        **estimate(values, [cluster(name) for name in by_institution]),
        "wins": int(np.count_nonzero(better > 0)),
        "losses": int(np.count_nonzero(better < 0)),
        "by_institution": by_institution,
    }


def share_harmed(
    scores: Iterable[EpisodeScore], method: str, k: int, *, metric: str = CREDIT.headline, tolerance: float = 0.005
) -> float:
    """Share of draws on which adapting to k labels lowered the metric by more than `tolerance` against k = 0.

    Raises:
        ValueError: the method was not scored at both, on the same draws.

    """
    after, before = _by_draw(scores := list(scores), method, k, metric), _by_draw(scores, method, 0, metric)
    if not after or after.keys() != before.keys():
        raise ValueError(f"'{method}' was not scored at k={k} and at k=0 on the same draws")
    return float(np.mean([before[key] - value > tolerance for key, value in after.items()]))


def _episode(
    dataset: EvaluationSet, chosen: FewShotDraw, method: Method, ks: Sequence[int], yardstick: Yardstick
) -> dict[int, dict[str, float]]:
    query = chosen.query
    x, raw, y = dataset.x[query], dataset.raw[query], dataset.y[query]
    extra = {name: values[query] for name, values in dataset.extra.items()}
    found: dict[int, dict[str, float]] = {}
    previous: tuple[Predictor, dict[str, float]] | None = None
    for k in ks:
        if k == 0 and method.needs_support:
            continue
        rows = chosen.support[:k]
        predictor = method.fit(dataset.x[rows], dataset.raw[rows], dataset.y[rows])
        # A method that ignores its labels returns one same predictor, whose scores on these records are known.
        if previous is None or predictor is not previous[0]:
            try:
                previous = predictor, yardstick.score(y, predictor(x, raw), extra)
            except ValueError as error:
                raise ValueError(
                    f"method '{method.name}' at k={k} on institution '{dataset.institution}': {error}"
                ) from error
        found[k] = previous[1]
    return found


def _by_draw(scores: Iterable[EpisodeScore], method: str, k: int, metric: str) -> dict[tuple[str, int], float]:
    return {
        (score.institution, score.draw): score[metric] for score in scores if score.method == method and score.k == k
    }


def _mean(scores: Sequence[EpisodeScore], metric: str) -> float:
    return float(np.mean([score[metric] for score in scores]))


def _unique(what: str, values: Sequence[object]) -> None:
    if not values:
        raise ValueError(f"there is no {what} to evaluate")
    if len(set(values)) < len(values):
        raise ValueError(f"one {what} stands twice among those to evaluate")
