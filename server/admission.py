"""The server's judgement of one reply: what is wrong with it, as a constant, or nothing.

A reply that is not admitted changes nothing but the journal. Checks run before the first number is added.
"""

import math
from collections.abc import Mapping

import numpy as np

from metarisk_common.params import Params, l2_norm
from metarisk_common.plan import Plan
from metarisk_common.wire import TrainOrder, TrainReport

from .aggregators import fits

_NOISE_DEVIATIONS = 6.0


def judge(
    report: TrainReport,
    order: TrainOrder,
    plan: Plan,
    *,
    admitted: Mapping[str, str],
    declared_sizes: Mapping[str, int],
) -> str | None:
    """Judge a report against the order that it answers.

    Args:
        report: the decoded reply.
        order: what was sent; `meta_params` gives the shapes and dtype an update must have.
        plan: the run's plan.
        admitted: institutions already admitted in this round, with their receipts.
        declared_sizes: what institutions declared in earlier rounds.

    Returns:
        None if admitted, else one of: "order", "event", "duplicate", "size", "shape", "not-finite", "norm".

    """
    if (report.run_id, report.round, report.plan_hash) != (order.run_id, order.round, order.plan_hash):
        return "order"
    event, mechanism = report.event, plan.mechanism
    promised = (mechanism.noise_multiplier, mechanism.sample_rate, plan.inner.local_steps, "")
    if (event.noise_multiplier, event.sample_rate, event.steps, event.segment) != promised:
        return "event"
    if report.institution in admitted or report.receipt in admitted.values():
        return "duplicate"
    size = report.declared_size
    if not 1 <= size <= plan.outer.max_declared_size or declared_sizes.get(report.institution, size) != size:
        return "size"
    return _judge_update(report.update, order.meta_params, plan, size)


def _judge_update(update: Params, like: Params, plan: Plan, size: int) -> str | None:
    if set(update) != set(like):
        return "shape"
    if any(value.shape != like[name].shape or value.dtype != like[name].dtype for name, value in update.items()):
        return "shape"
    if not all(bool(np.isfinite(value).all()) for value in update.values()):
        return "not-finite"
    # First, so that a plan without clipping has a limit too, and the squares of the norm cannot overflow.
    if not fits(update, size):
        return "norm"
    bound = norm_bound(plan, size, sum(int(np.size(value)) for value in like.values()))
    return "norm" if l2_norm({name: value.astype(np.float64) for name, value in update.items()}) > bound else None


def norm_bound(plan: Plan, declared_size: int, parameters: int) -> float:
    """Largest norm that an honest update of this plan can have, but for a chance below exp(-18).

    A step's clipped sum over a dataset of the declared size has norm at most `C * n` (all records, each
    clipped); the noise of T steps has norm below `sigma C (sqrt(T d) + 6 sqrt(T))` (Gaussian concentration of a
    1-Lipschitz function). Both are divided by the public batch `q n` and multiplied by the learning rate.
    A bank may hold more records than it declares by a little, hence the factor 2 on the first term. With S tasks
    the batch of each is an S-th and the update their mean, so the noise is sqrt(S) times larger.

    Returns:
        `inf` where the plan does not clip.

    """
    mechanism, inner = plan.mechanism, plan.inner
    if mechanism.max_grad_norm is None:
        return math.inf
    batch = mechanism.sample_rate * declared_size
    signal = 2.0 * inner.local_steps * declared_size / batch
    noise = mechanism.noise_multiplier * math.sqrt(inner.local_steps * len(plan.tasks)) / batch
    clipped = signal + noise * (math.sqrt(parameters) + _NOISE_DEVIATIONS)
    return inner.learning_rate * mechanism.max_grad_norm * clipped
