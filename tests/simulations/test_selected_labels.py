"""Methods that learn from supports with more positives than there are: corrected to the public base rate."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import expit, logit

from metarisk_common.fraud_metrics import average_precision
from metarisk_common.plan import ModelSpec
from simulations.baselines import Corrected, LocalLightGBM, LocalLogistic, ModelInitialization
from simulations.scenarios import Evaluation, built_in, load_scenario

Array = npt.NDArray[np.float64]
TRUTH = np.array([1.2, -0.8, 4 * -3.9])


def world(rows: int, seed: int) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    x = np.column_stack([random.normal(size=(rows, 2)), np.full(rows, 0.25)])
    return x, (random.random(rows) < expit(x @ TRUTH)).astype(np.float64)


@pytest.fixture(scope="module")
def support() -> tuple[Array, Array]:
    x, y = world(20_000, 1)
    rows = np.concatenate([np.flatnonzero(y == 1)[:30], np.flatnonzero(y == 0)[:170]])
    return x[rows], y[rows]


@pytest.mark.parametrize("method", [LocalLogistic(), LocalLightGBM()])
def test_a_local_method_keeps_its_order_and_comes_to_the_base_rate(
    method: LocalLogistic | LocalLightGBM, support: tuple[Array, Array]
) -> None:
    x, y = support
    everyone, outcome = world(5_000, 2)
    plain = method.fit(x, x[:, :2], y)(everyone, everyone[:, :2])
    found = Corrected(method, 0.03)
    p = found.fit(x, x[:, :2], y)(everyone, everyone[:, :2])
    assert (found.name, found.needs_support) == (method.name, True)
    assert average_precision(outcome, p) == pytest.approx(average_precision(outcome, plain), abs=1e-9)
    np.testing.assert_allclose(logit(plain) - logit(p), logit(0.15) - logit(0.03), atol=1e-9)


def test_an_initialization_comes_to_the_true_level(support: tuple[Array, Array]) -> None:
    x, y = support
    everyone, outcome = world(20_000, 3)
    params = {"points.weight": np.array([[0.5, -0.3, 4 * -3.5]])}
    rate = float(outcome.mean())

    def level(base_rate: float | None) -> float:
        method = ModelInitialization("m", ModelSpec(), params, "prox", 3.0, base_rate=base_rate)
        return float(method.fit(x, x, y)(everyone, everyone).mean())

    assert level(None) > 2.5 * rate
    assert level(rate) == pytest.approx(rate, rel=0.2)


def test_labels_of_one_outcome_and_none_at_all_are_left_alone(support: tuple[Array, Array]) -> None:
    x, _ = support
    params = {"points.weight": TRUTH[None]}
    for rows in (0, 20):
        y = np.zeros(rows)
        found, plain = (ModelInitialization("m", ModelSpec(), params, "prox", 3.0, base_rate=b) for b in (0.02, None))
        np.testing.assert_array_equal(found.fit(x[:rows], x, y)(x, x), plain.fit(x[:rows], x, y)(x, x))


def test_a_base_rate_is_a_share_and_of_outcomes() -> None:
    with pytest.raises(ValueError, match="base_rate"):
        Evaluation(base_rate=1.0)
    volatility = load_scenario(built_in("volatility"))
    evaluation = volatility.evaluation.model_copy(update={"base_rate": 0.1}).model_dump()
    values = volatility.model_dump(by_alias=True) | {"evaluation": evaluation}
    with pytest.raises(ValueError, match="the label is a number"):
        type(volatility).model_validate(values)
