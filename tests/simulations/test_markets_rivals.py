"""What an asset's own past forecasts, and what makes a forecast of a logarithm one of the variance: the past alone."""

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from metarisk_common.errors import DataError
from metarisk_common.evaluation import EvaluationSet, Method, Predictor
from metarisk_common.schema import NumericLabel
from simulations import markets
from simulations.market_episodes import Fixed, Learned, LocalHAR, forecasts_in, retransformed, rivals, with_forecasts
from simulations.markets import HORIZON, har, inputs, known_of_unseen, own_mean, records

LABEL = NumericLabel(kind="numeric", name="y", lower=-16, upper=-3, centre=-8, scale=2)
FIRST = date(2009, 1, 1)
CUT = FIRST + timedelta(days=499)


def walk(days: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    moves = 0.01 * np.exp(0.3 * np.cumsum(0.2 * random.standard_normal(days))) * random.standard_normal(days)
    return np.asarray(50.0 * np.exp(np.cumsum(np.clip(moves, -0.2, 0.2))))


def prices(path: Path, **closes: np.ndarray) -> Path:
    """Write assets of one class, of which by name every third is unseen."""
    tables = [
        pl.DataFrame(
            {"asset": name, "desk": "us_stocks", "close": values}
        ).with_columns(date=pl.date_range(FIRST, FIRST + timedelta(days=len(values) - 1), eager=True))
        for name, values in closes.items()
    ]  # fmt: skip
    pl.concat(tables).write_parquet(path)
    return path


@pytest.fixture(scope="module")
def closes() -> np.ndarray:
    return walk(800, 1)


def unseen(path: Path) -> pl.DataFrame:
    found = markets.table(path, {"learn_until": CUT.isoformat()})
    return found.filter(pl.col("asset") == "C")


def test_the_own_regression_is_that_on_all_days_whose_target_is_known(closes: np.ndarray) -> None:
    found = records(closes)
    forecasts, day = har(found), 600
    known = found[: day - HORIZON + 1].drop_nulls()
    # The last one's target ended today.
    assert known["session"][-1] + HORIZON == day
    x = np.column_stack([np.ones(known.height), known.select(inputs()).to_numpy()])
    weights = np.linalg.lstsq(x, known["log_variance"].to_numpy(), rcond=None)[0]
    today = np.append(1.0, found.select(inputs()).row(day))
    assert forecasts[day] == pytest.approx(today @ weights, abs=1e-8)
    # 66 days until there is a record, 250 of them, and five more until the last one's target is known.
    assert np.flatnonzero(np.isfinite(forecasts))[0] == 66 + 249 + HORIZON


def test_what_an_assets_past_says_no_later_price_changes(closes: np.ndarray, tmp_path: Path) -> None:
    day, later = 600, closes.copy()
    later[day + 1 :] *= np.linspace(1, 3, len(closes) - day - 1)
    np.testing.assert_array_equal(har(records(later))[: day + 1], har(records(closes))[: day + 1])
    others = {"A": walk(800, 2), "B": walk(800, 3)}
    before = unseen(prices(tmp_path / "before.parquet", **others, C=closes))
    after = unseen(prices(tmp_path / "after.parquet", **others, C=later))
    sooner = pl.col("session") <= day
    assert before.filter(sooner).select(known_of_unseen()).equals(after.filter(sooner).select(known_of_unseen()))
    assert not before.select("har_all").equals(after.select("har_all"))


def test_the_own_mean_is_of_targets_that_are_known() -> None:
    target = np.array([np.nan, 1.0, 3.0, 8.0, 4.0, 5.0, 6.0, 7.0, np.nan])
    np.testing.assert_array_equal(own_mean(target), [np.nan] * 6 + [1.0, 2.0, 4.0])


def test_rivals_are_retransformed_by_their_errors_until_desks_stopped_learning(
    closes: np.ndarray, tmp_path: Path
) -> None:
    table = unseen(prices(tmp_path / "prices.parquet", A=walk(800, 2), B=walk(800, 3), C=closes))
    found = records(closes)
    known = np.arange(500 - HORIZON)  # days whose target was known on the 500th, the last of learning
    missed = found["log_variance"].to_numpy()[known] - har(found)[known]
    assert table["har_all_half_variance"].unique().to_list() == [pytest.approx(np.nanvar(missed) / 2)]
    assert table["asset_class"].unique().to_list() == ["us stocks"]
    assert table["date"].min() == CUT + timedelta(days=1)


def test_an_asset_too_young_for_models_of_its_own_is_refused_before_training(tmp_path: Path) -> None:
    path = prices(tmp_path / "prices.parquet", A=walk(800, 2), B=walk(800, 3), C=walk(800, 4))
    young = pl.read_parquet(path).filter((pl.col("asset") != "C") | (pl.col("date") > FIRST + timedelta(days=230)))
    young.write_parquet(path)
    with pytest.raises(DataError, match=r"asset 'C' has too few days up to 2010-05-15 .* give it 322"):
        unseen(path)


class Constant:
    """A start that forecasts one number, more by each label."""

    name = "start"
    needs_support = False

    def fit(self, _x: Any, _raw: Any, y: Any) -> Predictor:
        return lambda x, _raw: np.full(len(x), float(len(y)))


def test_all_methods_are_retransformed_alike_and_forecast_as_before() -> None:
    random = np.random.default_rng(5)
    x, raw, y = np.zeros((400, 1)), random.standard_normal((400, 2)), random.standard_normal(400)
    frame = pl.DataFrame(
        {"desk": ["a"] * 9, "ewma": [-6.0] * 9, "ewma_half_variance": [0.5] * 9, "own_mean": [-9.0] * 9}
    )
    sets = [EvaluationSet("a", np.zeros((9, 1)), random.standard_normal((9, 2)), random.standard_normal(9))]
    judged = with_forecasts(sets, frame, "desk", LABEL)[0]
    np.testing.assert_array_equal(judged.extra["own_reference"], np.full(9, -0.5))
    plain: list[Method] = [Constant(), *(method for method, *_ in rivals(raw, y, forecasts_in(frame)))]
    found = retransformed(plain, Learned(x, raw, y), LABEL.scale)
    below = {}
    for method, changed in zip(plain, found, strict=True):
        assert (changed.name, changed.needs_support) == (method.name, method.needs_support)
        support = judged.x[:6], judged.raw[:6], judged.y[:6]
        expected = method.fit(*support)(judged.x, judged.raw)
        got = changed.fit(*support)(judged.x, judged.raw)
        np.testing.assert_array_equal(got[:, 0], expected)
        assert np.ptp(got[:, 1]) == 0
        below[method.name] = got[0, 1]
        if isinstance(changed, Fixed):
            # One predictor for every k, which episodes need score once only.
            assert changed.fit(*support) is changed.fit(judged.x[:0], judged.raw[:0], judged.y[:0])
    pooled = next(method for method in plain if method.name == "pooled-har").fit(x[:0], raw[:0], y[:0])
    # In log-variance half the variance is scale^2 / 2 of the standardised one's, and one unit is `scale` of those.
    assert below["start"] == pytest.approx(y.var() * LABEL.scale / 2)
    assert below["pooled-har"] == pytest.approx((y - pooled(x, raw)).var() * LABEL.scale / 2)
    assert below["local-har"] == below["pooled-har"]
    assert below["local-ewma"] == 0.5 / LABEL.scale
    # A run from before tables said so can still be judged.
    old = with_forecasts(sets, frame.select("desk", "ewma"), "desk", LABEL)[0]
    assert "own_reference" not in old.extra
    ewma = next(method for method in found if method.name == "local-ewma").fit(old.x, old.raw, old.y)
    assert ewma(old.x, old.raw)[0, 1] == below["pooled-har"]


def test_a_forecast_beyond_all_that_was_seen_gives_way_to_their_mean() -> None:
    raw = np.array([[0.0], [1.0], [2.0], [3.0]])
    predict = LocalHAR(1).fit(raw, raw, np.array([0.0, 1.0, 2.0, 3.0]))
    asked = np.array([[1.5], [3.5], [-0.5], [1e6]])
    np.testing.assert_allclose(predict(asked, asked), [1.5, 1.5, 1.5, 1.5])
    np.testing.assert_allclose(predict(raw, raw[1:3]), [1.0, 2.0])
