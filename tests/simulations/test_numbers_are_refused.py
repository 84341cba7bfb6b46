"""What is for binary outcomes says so of a run that forecasts a number, before it reads a record."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import polars as pl
import pytest

from client.adapt import Choice, adapt_model
from metarisk_common.errors import ConfigError
from simulations.join_report import judge
from simulations.runfolder import RunFolder
from simulations.scenarios import built_in, load_scenario


def test_a_report_on_joining_and_a_banks_model_are_for_binary_outcomes() -> None:
    scenario = load_scenario(built_in("volatility"))
    plan = scenario.plan(epsilon=3.0)
    run = RunFolder(Path("run"), scenario, plan, {"declared_sizes": {}})
    with pytest.raises(ConfigError, match="its label is a number"):
        judge(run, pl.DataFrame(), "Newcomer", where="newcomer.csv")
    start = cast("Any", SimpleNamespace(plan=plan, prior=None))
    choice = Choice(60, "auto", None, 1, cast("Any", None))
    with pytest.raises(ConfigError, match="for binary outcomes"):
        adapt_model(cast("Any", None), start, choice)
