"""Learning up to a moment and judging what came after it."""

import datetime as dt
from pathlib import Path

import polars as pl
import pytest

from metarisk_common.errors import ConfigError, DataError
from simulations.runfolder import prepare
from simulations.scenarios import Scenario, Splits, TimeSplit, built_in, load_scenario, split
from simulations.tables import read_scenario_table
from simulations.unseen import learned_from, unseen_tasks


@pytest.fixture(scope="module")
def loans() -> pl.DataFrame:
    path = built_in("credit-later")
    return read_scenario_table(load_scenario(path), path)


def scenario(**time: object) -> Scenario:
    built = load_scenario(built_in("credit-later"))
    if not time:
        return built
    return built.model_copy(update={"splits": Splits(unseen=20, time=TimeSplit.model_validate(time))})


def test_nobody_learns_from_what_is_judged_and_no_record_is_lost(loans: pl.DataFrame) -> None:
    numbered = loans.with_row_index("row")
    learned, judged = learned_from(scenario(), numbered), unseen_tasks(scenario(), numbered)
    assert learned["approval_year"].max() == 2003
    assert min(int(str(table["approval_year"].min())) for table in judged.values()) == 2004
    assert all(name.endswith(" / after 2003") for name in judged)
    later = numbered.filter(pl.col("approval_year") > 2003)
    before = numbered.filter(pl.col("approval_year") <= 2003)
    few = before.filter(pl.len().over("bank") < 100)
    assert learned.height + few.height + later.height == loans.height
    whole = later.group_by("bank").len().sort("bank")
    for bank, rows in whole.iter_rows():
        if f"{bank} / after 2003" in judged:
            assert judged[f"{bank} / after 2003"].height == rows
    assert len(judged) > 60, "most lenders have enough later loans to be judged"


def test_the_year_is_no_input_of_a_model_of_the_future() -> None:
    assert not {"approval_year"} & {source for column in scenario().columns.columns for source in column.sources}


def test_a_scenario_keeps_its_moment_through_its_file() -> None:
    for moment in (2003, 2003.5, dt.date(2003, 12, 31)):
        one = scenario(column="approval_year", learn_until=moment)
        back = Scenario.model_validate_json(one.model_dump_json(by_alias=True))
        assert back.splits.time is not None
        assert back == one
        assert back.splits.time.learn_until == moment


def test_dates_split_as_dates_and_as_their_text(loans: pl.DataFrame) -> None:
    dates = loans.with_columns(pl.date(pl.col("approval_year"), 6, 30).alias("approved"))
    texts = dates.with_columns(pl.col("approved").cast(pl.String))
    by_date = scenario(column="approved", learn_until=dt.date(2003, 6, 30))
    expected = learned_from(scenario(), loans).height
    assert learned_from(by_date, dates).height == learned_from(by_date, texts).height == expected
    with pytest.raises(ConfigError, match="learn_until is a number, but column 'approved' holds dates"):
        learned_from(scenario(column="approved", learn_until=2003), dates)


@pytest.mark.parametrize(
    ("time", "words"),
    [
        ({"column": "year", "learn_until": 2003}, "has no column 'year'"),
        ({"column": "approval_year", "learn_until": 2050}, "all records are up to 2050"),
        ({"column": "approval_year", "learn_until": 1900}, "all records are after 1900"),
    ],
)
def test_a_split_that_splits_nothing_says_so(loans: pl.DataFrame, time: dict[str, object], words: str) -> None:
    for rule in (learned_from, unseen_tasks):
        with pytest.raises(ConfigError, match=words):
            rule(scenario(**time), loans)


def test_a_record_without_a_time_is_not_dropped_silently(loans: pl.DataFrame) -> None:
    holed = loans.with_columns(pl.when(pl.int_range(pl.len()) < 3).then(None).otherwise("approval_year").alias("when"))
    with pytest.raises(DataError, match=r"3 record\(s\) have no time"):
        learned_from(scenario(column="when", learn_until=2003), holed)


def test_a_lender_with_little_before_takes_no_part_and_is_judged(loans: pl.DataFrame, tmp_path: Path) -> None:
    built = scenario()
    run = prepare(tmp_path / "run", built, loans, where="loans", epsilon=None, engine="inprocess")
    counts = loans.filter(pl.col("approval_year") <= 2003)["bank"].value_counts()
    newcomers = set(loans["bank"]) - set(counts.filter(pl.col("count") >= 100)["bank"])
    assert "CAPITAL ONE BK (USA) NATL ASSO" in newcomers
    unseen = set(split(built, loans["bank"].unique().to_list()).unseen)
    assert set(run.bank_folders) == set(loans["bank"]) - newcomers - unseen
    assert "CAPITAL ONE BK (USA) NATL ASSO / after 2003" in run.info["unseen"]
    for name, folder in run.bank_folders.items():
        (table,) = folder.glob("*.parquet")
        assert int(str(pl.read_parquet(table)["approval_year"].max())) <= 2003, name


def test_two_ways_to_say_later_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "both.toml"
    text = built_in("credit-later").read_text(encoding="utf-8")
    path.write_text(text.replace("unseen = 20 ", 'by = "sector"\nlater = ["retail"]\nunseen = 20 '), encoding="utf-8")
    with pytest.raises(ConfigError, match="two ways to say what came later"):
        load_scenario(path)
