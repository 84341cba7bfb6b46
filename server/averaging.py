"""Tail averaging: the run's result as the mean of the last rounds' meta-parameters.

Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; of the last rounds only, after
Rakhlin, Shamir and Sridharan 2012, "Making Gradient Descent Optimal", section 5. The rounds themselves go on from the
newest meta-parameters, not from the mean. Once the last round is done the mean takes their place, so that what is
exported, evaluated and judged by score histograms is one and the same.

An average of what follows from noised updates is post-processing and costs no privacy.
"""

import math
from fractions import Fraction

import numpy as np

from metarisk_common.params import Params, add, scale
from metarisk_common.plan import OuterLoop

TailState = dict[str, np.ndarray]
"""`sum/NAME`, float64, and `rounds`, how many were added; empty before the first. All of it is in the checkpoint."""

_SUM = "sum/"


def tail_rounds(outer: OuterLoop) -> int:
    """Give the number of rounds that are averaged, with the share as people write it, rounded up."""
    return math.ceil(Fraction(repr(outer.tail_averaging)) * outer.rounds)


def add_round(tail: TailState, outer: OuterLoop, round_number: int, meta_params: Params) -> TailState:
    """Add a round's meta-parameters if it is one of the last; a round below the quorum counts with those it kept."""
    if round_number <= outer.rounds - tail_rounds(outer):
        return tail
    before = {name: tail[_SUM + name] for name in meta_params} if tail else scale(meta_params, 0.0)
    rounds = int(tail["rounds"]) + 1 if tail else 1
    return {
        "rounds": np.asarray(rounds, np.int64),
        **{_SUM + name: value for name, value in add(before, meta_params).items()},
    }


def averaged(tail: TailState, meta_params: Params) -> Params:
    """Give the mean over the rounds that were added; `meta_params` where there are none."""
    if not tail:
        return meta_params
    return scale({name: tail[_SUM + name] for name in meta_params}, 1 / int(tail["rounds"]))
