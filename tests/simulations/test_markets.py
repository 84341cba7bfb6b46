"""Records of prices: inputs look back, targets look ahead, and rivals know nothing that they could not have known."""

from datetime import date
from typing import cast

import numpy as np
import polars as pl
import pytest
from arch import arch_model

from metarisk_common.errors import ConfigError, DataError
from metarisk_common.evaluation import EvaluationSet
from metarisk_common.schema import NumericLabel
from simulations import markets, results, tables
from simulations.market_episodes import LocalHAR, forecasts_in, rivals, with_forecasts
from simulations.markets import FLOOR, HORIZON, LOG_OF_MEAN, desks_of, ewma, garch, inputs, records
from simulations.scenarios import built_in, load_scenario
from simulations.unseen import unseen_tasks

LABEL = NumericLabel(kind="numeric", name="y", lower=-16, upper=-3, centre=-8, scale=2)


def walk(days: int = 400, seed: int = 1) -> np.ndarray:
    return 50.0 * np.exp(np.cumsum(0.01 * np.random.default_rng(seed).standard_normal(days)))


@pytest.fixture(scope="module")
def embedded() -> pl.DataFrame:
    path = built_in("volatility")
    return tables.read_scenario_table(load_scenario(path), path)


def test_inputs_and_targets_are_what_they_say() -> None:
    closes = walk()
    found, squared = records(closes), np.square(np.diff(np.log(closes)))
    day = 200
    for window in markets.WINDOWS:
        expected = np.log(squared[day - window : day].mean())
        assert found[f"log_variance_{window}"][day] == pytest.approx(expected)
    assert found["log_variance"][day] == pytest.approx(np.log(squared[day : day + HORIZON].mean()))
    assert found["log_variance"][-HORIZON:].null_count() == HORIZON


def test_a_later_price_changes_no_input_and_an_earlier_one_no_target() -> None:
    closes = walk()
    before, day = records(closes), 300
    later = closes.copy()
    later[day + 1 :] *= 1.5
    assert records(later)[: day + 1].select(inputs()).equals(before[: day + 1].select(inputs()))
    earlier = closes.copy()
    earlier[:day] *= np.linspace(1, 2, day)
    assert records(earlier)["log_variance"][day:].equals(before["log_variance"][day:])


def test_rivals_know_the_past_only() -> None:
    closes, day = walk(900), 700
    later = closes.copy()
    later[day + 1 :] *= np.linspace(1, 3, len(closes) - day - 1)
    for rival in (ewma, lambda values: garch(values, 600)):
        np.testing.assert_array_equal(rival(later)[: day + 1], rival(closes)[: day + 1])


def test_the_average_is_the_recursion_by_hand() -> None:
    closes = walk(60)
    squared = np.square(np.diff(np.log(closes)))
    level = squared[:22].mean()
    for value in squared[:30]:
        level = 0.94 * level + 0.06 * value
    assert ewma(closes)[30] == pytest.approx(np.log(level) + LOG_OF_MEAN)


def test_forecasts_of_variance_are_brought_to_the_logarithm_without_bias() -> None:
    """Of independent normals the target's mean is the variance's logarithm and the constant."""
    draws = np.square(np.random.default_rng(2).standard_normal((200_000, HORIZON))).mean(axis=1)
    assert np.log(draws).mean() == pytest.approx(LOG_OF_MEAN, abs=0.01)


def test_garch_follows_a_garch_process() -> None:
    random, days = np.random.default_rng(3), 3000
    variance, returns, known = 1e-4, np.empty(days), np.empty(days)
    for day in range(days):
        known[day] = variance
        returns[day] = np.sqrt(variance) * random.standard_normal()
        variance = 4e-6 + 0.1 * returns[day] ** 2 + 0.86 * variance
    forecast = garch(np.exp(np.cumsum(np.append(0.0, returns))), 2500)
    # At the close of day t, element t: the next day's variance is known[t].
    assert np.corrcoef(forecast[2500:-1], np.log(known[2500:]))[0, 1] > 0.95
    # Five days ahead, as the package itself says on the last day it is estimated on.
    fitted = arch_model(100.0 * returns[:2499], mean="Constant", vol="GARCH").fit(disp="off", show_warning=False)
    five = fitted.forecast(horizon=HORIZON, reindex=False).variance.to_numpy()[-1].mean() / 1e4
    assert forecast[2499] == pytest.approx(np.log(five) + LOG_OF_MEAN, abs=1e-6)


def test_own_har_is_least_squares_on_its_days_alone() -> None:
    random = np.random.default_rng(4)
    raw = random.standard_normal((40, 6))
    y = 1.0 + raw[:, :4] @ np.array([0.1, 0.2, 0.3, 0.4])
    predict = LocalHAR(4).fit(raw, raw[:30], y[:30])
    known = (y[30:] >= y[:30].min()) & (y[30:] <= y[:30].max())
    assert known.sum() > 5
    np.testing.assert_allclose(predict(raw[30:], raw[30:])[known], y[30:][known], atol=1e-9)
    # Rivals' forecasts stand beside the inputs, and it knows nothing of them.
    other, noisy = raw.copy(), y + random.standard_normal(40)
    other[:, 4:] = noisy[:, None]
    np.testing.assert_array_equal(
        LocalHAR(4).fit(raw, raw[:30], noisy[:30])(raw, raw),
        LocalHAR(4).fit(other, other[:30], noisy[:30])(other, other),
    )


def test_rivals_forecasts_are_read_off_the_table_in_the_labels_units() -> None:
    frame = pl.DataFrame({"desk": ["b", "a", "b"], "ewma": [-6.0, -8.0, -10.0], "garch": [-8.0, -8.0, -4.0]})
    sets = [EvaluationSet(name, np.zeros((n, 3)), np.zeros((n, 2)), np.zeros(n)) for name, n in (("a", 1), ("b", 2))]
    found = with_forecasts(sets, frame, "desk", LABEL)
    np.testing.assert_array_equal(found[1].raw, [[0, 0, 1, 0], [0, 0, -1, 2]])
    methods = {method.name: method for method, *_ in rivals(np.zeros((9, 2)), np.zeros(9), forecasts_in(frame))}
    predict = methods["local-garch"].fit(sets[1].x, found[1].raw, sets[1].y)
    np.testing.assert_array_equal(predict(sets[1].x, found[1].raw), [0, 2])
    bare = frame.drop("ewma", "garch")
    assert [method.name for method, *_ in rivals(np.zeros((9, 2)), np.zeros(9), forecasts_in(bare))] == [
        "local-har",
        "pooled-har",
    ]


def test_who_is_who_follows_from_names_alone() -> None:
    frame = pl.DataFrame({"desk": ["x"] * 7, "asset": list("gfedcba"), "close": [1.0] * 7})
    assert desks_of(frame, 2) == {
        "a": "x desk 1", "b": "x desk 1", "c": None, "d": "x desk 2", "e": "x desk 2", "f": None, "g": "x desk 3",
    }  # fmt: skip
    assert desks_of(frame.sample(fraction=1.0, shuffle=True, seed=1), 2) == desks_of(frame, 2)


def test_the_embedded_assets_learn_before_and_are_judged_after(embedded: pl.DataFrame) -> None:
    scenario = load_scenario(built_in("volatility"))
    judged = unseen_tasks(scenario, embedded)
    assert set(judged) == set(cast("tuple[str, ...]", scenario.splits.unseen))
    unseen = pl.concat(judged.values())
    learned = embedded.filter(~pl.col("desk").is_in(list(judged)))
    assert not set(learned["asset"]) & set(unseen["asset"])
    # The last target learned from was known by the end of 2011, and the first day judged comes after it.
    assert learned["date"].max() == date(2011, 12, 22)
    assert unseen["date"].min() == date(2012, 1, 3)
    assert unseen.null_count().sum_horizontal().item() == 0
    assert learned.select(markets.known_of_unseen()).null_count().sum_horizontal().item() == 7 * learned.height
    assert learned.drop(markets.known_of_unseen()).null_count().sum_horizontal().item() == 0


@pytest.mark.parametrize("name", ["volatility", "volatility-across"])
def test_no_target_adapted_on_reaches_into_the_days_judged(name: str) -> None:
    path = built_in(name)
    scenario = load_scenario(path)
    found = tables.read_scenario_table(scenario, path)
    rule, k_max = results.draw_rule(scenario.evaluation), max(scenario.evaluation.k)
    for asset, part in unseen_tasks(scenario, found).items():
        day = part["session"].to_numpy()
        dataset = EvaluationSet(asset, day, day, day, {"day": day})
        drawn = rule(dataset, k_min=20, k_max=k_max, seed_parts=(1, asset, 0), where=asset)
        assert day[drawn.support].max() + HORIZON < day[drawn.query].min()


def test_classes_that_learn_and_classes_that_are_judged_are_apart() -> None:
    path = built_in("volatility-across")
    scenario = load_scenario(path)
    found = tables.read_scenario_table(scenario, path)
    judged = set(unseen_tasks(scenario, found))
    assert judged == set(cast("tuple[str, ...]", scenario.splits.unseen))
    assert {name.rsplit(" ", 2)[0] for name in set(found["desk"]) - judged} == {"us stocks"}
    with pytest.raises(ConfigError, match="no class 'gold'"):
        markets.table(path.parent / "data" / "market_prices.parquet", {"learn": ["gold"]})


def test_an_asset_that_does_not_move_and_a_table_without_prices() -> None:
    assert records(np.full(300, 7.0))["log_variance"][100] == pytest.approx(np.log(FLOOR))
    path = built_in("volatility").parent / "data" / "market_prices.parquet"
    with pytest.raises(ConfigError, match=r"data\.options"):
        markets.table(path, {"learn_util": "2011-12-30"})
    with pytest.raises(DataError, match="column 'date'"):
        markets.table(built_in("credit").parent / "data" / "sba_loans.parquet", {})
