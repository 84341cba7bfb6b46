"""Each method moves what it names, as far as it says; `auto` follows the labels, and only as far as they carry."""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from metarisk_common.adaptation import adapt, map_logistic
from metarisk_common.adapters import INTERCEPT_TAU2, METHODS, PRIOR_SHARE, Adapted, adapt_params, predict
from metarisk_common.initialisation import RATE, param_shapes
from metarisk_common.metrics import log_loss
from metarisk_common.models import build, forward
from metarisk_common.params import Params
from metarisk_common.plan import ModelSpec

Array = npt.NDArray[Any]

SCORECARD, MLP = ModelSpec(), ModelSpec(kind="mlp", hidden=(6,))
WIDTH = 9
INTERCEPT = 0.25


def inputs(generator: np.random.Generator, rows: int) -> Array:
    """Encoded rows: norm 1, the last input the constant intercept."""
    x = generator.normal(size=(rows, WIDTH - 1))
    x *= np.sqrt(1 - INTERCEPT**2) / np.linalg.norm(x, axis=1, keepdims=True)
    return np.hstack([x, np.full((rows, 1), INTERCEPT)])


def initialization(spec: ModelSpec, seed: int = 0) -> Params:
    generator = np.random.default_rng(seed)
    params = {name: generator.normal(size=shape) for name, shape in param_shapes(spec, WIDTH).items()}
    if spec is SCORECARD:
        params["points.weight"] *= 2
        params["points.weight"][0, -1] = -1.0 / INTERCEPT
    return params


def task(seed: int, rows: int, spec: ModelSpec = SCORECARD, *, shift: float = 0.0) -> tuple[Params, Array, Array]:
    """An initialization, and records whose outcomes follow it but for a shift of the logit."""
    generator = np.random.default_rng(seed)
    x, params = inputs(generator, rows), initialization(spec, seed)
    y = generator.random(rows) < expit(logit(predict(spec, params, x)) + shift)
    return params, x, y.astype(np.float32)


def same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("spec", [SCORECARD, MLP], ids=["scorecard", "mlp"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "prior"])
def test_every_method_gives_the_models_own_parameters(spec: ModelSpec, method: str) -> None:
    params, x, y = task(1, 30, spec, shift=1.0)
    before = {name: value.copy() for name, value in params.items()}
    found = adapt_params(spec, params, x.astype(np.float32), y, method=method)
    assert {name: value.shape for name, value in found.params.items()} == param_shapes(spec, WIDTH)
    assert all(value.dtype == np.float64 and np.isfinite(value).all() for value in found.params.values())
    assert found.method in METHODS[:-1]
    assert method in {found.method, "auto"}
    assert bool(found.folds_log_loss) == (method == "auto")
    assert same(params, before)
    assert same(found.params, params) == (found.method == "none")
    assert same(found.params, adapt_params(spec, params, x.astype(np.float32), y, method=method).params)


@pytest.mark.parametrize("spec", [SCORECARD, MLP], ids=["scorecard", "mlp"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "prior"])
def test_without_labels_the_initialization_stays(spec: ModelSpec, method: str) -> None:
    params, x, y = task(2, 0, spec)
    found = adapt_params(spec, params, x, y, method=method)
    assert same(found.params, params)
    assert (found.method, found.strength, found.folds_log_loss) == ("none", None, {})


@pytest.mark.parametrize("spec", [SCORECARD, MLP], ids=["scorecard", "mlp"])
@pytest.mark.parametrize("outcome", [0.0, 1.0])
@pytest.mark.parametrize("k", [1, 2, 20])
def test_labels_of_one_class_are_borne(spec: ModelSpec, outcome: float, k: int) -> None:
    params, x, _ = task(3, k, spec)
    for method in (name for name in METHODS if name != "prior"):
        y = np.full(k, outcome)
        found = predict(spec, adapt_params(spec, params, x, y, method=method).params, x)
        assert ((found > 0) & (found < 1)).all()
        assert log_loss(y, found) <= log_loss(y, predict(spec, params, x)) + 1e-9


def test_a_prediction_is_what_the_model_says() -> None:
    for spec in (SCORECARD, MLP, ModelSpec(kind="mlp", hidden=(5, 3))):
        params, x, _ = task(4, 12, spec)
        tensors = {name: torch.from_numpy(value) for name, value in params.items()}
        logits = forward(build(spec, WIDTH, "float64"), tensors, torch.from_numpy(x)).numpy()
        assert predict(spec, params, x) == pytest.approx(expit(logits), abs=1e-12)


# Known answers.


@pytest.mark.parametrize("spec", [SCORECARD, MLP], ids=["scorecard", "mlp"])
@pytest.mark.parametrize("shift", [-2.0, 2.0])
def test_intercept_moves_the_intercept_alone_and_finds_the_base_rate(spec: ModelSpec, shift: float) -> None:
    params, x, y = task(5, 2000, spec, shift=shift)
    found = adapt_params(spec, params, x, y, method="intercept")
    before, after = logit(predict(spec, params, x)), logit(predict(spec, found.params, x))
    moved = after - before
    assert np.ptp(moved) < 1e-9
    # The minimum of the stated objective: what the labels say against what the prior holds.
    assert np.sum(expit(after) - y) + moved[0] / INTERCEPT_TAU2 == pytest.approx(0, abs=1e-5)
    assert abs(moved[0] - shift) < 0.3
    assert abs(predict(spec, found.params, x).mean() - y.mean()) < 0.005
    assert found.strength == 1 / INTERCEPT_TAU2


def test_methods_of_a_scorecard_are_the_minima_that_they_name() -> None:
    params, x, y = task(6, 40)
    start = params["points.weight"][0]
    own = np.full(WIDTH, 0.7)
    own[-1] = INTERCEPT_TAU2 / INTERCEPT**2
    prior = np.linspace(0, 2, WIDTH)
    for method, tau2, strength in (
        ("prox", np.full(WIDTH, 0.7), 1 / 0.7),
        ("head", own, 1 / 0.7),
        ("prior", PRIOR_SHARE * prior, 1 / PRIOR_SHARE),
    ):
        found = adapt_params(SCORECARD, params, x, y, method=method, prior_variance=0.7, prior=prior)
        assert found.params["points.weight"][0] == pytest.approx(map_logistic(start, x, y, tau2=tau2), abs=1e-12)
        assert found.strength == pytest.approx(strength)


def test_prox_of_an_mlp_moves_everything_and_head_the_last_layer() -> None:
    params, x, y = task(7, 40, MLP, shift=1.0)
    tensors = {name: torch.from_numpy(value) for name, value in params.items()}
    whole = adapt(
        partial(forward, build(MLP, WIDTH, "float64")), tensors, torch.tensor(x), torch.tensor(y), strength=2.0
    )
    found = adapt_params(MLP, params, x, y, method="prox", prior_variance=0.5).params
    assert all(found[name] == pytest.approx(whole[name].numpy(), abs=1e-6) for name in whole)
    head = adapt_params(MLP, params, x, y, method="head").params
    assert {name for name in params if not np.array_equal(head[name], params[name])} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("spec", [SCORECARD, MLP], ids=["scorecard", "mlp"])
def test_a_step_of_sgd_is_the_gradient_and_learned_rates_are_its_size(spec: ModelSpec) -> None:
    params, x, y = task(8, 25, spec, shift=1.0)
    steps = [adapt_params(spec, params, x, y, method="sgd", steps=n, learning_rate=0.1).params for n in (1, 2)]
    again = adapt_params(spec, steps[0], x, y, method="sgd", steps=1, learning_rate=0.1).params
    assert all(steps[1][name] == pytest.approx(again[name], abs=1e-12) for name in again)
    name = "points.weight" if spec is SCORECARD else "head.bias"
    residual = predict(spec, params, x) - y
    gradient = (x.T @ residual / 25)[None] if spec is SCORECARD else residual.mean(keepdims=True)
    assert steps[0][name] == pytest.approx(params[name] - 0.1 * gradient, abs=1e-9)
    rates = {RATE + key: np.full(value.shape, 0.1 if key == name else 0.0) for key, value in params.items()}
    learned = adapt_params(spec, {**params, **rates}, x, y, method="sgd", steps=1).params
    assert learned.keys() == params.keys()
    assert learned[name] == pytest.approx(steps[0][name], abs=1e-12)
    assert all(np.array_equal(learned[key], params[key]) for key in params if key != name)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_a_narrower_prior_never_moves_the_weights_further(seed: int, k: int) -> None:
    params, x, y = task(seed, k)
    spread = []
    for variance in (1e-9, 0.01, 0.3, 10.0):
        found = adapt_params(SCORECARD, params, x, y, method="prox", prior_variance=variance).params
        spread.append(float(np.linalg.norm(found["points.weight"] - params["points.weight"])))
    assert spread[0] < 1e-5
    assert all(one <= other + 1e-6 for one, other in pairwise(spread))


# What `auto` does.


def auto(params: Params, x: Array, y: Array, spec: ModelSpec = SCORECARD, **settings: Any) -> Adapted:
    return adapt_params(spec, params, x, y, method="auto", **settings)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 80), st.floats(-3, 3))
def test_auto_gives_up_at_most_a_nat_on_the_labels_own_word(seed: int, k: int, shift: float) -> None:
    params, x, y = task(seed, k, shift=shift)
    found = auto(params, x, y)
    losses = found.folds_log_loss
    assert losses["none"] == pytest.approx(log_loss(y, predict(SCORECARD, params, x)))
    best_of_method = min(value for key, value in losses.items() if key.split(",")[0] == found.method)
    assert k * (best_of_method - losses["none"]) <= 1.0 + 1e-9
    order = np.random.default_rng(seed).permutation(k)
    again = auto(params, x[order], y[order])
    assert again.method == found.method
    assert again.params["points.weight"] == pytest.approx(found.params["points.weight"], abs=1e-6)


@pytest.mark.parametrize("spec", [SCORECARD, MLP], ids=["scorecard", "mlp"])
def test_what_auto_chose_can_be_asked_for_by_name(spec: ModelSpec) -> None:
    chosen = set()
    for seed, shift in ((0, 0.0), (1, 1.0), (2, 3.0)):
        params, x, y = task(seed, 60, spec, shift=shift)
        found = auto(params, x, y, spec)
        variance = 1 / found.strength if found.strength else 0.3
        named = adapt_params(spec, params, x, y, method=found.method, prior_variance=variance)
        assert (named.method, named.strength) == (found.method, found.strength)
        assert all(named.params[name] == pytest.approx(found.params[name], abs=1e-9) for name in params)
        chosen.add(found.method)
    assert len(chosen) > 1 or spec is MLP


@pytest.mark.parametrize("k", [20, 100])
def test_labels_with_nothing_to_teach_do_next_to_no_harm(k: int) -> None:
    regrets, chosen = [], []
    for seed in range(60):
        params, x, y = task(seed, k + 1000)
        found = auto(params, x[:k], y[:k])
        chance, known = predict(SCORECARD, found.params, x[k:]), predict(SCORECARD, params, x[k:])
        # Against the true chances, which are the initialization's, so that no luck of the judged labels is in it.
        regrets.append(
            float(np.mean(known * np.log(known / chance) + (1 - known) * np.log((1 - known) / (1 - chance))))
        )
        chosen.append((found.method, found.strength))
    assert np.mean(regrets) < 0.006
    narrow = chosen.count(("none", None)) + chosen.count(("prox", 1 / 0.3))
    assert narrow >= 0.9 * len(chosen)


def test_a_prior_that_is_too_wide_is_seen_through() -> None:
    # Nothing to learn and weights that may go anywhere: adapting is worse on the labels' own word, nearly always.
    found = [auto(*task(seed, 60), prior_variance=30.0).method for seed in range(40)]
    assert found.count("none") >= 30


@pytest.mark.parametrize("spec", [SCORECARD, MLP], ids=["scorecard", "mlp"])
def test_a_base_rate_of_its_own_is_found(spec: ModelSpec) -> None:
    gains = []
    for seed in range(8):
        params, x, y = task(seed, 1050, spec, shift=2.5)
        found = auto(params, x[:50], y[:50], spec)
        assert found.method != "none"
        after, before = (predict(spec, each, x[50:]) for each in (found.params, params))
        gains.append(log_loss(y[50:], before) - log_loss(y[50:], after))
    assert np.mean(gains) > 0.2


@pytest.mark.parametrize("spec", [SCORECARD, MLP], ids=["scorecard", "mlp"])
def test_a_task_that_is_the_opposite_is_followed_further_than_the_narrow_prior_goes(spec: ModelSpec) -> None:
    generator = np.random.default_rng(9)
    x, params = inputs(generator, 2200), initialization(spec, 9)
    if spec is SCORECARD:
        params["points.weight"] *= 3
    y = (generator.random(2200) < 1 - predict(spec, params, x)).astype(np.float32)
    found = auto(params, x[:200], y[:200], spec)
    assert found.strength is not None
    assert found.strength < 1 / 0.3
    narrow = adapt_params(spec, params, x[:200], y[:200], method="prox")
    followed, held, start = (
        log_loss(y[200:], predict(spec, each, x[200:])) for each in (found.params, narrow.params, params)
    )
    assert followed < start - 0.3
    assert followed < held or spec is MLP


def test_auto_leaves_a_learned_prior_aside() -> None:
    """It was chosen too often on the loans: what is adapted by auto must not depend on it."""
    params, x, y = task(10, 60)
    with_it, without = auto(params, x, y, prior=np.full(WIDTH, 1000.0)), auto(params, x, y)
    assert (with_it.method, with_it.folds_log_loss) == (without.method, without.folds_log_loss)
    np.testing.assert_array_equal(with_it.params["points.weight"], without.params["points.weight"])


# What does not fit.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "no method 'magic'"),
        ({"y": np.zeros(4)}, "shapes"),
        ({"x": np.zeros(5)}, "shapes"),
        ({"x": np.full((5, WIDTH), np.nan)}, "finite"),
        ({"x": np.full((5, WIDTH - 1), INTERCEPT)}, "does not fit"),
        ({"params": {"points.weight": np.full((1, WIDTH), np.inf)}}, "finite"),
        ({"params": {"other": np.zeros((1, WIDTH))}}, "does not fit"),
        ({"y": np.full(5, 0.5)}, "0 and 1"),
        ({"prior_variance": 0.0}, "prior_variance"),
        ({"prior_variance": float("nan")}, "prior_variance"),
        ({"method": "prior"}, "learned"),
        ({"method": "prior", "prior": np.full(WIDTH, -1.0)}, "prior must hold 9"),
        ({"prior": np.zeros(3)}, "prior must hold 9"),
        ({"method": "sgd", "steps": 0}, "step"),
        ({"method": "sgd", "learning_rate": -1.0}, "learning_rate"),
        ({"x": np.arange(5.0 * WIDTH).reshape(5, WIDTH)}, "constant intercept"),
        ({"x": np.zeros((5, WIDTH))}, "constant intercept"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    params, x, y = task(11, 5)
    arguments: dict[str, Any] = {"params": params, "x": x, "y": y} | change
    with pytest.raises(ValueError, match=message):
        adapt_params(SCORECARD, **arguments)


def test_an_mlp_has_no_learned_prior() -> None:
    params, x, y = task(12, 5, MLP)
    with pytest.raises(ValueError, match="scorecard"):
        adapt_params(MLP, params, x, y, method="prior", prior=np.ones(WIDTH))
