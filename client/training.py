"""One turn of a bank: an order's meta-parameters in, the privatised meta-update out."""

import torch

from metarisk_common.algorithms import ALGORITHMS
from metarisk_common.models import DTYPES, build, record_losses, to_arrays, to_tensors
from metarisk_common.params import Params
from metarisk_common.plan import Plan
from metarisk_common.tasks import Task, tasks_of

from .dataset import Dataset
from .dpsgd import private_gradient
from .rng import SecureRandom


def tasks_for(plan: Plan, dataset: Dataset) -> list[Task]:
    """Build a bank's tasks: one for each public name in `plan.tasks`, whether or not the bank has records of it.

    Returns:
        Tasks with Torch tensors in the plan's dtype, `x: (rows, width)` and `y: (rows,)`; rows may be 0.

    """
    x = torch.tensor(dataset.x, dtype=DTYPES[plan.dtype])
    y = torch.tensor(dataset.y, dtype=DTYPES[plan.dtype])
    return tasks_of(dataset.institution, x, y, dataset.segment, plan.tasks)


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
    grad_fn = private_gradient(
        build(plan.model, width, plan.dtype),
        record_losses,
        mechanism=plan.mechanism,
        expected_batch_size=plan.mechanism.sample_rate * declared_size / len(tasks),
        rng=rng,
    )
    algorithm = ALGORITHMS[plan.inner.algorithm]
    return to_arrays(algorithm(to_tensors(meta_params), tasks, grad_fn, plan.inner))
