"""Adaptation finds the minimum that it names, the same one by both ways, and moves from prior to evidence."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad, minimize

from metarisk_common.adaptation import adapt, map_logistic

Array = npt.NDArray[Any]


def records(seed: int, rows: int, width: int) -> tuple[Array, Array, Array]:
    """Rows of norm 1 whose outcomes follow a logistic model, and an initialization near it."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    truth = generator.normal(size=width)
    y = (generator.random(rows) < 1 / (1 + np.exp(-2 * x @ truth))).astype(np.float64)
    return truth + generator.normal(size=width), x, y


def objective(w: Array, w0: Array, x: Array, y: Array, tau2: float | Array) -> float:
    return float(np.logaddexp(0, (1 - 2 * y) * (x @ w)).sum() + 0.5 * np.sum((w - w0) ** 2 / tau2))


def gradient(w: Array, w0: Array, x: Array, y: Array, tau2: float | Array) -> Array:
    return np.asarray(x.T @ (1 / (1 + np.exp(-x @ w)) - y) + (w - w0) / tau2)


def forward(params: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return x @ params["w"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 40), st.floats(0.01, 100))
def test_the_gradient_vanishes_whichever_side_is_smaller(seed: int, rows: int, width: int, tau2: float) -> None:
    w0, x, y = records(seed, rows, width)
    w = map_logistic(w0, x, y, tau2=tau2)
    assert np.linalg.norm(gradient(w, w0, x, y, tau2)) <= 1e-8
    assert w.dtype == np.float64


def test_the_objective_is_the_documented_one() -> None:
    w0, x, y = records(1, 30, 6)
    tau2 = np.linspace(0.1, 2, 6)
    assert check_grad(objective, gradient, w0 + 0.3, w0, x, y, tau2) < 1e-5
    found = minimize(objective, w0, args=(w0, x, y, tau2), jac=gradient, method="BFGS", options={"gtol": 1e-6})
    assert map_logistic(w0, x, y, tau2=tau2) == pytest.approx(found.x, abs=1e-5)


@pytest.mark.parametrize(("rows", "width"), [(10, 40), (50, 40), (200, 40)])
@pytest.mark.parametrize("tau2", [0.05, 0.3, 5.0])
def test_both_ways_agree_on_a_scorecard(rows: int, width: int, tau2: float) -> None:
    w0, x, y = records(rows, rows, width)
    params = {"w": torch.tensor(w0)}
    general = adapt(forward, params, torch.tensor(x), torch.tensor(y), strength=1 / tau2)["w"].numpy()
    assert general == pytest.approx(map_logistic(w0, x, y, tau2=tau2), abs=1e-6)
    assert np.array_equal(params["w"].numpy(), w0)


def test_without_labels_the_initialization_stays() -> None:
    w0, x, y = records(2, 0, 5)
    assert np.array_equal(map_logistic(w0, x, y), w0)
    assert np.array_equal(adapt(forward, {"w": torch.tensor(w0)}, torch.tensor(x), torch.tensor(y))["w"].numpy(), w0)


def test_a_tight_prior_keeps_the_initialization_and_a_wide_one_lets_the_labels_speak() -> None:
    w0, x, y = records(3, 500, 4)
    assert map_logistic(w0, x, y, tau2=1e-9) == pytest.approx(w0, abs=1e-6)
    unpenalised = minimize(objective, w0, args=(w0, x, y, 1e12), jac=gradient, method="BFGS").x
    assert map_logistic(w0, x, y, tau2=1e12) == pytest.approx(unpenalised, abs=1e-4)


def test_a_weight_without_prior_variance_does_not_move() -> None:
    w0, x, y = records(4, 25, 5)
    w = map_logistic(w0, x, y, tau2=np.array([0.0, 0.3, 0.3, 0.0, 0.3]))
    assert np.array_equal(w[[0, 3]], w0[[0, 3]])
    assert np.abs(w - w0)[[1, 2, 4]].min() > 1e-3


def test_separable_and_confidently_wrong_starts_converge() -> None:
    # An undamped Newton step overshoots here: every record starts far on the wrong side, where curvature is nil.
    x = np.eye(6)
    y = np.array([0.0, 1, 0, 1, 0, 1])
    w0 = np.where(y == 1, -40.0, 40.0)
    for tau2 in (0.3, 1e4):
        w = map_logistic(w0, x, y, tau2=tau2)
        assert np.linalg.norm(gradient(w, w0, x, y, tau2)) <= 1e-8


def test_unbounded_inputs_still_reach_the_minimum() -> None:
    w0, x, y = records(5, 40, 5)
    x = 1000 * x
    w = map_logistic(w0, x, y, tau2=0.3)
    assert objective(w, w0, x, y, 0.3) <= objective(w0, w0, x, y, 0.3)
    assert np.linalg.norm(gradient(w, w0, x, y, 0.3)) <= 1e-4


def test_float32_inputs_are_computed_in_float64() -> None:
    w0, x, y = records(6, 30, 8)
    narrow = map_logistic(w0.astype(np.float32), x.astype(np.float32), y.astype(np.int8))
    exact = map_logistic(w0.astype(np.float32).astype(float), x.astype(np.float32).astype(float), y)
    assert np.array_equal(narrow, exact)


def test_a_network_adapts_and_keeps_its_names_shapes_and_types() -> None:
    _, x, y = records(7, 60, 5)
    generator = torch.Generator().manual_seed(0)
    params = {
        "hidden": 0.3 * torch.randn(5, 4, generator=generator),
        "out": 0.3 * torch.randn(4, generator=generator),
    }
    inputs, outcome = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)

    def network(values: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(rows @ values["hidden"]) @ values["out"]

    adapted = adapt(network, params, inputs, outcome, strength=0.5)
    assert {name: (value.shape, value.dtype) for name, value in adapted.items()} == {
        name: (value.shape, value.dtype) for name, value in params.items()
    }
    free = {name: value.double().requires_grad_() for name, value in adapted.items()}
    total = torch.nn.functional.binary_cross_entropy_with_logits(
        network(free, inputs.double()), outcome.double(), reduction="sum"
    ) + 0.25 * sum((free[name] - params[name]).square().sum() for name in params)
    # Rounding the result to float32 leaves a gradient of about 1e-6.
    assert max(float(g.abs().max()) for g in torch.autograd.grad(total, list(free.values()))) < 1e-5


def half_squared(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 0.5 * (outputs - y).square()


def test_regression_adapts_by_ridge_toward_the_initialization() -> None:
    generator = np.random.default_rng(8)
    x, y, w0 = generator.normal(size=(20, 3)), generator.normal(size=20), generator.normal(size=3)
    ridge = w0 + np.linalg.solve(x.T @ x + 2.0 * np.eye(3), x.T @ (y - x @ w0))
    params = {"w": torch.tensor(w0)}
    adapted = adapt(forward, params, torch.tensor(x), torch.tensor(y), strength=2.0, loss=half_squared)
    assert adapted["w"].numpy() == pytest.approx(ridge, abs=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros(4)}, "shapes"),
        ({"w0": np.zeros(4)}, "shapes"),
        ({"tau2": -1.0}, "tau2"),
        ({"tau2": np.ones(2)}, "tau2"),
        ({"x": np.full((5, 3), np.nan)}, "finite"),
        ({"y": np.full(5, 0.5)}, "0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"w0": np.zeros(3), "x": np.zeros((5, 3)), "y": np.zeros(5), "tau2": 0.3} | change
    with pytest.raises(ValueError, match=message):
        map_logistic(arguments["w0"], arguments["x"], arguments["y"], tau2=arguments["tau2"])


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_a_prior_must_have_a_strength(strength: float) -> None:
    with pytest.raises(ValueError, match="strength"):
        adapt(forward, {"w": torch.zeros(2)}, torch.zeros(1, 2), torch.zeros(1), strength=strength)
