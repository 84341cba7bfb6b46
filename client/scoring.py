"""Two score histograms of a bank's records, noised: the one way in which a metric may leave a bank.

Released is `histograms + N(0, (z m)^2 I)` over all cells of both, with noise multiplier z and at most m records a
privacy unit (m = 1 where the unit is a record). Sensitivity, under zero-out adjacency: a record adds one to one cell,
so a unit moves the cells by at most m in Euclidean norm, reached when all its records fall into one cell. That is one
step of the Gaussian mechanism over all records, a `gaussian_histograms` PrivacyEvent (Dwork and Roth 2014, Theorem
A.1, for histograms). The bins are public constants of the plan, and the counts have no other scale than 1.
"""

from collections.abc import Sequence

import numpy as np

from metarisk_common.histograms import histograms, score_edges
from metarisk_common.models import build, forward, to_tensors
from metarisk_common.params import Params
from metarisk_common.plan import Plan
from metarisk_common.tasks import Task

from .rng import SecureRandom


def noised_histograms(
    meta_params: Params, plan: Plan, tasks: Sequence[Task], *, width: int, rng: SecureRandom
) -> Params:
    """Score the records of all tasks with the meta-parameters and count them with noise.

    Args:
        meta_params: NumPy arrays in the plan's dtype.
        plan: the approved plan, which asks for histograms.
        tasks: from `client.training.tasks_for`; a record is in one of them at most.
        width: inputs of the model.
        rng: the noise.

    Returns:
        "positives" and "negatives", each (bins,) float64.

    Raises:
        ValueError: the plan asks for no histograms.

    """
    if plan.metrics is None:
        raise ValueError("the plan asks for no score histograms")
    edges = score_edges(plan.model.base_rate, plan.metrics.bins)
    model, params = build(plan.model, width, plan.dtype), to_tensors(meta_params)
    logits = np.concatenate([forward(model, params, task.x).detach().numpy() for task in tasks])
    y = np.concatenate([task.y.numpy() for task in tasks])
    std = plan.metrics.noise_multiplier * plan.data.max_records_per_unit
    return {name: count + rng.normal(count.shape, std) for name, count in histograms(logits, y, edges).items()}
