"""Every baseline learns what it should from what it may see, and the initialization adapts as promised."""

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from scipy.special import expit

from metarisk_common.adaptation import map_logistic
from metarisk_common.adapters import predict
from metarisk_common.errors import DataError
from metarisk_common.evaluation import EvaluationSet, Method, run_episodes, summarise
from metarisk_common.features import Encoder
from metarisk_common.initialisation import param_shapes
from metarisk_common.metrics import auc, log_loss
from metarisk_common.plan import ModelSpec
from metarisk_common.schema import Schema
from simulations.baselines import (
    LocalLightGBM,
    LocalLogistic,
    LocalLogisticBinned,
    ModelInitialization,
    pooled_lightgbm,
    pooled_logistic,
    raw_matrix,
)

Array = npt.NDArray[Any]

SCHEMA = Schema.model_validate(
    {
        "label": {"name": "bad"},
        "institution": "bank",
        "columns": [
            {"kind": "numeric", "name": "amount", "lower": 1, "upper": 1000, "scale": "log"},
            {"kind": "numeric", "name": "rate", "lower": 0, "upper": 1},
            {"kind": "categorical", "name": "year", "categories": [2001, 2002, 2003]},
            {"kind": "categorical", "name": "kind", "categories": ["a", "b", "c"]},
        ],
    }
)
LOCAL: list[Method] = [LocalLogistic(), LocalLogisticBinned(), LocalLightGBM()]


def loans(seed: int, rows: int) -> pl.DataFrame:
    """Loans whose risk rises with the rate and falls with the year."""
    generator = np.random.default_rng(seed)
    rate, year = generator.random(rows), generator.integers(2001, 2004, rows)
    risk = expit(5 * (rate - 0.6) - (year - 2002))
    return pl.DataFrame(
        {
            "amount": np.exp(generator.normal(4, 1, rows)),
            "rate": rate,
            "year": year,
            "kind": generator.choice(["a", "b", "c", "d"], rows),
            "bad": (generator.random(rows) < risk).astype(np.int8),
        }
    )


def bank(name: str, seed: int, rows: int = 400) -> EvaluationSet:
    frame = loans(seed, rows)
    x, _ = Encoder(SCHEMA).encode(frame)
    return EvaluationSet(name, x, raw_matrix(frame, SCHEMA).values, frame["bad"].to_numpy().astype(np.float32))


def test_raw_inputs_say_what_the_schema_says() -> None:
    frame = pl.DataFrame(
        {
            "amount": [100.0, 0.5, None, 5000.0],
            "rate": [0.25, 0.5, float("nan"), 2.0],
            "year": [2001, 2003, 1999, None],
            "kind": ["a", "c", "unheard", None],
        }
    )
    found = raw_matrix(frame, SCHEMA)
    years = ["year = 2001", "year = 2002", "year = 2003", "year = other"]
    assert found.names == ("amount", "rate", *years, "kind = a", "kind = b", "kind = c", "kind = other")
    assert found.categorical.tolist() == [False, False, True, True, True, True, True, True, True, True]
    nan = np.nan
    expected = [
        [np.log(100), 0.25, 1, 0, 0, 0, 1, 0, 0, 0],
        [0.0, 0.5, 0, 0, 1, 0, 0, 0, 1, 0],
        [nan, nan, 0, 0, 0, 1, 0, 0, 0, 1],
        [np.log(1000), 1.0, 0, 0, 0, 1, 0, 0, 0, 1],
    ]
    assert np.allclose(found.values, expected, equal_nan=True)
    assert found.values.dtype == np.float64


def test_a_table_that_lacks_a_column_is_refused() -> None:
    with pytest.raises(DataError, match=r"table\.csv: column 'rate' is missing"):
        raw_matrix(loans(0, 5).drop("rate"), SCHEMA, "table.csv")


@pytest.mark.parametrize("method", LOCAL, ids=lambda method: method.name)
def test_a_local_method_learns_from_its_labels_and_repeats(method: Method) -> None:
    own, later = bank("a", 1, 200), bank("a", 2, 2000)
    few = method.fit(own.x[:50], own.raw[:50], own.y[:50])(later.x, later.raw)
    many = method.fit(own.x, own.raw, own.y)(later.x, later.raw)
    assert auc(later.y, many) > 0.75
    assert 0.6 < auc(later.y, few) <= auc(later.y, many)
    assert ((many > 0) & (many < 1)).all()
    assert abs(many.mean() - later.y.mean()) < 0.1
    assert np.array_equal(many, method.fit(own.x, own.raw, own.y)(later.x, later.raw))


@pytest.mark.parametrize("method", LOCAL, ids=lambda method: method.name)
def test_a_local_method_bears_ten_labels_and_gaps(method: Method) -> None:
    own = bank("a", 3)
    raw = own.raw.copy()
    raw[::3, 0] = np.nan
    raw[:10, 1] = np.nan  # a column of which the support knows nothing
    y = own.y.copy()
    y[:10] = 0
    y[4] = 1
    found = method.fit(own.x[:10], raw[:10], y[:10])(own.x, raw)
    assert found.shape == (400,)
    assert np.isfinite(found).all()


def test_missing_cells_and_constant_columns_say_nothing_to_logistic_regression() -> None:
    generator = np.random.default_rng(0)
    informative = generator.normal(size=200)
    y = (informative + generator.normal(size=200) > 0).astype(np.float64)
    raw = np.column_stack([informative, np.full(200, 7.0), np.full(200, np.nan)])
    predictor = LocalLogistic().fit(raw, raw, y)
    query = np.array([[0.3, 7.0, np.nan], [0.3, -99.0, 5.0], [np.nan, 7.0, np.nan], [informative.mean(), 7.0, 1.0]])
    found = predictor(query, query)
    assert found[0] == pytest.approx(found[1])
    assert found[2] == pytest.approx(found[3])


def test_pooled_models_ignore_the_labels_and_see_what_one_bank_cannot() -> None:
    train = [bank(str(seed), seed) for seed in range(10, 16)]
    raw, y = np.concatenate([one.raw for one in train]), np.concatenate([one.y for one in train])
    later = bank("later", 99, 2000)
    for method in (pooled_logistic(raw, y), pooled_lightgbm(raw, y)):
        predictor = method.fit(later.x[:0], later.raw[:0], later.y[:0])
        assert predictor is method.fit(later.x[:50], later.raw[:50], later.y[:50])
        assert auc(later.y, predictor(later.x, later.raw)) > 0.75


def shared(name: str, weights: np.ndarray, **how: Any) -> ModelInitialization:
    return ModelInitialization(name, ModelSpec(), {"points.weight": weights[None]}, **how)


def test_the_initialization_is_itself_without_labels_and_map_with_them() -> None:
    own = bank("a", 5)
    weights = np.random.default_rng(0).normal(size=(own.x.shape[1],))
    method = shared("reptile-no-dp", weights, method="prox", prior_variance=0.5)
    start = method.fit(own.x[:0], own.raw[:0], own.y[:0])(own.x, own.raw)
    assert start == pytest.approx(expit(own.x.astype(np.float64) @ weights))
    adapted = map_logistic(weights, own.x[:50], own.y[:50], tau2=0.5)
    found = method.fit(own.x[:50], own.raw[:50], own.y[:50])(own.x, own.raw)
    assert found == pytest.approx(expit(own.x.astype(np.float64) @ adapted))
    fixed = shared("joint", weights, method="none")
    assert np.array_equal(fixed.fit(own.x[:50], own.raw[:50], own.y[:50])(own.x, own.raw), start)


def test_a_network_adapts_by_itself() -> None:
    own = bank("a", 7)
    spec = ModelSpec(kind="mlp", hidden=(4,))
    generator = np.random.default_rng(2)
    params = {name: generator.normal(size=shape) for name, shape in param_shapes(spec, own.x.shape[1]).items()}
    method = ModelInitialization("network", spec, params)
    none, some = (method.fit(own.x[:k], own.raw[:k], own.y[:k])(own.x[100:], own.raw[100:]) for k in (0, 100))
    assert np.array_equal(none, predict(spec, params, own.x[100:]))
    assert log_loss(own.y[100:], some) < log_loss(own.y[100:], none)


def test_all_methods_run_in_one_experiment_and_knowledge_pays() -> None:
    train = [bank(str(seed), seed) for seed in range(20, 26)]
    x, raw, y = (np.concatenate([getattr(one, part) for one in train]) for part in ("x", "raw", "y"))
    weights = map_logistic(np.zeros(x.shape[1]), x, y, tau2=10.0)
    methods = [*LOCAL, pooled_logistic(raw, y), pooled_lightgbm(raw, y), shared("shared", weights)]
    unseen = [bank(f"unseen {seed}", seed) for seed in range(30, 34)]
    found = summarise(run_episodes(unseen, methods, [0, 20, 100], draws=2, seed=0))
    assert set(found) == {
        "local-logistic",
        "local-logistic-binned",
        "local-lightgbm",
        "pooled-logistic",
        "pooled-lightgbm",
        "shared",
    }
    assert "0" not in found["local-lightgbm"]
    assert found["pooled-lightgbm"]["0"] == found["pooled-lightgbm"]["100"]
    for local in LOCAL:
        assert found["shared"]["0"]["auc"]["mean"] > found[local.name]["20"]["auc"]["mean"]
        assert found[local.name]["100"]["auc"]["mean"] > found[local.name]["20"]["auc"]["mean"]
