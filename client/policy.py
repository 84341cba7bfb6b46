"""The bank's judgement of an order, from public state only: what may be answered, and what it will cost.

Nothing here reads a record or a count of records, so neither a refusal nor its timing can tell anything
about them.
"""

import math

import numpy as np

from metarisk_common.errors import RefusedError
from metarisk_common.initialisation import param_shapes
from metarisk_common.plan import Plan
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.wire import TrainOrder

from .config import InstitutionConfig

MECHANISM = "poisson_gaussian"
_DELTA_SHARE = 10
_TOLERANCE = 1e-9


def admit(order: TrainOrder, plan: Plan, config: InstitutionConfig, *, width: int) -> PrivacyEvent:
    """Judge an order under an approved plan.

    Args:
        order: the decoded order.
        plan: the approved plan that the order's hash names.
        config: the bank's configuration.
        width: inputs of the model under the plan's schema.

    Returns:
        The privacy event that answering it costs: all local steps of the round, for every record.

    Raises:
        RefusedError: with a public code; the ledger's budget is judged later, by the ledger itself.

    """
    mechanism = plan.mechanism
    if not 1 <= order.round <= plan.outer.rounds:
        raise RefusedError(f"round {order.round} is not one of the plan's {plan.outer.rounds}", code="round")
    if mechanism.delta > config.policy.delta * (1 + _TOLERANCE):
        raise RefusedError("the plan's delta is above the policy's", code="policy")
    if config.policy.delta * _DELTA_SHARE * config.declared_size > 1 + _TOLERANCE:
        message = f"the policy's delta must be at most 1 / ({_DELTA_SHARE} * declared_size)"
        raise RefusedError(message, code="policy")
    if mechanism.noise_multiplier == 0 and math.isfinite(config.policy.epsilon):
        raise RefusedError("the plan adds no noise, and the policy has a finite budget", code="policy")
    if config.declared_size > plan.outer.max_declared_size:
        raise RefusedError("the declared size is above the largest that the plan allows", code="policy")
    _check_params(order, plan, width)
    return PrivacyEvent(
        mechanism=MECHANISM,
        noise_multiplier=mechanism.noise_multiplier,
        sample_rate=mechanism.sample_rate,
        steps=plan.inner.local_steps,
        segment="",
    )


def _check_params(order: TrainOrder, plan: Plan, width: int) -> None:
    shapes = param_shapes(plan.model, width)
    if {name: tuple(value.shape) for name, value in order.meta_params.items()} != shapes:
        raise RefusedError("the order's parameters are not shaped as the plan's model", code="shape")
    for value in order.meta_params.values():
        if value.dtype != np.dtype(plan.dtype) or not bool(np.isfinite(value).all()):
            raise RefusedError("the order's parameters are not finite numbers of the plan's type", code="shape")
