"""What the learned prior needs of a run: each institution's updates, summed over the last quarter of the rounds.

As `init / add / result`, with all of it in the checkpoint. Memory is one model for each institution, and nothing where
the plan does not ask (`outer.learn_prior`). The sums are of noised updates that the server has anyway: what
`metarisk_common.prior` makes of them is post-processing and costs no privacy.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from metarisk_common.params import Params
from metarisk_common.plan import Plan
from metarisk_common.prior import FEWEST, MOST_INPUTS, LearnedPrior, Released, estimate_prior

PriorSums = dict[str, np.ndarray]
"""`NAME-OF-INSTITUTION/rounds`, and `NAME-OF-INSTITUTION/sum/PARAMETER` as float64.

The institution's name stands as the hexadecimal digits of its UTF-8, for it may hold any character.
"""

_SHARE: Final = 4
_ROUNDS: Final = "/rounds"
_SUM: Final = "/sum/"


def last_rounds(plan: Plan) -> int:
    """Give how many of the last rounds count: a quarter, rounded up."""
    return -(-plan.outer.rounds // _SHARE)


def init() -> PriorSums:
    """Start with nothing."""
    return {}


def add(sums: PriorSums, plan: Plan, round_number: int, institution: str, update: Params) -> PriorSums:
    """Add an institution's update of a round, if the plan asks for a prior and the round is one of those that count."""
    if not plan.outer.learn_prior or round_number <= plan.outer.rounds - last_rounds(plan):
        return sums
    key = institution.encode().hex()
    after = {**sums, key + _ROUNDS: np.asarray(int(sums.get(key + _ROUNDS, 0)) + 1, np.int64)}
    for name, value in update.items():
        place = key + _SUM + name
        after[place] = np.asarray(np.asarray(value, np.float64) + sums.get(place, 0.0))
    return after


def result(sums: PriorSums, plan: Plan, declared_sizes: Mapping[str, int], meta_params: Params) -> LearnedPrior | None:
    """Estimate the prior after the last round.

    None where too few institutions took part in the rounds that count, or the model is too wide (`MOST_INPUTS`):
    a run that has learned for hours does not fail at its end over a figure that it can do without.

    Args:
        sums: of the rounds that count.
        plan: the run's plan.
        declared_sizes: by institution.
        meta_params: the learned initialization.

    """
    released = []
    for name in sorted(declared_sizes):
        key = name.encode().hex()
        if key + _ROUNDS in sums:
            rounds = int(sums[key + _ROUNDS])
            mean = {parameter: sums[key + _SUM + parameter] / rounds for parameter in meta_params}
            released.append(Released(mean, rounds, declared_sizes[name]))
    inputs = sum(np.size(value) for value in meta_params.values())
    if len(released) < FEWEST or inputs > MOST_INPUTS:
        return None
    return estimate_prior(plan, meta_params, released, rounds=last_rounds(plan))
