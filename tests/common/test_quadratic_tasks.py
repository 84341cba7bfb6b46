"""Quadratic tasks, where mathematics says where the outer loop of each algorithm must end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from metarisk_common.algorithms import ALGORITHMS
from metarisk_common.initialisation import RATE
from metarisk_common.params import Params, mean, scale
from metarisk_common.plan import InnerLoop
from metarisk_common.tasks import Episode

TASKS, DIMENSION, RATE_INSIDE, STRENGTH = 8, 5, 0.1, 0.7
ENDS = ("reptile", "fedavg", "prox", "fomaml", "maml")
BOTH_TYPES = pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])


@dataclass(frozen=True)
class Quadratic:
    """Loss (theta - c)' A (theta - c) / 2."""

    a: Any
    c: Any


def quadratics(dtype: str = "float64", seed: int = 20) -> list[Quadratic]:
    random = np.random.default_rng(seed)
    eigenvalues = np.diag(np.logspace(-1, 0.7, DIMENSION))
    tasks = []
    for _ in range(TASKS):
        turn, _ = np.linalg.qr(random.normal(size=(DIMENSION, DIMENSION)))
        tasks.append(
            Quadratic((turn @ eigenvalues @ turn.T).astype(dtype), random.normal(size=DIMENSION).astype(dtype))
        )
    return tasks


def as_tensors(task: Quadratic) -> Quadratic:
    return Quadratic(torch.from_numpy(task.a), torch.from_numpy(task.c))


def gradient(params: Params, task: Quadratic) -> Params:
    return {"theta": task.a @ (params["theta"] - task.c)}


def inner(name: str, steps: int) -> InnerLoop:
    strength = {"prox_strength": STRENGTH} if name == "prox" else {}
    values = {"algorithm": name, "local_steps": steps, "learning_rate": RATE_INSIDE, **strength}
    return InnerLoop.model_validate(values)


def weight(name: str, a: np.ndarray, steps: int) -> np.ndarray:
    """W of the fixed point `(sum W_i)^-1 sum W_i c_i`."""
    one, a = np.eye(DIMENSION), a.astype(np.float64)
    through = np.linalg.matrix_power(one - RATE_INSIDE * a, steps)
    if name == "prox":
        b = a + STRENGTH * one
        return np.asarray((one - np.linalg.matrix_power(one - RATE_INSIDE * b, steps)) @ np.linalg.solve(b, a))
    return np.asarray({"fomaml": a @ through, "maml": through @ a @ through}.get(name, one - through))


def fixed_point(name: str, tasks: Sequence[Quadratic], steps: int) -> np.ndarray:
    weights = [weight(name, task.a, steps) for task in tasks]
    pairs = zip(weights, tasks, strict=True)
    return np.linalg.solve(sum(weights), sum(w @ task.c.astype(np.float64) for w, task in pairs))


def update_of(name: str, theta: np.ndarray, task: Quadratic, steps: int) -> np.ndarray:
    """One institution with one task, which it adapts on and judges on: MAML by Torch, the others by NumPy."""
    loop = inner(name, steps)
    meta: Params = {"theta": torch.from_numpy(theta) if loop.second_order else theta}
    own = as_tensors(task) if loop.second_order else task
    work: list[Any] = [Episode(own, own)] if loop.by_episode else [own]
    return np.asarray(ALGORITHMS[name](meta, work, gradient, loop)["theta"])


def outer_loop(name: str, tasks: Sequence[Quadratic], steps: int, dtype: str) -> np.ndarray:
    """The server adds a multiple of the mean update until nothing more can move."""
    curvature = np.linalg.eigvals(sum(weight(name, task.a, steps) for task in tasks) / len(tasks)).real
    rate = 2 / (curvature.min() + curvature.max())
    rounds = int(np.ceil(28 / -np.log1p(-rate * curvature.min())))
    theta = np.zeros(DIMENSION, dtype)
    for _ in range(rounds):
        update = mean([{"theta": update_of(name, theta, task, steps)} for task in tasks])
        theta = (theta + rate * update["theta"]).astype(dtype)
    return theta


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", ENDS)
@BOTH_TYPES
def test_the_outer_loop_ends_where_it_must(name: str, steps: int, dtype: str, tolerance: float) -> None:
    tasks = quadratics(dtype)
    assert np.abs(outer_loop(name, tasks, steps, dtype) - fixed_point(name, tasks, steps)).max() < tolerance


def test_the_ends_are_five_different_ones() -> None:
    """So none of the figures of the test above could stand in for another."""
    tasks = quadratics()
    ends = [fixed_point(name, tasks, 5) for name in ("reptile", "prox", "fomaml", "maml")]
    ends.append(fixed_point("reptile", tasks, 1))
    assert min(np.abs(a - b).max() for i, a in enumerate(ends) for b in ends[:i]) > 1e-3


def test_support_and_query_each_have_their_part() -> None:
    """With tasks of their own on either side: what is adapted on, and what is judged on, cannot be swapped."""
    supports, queries = quadratics(seed=20), quadratics(seed=21)
    theta = np.linspace(-1, 1, DIMENSION)
    for support, query in zip(supports, queries, strict=True):
        through = np.linalg.matrix_power(np.eye(DIMENSION) - RATE_INSIDE * support.a, 3)
        judged = query.a @ (support.c + through @ (theta - support.c) - query.c)
        found = ALGORITHMS["fomaml"]({"theta": theta}, [Episode(support, query)], gradient, inner("fomaml", 3))
        assert np.abs(found["theta"] + judged).max() < 1e-14
        episode = Episode(as_tensors(support), as_tensors(query))
        second = ALGORITHMS["maml"]({"theta": torch.from_numpy(theta)}, [episode], gradient, inner("maml", 3))
        assert np.abs(second["theta"].numpy() + through.T @ judged).max() < 1e-14


def test_meta_sgd_of_equal_rates_is_maml_and_its_rates_have_the_gradient_of_equation_3() -> None:
    """Of one step: `d loss / d rate = -(query's gradient at the adapted) * (support's gradient at the start)`."""
    tasks = [Episode(as_tensors(s), as_tensors(q)) for s, q in zip(quadratics(), quadratics(seed=3), strict=True)]
    theta = torch.linspace(-1, 1, DIMENSION, dtype=torch.float64)
    meta: Params = {"theta": theta, f"{RATE}theta": torch.full_like(theta, RATE_INSIDE)}
    for steps in (1, 4):
        found = ALGORITHMS["meta_sgd"](meta, tasks, gradient, inner("meta_sgd", steps))
        expected = ALGORITHMS["maml"]({"theta": theta}, tasks, gradient, inner("maml", steps))
        assert set(found) == set(meta)
        assert (found["theta"] - expected["theta"]).abs().max() < 1e-14
    by_hand = []
    for task in tasks:
        start = gradient({"theta": theta}, task.support)["theta"]
        by_hand.append({"rate": gradient({"theta": theta - RATE_INSIDE * start}, task.query)["theta"] * start})
    of_rates = ALGORITHMS["meta_sgd"](meta, tasks, gradient, inner("meta_sgd", 1))[f"{RATE}theta"]
    assert (of_rates - mean(by_hand)["rate"]).abs().max() < 1e-14


def test_meta_sgd_learns_each_coordinates_own_rate() -> None:
    """On a diagonal task the best step of a coordinate is one over its curvature: it leads to the optimum at once."""
    curvatures = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    centres = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 3)))
    tasks = [Quadratic(torch.diag(curvatures), centre) for centre in centres]
    meta: Params = {"theta": torch.zeros(3, dtype=torch.float64), f"{RATE}theta": torch.full((3,), 0.1).double()}
    for _ in range(250):
        update = ALGORITHMS["meta_sgd"](meta, [Episode(t, t) for t in tasks], gradient, inner("meta_sgd", 1))
        meta = {name: value + 0.2 * update[name] for name, value in meta.items()}
    assert (meta[f"{RATE}theta"] * curvatures - 1).abs().max() < 1e-3


def test_anil_moves_the_head_inside_and_answers_for_both() -> None:
    """Loss (body + head - c)^2 / 2: the inner steps see the shared body, and the body's answer the adapted head."""

    def pair(params: Params, centre: float) -> Params:
        residual = params["body.0.weight"] + params["head.weight"] - centre
        return {"body.0.weight": residual, "head.weight": residual}

    meta: Params = {"body.0.weight": np.array([0.5]), "head.weight": np.array([-0.25])}
    episodes = [Episode(1.0, 2.0), Episode(-3.0, 0.5)]
    found = ALGORITHMS["anil"](meta, episodes, pair, inner("anil", 3))
    expected = np.mean([0.25 + (1 - 0.9**3) * (e.support - 0.25) - e.query for e in episodes])
    assert found["body.0.weight"] == pytest.approx(-expected, abs=1e-15)
    assert found["head.weight"] == pytest.approx(-expected, abs=1e-15)
    # FOMAML moves the body as well, twice as far in all.
    first_order = ALGORITHMS["fomaml"](meta, episodes, pair, inner("fomaml", 3))
    both = np.mean([0.25 + (1 - 0.8**3) * (e.support - 0.25) - e.query for e in episodes])
    assert first_order["head.weight"] == pytest.approx(-both, abs=1e-15)


@pytest.mark.parametrize("name", ["points.weight", "head.weight"])
def test_anil_needs_a_body_and_a_head(name: str) -> None:
    with pytest.raises(ValueError, match="a body and a head"):
        ALGORITHMS["anil"]({name: np.zeros(2)}, [], gradient, inner("anil", 1))


@pytest.mark.parametrize("name", ["fomaml", "anil"])
def test_a_gradient_is_asked_for_once_a_step_and_once_to_judge(name: str) -> None:
    """A private gradient is a release: each call costs, and the query's is the last."""
    asked: list[str] = []

    def counted(params: Params, side: str) -> Params:
        asked.append(side)
        return scale(params, 1.0)

    meta: Params = {"body.0.weight": np.ones(1), "head.weight": np.ones(1)}
    ALGORITHMS[name](meta, [Episode("support", "query")] * 2, counted, inner(name, 3))
    assert asked == ["support", "support", "support", "query"] * 2


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "anil"])
def test_an_update_is_added(name: str) -> None:
    """The sign is fixed once: a small step along it lowers the loss after adaptation."""
    for task in quadratics():
        theta = np.zeros(DIMENSION)
        if name == "meta_sgd":
            own = as_tensors(task)
            meta: Params = {"theta": torch.from_numpy(theta), f"{RATE}theta": torch.full((DIMENSION,), 0.1).double()}
            update = ALGORITHMS[name](meta, [Episode(own, own)], gradient, inner(name, 2))["theta"].numpy()
        else:
            update = update_of(name, theta, task, 2)
        assert (theta + 0.1 * update - task.c) @ task.a @ (theta + 0.1 * update - task.c) < task.c @ task.a @ task.c
