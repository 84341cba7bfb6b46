"""A bank's turn against what it must be without privacy: plain gradient descent, written out by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from client.dataset import Dataset, from_frame
from client.rng import SecureRandom
from client.training import meta_update, tasks_for
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.params import Params
from metarisk_common.plan import Plan

SIZE = 220


@pytest.fixture
def dataset(make_loans: Callable[..., pl.DataFrame], plan: Plan) -> Dataset:
    return from_frame(make_loans(lenders=1), plan.data, "Lender A", "loans.csv")


def changed(plan: Plan, *, inner: dict[str, Any] | None = None, mechanism: dict[str, Any] | None = None) -> Plan:
    return plan.model_copy(
        update={
            "inner": plan.inner.model_copy(update=inner or {}),
            "mechanism": plan.mechanism.model_copy(update=mechanism or {}),
            "dtype": "float64",
        }
    )


def update_of(plan: Plan, dataset: Dataset, *, size: int = SIZE, seed: int = 0) -> Params:
    width = Encoder(plan.data).width
    start = {name: value.astype(plan.dtype) for name, value in initial_params(plan, width).items()}
    rng = SecureRandom.seeded(seed)
    return meta_update(start, plan, tasks_for(plan, dataset), declared_size=size, width=width, rng=rng)


def sgd_by_hand(plan: Plan, x: np.ndarray, y: np.ndarray, batch: float) -> np.ndarray:
    """Logistic regression's summed gradient over a public constant, from the plan's starting weights."""
    start = initial_params(plan, x.shape[1])["points.weight"].astype(np.float64).reshape(-1)
    weights: np.ndarray = start.copy()
    for _ in range(plan.inner.local_steps):
        scores = 1 / (1 + np.exp(-(x.astype(np.float64) @ weights)))
        weights -= plan.inner.learning_rate * x.astype(np.float64).T @ (scores - y) / batch
    change: np.ndarray = weights - start
    return change


NO_PRIVACY = {"noise_multiplier": 0.0, "max_grad_norm": None}
NO_CLIPPING = {"noise_multiplier": 0.0, "max_grad_norm": 1e6}


@pytest.mark.parametrize("mechanism", [NO_PRIVACY, NO_CLIPPING], ids=["plain", "opacus"])
def test_without_noise_and_clipping_a_turn_is_gradient_descent(
    plan: Plan, dataset: Dataset, mechanism: dict[str, Any]
) -> None:
    free = changed(plan, inner={"local_steps": 5}, mechanism=mechanism)
    found = update_of(free, dataset)
    assert set(found) == {"points.weight"}
    expected = sgd_by_hand(free, dataset.x, dataset.y, SIZE)
    np.testing.assert_allclose(found["points.weight"].reshape(-1), expected, atol=1e-6, rtol=0)
    assert np.abs(expected).max() > 0.01


def test_one_step_of_reptile_is_a_step_of_joint_training(plan: Plan, dataset: Dataset) -> None:
    reptile = changed(plan, inner={"local_steps": 1, "algorithm": "reptile"}, mechanism=NO_PRIVACY)
    joint = changed(plan, inner={"local_steps": 1, "algorithm": "fedavg"}, mechanism=NO_PRIVACY)
    np.testing.assert_array_equal(
        update_of(reptile, dataset)["points.weight"], update_of(joint, dataset)["points.weight"]
    )
    # By segment as well: a mean of equal shares of the declared size is the step of all records together.
    parts = changed(plan, inner={"local_steps": 1, "task": "segment"}, mechanism=NO_PRIVACY)
    found = update_of(parts, dataset)["points.weight"].reshape(-1)
    np.testing.assert_allclose(found, sgd_by_hand(joint, dataset.x, dataset.y, SIZE), atol=1e-6)


def test_the_declared_size_is_what_is_divided_by_and_not_the_number_of_records(plan: Plan, dataset: Dataset) -> None:
    free = changed(plan, inner={"local_steps": 1}, mechanism=NO_PRIVACY)
    half, whole = update_of(free, dataset, size=SIZE), update_of(free, dataset, size=2 * SIZE)
    np.testing.assert_allclose(half["points.weight"], 2 * whole["points.weight"], rtol=1e-12)


def test_every_public_segment_is_a_task_even_where_the_bank_has_no_record_of_it(plan: Plan, dataset: Dataset) -> None:
    segments = changed(plan, inner={"task": "segment"})
    assert dataset.segment is not None
    keep = np.asarray(dataset.segment != "home")
    without = Dataset("Lender A", dataset.x[keep], dataset.y[keep], dataset.segment[keep], dataset.counts)
    tasks = tasks_for(segments, without)
    assert [task.segment for task in tasks] == ["car", "home", "travel"]
    assert len(tasks[1].x) == 0
    assert sum(len(task.x) for task in tasks) == keep.sum()
    assert [task.segment for task in tasks_for(plan, dataset)] == [""]
    update = update_of(segments, without)
    assert all(np.isfinite(value).all() for value in update.values())


def test_a_bank_without_records_answers_with_noise_alone(plan: Plan, dataset: Dataset) -> None:
    assert dataset.segment is not None
    empty = Dataset("Lender A", dataset.x[:0], dataset.y[:0], dataset.segment[:0], dataset.counts)
    one = changed(plan, inner={"local_steps": 1}, mechanism={"noise_multiplier": 5.0})
    draws = np.concatenate([update_of(one, empty, seed=seed)["points.weight"].reshape(-1) for seed in range(60)])
    std = one.inner.learning_rate * 5.0 * 0.7 / SIZE
    assert draws.std() == pytest.approx(std, rel=0.12)


def test_noise_depends_on_the_stream_and_on_nothing_global(plan: Plan, dataset: Dataset) -> None:
    first, again, other = (update_of(changed(plan), dataset, seed=seed)["points.weight"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
