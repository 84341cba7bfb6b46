"""Tasks (one segment of one institution) and few-shot draws: which records adapt a model and which judge it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import numpy as np
from scipy.stats import hypergeom

from .errors import DataError
from .params import Array

WHOLE_INSTITUTION: Final = ""
"""Segment of a task that holds all records of its institution."""

_DRAWS_AT_ONCE: Final = 1024


@dataclass(frozen=True)
class Task:
    """Records of one segment of one institution; `x` and `y` are arrays or tensors with rows aligned.

    `unit`: (rows,) int64 from 0 without gaps, the same number for records of the same privacy unit (a customer, say),
    which are protected together; None where every record is a unit of its own.
    """

    institution: str
    segment: str
    x: Array
    y: Array
    unit: Array | None = None


T = TypeVar("T")


@dataclass(frozen=True)
class Episode(Generic[T]):
    """What a task adapts on and what it is judged on: two tasks, or two lists of tasks, without a record in common."""

    support: T
    query: T


@dataclass(frozen=True)
class FewShotDraw:
    """One order of a task's records. The first `k` of `support` adapt the model, `query` judges it, for every `k`.

    Attributes:
        support: (k_max,) int64 row numbers; supports of different sizes are nested.
        query: (rows - k_max,) int64 row numbers, the same for every k and disjoint from the support.

    """

    support: np.ndarray
    query: np.ndarray


def tasks_of(
    institution: str,
    x: Array,
    y: Array,
    segment: np.ndarray | None,
    names: Sequence[str],
    unit: np.ndarray | None = None,
) -> list[Task]:
    """Cut an institution's records into the tasks of a public list, one for each name in its order.

    A record's segment is a public rule on that record alone, so the tasks' records are disjoint. Which segments
    occur is private: a task comes for every name, with no rows where the institution has none.

    Args:
        institution: its name.
        x: (rows, width) inputs, an array or a tensor.
        y: (rows,) labels, likewise.
        segment: (rows,) of str; may be None where the only name is `WHOLE_INSTITUTION`.
        names: public segments; `WHOLE_INSTITUTION` alone for all records as one task.
        unit: (rows,) int64, whose each record is; None where every record is a unit of its own.

    Raises:
        DataError: tasks by segment are asked for and the records have none.

    """
    if tuple(names) == (WHOLE_INSTITUTION,):
        return [Task(institution, WHOLE_INSTITUTION, x, y, _renumbered(unit))]
    if segment is None:
        raise DataError(f"{institution}: the records have no segment; name a segment column in the schema")
    rows_of = {name: np.flatnonzero(segment == name) for name in names}
    return [
        Task(institution, name, x[rows], y[rows], None if unit is None else _renumbered(unit[rows]))
        for name, rows in rows_of.items()
    ]


def _renumbered(unit: np.ndarray | None) -> np.ndarray | None:
    """Number units from 0 without gaps."""
    return None if unit is None else np.unique(unit, return_inverse=True)[1].astype(np.int64)


def few_shot_draw(
    y: np.ndarray,
    *,
    k_min: int,
    k_max: int,
    seed_parts: tuple[str | int, ...],
    where: str,
    min_positives: int = 1,
) -> FewShotDraw:
    """Draw a random order of the records, given that support and query can both be learned from and judged.

    The order is uniform among those whose first `k_min` records, and whose records after the first `k_max`,
    hold both classes. It is drawn by rejection on the class counts of those stretches, which has the
    distribution of shuffling again until they fit, without shuffling every time.

    With `min_positives` above 1 the first `k_min` records hold at least that many positives. Such a support is
    selected on its labels: where positives are rarer than `min_positives / k_min`, their share in it is above that of
    the records it stands for, and a model that takes the support for a plain sample predicts too high. Log-loss, Brier
    and calibration feel it, and rankings may, unless the intercept is corrected by the known share before the other
    weights are adapted (prior correction: King and Zeng 2001, "Logistic Regression in Rare Events Data", section 4.1).

    Args:
        y: (rows,) labels 0 or 1.
        k_min: the smallest support that will be used.
        k_max: the largest support; the query starts after it.
        seed_parts: what the draw is for (e.g. a seed, the institution, a number); same parts, same draw.
        where: names the institution in the error.
        min_positives: the least number of positives in the smallest support.

    Raises:
        DataError: no order fits: too few records, or too few of one class.
        ValueError: `k_min` and `k_max` are not in order, or `k_min` has no room for `min_positives` and a negative.

    """
    rows = len(y)
    positive = np.asarray(y) > 0.5  # noqa: PLR2004 - halfway between the two labels
    positives = int(np.count_nonzero(positive))
    if not 2 <= k_min <= k_max:  # noqa: PLR2004 - one record of each class
        raise ValueError(f"k_min must be at least 2 and at most k_max, not {k_min} and {k_max}")
    if not 1 <= min_positives < k_min:
        raise ValueError(f"min_positives must be at least 1 and below k_min = {k_min}, not {min_positives}")
    if 1 < min_positives >= positives:
        raise DataError(
            f"{where}: {positives} positive records are too few; supports with at least {min_positives} of them need "
            "one more to judge by",
        )
    if rows < k_max + 2 or min(positives, rows - positives) < 2:  # noqa: PLR2004 - one of each class in both parts
        raise DataError(
            f"{where}: too few records for supports of {k_min} to {k_max}; a draw needs at least {k_max + 2} records, "
            "with at least 2 of each class",
        )
    random = np.random.default_rng(_seed(seed_parts))
    sizes = np.array([k_min, k_max - k_min, rows - k_max])
    while True:
        hits = _class_counts(random, sizes, positives, min_positives)
        both = (hits > 0) & (hits < sizes)
        fits = np.flatnonzero(both[:, 0] & both[:, 2])
        if len(fits):
            break
    first = hits[fits[0]]
    ends = np.cumsum(first)[:-1], np.cumsum(sizes - first)[:-1]
    of_positives = np.split(random.permutation(np.flatnonzero(positive)), ends[0])
    of_negatives = np.split(random.permutation(np.flatnonzero(~positive)), ends[1])
    smallest, rest, query = (
        random.permutation(np.concatenate(pair)) for pair in zip(of_positives, of_negatives, strict=True)
    )
    return FewShotDraw(support=np.concatenate([smallest, rest]), query=query)


def _class_counts(random: np.random.Generator, sizes: np.ndarray, positives: int, least: int) -> np.ndarray:
    """Return (draws, 3): positives in each stretch of a random order, given at least `least` in the first.

    Where `least` is above 1, supports with as many may be too rare to wait for: the first stretch's count comes from
    its own distribution (hypergeometric) above the limit, and the others' given that. It is the same law.
    """
    if least == 1:
        return random.multivariate_hypergeometric(sizes, positives, size=_DRAWS_AT_ONCE)
    counts = np.arange(least, min(int(sizes[0]), positives) + 1)
    log_chance = hypergeom.logpmf(counts, int(sizes.sum()), positives, int(sizes[0]))
    chance = np.exp(log_chance - log_chance.max())
    first = random.choice(counts, size=_DRAWS_AT_ONCE, p=chance / chance.sum())
    second = random.hypergeometric(positives - first, sizes[1:].sum() - positives + first, int(sizes[1]))
    return np.column_stack([first, second, positives - first - second])


def few_shot_in_time(
    time: np.ndarray, *, k_max: int, embargo: float, least_judged: int, seed_parts: tuple[str | int, ...], where: str
) -> FewShotDraw:
    """Draw a moment: the last `k_max` records before it, less an embargo, adapt; what comes from then on judges.

    The moment is uniform among the distinct times that leave enough on both sides. Every record of the support lies
    more than `embargo` before every record that is judged, so that a label that takes that long to be known, or that
    looks that far ahead, shares nothing with what it is judged on.

    Args:
        time: (rows,) numbers, days say; the support is nested with the most recent record first.
        k_max: the largest support.
        embargo: in the unit of `time`, 0 or more.
        least_judged: the least number of records from the moment on.
        seed_parts: as in `few_shot_draw`.
        where: names the institution in the error.

    Raises:
        DataError: no moment leaves enough records on both sides.

    """
    when = np.asarray(time, dtype=np.float64)
    order = np.argsort(when, kind="stable")
    moments = np.unique(when)
    before = np.searchsorted(when[order], moments - embargo, side="left")
    after = len(when) - np.searchsorted(when[order], moments, side="left")
    fits = np.flatnonzero((before >= k_max) & (after >= least_judged))
    if not len(fits):
        raise DataError(
            f"{where}: no moment has {k_max} records more than {embargo:g} before it and {least_judged} from it on"
        )
    at = int(np.random.default_rng(_seed(seed_parts)).choice(fits))
    last = int(before[at])
    return FewShotDraw(support=order[last - k_max : last][::-1], query=order[len(when) - int(after[at]) :])


def _seed(parts: tuple[str | int, ...]) -> int:
    # JSON keeps the parts apart: ("a", 1), ("a1",) and ("a", "1") are three seeds.
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest(), "big")
