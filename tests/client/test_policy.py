"""What a bank refuses, from public state only, and with which of the constants that may leave it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from client.config import InstitutionConfig
from client.policy import admit, check_plan
from metarisk_common.errors import RefusedError
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.plan import Plan, ScoreHistograms
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.wire import REFUSAL_CODES, EvaluateOrder, TrainOrder


@pytest.fixture
def width(plan: Plan) -> int:
    return Encoder(plan.data).width


@pytest.fixture
def order(plan: Plan, width: int) -> TrainOrder:
    return TrainOrder("run", 1, plan.hash(), initial_params(plan, width))


def config(
    *, size: int = 220, epsilon: float = 4.0, delta: float = 1e-4, limits: dict[str, float] | None = None
) -> InstitutionConfig:
    policy = {"epsilon": epsilon, "delta": delta, **(limits or {})}
    return InstitutionConfig.model_validate(
        {"name": "A", "data": "x.csv", "declared_size": size, "policy": policy},
    )


def changed(plan: Plan, part: str, **values: Any) -> Plan:
    return plan.model_copy(update={part: getattr(plan, part).model_copy(update=values)})


def test_an_admitted_order_costs_all_its_steps_for_every_record(plan: Plan, order: TrainOrder, width: int) -> None:
    noise = plan.mechanism.noise_multiplier
    event = PrivacyEvent(mechanism="poisson_gaussian", noise_multiplier=noise, sample_rate=1.0, steps=2, segment="")
    assert admit(order, plan, config(), width=width) == event
    sampled = changed(changed(plan, "mechanism", sample_rate=0.25), "inner", local_steps=7)
    event = admit(order, sampled, config(), width=width)
    assert (event.sample_rate, event.steps) == (0.25, 7)


def test_steps_on_disjoint_segments_are_charged_once_for_every_record(
    plan: Plan, order: TrainOrder, width: int
) -> None:
    assert admit(order, changed(plan, "inner", task="segment"), config(), width=width) == admit(
        order, plan, config(), width=width
    )


@pytest.mark.parametrize("number", [-1, 0, 13, 10**9])
def test_a_round_that_the_plan_does_not_have_is_refused(plan: Plan, order: TrainOrder, width: int, number: int) -> None:
    assert plan.outer.rounds == 12
    assert refusal(replace(order, round=number), plan, config(), width) == "round"
    admit(replace(order, round=12), plan, config(), width=width)


def test_a_plan_against_the_policy_is_refused(plan: Plan, order: TrainOrder, width: int) -> None:
    assert refusal(order, changed(plan, "mechanism", delta=2e-4), config(), width) == "policy"
    assert refusal(order, changed(plan, "mechanism", noise_multiplier=0.0), config(), width) == "policy"
    assert refusal(order, changed(plan, "outer", max_declared_size=219), config(), width) == "policy"
    admit(order, changed(plan, "mechanism", noise_multiplier=0.0), config(epsilon=math.inf), width=width)


@pytest.mark.parametrize(
    ("limit", "part", "values"),
    [
        ({"min_noise_multiplier": 3.0}, "mechanism", {"noise_multiplier": 2.9}),
        ({"max_grad_norm": 0.5}, "mechanism", {"max_grad_norm": 0.6}),
        ({"max_grad_norm": 0.5}, "mechanism", {"max_grad_norm": None, "noise_multiplier": 1.0}),
        ({"max_local_steps": 6}, "inner", {"local_steps": 7}),
        ({"max_sample_rate": 0.5}, "mechanism", {"sample_rate": 0.6}),
        ({"min_noise_multiplier": 3.0}, "metrics", {"noise_multiplier": 2.9}),
    ],
)
def test_what_the_bank_limits_is_refused_beyond_it(
    plan: Plan, order: TrainOrder, width: int, limit: dict[str, float], part: str, values: dict[str, Any]
) -> None:
    modest = {"noise_multiplier": 3.0, "max_grad_norm": 0.5, "sample_rate": 0.5}
    within = changed(changed(plan, "mechanism", **modest), "inner", local_steps=6)
    within = within.model_copy(update={"metrics": ScoreHistograms(noise_multiplier=3.0)})
    admit(order, within, config(limits=limit), width=width)
    assert refusal(order, changed(within, part, **values), config(limits=limit), width) == "policy"
    with pytest.raises(RefusedError, match=rf"{next(iter(limit))}|adds no noise"):
        check_plan(changed(within, part, **values), config(limits=limit))


def test_score_histograms_are_given_only_when_the_plan_asks_for_them(plan: Plan, order: TrainOrder, width: int) -> None:
    def question(number: int) -> EvaluateOrder:
        return EvaluateOrder(order.run_id, number, order.plan_hash, order.meta_params)

    asking = plan.model_copy(update={"metrics": ScoreHistograms(noise_multiplier=9.0, every=5)})
    event = PrivacyEvent("gaussian_histograms", 9.0, 1.0, 1)
    assert [admit(question(number), asking, config(), width=width) for number in (5, 10, 12)] == [event] * 3
    for number in (1, 11, 13):
        assert refusal(question(number), asking, config(), width) == "round"
    assert refusal(question(12), plan, config(), width) == "round"


def test_delta_may_be_a_tenth_of_a_record_at_most(plan: Plan, order: TrainOrder, width: int) -> None:
    admit(order, plan, config(size=1000, delta=1e-4), width=width)
    assert refusal(order, plan, config(size=1001, delta=1e-4), width) == "policy"


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"points.weight": np.zeros((1, 3), np.float32)},
        {"points.weight": np.zeros((1, 0), np.float32), "more": np.zeros(2, np.float32)},
    ],
)
def test_parameters_of_another_model_are_refused(
    plan: Plan, order: TrainOrder, width: int, broken: dict[str, np.ndarray]
) -> None:
    assert refusal(replace(order, meta_params=broken), plan, config(), width) == "shape"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_no_numbers_are_refused(plan: Plan, order: TrainOrder, width: int, value: float) -> None:
    (name, array), *_ = order.meta_params.items()
    bad = np.array(array)
    bad.flat[-1] = value
    assert refusal(replace(order, meta_params={**order.meta_params, name: bad}), plan, config(), width) == "shape"


def test_parameters_of_another_type_are_refused(plan: Plan, order: TrainOrder, width: int) -> None:
    doubles = {name: np.asarray(value, np.float64) for name, value in order.meta_params.items()}
    assert refusal(replace(order, meta_params=doubles), plan, config(), width) == "shape"


def refusal(order: TrainOrder, plan: Plan, config: InstitutionConfig, width: int) -> str:
    with pytest.raises(RefusedError) as refused:
        admit(order, plan, config, width=width)
    assert refused.value.code in REFUSAL_CODES
    return refused.value.code
