"""A scenario's table, wherever it comes from: a file, a generator of synthetic records, or a recipe made of a file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

import polars as pl

from client.dataset import read_table
from metarisk_common.errors import ConfigError

from .scenarios import Scenario, data_path

Options = Mapping[str, object]
T = TypeVar("T")


def read_scenario_table(scenario: Scenario, scenario_path: Path) -> pl.DataFrame:
    """Read or make the table that a scenario names under `[data]`; the same scenario gives the same table.

    Args:
        scenario: the scenario.
        scenario_path: its file; a relative path under `[data]` counts from the folder of that.

    Raises:
        ConfigError: there is no such generator or recipe, or its options are wrong.
        DataError: the file cannot be read.

    """
    data = scenario.data
    if data.generator is not None:
        return _chosen(_GENERATORS, "generator", data.generator)(data.options)
    path = data_path(scenario, scenario_path)
    if data.recipe is None:
        return read_table(path)
    return _chosen(_RECIPES, "recipe", data.recipe)(path, data.options)


def table_name(scenario: Scenario, scenario_path: Path) -> str:
    """Return what messages call the scenario's table: its path, or the name of its generator."""
    if scenario.data.generator is not None:
        return f"generator '{scenario.data.generator}'"
    return str(data_path(scenario, scenario_path))


def _payments(options: Options) -> pl.DataFrame:
    from .payments import table  # noqa: PLC0415 - only who asks for it pays for it

    return table(options)


def _market_volatility(path: Path, options: Options) -> pl.DataFrame:
    from .markets import table  # noqa: PLC0415 - only who asks for it pays for it

    return table(path, options)


_GENERATORS: Final[Mapping[str, Callable[[Options], pl.DataFrame]]] = {"payments": _payments}
_RECIPES: Final[Mapping[str, Callable[[Path, Options], pl.DataFrame]]] = {"market-volatility": _market_volatility}


def _chosen(known: Mapping[str, T], kind: str, name: str) -> T:
    if name not in known:
        raise ConfigError(f"data.{kind}: there is no '{name}'; choose one of: {', '.join(sorted(known))}")
    return known[name]
