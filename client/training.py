"""One turn of a bank: an order's meta-parameters in, the privatised meta-update out."""

from dataclasses import replace

import torch

from metarisk_common.algorithms import ALGORITHMS
from metarisk_common.models import DTYPES, build, record_loss, to_arrays, to_tensors
from metarisk_common.params import Params
from metarisk_common.plan import Plan
from metarisk_common.tasks import Episode, Task, tasks_of

from .dataset import Dataset
from .dpsgd import differentiable_gradient, private_gradients
from .episodes import episode_of
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

    Released is a sequence of Gaussian mechanisms, each of which `dpsgd` describes; everything after them (the steps,
    their difference, the mean over tasks) is post-processing. A record is in one task at most, so over tasks the
    mechanisms compose in parallel and cost as one. Every size that is divided by is public: the declared size, the
    plan's sample rate, its number of tasks and, under `fomaml` and `anil`, the two sides of an episode.

    Reptile, FedAvg and prox take `local_steps` mechanisms, each over all of a task's records. FOMAML and ANIL take
    `local_steps` over the support and then one over the query, at the parameters that the support's noised steps led
    to; that last one is what is released. A record is on one side by a rule on that record alone (`episodes`), so the
    two compose in parallel: on the support's side it costs `local_steps` mechanisms, on the query's one, and never
    more than the `local_steps` that the plan charges. MAML and Meta-SGD are not private; their plans have no noise.

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
    inner, mechanism = plan.inner, plan.mechanism
    algorithm = ALGORITHMS[inner.algorithm]
    model, loss = build(plan.model, width, plan.dtype), record_loss(plan.model)
    batch = mechanism.sample_rate * declared_size / len(tasks) / (2 if inner.by_episode else 1)
    start = to_tensors(meta_params)
    episodes = [episode_of(task) for task in tasks] if inner.by_episode else []
    if inner.second_order:
        grad_fn = differentiable_gradient(
            model, loss, sample_rate=mechanism.sample_rate, expected_batch_size=batch, rng=rng
        )
        return to_arrays(algorithm(start, episodes, grad_fn, inner))
    grads_fn = private_gradients(model, loss, mechanism=mechanism, expected_batch_size=batch, rng=rng)
    if inner.algorithm == "fedavg":

        def mean_gradient(params: Params, tasks: list[Task]) -> Params:
            return _mean_over_tasks(grads_fn(_for_each(tasks, params), tasks))

        return to_arrays(algorithm(start, [tasks], mean_gradient, inner))
    # All tasks step together, each at parameters of its own: one stacked "task", or episode, to the algorithm.
    stacked = Episode([one.support for one in episodes], [one.query for one in episodes]) if episodes else tasks
    return to_arrays(_mean_over_tasks(algorithm(_for_each(tasks, start), [stacked], grads_fn, inner)))


def _for_each(tasks: list[Task], params: Params) -> Params:
    return {name: value.expand(len(tasks), *value.shape) for name, value in params.items()}


def _mean_over_tasks(stacked: Params) -> Params:
    return {name: value.mean(0) for name, value in stacked.items()}
