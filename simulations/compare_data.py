"""The records of a comparison: who learns from which of them, and who is judged on which.

A record that is judged is never learned from: lenders are apart by their names, segments by a rule on the record alone.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from client.dataset import Dataset, from_frame
from client.training import tasks_for
from metarisk_common.errors import ConfigError, DataError
from metarisk_common.evaluation import EvaluationSet
from metarisk_common.plan import Plan
from metarisk_common.schema import Schema
from metarisk_common.table import check_table, labels, segments, split_by_institution
from metarisk_common.tasks import Task

from . import results
from .baselines import raw_matrix
from .comparison import Judging, Part
from .scenarios import Scenario, data_path, load_scenario
from .tables import read_scenario_table, table_name


@dataclass(frozen=True)
class World:
    """A scenario's checked table by lender; `digest` is of the file, so that other records are another world.

    `encoded` and `judged` remember what was encoded before: a process meets the same lenders in most of its jobs.
    """

    scenario: Scenario
    tables: Mapping[str, pl.DataFrame]
    where: str
    digest: str
    encoded: dict[tuple[str, tuple[str, ...], str], Dataset] = field(default_factory=dict)
    judged: dict[tuple[str, tuple[str, ...], str], EvaluationSet] = field(default_factory=dict)


def open_world(scenario_path: Path) -> World:
    """Read and check a scenario's table; once in a process, as long as the file stays what it is.

    Raises:
        ConfigError: the scenario cannot be read.
        DataError: the table cannot be read, or does not fit the schema.

    """
    scenario = load_scenario(scenario_path)
    if scenario.data.file is None:
        content = json.dumps(scenario.data.model_dump(mode="json"), sort_keys=True).encode()
        return _read(scenario_path, hashlib.sha256(content).hexdigest())
    try:
        digest = hashlib.sha256(data_path(scenario, scenario_path).read_bytes()).hexdigest()
    except OSError:
        digest = ""  # `read_table` says what is wrong.
    return _read(scenario_path, digest)


@functools.lru_cache(maxsize=1)
def _read(scenario_path: Path, digest: str) -> World:
    scenario = load_scenario(scenario_path)
    frame, where = read_scenario_table(scenario, scenario_path), table_name(scenario, scenario_path)
    check_table(frame, scenario.columns, where)
    return World(scenario, split_by_institution(frame, scenario.columns, where), where, digest)


def check_segments(world: World, part: Part) -> None:
    """Raise for a segment that no record has: a typing error would leave nothing out of training.

    Raises:
        ConfigError: naming it.

    """
    known = (
        set().union(*(set(_segment_of(table, world)) for table in world.tables.values())) if part.segments else set()
    )
    for name in part.segments:
        if name not in known:
            raise ConfigError(f"split.unseen: no record of the table is of segment '{name}'")


def training_tables(world: World, part: Part) -> dict[str, pl.DataFrame]:
    """Return what each lender learns from: nothing of a lender that is held out, and nothing of a held-out segment.

    A lender that has nothing left takes no part.
    """
    found = {}
    for name in part.training:
        table = world.tables[name]
        if part.segments:
            table = table.filter(~pl.Series(np.isin(_segment_of(table, world), part.segments)))
        if table.height:
            found[name] = table
    return found


def declared_sizes(world: World, part: Part) -> dict[str, int]:
    """Return the number of units that each lender protects: records, or the schema's privacy units."""
    unit = world.scenario.columns.privacy_unit
    tables = training_tables(world, part)
    return {name: table.height if unit is None else table[unit].n_unique() for name, table in tables.items()}


def training_tasks(world: World, part: Part, plan: Plan) -> dict[str, list[Task]]:
    """Return each lender's tasks as its client builds them."""
    tasks, encoding = {}, plan.data.fingerprint()
    for name, table in training_tables(world, part).items():
        place = name, part.segments, encoding
        if place not in world.encoded:
            world.encoded[place] = from_frame(table, plan.data, name, world.where)
        tasks[name] = tasks_for(plan, world.encoded[place])
    return tasks


def pooled(world: World, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Return what lenders learn from in one place: `(rows, columns)` inputs without bins, and `(rows,)` outcomes."""
    together = pl.concat(training_tables(world, part).values())
    schema = world.scenario.columns
    return raw_matrix(together, schema, world.where).values, labels(together, schema.label, world.where)


def judged_sets(world: World, part: Part, judging: Judging, schema: Schema) -> list[EvaluationSet]:
    """Return the records that methods are judged on, by lender or by lender and segment, but for those too small.

    `schema` is the scenario's, or a method's that encodes the same columns in another way.

    Raises:
        DataError: all are too small.

    """
    small, encoding = too_small(world, part, judging), schema.fingerprint()
    fitting = {name: table for name, table in _judged_tables(world, part).items() if name not in small}
    if not fitting:
        raise DataError(
            f"{world.where}: nobody has {judging.min_judged} records to be judged on beyond {max(judging.k)} labels, "
            "and 2 of each class; ask for smaller k, or a smaller evaluation.min_judged"
        )
    new = [name for name in fitting if (name, part.segments, encoding) not in world.judged]
    if new:
        # A set is called after its lender and segment, which stand in the column of lenders for as long.
        named = [fitting[name].with_columns(pl.lit(name).alias(schema.institution)) for name in new]
        for made in results.evaluation_sets(pl.concat(named), schema, world.where):
            world.judged[made.institution, part.segments, encoding] = made
    return [world.judged[name, part.segments, encoding] for name in sorted(fitting)]


def too_small(world: World, part: Part, judging: Judging) -> list[str]:
    """Return who has too few records, or too few of one class, to be judged on."""
    small = []
    for name, table in _judged_tables(world, part).items():
        y = labels(table, world.scenario.columns.label, world.where)
        positives = int(np.count_nonzero(y > 0.5))  # noqa: PLR2004 - halfway between the two labels
        few = table.height - max(judging.k) < judging.min_judged
        if few or min(positives, table.height - positives) < 2:  # noqa: PLR2004 - one of a class in each part
            small.append(name)
    return small


def _judged_tables(world: World, part: Part) -> dict[str, pl.DataFrame]:
    if not part.segments:
        return {name: world.tables[name] for name in part.judged}
    found = {}
    for name in part.judged:
        own = _segment_of(world.tables[name], world)
        for segment in part.segments:
            table = world.tables[name].filter(pl.Series(own == segment))
            if table.height:
                found[f"{name} / {segment}"] = table
    return found


def _segment_of(table: pl.DataFrame, world: World) -> np.ndarray:
    """Return each record's segment, `(rows,)` of str."""
    column = world.scenario.columns.segment
    if column is None:
        raise ConfigError("a segment can be left out only where the schema names the column of segments")
    return segments(table, column, world.where).to_numpy().astype(np.str_)
