"""The noise that the server takes for known, against the noise that banks' real engine adds."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from client.rng import SecureRandom
from client.training import meta_update
from metarisk_common.initialisation import initial_params
from metarisk_common.params import Params
from metarisk_common.plan import Plan
from metarisk_common.tasks import Task
from server.aggregators import add, init, result
from server.noise import mean_noise_variance, update_noise_variance

WIDTH = 1500
DATA: dict[str, Any] = {
    "label": {"name": "default"},
    "institution": "bank",
    "segment": "sector",
    "segments": ["trade", "crafts", "farms"],
    "columns": [{"kind": "numeric", "name": "amount", "lower": 0, "upper": 1}],
}
CASES: dict[str, dict[str, Any]] = {
    "one step": {"inner": {"local_steps": 1, "learning_rate": 0.5}},
    "reptile": {"inner": {"local_steps": 4, "learning_rate": 2.0}},
    "reptile by segment": {"inner": {"local_steps": 2, "learning_rate": 2.0, "task": "segment"}},
    "fedavg by segment": {"inner": {"algorithm": "fedavg", "local_steps": 2, "task": "segment"}},
    "sampled": {"inner": {"local_steps": 2}, "mechanism": {"sample_rate": 0.25}},
    "prox": {"inner": {"algorithm": "prox", "local_steps": 4, "learning_rate": 0.5, "prox_strength": 0.8}},
    "fomaml": {"inner": {"algorithm": "fomaml", "local_steps": 3, "learning_rate": 0.5}},
    "fomaml by segment": {"inner": {"algorithm": "fomaml", "local_steps": 3, "task": "segment"}},
    "anil": {"inner": {"algorithm": "anil", "local_steps": 3}, "model": {"kind": "mlp", "hidden": [30]}},
}
SIZES = {"small": 50, "middle": 200, "large": 500}


def plan(**parts: Any) -> Plan:
    mechanism = {"noise_multiplier": 3.0, "max_grad_norm": 0.7, **parts.pop("mechanism", {})}
    outer = {"optimizer": "adam", "subtract_noise": True, **parts.pop("outer", {})}
    return Plan.model_validate({"name": "test", "data": DATA, "mechanism": mechanism, "outer": outer, **parts})


def noise_of(chosen: Plan, size: int, *labels: str | int) -> Params:
    """A real bank's update without a single record: the noise of its private engine, and nothing else."""
    empty = [Task("bank", name, torch.zeros(0, WIDTH), torch.zeros(0)) for name in chosen.tasks]
    start = initial_params(chosen, WIDTH)
    rng = SecureRandom.seeded(5, *labels)
    return meta_update(start, chosen, empty, declared_size=size, width=WIDTH, rng=rng)


def variance_of(draws: list[Params]) -> float:
    return float(np.mean(np.concatenate([value.ravel() for one in draws for value in one.values()]) ** 2))


def right(found: float, known: float) -> bool:
    return abs(found / known - 1) < 0.03


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_noise_in_an_update_is_what_is_known(case: Mapping[str, Any]) -> None:
    chosen = plan(**{part: dict(values) for part, values in case.items()})
    calls = 2 if chosen.model.kind == "mlp" else 30
    found = variance_of([noise_of(chosen, 200, number) for number in range(calls)])
    known = update_noise_variance(chosen, 200)
    assert right(found, known)
    assert not right(found, known * 2 / 3)
    assert not right(found, known * 3 / 2)


@pytest.mark.parametrize("weighting", ["declared_size", "equal"])
def test_the_noise_in_a_rounds_mean_is_what_is_known(weighting: str) -> None:
    chosen = plan(inner={"local_steps": 2}, outer={"weighting": weighting})
    means = []
    for number in range(30):
        folded = init(initial_params(chosen, WIDTH))
        for name, size in SIZES.items():
            folded = add(folded, noise_of(chosen, size, name, number), size if weighting == "declared_size" else 1)
        means.append(result(folded))
    found, known = variance_of(means), mean_noise_variance(chosen, SIZES.values())
    assert right(found, known)
    assert not right(found, known * 2 / 3)
    assert not right(found, known * 3 / 2)


def test_by_hand() -> None:
    """Three banks of 100: a step's noise is 3 * 0.7 / 100, a third of its variance is left in the mean of three."""
    chosen = plan(inner={"local_steps": 1})
    assert mean_noise_variance(chosen, [100] * 3) == pytest.approx(0.021**2 / 3)
    assert update_noise_variance(plan(inner={"local_steps": 5, "learning_rate": 2.0}), 100) == pytest.approx(
        20 * 0.021**2
    )


def test_more_steps_see_the_curvature_so_the_known_variance_is_an_upper_end() -> None:
    """As the table says: too high by about a H (K - 1), with a H at most 0.25 times the rate here."""
    chosen = plan(inner={"local_steps": 3, "learning_rate": 1.0})
    random = np.random.default_rng(6)
    x = torch.tensor(random.normal(size=(500, WIDTH)) / math.sqrt(WIDTH), dtype=torch.float32)
    tasks = [Task("bank", "", x, torch.zeros(500))]
    start = initial_params(chosen, WIDTH)
    updates = [
        meta_update(start, chosen, tasks, declared_size=500, width=WIDTH, rng=SecureRandom.seeded(7, number))
        for number in range(40)
    ]
    stacked = np.stack([one["points.weight"].ravel() for one in updates])
    found = float(stacked.var(axis=0, ddof=1).mean())
    assert 0.97 < update_noise_variance(chosen, 500) / found < 1.06


def test_the_order_of_banks_changes_no_bit() -> None:
    sizes = [int(size) for size in np.random.default_rng(3).integers(1, 10**6, 200)]
    assert mean_noise_variance(plan(), sizes) == mean_noise_variance(plan(), sorted(sizes))


def test_a_plan_without_noise_has_none() -> None:
    for mechanism in ({"noise_multiplier": 0.0}, {"noise_multiplier": 0.0, "max_grad_norm": None}):
        assert mean_noise_variance(plan(mechanism=mechanism), [5, 7]) == 0
    second_order = {"inner": {"algorithm": "maml"}, "mechanism": {"noise_multiplier": 0.0, "max_grad_norm": None}}
    assert mean_noise_variance(plan(**second_order), [5, 7]) == 0


def test_what_is_not_known_is_refused() -> None:
    robust = plan(outer={"aggregator": "median", "weighting": "equal", "subtract_noise": False})
    with pytest.raises(ValueError, match='under aggregator = "median" is not known'):
        mean_noise_variance(robust, [5, 7])
    with pytest.raises(ValueError, match="no update was admitted"):
        mean_noise_variance(plan(), [])


@pytest.mark.parametrize(
    ("outer", "said"),
    [
        ({"aggregator": "median", "weighting": "equal"}, 'subtract_noise needs aggregator = "mean"'),
        ({"aggregator": "trimmed_mean", "weighting": "equal"}, "depends on the updates themselves and is not known"),
        ({"aggregator": "norm_bounded_mean", "max_update_norm": 1.0}, 'needs aggregator = "mean"'),
        ({"optimizer": "momentum"}, 'does nothing under optimizer = "momentum"'),
        ({"optimizer": "sgd"}, 'set optimizer = "adam" or "yogi"'),
    ],
)
def test_the_plan_refuses_to_subtract_what_it_does_not_know(outer: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(outer=outer)
