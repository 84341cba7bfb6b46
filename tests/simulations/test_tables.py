"""Where a scenario's table comes from: a file, a generator or a recipe."""

from pathlib import Path

import polars as pl
import pytest
from pydantic import ValidationError

from metarisk_common.errors import ConfigError
from simulations import payments
from simulations.scenarios import DataFile, Scenario, built_in, load_scenario
from simulations.tables import read_scenario_table, table_name


def with_data(data: DataFile) -> Scenario:
    return load_scenario(built_in("fraud")).model_copy(update={"data": data})


def test_a_generators_table_is_made_with_the_scenarios_options(tmp_path: Path) -> None:
    options = {"banks": 2, "customers": 60, "seed": 9}
    scenario = with_data(DataFile(generator="payments", options=options))
    assert read_scenario_table(scenario, tmp_path / "any.toml").equals(payments.table(options))
    assert table_name(scenario, tmp_path / "any.toml") == "generator 'payments'"


def test_a_file_counts_from_the_scenarios_folder(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1, 2]}).write_parquet(tmp_path / "t.parquet")
    scenario = with_data(DataFile(file="t.parquet"))
    assert read_scenario_table(scenario, tmp_path / "s.toml")["a"].to_list() == [1, 2]
    assert table_name(scenario, tmp_path / "s.toml") == str(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (DataFile(generator="loans"), "data.generator: there is no 'loans'; choose one of: payments"),
        (DataFile(file="t.parquet", recipe="soup"), "data.recipe: there is no 'soup'"),
    ],
)
def test_an_unknown_name_is_told_with_those_there_are(data: DataFile, named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        read_scenario_table(with_data(data), tmp_path / "s.toml")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"file": "a.csv", "generator": "payments"},
        {"generator": "payments", "recipe": "market-volatility"},
        {"file": "a.csv", "options": {"seed": 1}},
    ],
)
def test_contradictions_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataFile.model_validate(given)
