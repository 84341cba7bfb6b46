"""The mean of a round's updates, as `init / add / result`: a reply is added and can be forgotten.

Memory is two integers a parameter, however many banks there are. The sum is exact: it does not depend on the
order in which replies arrive, so a round gives the same bits on one core, on many, and after a restart.
`server.robust` has the other aggregators, and the choice among all that a plan makes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from metarisk_common.params import Params, l2_norm

_BITS: Final = 62
LARGEST: Final = float(2**42)
"""Terms, weight included, must be below it in magnitude."""
MOST: Final = 2**20
"""Updates that one sum can hold: that many terms below `LARGEST` stay within 64 bits."""
UNFIT: Final = "the update is not finite or too large to add"


@dataclass(frozen=True)
class MeanState:
    """Running weighted sum in fixed point, `whole + parts * 2^-62` with `0 <= parts < 2^62`, and the total weight."""

    whole: dict[str, np.ndarray]
    parts: dict[str, np.ndarray]
    weight: int
    count: int


def init(like: Mapping[str, np.ndarray]) -> MeanState:
    """Start an empty sum for parameters shaped as `like`."""
    return MeanState(
        whole={name: np.zeros(value.shape, np.int64) for name, value in like.items()},
        parts={name: np.zeros(value.shape, np.int64) for name, value in like.items()},
        weight=0,
        count=0,
    )


def fits(update: Mapping[str, np.ndarray], weight: int) -> bool:
    """Tell whether `weight * update` may be added: every term is finite and below `LARGEST`."""
    return all(bool(np.all(np.abs(value) < LARGEST / weight)) for value in update.values())


def update_norm(update: Mapping[str, np.ndarray]) -> float:
    """L2 norm of all values together, in double precision; the order of names and the memory's layout change no bit."""
    return l2_norm({name: np.asarray(update[name], np.float64, order="C") for name in sorted(update)})


def add(state: MeanState, update: Mapping[str, np.ndarray], weight: int) -> MeanState:
    """Add `weight * update`; each term is rounded once, to a multiple of 2^-62, and then summed as integers.

    Raises:
        ValueError: the weight is not a positive integer, the update does not `fits`, or `MOST` were added before.

    """
    if weight < 1:
        raise ValueError("weight must be a positive integer")
    if state.count >= MOST:
        raise ValueError(f"a sum holds at most {MOST} updates")
    if not fits({name: update[name] for name in state.whole}, weight):
        raise ValueError(UNFIT)
    wholes, parts = {}, {}
    for name, whole_before in state.whole.items():
        term = np.asarray(update[name], np.float64) * weight
        # Cutting a number off at the point is exact, and so is scaling by a power of two: only `rint` rounds.
        whole = np.trunc(term)
        part = state.parts[name] + np.rint((term - whole) * 2.0**_BITS).astype(np.int64)
        wholes[name] = whole_before + whole.astype(np.int64) + (part >> _BITS)
        parts[name] = part & ((1 << _BITS) - 1)
    return MeanState(wholes, parts, state.weight + weight, state.count + 1)


def result(state: MeanState) -> Params:
    """Return the weighted mean as float64 arrays.

    Raises:
        ValueError: nothing was added.

    """
    if state.weight == 0:
        raise ValueError("no update was added")
    mean = {}
    for name, whole in state.whole.items():
        # Round to the nearest whole first: -1 + 0.999... would lose the digits of a small negative sum.
        up = state.parts[name] >> (_BITS - 1)
        rest = state.parts[name] - (up << _BITS)
        mean[name] = ((whole + up) + rest * 2.0**-_BITS) / state.weight
    return mean
