"""The algorithms that a plan may name: what each needs, what does not go with it, and that older plans are as ever."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from metarisk_common.plan import Plan

SMALL: dict[str, Any] = {
    "name": "test",
    "data": {
        "label": {"name": "default"},
        "institution": "bank",
        "columns": [{"kind": "numeric", "name": "amount", "lower": 0, "upper": 1}],
    },
    "mechanism": {"noise_multiplier": 1.0},
}
MLP = {"kind": "mlp", "hidden": [3]}
PROX = {"algorithm": "prox", "prox_strength": 0.25}


def of_inner(inner: dict[str, Any]) -> Plan:
    return Plan.model_validate({**SMALL, "inner": inner})


def test_the_hash_changes_with_the_algorithm_and_what_it_is_told() -> None:
    inners: list[dict[str, Any]] = [
        {}, PROX, {**PROX, "prox_strength": 0.5}, {"algorithm": "fedavg"}, {"algorithm": "fomaml"},
    ]  # fmt: skip
    assert len({of_inner(inner).hash() for inner in inners}) == len(inners)
    without_privacy = {"mechanism": {"noise_multiplier": 0.0, "max_grad_norm": None}, "model": MLP}
    algorithms = ("reptile", "fedavg", "fomaml", "anil", "maml", "meta_sgd")
    plans = [Plan.model_validate({**SMALL, **without_privacy, "inner": {"algorithm": name}}) for name in algorithms]
    assert len({plan.hash() for plan in plans}) == len(algorithms)
    assert [plan.inner.by_episode for plan in plans] == [False, False, True, True, True, True]
    assert [plan.inner.second_order for plan in plans] == [False, False, False, False, True, True]
    # Whatever is done with an order, what is charged for it is every step of it.
    assert {plan.train_event().steps for plan in plans} == {5}


def test_the_algorithm_of_every_older_plan_may_be_written_out() -> None:
    assert of_inner({"prox_strength": 0.0}).to_json() == Plan.model_validate(SMALL).to_json()
    assert "prox_strength" not in json.loads(of_inner({}).to_json())["inner"]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"inner": {"algorithm": "prox"}}, 'algorithm = "prox" needs prox_strength above 0'),
        ({"inner": {"prox_strength": 0.5}}, 'prox_strength does nothing under algorithm = "reptile"'),
        ({"inner": {**PROX, "algorithm": "anil"}}, 'prox_strength does nothing under algorithm = "anil"'),
        ({"inner": {**PROX, "prox_strength": 1.01}}, r"learning_rate \* prox_strength must be at most 1"),
        ({"inner": {"algorithm": "anil"}}, 'a scorecard is nothing but head: set algorithm = "fomaml"'),
        ({"inner": {"algorithm": "maml"}}, 'algorithm = "maml" .* cannot be private.*"fomaml" can be private'),
        ({"inner": {"algorithm": "meta_sgd"}}, 'algorithm = "meta_sgd" .* cannot be private'),
        (
            {"inner": {"algorithm": "maml"}, "mechanism": {"noise_multiplier": 0.0, "max_grad_norm": 0.7}},
            "no max_grad_norm",
        ),
    ],
)
def test_what_does_not_go_with_an_algorithm_is_refused(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Plan.model_validate({**SMALL, **parts})
