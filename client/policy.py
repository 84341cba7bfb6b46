"""The bank's judgement of an order, from public state only: what may be answered, and what it will cost.

Nothing here reads a record or a count of records, so neither a refusal nor its timing can tell anything
about them.
"""

import math

import numpy as np

from metarisk_common.errors import RefusedError
from metarisk_common.initialisation import meta_shapes
from metarisk_common.plan import Plan
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.wire import EvaluateOrder, TrainOrder

from .config import InstitutionConfig

_DELTA_SHARE = 10
_TOLERANCE = 1e-9


def check_plan(plan: Plan, config: InstitutionConfig) -> None:
    """Hold a plan against the bank's limits, before it is approved and again at every order.

    Raises:
        RefusedError: naming the first limit that the plan passes; its code is always "policy".

    """
    mechanism, limits = plan.mechanism, config.policy
    noises = [mechanism.noise_multiplier, *([] if plan.metrics is None else [plan.metrics.noise_multiplier])]
    clip = math.inf if mechanism.max_grad_norm is None else mechanism.max_grad_norm
    if mechanism.delta > limits.delta * (1 + _TOLERANCE):
        raise RefusedError("the plan's delta is above the policy's")
    if limits.delta * _DELTA_SHARE * config.declared_size > 1 + _TOLERANCE:
        raise RefusedError(f"the policy's delta must be at most 1 / ({_DELTA_SHARE} * declared_size)")
    if min(noises) == 0 and math.isfinite(limits.epsilon):
        raise RefusedError("the plan adds no noise, and the policy has a finite budget")
    if min(noises) < limits.min_noise_multiplier and math.isfinite(limits.epsilon):
        raise RefusedError(
            f"the plan's noise multiplier of {min(noises):g} is below policy.min_noise_multiplier = "
            f"{limits.min_noise_multiplier:g}"
        )
    if limits.max_grad_norm is not None and clip > limits.max_grad_norm:
        raise RefusedError(f"the plan's clip norm is above policy.max_grad_norm = {limits.max_grad_norm:g}")
    if plan.inner.local_steps > limits.max_local_steps:
        raise RefusedError(
            f"the plan's {plan.inner.local_steps} steps a round are above policy.max_local_steps = "
            f"{limits.max_local_steps}"
        )
    if mechanism.sample_rate > limits.max_sample_rate:
        raise RefusedError(
            f"the plan's sample rate of {mechanism.sample_rate:g} is above policy.max_sample_rate = "
            f"{limits.max_sample_rate:g}"
        )
    if config.declared_size > plan.outer.max_declared_size:
        raise RefusedError("the declared size is above the largest that the plan allows")


def admit(order: TrainOrder, plan: Plan, config: InstitutionConfig, *, width: int) -> PrivacyEvent:
    """Judge an order under a plan; whether the plan is approved, and the budget, the ledger judges.

    Args:
        order: the decoded order.
        plan: the plan that the order's hash names, from the bank's own disk.
        config: the bank's configuration.
        width: inputs of the model under the plan's schema.

    Returns:
        The privacy event that answering it costs: of a training order, all local steps of the round, for every
        record.

    Raises:
        RefusedError: with a public code.

    """
    if not 1 <= order.round <= plan.outer.rounds:
        raise RefusedError(f"round {order.round} is not one of the plan's {plan.outer.rounds}", code="round")
    check_plan(plan, config)
    _check_params(order, plan, width)
    if isinstance(order, EvaluateOrder):
        if not plan.evaluates_after(order.round):
            raise RefusedError(f"the plan asks for no score histograms after round {order.round}", code="round")
        return plan.evaluate_event()
    return plan.train_event()


def _check_params(order: TrainOrder, plan: Plan, width: int) -> None:
    shapes = meta_shapes(plan, width)
    if {name: tuple(value.shape) for name, value in order.meta_params.items()} != shapes:
        raise RefusedError("the order's parameters are not shaped as the plan's model", code="shape")
    for value in order.meta_params.values():
        if value.dtype != np.dtype(plan.dtype) or not bool(np.isfinite(value).all()):
            raise RefusedError("the order's parameters are not finite numbers of the plan's type", code="shape")
