"""A run that could not be judged, or only by looking ahead, is refused before anything is trained."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from metarisk_common.errors import ConfigError, DataError
from simulations.runfolder import RunFolder, numbers_of, prepare
from simulations.scenarios import Scenario, Splits, built_in, load_scenario


def changed(**evaluation: Any) -> Scenario:
    """Return the built-in scenario with one unseen asset and a changed [evaluation]."""
    scenario = load_scenario(built_in("volatility"))
    values = scenario.evaluation.model_dump() | evaluation
    return Scenario.model_validate(
        {**scenario.model_dump(by_alias=True), "splits": Splits(unseen=("New",)), "evaluation": values}
    )


def table(new: int) -> pl.DataFrame:
    random = np.random.default_rng(1)
    names = [f"log_variance_{window}" for window in (1, 5, 22, 66)]
    tables = []
    for desk, rows in (("Desk 1", 900), ("Desk 2", 900), ("New", new)):
        columns = {name: random.normal(-8.5, 1.0, rows) for name in [*names, "log_variance"]}
        tables.append(pl.DataFrame({"desk": [desk] * rows, "session": np.arange(rows, dtype=float), **columns}))
    return pl.concat(tables)


def prepared(folder: Path, scenario: Scenario, frame: pl.DataFrame) -> RunFolder:
    return prepare(folder / "run", scenario, frame, where="prices.csv", epsilon=None, engine="inprocess")


def test_an_asset_too_short_to_be_judged_is_named_before_training(tmp_path: Path) -> None:
    # The largest support, 250, lies more than the embargo of five days before at least 250 days to judge.
    with pytest.raises(DataError, match=r"prices.csv: institution 'New': no moment has 250 records more than 5 before"):
        prepared(tmp_path, changed(), table(504))
    assert not list(tmp_path.iterdir())
    run = prepared(tmp_path, changed(), table(505))
    assert run.info["unseen"] == ["New"]


def test_days_may_be_dates_and_must_be_there(tmp_path: Path) -> None:
    frame = table(505)
    dated = frame.with_columns(pl.from_epoch(pl.col("session").cast(pl.Int64), time_unit="d").alias("session"))
    assert prepared(tmp_path, changed(), dated).info["unseen"] == ["New"]
    np.testing.assert_array_equal(numbers_of(dated, "session", "t"), frame["session"].to_numpy())
    gap = dated.with_columns(pl.when(pl.col("session").dt.year() > 1970).then(pl.col("session")).alias("session"))
    with pytest.raises(DataError, match="'New': column 'session' must hold a number or a date in every row"):
        prepared(tmp_path / "gap", changed(), gap)
    with pytest.raises(DataError, match=r"'New'.*session"):
        prepared(tmp_path / "none", changed(), frame.drop("session"))


def test_a_number_in_time_is_not_drawn_at_random_across_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.embargo is missing: .*adapt on what comes after"):
        changed(embargo=None)
    path = built_in("volatility")
    written = tmp_path / "scenario.toml"
    written.write_text(path.read_text(encoding="utf-8").replace("embargo = 5.0", "# embargo"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"evaluation\.embargo"):
        load_scenario(written)
    assert changed(embargo=0.0).evaluation.embargo == 0.0
    assert changed(embargo=None, day=None).evaluation.day is None
    # Of two outcomes, days are for alerts a day and no order.
    assert load_scenario(built_in("fraud")).evaluation.embargo is None


def test_numbers_that_cannot_be_drawn_at_random_are_refused_too(tmp_path: Path) -> None:
    scenario = changed(embargo=None, day=None, k=[0, 20])
    assert prepared(tmp_path / "fits", scenario, table(22)).info["unseen"] == ["New"]
    with pytest.raises(DataError, match="'New': 21 records cannot be drawn at random for supports of up to 20"):
        prepared(tmp_path / "few", scenario, table(21))
    low = table(60).with_columns(pl.col("log_variance").clip(upper_bound=-8.5))
    with pytest.raises(DataError, match="2 or more above the label's centre"):
        prepared(tmp_path / "low", scenario, low)


def test_a_longer_name_than_messages_hold_is_refused_whatever_the_label(tmp_path: Path) -> None:
    long = table(505).with_columns(pl.col("desk").replace("Desk 1", "D" * 201))
    with pytest.raises(DataError, match="shorten it to 200"):
        prepared(tmp_path, changed(), long)
