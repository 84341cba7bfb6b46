"""Labels that were selected on what they say are explained as what they are, and the level comes out true."""

import numpy as np
import pytest
from scipy.special import expit, logit

from metarisk_common.adapters import adapt_params, predict
from metarisk_common.params import Params
from metarisk_common.plan import ModelSpec
from metarisk_common.prior_correction import adapt_selected, corrected, offset

CARD = ModelSpec()
NET = ModelSpec(kind="mlp", hidden=(3,))
TRUTH = np.array([0.9, -0.6, 4 * -3.5])


def world(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rare positives, about one in twenty-five, by two inputs and the encoder's constant."""
    random = np.random.default_rng(seed)
    x = np.column_stack([random.normal(size=(rows, 2)), np.full(rows, 0.25)])
    return x, (random.random(rows) < expit(x @ TRUTH)).astype(np.float64)


def selected(positives: int, negatives: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = world(20_000, seed)
    rows = np.concatenate([np.flatnonzero(y == 1)[:positives], np.flatnonzero(y == 0)[:negatives]])
    return x[rows], y[rows]


def net(seed: int) -> Params:
    random = np.random.default_rng(seed)
    shapes = {"body.0.weight": (3, 3), "body.0.bias": (3,), "head.weight": (1, 3), "head.bias": (1,)}
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("method", ["prox", "head", "intercept", "auto"])
@pytest.mark.parametrize("start", [-3.5, -2.0])
def test_the_level_is_the_true_one_after_enriched_labels(method: str, start: float) -> None:
    x, y = selected(300, 600, seed=1)
    everyone, outcome = world(40_000, seed=2)
    rate = float(outcome.mean())
    params = {"points.weight": np.array([[0.5, -0.3, 4 * start]])}
    by = offset(float(y.mean()), rate)
    found = adapt_selected(CARD, params, x, y, by=by, method=method, prior_variance=3.0)
    naive = adapt_params(CARD, params, x, y, method=method, prior_variance=3.0)
    assert predict(CARD, found.params, everyone).mean() == pytest.approx(rate, rel=0.12)
    assert predict(CARD, naive.params, everyone).mean() > 3 * rate


def test_few_labels_are_not_corrected_twice() -> None:
    # A truthful initialization under a narrow prior: labels as expected move nothing, however they were selected.
    x, y = selected(15, 15, seed=3)
    params = {"points.weight": TRUTH[None]}
    everyone, outcome = world(40_000, seed=4)
    by = offset(0.5, float(outcome.mean()))
    found = adapt_selected(CARD, params, x, y, by=by, method="prox", prior_variance=0.03)
    assert predict(CARD, found.params, everyone).mean() == pytest.approx(outcome.mean(), rel=0.15)
    later = corrected(
        predict(CARD, adapt_params(CARD, params, x, y, method="prox", prior_variance=0.03).params, everyone), by
    )
    assert later.mean() < 0.3 * outcome.mean()


@pytest.mark.parametrize(("spec", "params"), [(CARD, {"points.weight": TRUTH[None]}), (NET, net(0))])
def test_it_is_the_shift_of_the_initialization_there_and_back(spec: ModelSpec, params: Params) -> None:
    x, y = selected(20, 30, seed=5)
    before = {name: np.array(value) for name, value in params.items()}
    still = adapt_selected(spec, params, x, y, by=1.5, method="none")
    np.testing.assert_allclose(predict(spec, still.params, x), predict(spec, params, x), atol=1e-12)
    plain = adapt_selected(spec, params, x, y, by=0.0, method="head")
    np.testing.assert_array_equal(
        predict(spec, plain.params, x), predict(spec, adapt_params(spec, params, x, y, method="head").params, x)
    )
    moved = adapt_selected(spec, params, x, y, by=1.5, method="head")
    assert predict(spec, moved.params, x).mean() < predict(spec, plain.params, x).mean() - 0.05
    empty = adapt_selected(spec, params, x[:0], y[:0], by=1.5)
    np.testing.assert_array_equal(predict(spec, empty.params, x), predict(spec, params, x))
    for name, value in before.items():
        np.testing.assert_array_equal(params[name], value)


def test_what_was_learned_from_selected_labels_alone_is_moved_as_a_whole() -> None:
    p = np.array([0.2, 0.5, 0.9])
    np.testing.assert_allclose(logit(corrected(p, 2.0)), logit(p) - 2.0)
    assert offset(0.5, 0.01) == pytest.approx(np.log(99))
    assert offset(0.01, 0.01) == 0.0


def test_a_share_without_both_outcomes_is_refused() -> None:
    for share, rate in ((0.0, 0.1), (1.0, 0.1), (0.5, 0.0), (0.5, 1.0)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            offset(share, rate)
    with pytest.raises(ValueError, match="finite shift"):
        adapt_selected(CARD, {"points.weight": TRUTH[None]}, *selected(2, 2, 6), by=np.inf)
    with pytest.raises(ValueError, match="two outcomes"):
        adapt_selected(ModelSpec(loss="squared"), {"points.weight": TRUTH[None]}, *selected(2, 2, 6), by=1.0)
