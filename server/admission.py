"""The server's judgement of one reply: what is wrong with it, as a constant, or nothing.

A reply that is not admitted changes nothing but the journal. Checks run before the first number is added. What
needs no report to be judged, or who was asked, is judged in `strategy`: "protocol", "flower-error-CODE", "node" (it
was not asked), "duplicate" (it has answered), "name" (not the institution that the operator pinned to the node).
"""

import math
from collections.abc import Mapping

import numpy as np

from metarisk_common.histograms import NEGATIVES, POSITIVES
from metarisk_common.params import Params
from metarisk_common.plan import Plan
from metarisk_common.wire import EvaluateOrder, EvaluateReport, TrainOrder, TrainReport

from .aggregators import fits, update_norm

_NOISE_DEVIATIONS = 6.0


def judge(
    report: TrainReport,
    order: TrainOrder,
    plan: Plan,
    *,
    admitted: Mapping[str, str],
    declared_sizes: Mapping[str, int],
    ledgers: Mapping[str, tuple[int, str]],
) -> str | None:
    """Judge a report against the order that it answers.

    Args:
        report: the decoded reply.
        order: what was sent; `meta_params` gives the shapes and dtype an update must have.
        plan: the run's plan.
        admitted: institutions already admitted in this round, with their receipts.
        declared_sizes: what institutions declared in earlier rounds.
        ledgers: the newest entry heard of each institution's ledger in earlier rounds, (counter, receipt).

    Returns:
        None if admitted, else one of: "order", "event", "duplicate", "ledger", "size", "shape", "not-finite", "norm".

    """
    evaluates = isinstance(order, EvaluateOrder)
    answered = (report.run_id, report.round, report.plan_hash, isinstance(report, EvaluateReport))
    if answered != (order.run_id, order.round, order.plan_hash, evaluates):
        return "order"
    if report.event != (plan.evaluate_event() if evaluates else plan.train_event()):
        return "event"
    if report.institution in admitted or report.receipt in admitted.values():
        return "duplicate"
    if report.counter <= ledgers.get(report.institution, (0, ""))[0]:
        # Every release has an entry of its own, after all earlier ones: this ledger has gone back.
        return "ledger"
    size = report.declared_size
    if not 1 <= size <= plan.outer.max_declared_size or declared_sizes.get(report.institution, size) != size:
        return "size"
    found = report.update
    return _judge_histograms(found, plan, size) if evaluates else _judge_update(found, order.meta_params, plan, size)


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
    return "norm" if update_norm(update) > bound else None


def _judge_histograms(found: Params, plan: Plan, size: int) -> str | None:
    bins, noise_multiplier = (0, 0.0) if plan.metrics is None else (plan.metrics.bins, plan.metrics.noise_multiplier)
    if set(found) != {POSITIVES, NEGATIVES}:
        return "shape"
    if any(value.shape != (bins,) or value.dtype != np.float64 for value in found.values()):
        return "shape"
    if not all(bool(np.isfinite(value).all()) for value in found.values()):
        return "not-finite"
    most = plan.data.max_records_per_unit
    # As for an update: what the declared size can count, a little more, and the noise.
    bound = 2.0 * size * most + noise_multiplier * most * (math.sqrt(2 * bins) + _NOISE_DEVIATIONS)
    return "norm" if update_norm(found) > bound else None


def norm_bound(plan: Plan, declared_size: int, parameters: int) -> float:
    """Largest norm that an honest update of this plan can have, but for a chance below exp(-18).

    A step's clipped sum over a dataset of the declared size has norm at most `C * n` (all records, each
    clipped); the noise of T steps has norm below `sigma C (sqrt(T d) + 6 sqrt(T))` (Gaussian concentration of a
    1-Lipschitz function). Both are divided by the public batch `q n` and multiplied by the learning rate.
    A bank may hold more records than it declares by a little, hence the factor 2 on the first term. With S tasks
    the batch of each is an S-th and the update their mean, so the noise is sqrt(S) times larger.

    Under `prox` each step first shrinks what the steps before have added, by the factor `1 - rate * strength`, which
    the plan keeps within [0, 1]: instead of T count the sum of its powers, and for the noise that of their squares.

    An update of `fomaml` and `anil` is one query gradient a task: one clipped, noised sum over the query's records,
    which may be all that the bank has, divided by half the batch, and no learning rate multiplies it.

    Returns:
        `inf` where the plan does not clip.

    """
    mechanism, inner = plan.mechanism, plan.inner
    if mechanism.max_grad_norm is None:
        return math.inf
    batch, steps, rate = mechanism.sample_rate * declared_size, inner.local_steps, inner.learning_rate
    if inner.by_episode:
        batch, steps, rate = batch / 2, 1, 1.0
    kept = [(1.0 - inner.learning_rate * inner.prox_strength) ** later for later in range(steps)]
    signal = 2.0 * sum(kept) * declared_size / batch
    noise = mechanism.noise_multiplier * math.sqrt(sum(one * one for one in kept) * len(plan.tasks)) / batch
    clipped = signal + noise * (math.sqrt(parameters) + _NOISE_DEVIATIONS)
    return rate * mechanism.max_grad_norm * clipped
