"""One turn of a bank: an order's meta-parameters in, the privatised meta-update out."""

from dataclasses import replace

import torch

from metarisk_common.algorithms import ALGORITHMS
from metarisk_common.models import DTYPES, build, record_losses, to_arrays, to_tensors
from metarisk_common.params import Params
from metarisk_common.plan import Plan
from metarisk_common.tasks import Task, tasks_of

from .dataset import Dataset
from .dpsgd import private_gradients
from .rng import SecureRandom


def tasks_for(plan: Plan, dataset: Dataset) -> list[Task]:
    """Build a bank's tasks: one for each public name in `plan.tasks`, whether or not the bank has records of it.

    Returns:
        Tasks with Torch tensors in the plan's dtype, `x: (rows, width)` and `y: (rows,)`; rows may be 0.

    """
    x = torch.tensor(dataset.x, dtype=DTYPES[plan.dtype])
    y = torch.tensor(dataset.y, dtype=DTYPES[plan.dtype])
    tasks = tasks_of(dataset.institution, x, y, dataset.segment, plan.tasks, dataset.unit)
    return [task if task.unit is None else replace(task, unit=torch.from_numpy(task.unit)) for task in tasks]


def meta_update(
    meta_params: Params, plan: Plan, tasks: list[Task], *, declared_size: int, width: int, rng: SecureRandom
) -> Params:
    """Run the plan's algorithm with private gradients.

    Released is a sequence of `local_steps` Gaussian mechanisms, each of which `dpsgd` describes; everything
    after them (the steps, their difference, the mean over tasks) is post-processing. A record is in one task
    at most, so over tasks the mechanisms compose in parallel and cost as one. Every size that is divided by is
    public: the declared size, the plan's sample rate and its number of tasks.

    Args:
        meta_params: NumPy arrays in the plan's dtype.
        plan: the approved plan.
        tasks: from `tasks_for`.
        declared_size: the bank's public size.
        width: inputs of the model.
        rng: noise and sampling.

    Returns:
        The meta-update as NumPy arrays, named and shaped as `meta_params`.

    """
    grads_fn = private_gradients(
        build(plan.model, width, plan.dtype),
        record_losses,
        mechanism=plan.mechanism,
        expected_batch_size=plan.mechanism.sample_rate * declared_size / len(tasks),
        rng=rng,
    )
    start = to_tensors(meta_params)
    if plan.inner.algorithm == "reptile":
        # All tasks step together, each at parameters of its own: one stacked "task" to the algorithm.
        each = {name: value.expand(len(tasks), *value.shape) for name, value in start.items()}
        return to_arrays(_mean_over_tasks(ALGORITHMS["reptile"](each, [tasks], grads_fn, plan.inner)))

    def mean_gradient(params: Params, tasks: list[Task]) -> Params:
        each = {name: value.expand(len(tasks), *value.shape) for name, value in params.items()}
        return _mean_over_tasks(grads_fn(each, tasks))

    return to_arrays(ALGORITHMS[plan.inner.algorithm](start, [tasks], mean_gradient, plan.inner))


def _mean_over_tasks(stacked: Params) -> Params:
    return {name: value.mean(0) for name, value in stacked.items()}
