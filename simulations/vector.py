"""All banks in one loop, without messages, processes or ledgers: the pure functions of a round, called directly.

For baselines and for checking the other engines: it must give their numbers.
"""

from collections.abc import Callable, Mapping

import numpy as np

from client.rng import SecureRandom
from client.training import meta_update
from metarisk_common.initialisation import initial_params
from metarisk_common.params import Params
from metarisk_common.plan import Plan
from metarisk_common.tasks import Task
from server.optimizers import optimizer_for, rate_at
from server.robust import aggregator_for


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
    meta = {name: np.asarray(value, np.float64) for name, value in initial_params(plan, width).items()}
    optimizer, aggregator = optimizer_for(plan.outer), aggregator_for(plan.outer)
    state = optimizer.init(meta)
    plan_hash = plan.hash()
    for round_number in range(1, plan.outer.rounds + 1):
        order = {name: np.asarray(value, plan.dtype) for name, value in meta.items()}
        total = aggregator.init(order)
        for name, tasks in banks.items():
            if seed is None:
                rng = SecureRandom.from_system()
            else:
                rng = SecureRandom.seeded(seed, name, plan_hash, round_number)
            update = meta_update(order, plan, tasks, declared_size=sizes[name], width=width, rng=rng)
            total = aggregator.add(total, update, sizes[name] if plan.outer.weighting == "declared_size" else 1)
        state, meta = optimizer.apply(state, meta, aggregator.result(total), rate_at(plan.outer, round_number))
        if on_round is not None:
            on_round(round_number)
    return meta
