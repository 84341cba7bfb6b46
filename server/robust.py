"""What a lying bank can do to a round is bounded here: aggregators beside the mean, and the choice that a plan makes.

All of it is post-processing of noised updates and costs no privacy. No result depends on the order in which replies
arrive, not even in its last bit.

| aggregator | withstands | memory |
|---|---|---|
| mean | nobody beyond what admission lets through | two integers a parameter |
| norm-bounded mean | no number; each contributes at most its share of `max_update_norm` | the same |
| median | fewer than half of the banks | every update of the round, until its end |
| trimmed mean | up to `floor(trim * n)` of n banks | every update of the round, until its end |

Where every bank is honest, the median pays for it: of Gaussian noise it keeps pi / 2 times the mean's variance.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from metarisk_common.params import Params, scale
from metarisk_common.plan import OuterLoop

from . import aggregators as mean_of
from .aggregators import UNFIT, MeanState, fits, update_norm


class Counted(Protocol):
    """A state that knows how many updates it has taken in."""

    @property
    def count(self) -> int:
        """Number of updates added."""


State = TypeVar("State", bound=Counted)


@dataclass(frozen=True)
class Aggregator(Generic[State]):
    """`init(like)` gives a state; `add(state, update, weight)` the next; `result(state)` the round's update, float64.

    `buffers`: the state holds every update, not only a sum. `add` raises ValueError for an update that is not finite
    or too large or has a weight that does not suit, `result` where nothing was added.
    """

    init: Callable[[Mapping[str, np.ndarray]], State]
    add: Callable[[State, Mapping[str, np.ndarray], int], State]
    result: Callable[[State], Params]
    buffers: bool


@dataclass(frozen=True)
class Buffer:
    """Every update of a round as it came, in its own dtype: for n banks, n times the memory of one update.

    `result` sorts one array of the model at a time, and for that long needs n times that array's memory besides.
    """

    names: tuple[str, ...]
    updates: tuple[Params, ...]

    @property
    def count(self) -> int:
        """Number of updates added."""
        return len(self.updates)


def mean() -> Aggregator[MeanState]:
    """The exact streaming mean by weight; see `server.aggregators`."""
    return Aggregator(mean_of.init, mean_of.add, mean_of.result, buffers=False)


def norm_bounded_mean(max_update_norm: float) -> Aggregator[MeanState]:
    """The exact streaming mean of updates of which each was scaled down to at most `max_update_norm`.

    Norm thresholding after Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 5. However many lie,
    the result is no longer than the bound, to within a rounding; and one update contributes at most the bound times
    its share of the weights.
    """

    def add(state: MeanState, update: Mapping[str, np.ndarray], weight: int) -> MeanState:
        if not fits(update, weight):
            raise ValueError(UNFIT)
        return mean_of.add(state, bounded(update, max_update_norm), weight)

    return Aggregator(mean_of.init, add, mean_of.result, buffers=False)


def bounded(update: Mapping[str, np.ndarray], max_update_norm: float) -> Params:
    """Scale an update down to at most `max_update_norm` in double precision; a smaller one stays as it is."""
    norm = update_norm(update)
    if norm <= max_update_norm:
        return dict(update)
    wide = {name: np.asarray(value, np.float64) for name, value in update.items()}
    return scale(wide, max_update_norm / norm)


def median() -> Aggregator[Buffer]:
    """The median of each coordinate, of an even number the mean of the middle two (Yin et al. 2018, definition 1).

    "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates". While fewer than half of the banks lie,
    every coordinate lies within the range of the honest ones.
    """

    def result(state: Buffer) -> Params:
        return _of_each_array(state, _middle)

    return Aggregator(_empty, _buffered, result, buffers=True)


def trimmed_mean(trim: float) -> Aggregator[Buffer]:
    """The mean of each coordinate without its `cut_of` lowest and highest values (Yin et al. 2018, definition 2).

    While no more banks lie than are cut at each end, every coordinate lies within the range of the honest ones, to
    within the rounding of the exact mean. Where nothing is cut it is that mean, to the bit.
    """

    def result(state: Buffer) -> Params:
        cut = cut_of(trim, state.count)
        return _of_each_array(state, lambda ordered: _mean_of_rows(ordered[cut : state.count - cut]))

    return Aggregator(_empty, _buffered, result, buffers=True)


def cut_of(trim: float, count: int) -> int:
    """`floor(trim * count)` with `trim` as people write it: of 100 a trim of 0.29 cuts 29, not 28."""
    return math.floor(Fraction(repr(trim)) * count)


def aggregator_for(outer: OuterLoop) -> Aggregator[Any]:
    """Build the aggregator that a plan names."""
    if outer.aggregator == "median":
        return median()
    if outer.aggregator == "trimmed_mean":
        return trimmed_mean(outer.trim)
    if outer.max_update_norm is not None:
        return norm_bounded_mean(outer.max_update_norm)
    return mean()


def _empty(like: Mapping[str, np.ndarray]) -> Buffer:
    return Buffer(tuple(like), ())


def _buffered(state: Buffer, update: Mapping[str, np.ndarray], weight: int) -> Buffer:
    if weight != 1:
        raise ValueError("weight must be 1: this aggregator counts every update once")
    # Adding nought makes a copy, and of a negative nought a positive one: sorting cannot tell the two apart.
    own = {name: np.asarray(update[name] + 0.0) for name in state.names}
    if not fits(own, weight):
        raise ValueError(UNFIT)
    return Buffer(state.names, (*state.updates, own))


def _of_each_array(state: Buffer, judge: Callable[[np.ndarray], np.ndarray]) -> Params:
    """Apply `judge` to each array's values from all updates, sorted along the first axis: (updates, *shape)."""
    if state.count == 0:
        raise ValueError("no update was added")
    found = {}
    for name in state.names:
        values = np.stack([update[name] for update in state.updates])
        values.sort(axis=0)  # In place: a sorted copy would be as large again.
        found[name] = judge(values)
    return found


def _middle(ordered: np.ndarray) -> np.ndarray:
    count = len(ordered)
    low, high = ordered[(count - 1) // 2], ordered[count // 2]
    return np.asarray((low.astype(np.float64) + high) / 2)


def _mean_of_rows(rows: np.ndarray) -> np.ndarray:
    state = mean_of.init({"": rows[0]})
    for row in rows:
        state = mean_of.add(state, {"": row}, 1)
    return np.asarray(mean_of.result(state)[""])
