"""The server's judgement: every verdict, and a bound that no honest bank ever meets."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from client.rng import SecureRandom
from client.training import meta_update
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.models import to_tensors
from metarisk_common.params import Params, l2_norm, scale
from metarisk_common.plan import Plan
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.tasks import Task, tasks_of
from metarisk_common.wire import TrainOrder, TrainReport
from server.admission import judge, norm_bound
from server.aggregators import LARGEST, fits

RUN, SIZE = "run-1", 100


def plan(**parts: Any) -> Plan:
    data = {
        "label": {"name": "default"},
        "institution": "bank",
        "segment": "sector",
        "segments": ["a", "b", "c"],
        "columns": [
            {"kind": "numeric", "name": "amount", "lower": 0, "upper": 1, "bins": [0.25, 0.5, 0.75]},
            {"kind": "categorical", "name": "state", "categories": ["x", "y", "z"]},
        ],
    }
    mechanism = {"noise_multiplier": 1.0, "sample_rate": 0.5, **parts.pop("mechanism", {})}
    return Plan.model_validate({"name": "test", "data": data, "mechanism": mechanism, **parts})


def order_of(chosen: Plan) -> TrainOrder:
    return TrainOrder(RUN, 1, chosen.hash(), initial_params(chosen, Encoder(chosen.data).width))


def report_of(chosen: Plan, update: Params, **changes: Any) -> TrainReport:
    mechanism = chosen.mechanism
    event = PrivacyEvent(
        "poisson_gaussian", mechanism.noise_multiplier, mechanism.sample_rate, chosen.inner.local_steps, ""
    )
    report = TrainReport(RUN, 1, chosen.hash(), "Bank A", SIZE, event, "receipt-a", 1, update)
    return replace(report, **changes)


PLAN = plan()
ORDER = order_of(PLAN)
UPDATE: Params = {name: np.full_like(value, 1e-3) for name, value in ORDER.meta_params.items()}
GOOD = report_of(PLAN, UPDATE)


def verdict(report: TrainReport, **known: Any) -> str | None:
    return judge(report, ORDER, PLAN, **{"admitted": {}, "declared_sizes": {}, "ledgers": {}, **known})


def with_update(change: Any) -> TrainReport:
    return replace(GOOD, update={name: change(value) for name, value in UPDATE.items()})


def with_value(value: float) -> TrainReport:
    def put(array: np.ndarray) -> np.ndarray:
        copy = array.copy()
        copy.flat[-1] = value
        return copy

    return with_update(put)


def test_a_good_report_is_admitted() -> None:
    assert verdict(GOOD) is None
    assert verdict(GOOD, admitted={"Bank B": "receipt-b"}, declared_sizes={"Bank A": SIZE, "Bank B": 5}) is None


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (replace(GOOD, run_id="run-2"), "order"),
        (replace(GOOD, round=2), "order"),
        (replace(GOOD, plan_hash="0" * 64), "order"),
        (replace(GOOD, event=replace(GOOD.event, noise_multiplier=0.5)), "event"),
        (replace(GOOD, event=replace(GOOD.event, sample_rate=1.0)), "event"),
        (replace(GOOD, event=replace(GOOD.event, steps=4)), "event"),
        (replace(GOOD, event=replace(GOOD.event, segment="a")), "event"),
        (replace(GOOD, declared_size=0), "size"),
        (replace(GOOD, declared_size=-1), "size"),
        (replace(GOOD, declared_size=PLAN.outer.max_declared_size + 1), "size"),
        (replace(GOOD, update={}), "shape"),
        (replace(GOOD, update={**UPDATE, "extra": np.zeros(1, np.float32)}), "shape"),
        (replace(GOOD, update={f"{name}.renamed": value for name, value in UPDATE.items()}), "shape"),
        (with_update(lambda value: value[:, 1:]), "shape"),
        (with_update(lambda value: value.T), "shape"),
        (with_update(lambda value: value.astype(np.float64)), "shape"),
        (with_update(lambda value: value.astype(np.complex64)), "shape"),
        (with_update(lambda value: value.astype(str)), "shape"),
        (with_value(float("nan")), "not-finite"),
        (with_value(float("inf")), "not-finite"),
        (with_value(-float("inf")), "not-finite"),
        (with_value(1e4), "norm"),
        (with_value(float(np.finfo(np.float32).max)), "norm"),
    ],
)
def test_a_bad_report_is_not(report: TrainReport, expected: str) -> None:
    assert verdict(report) == expected


def test_one_report_a_bank_and_one_bank_a_report() -> None:
    assert verdict(GOOD, admitted={"Bank A": "receipt-z"}) == "duplicate"
    assert verdict(GOOD, admitted={"Bank Z": "receipt-a"}) == "duplicate"


def test_a_size_once_declared_stays() -> None:
    assert verdict(GOOD, declared_sizes={"Bank A": SIZE + 1}) == "size"


@pytest.mark.parametrize("value", [1e15, 1e30, float(np.finfo(np.float32).max)])
def test_without_clipping_there_is_a_limit_still(value: float) -> None:
    """A huge update must be a verdict: were it admitted, adding it would end the run."""
    free = plan(mechanism={"noise_multiplier": 0.0, "max_grad_norm": None})
    order = order_of(free)
    for number, expected in ((1.0, None), (value, "norm"), (-value, "norm")):
        update = {name: np.full_like(array, number) for name, array in order.meta_params.items()}
        assert judge(report_of(free, update), order, free, admitted={}, declared_sizes={}, ledgers={}) == expected


@pytest.mark.parametrize("heard", [GOOD.counter, GOOD.counter + 1, 10**6])
def test_a_ledger_that_has_gone_back_is_found_out(heard: int) -> None:
    assert verdict(GOOD, ledgers={"Bank A": (heard, "digest")}) == "ledger"
    assert verdict(GOOD, ledgers={"Bank A": (GOOD.counter - 1, "digest"), "Bank B": (heard, "digest")}) is None


def test_whatever_is_admitted_can_be_added() -> None:
    assert fits(with_value(LARGEST / (2 * SIZE)).update, SIZE)
    assert not fits(with_value(2 * LARGEST / SIZE).update, SIZE)


PLANS = {
    "scorecard, all records, one step": plan(
        mechanism={"sample_rate": 1.0, "noise_multiplier": 5.0}, inner={"local_steps": 1}
    ),
    "scorecard, sampled, five steps": plan(mechanism={"sample_rate": 0.25, "noise_multiplier": 2.0}),
    "tasks by segment": plan(inner={"task": "segment", "local_steps": 4, "learning_rate": 0.3}),
    "joint training by segment": plan(inner={"task": "segment", "algorithm": "fedavg", "local_steps": 4}),
    "mlp": plan(model={"kind": "mlp", "hidden": [6, 4]}, mechanism={"max_grad_norm": 0.3}),
    "mlp by segment, nearly all noise": plan(
        model={"kind": "mlp", "hidden": [30]}, mechanism={"noise_multiplier": 500.0}, inner={"task": "segment"}
    ),
    "prox by segment": plan(
        inner={"task": "segment", "algorithm": "prox", "prox_strength": 2.0, "local_steps": 6, "learning_rate": 0.5}
    ),
    "first-order maml": plan(inner={"algorithm": "fomaml", "learning_rate": 0.01}),
    "first-order maml by segment, nearly all noise": plan(
        inner={"algorithm": "fomaml", "task": "segment", "learning_rate": 3.0}, mechanism={"noise_multiplier": 500.0}
    ),
    "anil by segment": plan(
        model={"kind": "mlp", "hidden": [6, 4]}, inner={"algorithm": "anil", "task": "segment", "local_steps": 2}
    ),
    "no noise": plan(mechanism={"noise_multiplier": 0.0, "sample_rate": 1.0}),
    "double precision": plan(dtype="float64", mechanism={"noise_multiplier": 30.0}),
}


def data(chosen: Plan, rows: int, seed: int, *, alike: bool) -> list[Task]:
    """Random records; or all of them nearly the same and mispredicted, so that their gradients add up."""
    random = np.random.default_rng(seed)
    width = Encoder(chosen.data).width
    x = random.normal(1.0, 1e-3, (rows, width)) if alike else random.normal(size=(rows, width))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(chosen.dtype)
    y = (np.ones(rows) if alike else random.integers(0, 2, rows)).astype(chosen.dtype)
    tensors = to_tensors({"x": x, "y": y})
    return tasks_of("Bank A", tensors["x"], tensors["y"], random.choice(["a", "b", "c"], rows), chosen.tasks)


@pytest.mark.parametrize("name", PLANS)
def test_honest_banks_are_never_refused(name: str) -> None:
    """Real meta-updates, of a bank with up to twice the records that it declares, and of one with none."""
    chosen = PLANS[name]
    order, width = order_of(chosen), Encoder(chosen.data).width
    bound = norm_bound(chosen, SIZE, sum(value.size for value in order.meta_params.values()))
    nearest = 0.0
    for seed, (rows, alike) in enumerate([(SIZE, False), (SIZE, True), (2 * SIZE, True), (0, False), (7, False)] * 2):
        tasks = data(chosen, rows, seed, alike=alike)
        rng = SecureRandom.seeded(seed, name)
        update = meta_update(order.meta_params, chosen, tasks, declared_size=SIZE, width=width, rng=rng)
        assert judge(report_of(chosen, update), order, chosen, admitted={}, declared_sizes={}, ledgers={}) is None
        nearest = max(nearest, l2_norm(update) / bound)
    # The bound is of the right size: an honest bank comes near enough that ten times the bound is no honest update.
    assert 0.1 < nearest <= 1
    poison = scale(update, 10 * bound / l2_norm(update))
    assert judge(report_of(chosen, poison), order, chosen, admitted={}, declared_sizes={}, ledgers={}) == "norm"


def test_the_bound_covers_the_noise_of_every_task() -> None:
    """Pure noise, no records: with S tasks the update is the mean of S noises on an S-th of the batch each."""
    chosen = PLANS["tasks by segment"]
    order, width = order_of(chosen), Encoder(chosen.data).width
    tasks = data(chosen, 0, 0, alike=False)
    norms = []
    for seed in range(20):
        rng = SecureRandom.seeded(seed)
        update = meta_update(order.meta_params, chosen, tasks, declared_size=SIZE, width=width, rng=rng)
        norms.append(l2_norm(update))
    mechanism, inner = chosen.mechanism, chosen.inner
    std = inner.learning_rate * mechanism.noise_multiplier * 0.7 / (mechanism.sample_rate * SIZE)
    expected = std * np.sqrt(inner.local_steps * len(chosen.tasks) * width)
    assert np.mean(norms) == pytest.approx(expected, rel=0.15)
