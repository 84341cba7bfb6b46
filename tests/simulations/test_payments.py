"""The SYNTHETIC payments: the same each time, frauds where and when it is said, and nothing gives them away."""

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from client.dataset import from_frame
from metarisk_common.errors import ConfigError
from simulations import payments, payments_lookback, payments_patterns
from simulations.scenarios import Scenario, built_in, load_scenario, split
from simulations.tables import read_scenario_table
from simulations.unseen import learned_from, unseen_tasks


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return load_scenario(built_in("fraud"))


@pytest.fixture(scope="module")
def frame(scenario: Scenario) -> pl.DataFrame:
    return read_scenario_table(scenario, built_in("fraud"))


SMALL = {"banks": 3, "customers": 150}


def test_a_seed_gives_one_table_and_another_seed_another() -> None:
    first = payments.table({**SMALL, "seed": 5})
    assert first.equals(payments.table({**SMALL, "seed": 5}))
    assert not first.equals(payments.table({**SMALL, "seed": 6}))


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ConfigError, match="costumers"):
        payments.table({"costumers": 3})


def test_it_is_as_large_as_it_says_and_says_that_it_is_synthetic(frame: pl.DataFrame, scenario: Scenario) -> None:
    assert 120_000 <= frame.height <= 200_000
    assert frame["bank"].n_unique() == 24
    assert "SYNTHETIC" in scenario.title
    assert "SYNTHETIC" in (payments.__doc__ or "")


def test_half_a_percent_to_four_percent_of_each_segment_of_each_bank_are_frauds(frame: pl.DataFrame) -> None:
    shares = frame.group_by("bank", "segment").agg(pl.col("fraud").mean())["fraud"].to_numpy()
    assert len(shares) == 24 * 9
    assert shares.min() >= 0.005
    assert shares.max() <= 0.04
    assert shares.max() > 2 * shares.min()


def test_every_scenario_strikes_its_channel_in_its_periods_and_nowhere_else(frame: pl.DataFrame) -> None:
    frauds = frame.filter(pl.col("fraud") == 1)
    assert frauds["fraud_scenario"].null_count() == 0
    assert frame.filter(pl.col("fraud") == 0)["fraud_scenario"].null_count() == frame.height - frauds.height
    for pattern in payments_patterns.PATTERNS:
        found = set(frauds.filter(pl.col("fraud_scenario") == pattern.name)["segment"])
        assert found == {payments_patterns.segment_of(pattern.channel, period) for period in pattern.strikes}


def test_most_frauds_of_a_later_segment_are_of_a_scenario_that_nobody_has_learned_from(
    frame: pl.DataFrame, scenario: Scenario
) -> None:
    seen = set(learned_from(scenario, frame)["fraud_scenario"])
    for channel in payments_patterns.CHANNELS:
        new = payments_patterns.new_patterns(channel)
        assert new
        assert not seen & set(new)
        for period in payments_patterns.LATER:
            own = frame.filter((pl.col("segment") == f"{channel} {period}") & (pl.col("fraud") == 1))
            assert np.mean(own["fraud_scenario"].is_in(list(new)).to_numpy()) > 0.5


def test_no_single_column_gives_the_frauds_away(frame: pl.DataFrame, scenario: Scenario) -> None:
    y = frame["fraud"].to_numpy()
    names = {source for column in scenario.columns.columns for source in column.sources}
    assert "fraud_scenario" not in names
    for name in names:
        column = frame[name]
        if column.dtype.is_numeric():
            score = column.fill_null(-1).to_numpy()
        else:
            score = frame.select(pl.col("fraud").mean().over(name))["fraud"].to_numpy()
        auc = roc_auc_score(y, score)
        assert max(auc, 1 - auc) < 0.95, name


def test_later_payments_change_nothing_that_was_known_before() -> None:
    customer = np.array([0, 0, 0, 0, 1, 1])
    minute = np.array([0, 10, 10, 12_000, 5, 20])
    amount = np.array([5.0, 7.0, 1.0, 2.0, 100.0, 3.0])
    whole = payments_lookback.look_back(customer, minute, amount)
    assert whole.count_24h.tolist() == [0, 1, 1, 0, 0, 1]
    assert whole.sum_24h.tolist() == [0, 5, 5, 0, 0, 100]
    assert whole.count_7d.tolist() == [0, 1, 1, 0, 0, 1]
    np.testing.assert_allclose(whole.hours_since, [np.nan, 1 / 6, 1 / 6, 199 + 5 / 6, np.nan, 0.25])
    changed = payments_lookback.look_back(customer[:3], minute[:3], amount[:3])
    assert changed.sum_7d.tolist() == whole.sum_7d[:3].tolist()


def test_the_velocity_of_the_table_is_that_of_a_slow_count() -> None:
    frame = payments.table({**SMALL, "seed": 3}).with_columns(at=pl.col("day") * 24 + pl.col("hour"))
    for (_,), own in frame.filter(pl.col("count_7d") > 2).head(5).group_by("customer"):
        theirs = frame.filter(pl.col("customer") == own["customer"][0])
        for row in own.iter_rows(named=True):
            # Hours are rounded to hundredths: payments of nearly the same moment are left out of the slow count.
            since = row["at"] - theirs["at"].to_numpy()
            if (np.abs(since) < 0.02).sum() == 1:
                day, week = (since > 0) & (since <= 24), (since > 0) & (since <= 168)
                assert (row["count_24h"], row["count_7d"]) == (day.sum(), week.sum())
                assert row["sum_7d"] == pytest.approx(theirs["amount"].to_numpy()[week].sum(), abs=0.02)


def test_payments_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="in order"):
        payments_lookback.look_back(np.array([0, 0]), np.array([5, 4]), np.array([1.0, 1.0]))


def test_what_is_judged_is_no_record_of_what_is_learned_from(frame: pl.DataFrame, scenario: Scenario) -> None:
    learned, judged = learned_from(scenario, frame), unseen_tasks(scenario, frame)
    assert set(learned["segment"]) == set(payments_patterns.segments(later=False))
    assert set(scenario.splits.later) == set(payments_patterns.segments(later=True))
    unseen_banks = split(scenario, sorted(frame["bank"].unique())).unseen
    judged_at = {name.split(" / ")[0] for name in judged}
    assert judged_at & set(unseen_banks)
    assert judged_at - set(unseen_banks)
    for name, table in judged.items():
        bank, segment = name.split(" / ")
        own = frame.filter((pl.col("bank") == bank) & (pl.col("segment") == segment))
        assert table.drop("bank").equals(own.drop("bank"))
        assert table["bank"].unique().to_list() == [name]
        assert table["fraud"].sum() >= 2 * scenario.evaluation.min_positives


def test_a_later_segment_that_no_payment_has_is_refused(frame: pl.DataFrame, scenario: Scenario) -> None:
    splits = scenario.splits.model_copy(update={"later": ("transfer 2031-H1",)})
    with pytest.raises(ConfigError, match="transfer 2031-H1"):
        unseen_tasks(scenario.model_copy(update={"splits": splits}), frame)


def test_without_later_segments_those_who_take_no_part_are_judged_on_all_they_have(
    frame: pl.DataFrame, scenario: Scenario
) -> None:
    plain = scenario.model_copy(update={"splits": scenario.splits.model_copy(update={"by": None, "later": ()})})
    assert learned_from(plain, frame).height == frame.height
    found = unseen_tasks(plain, frame)
    assert set(found) == set(split(plain, sorted(frame["bank"].unique())).unseen)


def test_a_customer_counts_once_with_payments_in_every_channel(frame: pl.DataFrame, scenario: Scenario) -> None:
    own = learned_from(scenario, frame).filter(pl.col("bank") == "bank 03")
    dataset = from_frame(own, scenario.columns, "bank 03", "the table")
    assert dataset.unit is not None
    assert np.unique(dataset.unit).size == own["customer"].n_unique()
    assert np.bincount(dataset.unit).max() <= scenario.columns.max_records_per_unit
    assert dataset.dropped == 0


def test_customers_of_different_banks_are_different_and_stay_in_their_segments_period(frame: pl.DataFrame) -> None:
    assert frame.select("bank", "customer").n_unique() == frame["customer"].n_unique()
    ends = dict(zip(payments_patterns.PERIODS, payments_patterns.PERIOD_ENDS, strict=True))
    last = frame.group_by(pl.col("segment").str.tail(7)).agg(pl.col("day").max())
    assert all(day < ends[period] for period, day in last.iter_rows())


def test_fraudsters_learn_to_hide(frame: pl.DataFrame) -> None:
    # A lost card is tapped in three of four frauds at first, and by its drift in less than two of three in 2025.
    own = frame.filter(pl.col("fraud_scenario") == "lost_and_stolen")
    early, late = (own.filter(pl.col("segment").str.ends_with(half)) for half in ("2024-H1", "2025-H1"))
    tapped = [float(np.mean((part["authentication"] == "contactless").to_numpy())) for part in (early, late)]
    assert min(early.height, late.height) > 100
    assert tapped[1] < tapped[0] - 0.05
