"""All banks in one loop, without messages, processes or ledgers: the pure functions of a round, called directly.

For baselines and for checking the other engines: it must give their numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from client.rng import SecureRandom
from client.training import meta_update
from metarisk_common.initialisation import initial_params
from metarisk_common.params import Params
from metarisk_common.plan import Plan
from metarisk_common.prior import LearnedPrior
from metarisk_common.tasks import Task
from server import prior_sums
from server.robust import aggregator_for
from server.state import end_round, initial_state


def train(
    plan: Plan,
    banks: Mapping[str, list[Task]],
    sizes: Mapping[str, int],
    *,
    width: int,
    seed: int | None,
    on_round: Callable[[int], None] | None = None,
) -> Params:
    """Play a plan's rounds over banks in memory.

    Args:
        plan: the plan; its noise is added as at the banks.
        banks: each bank's tasks, from `client.training.tasks_for`.
        sizes: declared sizes.
        width: inputs of the model.
        seed: of the noise, drawn exactly as the banks draw it; None for the system's randomness.
        on_round: told each round's number when it is done.

    Returns:
        The meta-parameters as float64 arrays.

    """
    return learn(plan, banks, sizes, width=width, seed=seed, on_round=on_round).meta_params


@dataclass(frozen=True)
class Learned:
    """What a run leaves: the meta-parameters as float64 arrays and, where the plan asks, the learned prior."""

    meta_params: Params
    prior: LearnedPrior | None


def learn(
    plan: Plan,
    banks: Mapping[str, list[Task]],
    sizes: Mapping[str, int],
    *,
    width: int,
    seed: int | None,
    on_round: Callable[[int], None] | None = None,
) -> Learned:
    """Play a plan's rounds as `train` does, which names the arguments, and keep all that the server would."""
    state = initial_state("", plan, initial_params(plan, width))
    aggregator, prior = aggregator_for(plan.outer), prior_sums.init()
    for round_number in range(1, plan.outer.rounds + 1):
        order = {name: np.asarray(value, plan.dtype) for name, value in state.meta_params.items()}
        total = aggregator.init(order)
        for name, tasks in banks.items():
            if seed is None:
                rng = SecureRandom.from_system()
            else:
                rng = SecureRandom.seeded(seed, name, state.plan_hash, round_number)
            update = meta_update(order, plan, tasks, declared_size=sizes[name], width=width, rng=rng)
            total = aggregator.add(total, update, sizes[name] if plan.outer.weighting == "declared_size" else 1)
            prior = prior_sums.add(prior, plan, round_number, name, update)
        state = end_round(state, plan, round_number, aggregator.result(total), [sizes[name] for name in banks])
        if on_round is not None:
            on_round(round_number)
    learned = prior_sums.result(prior, plan, sizes, state.meta_params) if plan.outer.learn_prior else None
    return Learned(state.meta_params, learned)
