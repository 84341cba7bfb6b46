"""The known noise in a round's mean update: how large it is follows from public constants alone.

Each gradient that a bank releases holds `N(0, (z C)^2)` over its public batch, in every coordinate (`client.dpsgd`).
With n the declared size, q the sample rate, S the number of tasks, each with an S-th of the batch, K local steps of
size a, and v = S (z C)^2 / (q n)^2, the variance of the noise in one coordinate of a bank's update is

| algorithm | variance | why |
|---|---|---|
| reptile, fedavg | a^2 K v | K steps' noise adds up |
| prox | a^2 v sum over k < K of (1 - a L)^(2 k) | the pull of strength L shrinks what k later steps see of it |
| fomaml, anil | 4 v | only the query's gradient is released, over half the batch |
| maml, meta_sgd | 0 | their plans have no noise |

It is exact for one step. With more, a step also sees the loss' curvature H: reptile, fedavg and prox shrink earlier
noise by (I - a H) a step, so the figure is an upper end, by about a fraction a H (K - 1) too high; where a gradient is
clipped or flat it is exact. In fomaml and anil the support's noise moves the place at which the query's gradient is
taken, and with it that gradient by a H times itself, which is left out.

What a bank's Poisson sampling adds depends on its records, is not known and is not counted. Nothing here reads more
than the plan and declared sizes; what is done with it is post-processing of noised updates and costs no privacy.
"""

import math
from collections.abc import Iterable

from metarisk_common.plan import Plan
from metarisk_common.prior import gradient_noise_variance


def update_noise_variance(plan: Plan, declared_size: int) -> float:
    """Variance of the known noise in one coordinate of the update of a bank that declares this size."""
    inner, variance = plan.inner, gradient_noise_variance(plan, declared_size)
    if inner.by_episode:
        return 4 * variance
    kept = 1 - inner.learning_rate * inner.prox_strength
    return inner.learning_rate**2 * variance * math.fsum(kept ** (2 * step) for step in range(inner.local_steps))


def mean_noise_variance(plan: Plan, declared_sizes: Iterable[int]) -> float:
    """Variance of the known noise in one coordinate of a round's weighted mean update.

    Args:
        plan: the run's plan; its aggregator is the mean.
        declared_sizes: of the banks whose updates were admitted, in any order: it changes no bit.

    Raises:
        ValueError: no bank was admitted, or the aggregator is another, whose noise depends on the updates.

    """
    if plan.outer.aggregator != "mean":
        raise ValueError(f'the noise under aggregator = "{plan.outer.aggregator}" is not known')
    sizes = list(declared_sizes)
    if not sizes:
        raise ValueError("no update was admitted")
    weights = sizes if plan.outer.weighting == "declared_size" else [1] * len(sizes)
    pairs = zip(weights, sizes, strict=True)
    return math.fsum(weight**2 * update_noise_variance(plan, size) for weight, size in pairs) / sum(weights) ** 2
