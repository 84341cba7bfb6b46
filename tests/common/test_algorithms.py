"""Meta-learning on quadratic tasks, where the outer loop's fixed point is known in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from metarisk_common.algorithms import ALGORITHMS, fedavg, reptile
from metarisk_common.params import Params, add, l2_norm, mean
from metarisk_common.plan import InnerLoop

TASKS, DIMENSION, RATE = 8, 5, 0.1
STEPS = pytest.mark.parametrize("steps", [1, 5, 200])
BOTH = pytest.mark.parametrize("name", ["reptile", "fedavg"])


@dataclass(frozen=True)
class Quadratic:
    """Loss (theta - c)' A (theta - c) / 2."""

    a: np.ndarray
    c: np.ndarray


def quadratics(dtype: str = "float64") -> list[Quadratic]:
    random = np.random.default_rng(20)
    eigenvalues = np.diag(np.logspace(-1, 0.7, DIMENSION))
    tasks = []
    for _ in range(TASKS):
        turn, _ = np.linalg.qr(random.normal(size=(DIMENSION, DIMENSION)))
        a = (turn @ eigenvalues @ turn.T).astype(dtype)
        tasks.append(Quadratic(a, random.normal(size=DIMENSION).astype(dtype)))
    return tasks


def gradient(params: Params, task: Quadratic) -> Params:
    return {"theta": task.a @ (params["theta"] - task.c)}


def weights(tasks: Sequence[Quadratic], steps: int) -> list[np.ndarray]:
    one = np.eye(DIMENSION)
    return [one - np.linalg.matrix_power(one - RATE * task.a.astype(np.float64), steps) for task in tasks]


def fixed_point(tasks: Sequence[Quadratic], steps: int) -> np.ndarray:
    """(sum W_i)^-1 sum W_i c_i with W = I - (I - aA)^s."""
    w = weights(tasks, steps)
    return np.linalg.solve(sum(w), sum(wi @ task.c.astype(np.float64) for wi, task in zip(w, tasks, strict=True)))


def inner(steps: int, name: str = "reptile") -> InnerLoop:
    return InnerLoop.model_validate({"algorithm": name, "local_steps": steps, "learning_rate": RATE})


def outer_loop(name: str, tasks: Sequence[Quadratic], steps: int, dtype: str) -> np.ndarray:
    """Each institution has one task; the server adds a multiple of their mean until nothing more can move."""
    curvature = np.linalg.eigvalsh(sum(weights(tasks, steps)) / len(tasks))
    rate = 2 / (curvature[0] + curvature[-1])
    rounds = int(np.ceil(30 / -np.log1p(-rate * curvature[0])))
    meta: Params = {"theta": np.zeros(DIMENSION, dtype)}
    for _ in range(rounds):
        update = mean([ALGORITHMS[name](meta, [task], gradient, inner(steps)) for task in tasks])
        meta = {"theta": (meta["theta"] + rate * update["theta"]).astype(dtype)}
    result: np.ndarray = meta["theta"]
    assert result.dtype == dtype
    return result


@STEPS
@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_the_outer_loop_ends_where_it_must(name: str, steps: int, dtype: str, tolerance: float) -> None:
    tasks = quadratics(dtype)
    assert np.abs(outer_loop(name, tasks, steps, dtype) - fixed_point(tasks, steps)).max() < tolerance


def test_the_ends_of_the_range_are_joint_training_and_the_mean_of_the_optima() -> None:
    tasks = quadratics()
    joint = np.linalg.solve(sum(task.a for task in tasks), sum(task.a @ task.c for task in tasks))
    centre = np.mean([task.c for task in tasks], axis=0)
    assert np.abs(fixed_point(tasks, 1) - joint).max() < 1e-12
    assert np.abs(fixed_point(tasks, 10_000) - centre).max() < 1e-12
    # And the number of steps matters: none of the three figures of the test above could stand in for another.
    ends = [fixed_point(tasks, steps) for steps in (1, 5, 200)]
    assert min(np.abs(a - b).max() for i, a in enumerate(ends) for b in ends[:i]) > 1e-2


def test_reptile_of_one_step_is_federated_sgd() -> None:
    tasks = quadratics()
    meta: Params = {"theta": np.linspace(-1, 1, DIMENSION)}
    after = add(meta, reptile(meta, tasks, gradient, inner(1)))
    step = np.mean([gradient(meta, task)["theta"] for task in tasks], axis=0)
    assert np.abs(after["theta"] - (meta["theta"] - RATE * step)).max() < 1e-15


@STEPS
def test_with_one_task_fedavg_is_reptile(steps: int) -> None:
    meta: Params = {"theta": np.ones(DIMENSION)}
    for task in quadratics():
        updates = [algorithm(meta, [task], gradient, inner(steps)) for algorithm in (reptile, fedavg)]
        assert np.array_equal(updates[0]["theta"], updates[1]["theta"])


@STEPS
def test_reptile_on_many_tasks_is_the_mean_over_each(steps: int) -> None:
    tasks = quadratics()
    meta: Params = {"theta": np.ones(DIMENSION)}
    apart = mean([reptile(meta, [task], gradient, inner(steps)) for task in tasks])
    together = reptile(meta, tasks, gradient, inner(steps))
    assert np.abs(apart["theta"] - together["theta"]).max() < 1e-15


@STEPS
def test_fedavg_on_many_tasks_trains_them_jointly(steps: int) -> None:
    tasks = quadratics()
    joint: Params = {"theta": fixed_point(tasks, 1)}
    assert l2_norm(fedavg(joint, tasks, gradient, inner(steps))) < 1e-13
    if steps > 1:
        assert l2_norm(reptile(joint, tasks, gradient, inner(steps))) > 1e-3


@BOTH
def test_an_update_is_added(name: str) -> None:
    """The sign is fixed once: adding the update brings the meta-parameters nearer to the task's optimum."""
    for task in quadratics():
        meta: Params = {"theta": np.zeros(DIMENSION)}
        after = add(meta, ALGORITHMS[name](meta, [task], gradient, inner(200)))
        assert np.linalg.norm(after["theta"] - task.c) < 0.5 * np.linalg.norm(task.c)


@BOTH
@STEPS
def test_gradients_are_asked_for_once_a_step_and_task(name: str, steps: int) -> None:
    """A private gradient is a release: each call costs."""
    calls = []

    def counted(params: Params, task: Quadratic) -> Params:
        calls.append(task)
        return gradient(params, task)

    tasks = quadratics()
    ALGORITHMS[name]({"theta": np.zeros(DIMENSION)}, tasks, counted, inner(steps))
    assert [sum(task is call for call in calls) for task in tasks] == [steps] * TASKS


@BOTH
def test_torch_gives_the_same_and_nothing_is_written_into(name: str) -> None:
    tasks = quadratics()
    meta: Params = {"theta": torch.ones(DIMENSION, dtype=torch.float64)}
    as_tensors = [Quadratic(torch.from_numpy(task.a), torch.from_numpy(task.c)) for task in tasks]  # type: ignore[arg-type]  # the same operators
    found = ALGORITHMS[name](meta, as_tensors, gradient, inner(5))
    expected = ALGORITHMS[name]({"theta": np.ones(DIMENSION)}, tasks, gradient, inner(5))
    assert np.abs(found["theta"].numpy() - expected["theta"]).max() < 1e-14
    assert torch.equal(meta["theta"], torch.ones(DIMENSION, dtype=torch.float64))
