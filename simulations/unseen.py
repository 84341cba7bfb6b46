"""What a run is judged on: institutions that took no part, or what came later at every institution.

Where a scenario names later values of a public column (`splits.by`, `splits.later`: "transfer 2025-H1", say) or a
moment (`splits.time`), nobody learns from what came later, and every institution's later records make a table to be
judged on, or one for each value. Which side a record is on is a rule on the record alone, so what is learned from and
what is judged have no record in common.
"""

import datetime as dt

import numpy as np
import polars as pl

from metarisk_common.errors import ConfigError, DataError
from metarisk_common.table import labels, split_by_institution

from .scenarios import Scenario, TimeSplit, split

SEPARATOR = " / "
"""Between institution and segment in the name of a table that is judged."""


def learned_from(scenario: Scenario, frame: pl.DataFrame) -> pl.DataFrame:
    """Return the records that training may see: nothing that came later, and nothing of who has too little before.

    Raises:
        ConfigError: the table lacks the column `splits.by` or `splits.time.column`, one of `splits.later` is in no
            record, or no record is on one of the sides of `splits.time`.
        DataError: a record has no time.

    """
    splits = scenario.splits
    if splits.time is not None:
        kept = frame.filter(~_after(splits.time, frame))
        return kept.filter(pl.len().over(scenario.columns.institution) >= splits.time.at_least)
    if splits.by is None:
        return frame
    return frame.filter(~_segments(scenario, frame).is_in(list(splits.later)))


def unseen_tasks(scenario: Scenario, frame: pl.DataFrame, where: str = "the table") -> dict[str, pl.DataFrame]:
    """Return each table to judge on by its name, in order of names.

    Where nothing came later: the whole tables of the institutions that take no part, by their names. With later
    segments: each institution's records of each, as "bank 07 / transfer 2025-H1"; with a moment: each institution's
    records after it, as "bank 07 / after 2003". The column of institutions then holds that name, so that the tables can
    stand in one. A table that is too small is left out: one that would not leave `evaluation.min_positives` (at least
    2) of each class to learn from and as many to judge on.

    Raises:
        ConfigError: as for `learned_from`.
        DataError: no table is large enough, or a record has no time.

    """
    schema, name_of = scenario.columns, scenario.columns.institution
    if not scenario.splits.judges_what_came_later:
        tables = split_by_institution(frame, schema, where)
        return {name: tables[name] for name in split(scenario, list(tables)).unseen}
    later = _later(scenario, frame)
    found: dict[str, pl.DataFrame] = {}
    for institution, table in split_by_institution(frame.with_columns(later), schema, where).items():
        for segment in _names(scenario):
            name = f"{institution}{SEPARATOR}{segment}"
            part = table.filter(pl.col(later.name) == segment).drop(later.name)
            if part.height and _large_enough(scenario, labels(part, schema.label, name)):
                found[name] = part.with_columns(pl.lit(name).alias(name_of))
    if not found:
        what = "after splits.time.learn_until" if scenario.splits.time is not None else "of any segment in splits.later"
        raise DataError(f"{where}: no institution has enough records {what}")
    return dict(sorted(found.items()))


def institution_of(task: str) -> str:
    """Return the institution in the name of a table that is judged beside others of its institution."""
    return task.rsplit(SEPARATOR, 1)[0]


def _large_enough(scenario: Scenario, y: np.ndarray) -> bool:
    evaluation = scenario.evaluation
    if len(y) < 2 * max(evaluation.k):
        return False
    if scenario.columns.regression:
        return True
    least = 2 * evaluation.min_positives
    positives = int(np.count_nonzero(y > 0.5))  # noqa: PLR2004 - halfway between the two labels
    return min(positives, len(y) - positives) >= least


def _names(scenario: Scenario) -> tuple[str, ...]:
    moment = scenario.splits.time
    return scenario.splits.later if moment is None else (f"after {moment.learn_until}",)


def _later(scenario: Scenario, frame: pl.DataFrame) -> pl.Series:
    """Say of each record which later table it belongs to, if any."""
    moment, name = scenario.splits.time, "metarisk: later"
    if moment is None:
        return _segments(scenario, frame).alias(name)
    after = _after(moment, frame)
    return pl.select(pl.when(after).then(pl.lit(_names(scenario)[0])).otherwise(pl.lit("")).alias(name)).to_series()


def _after(moment: TimeSplit, frame: pl.DataFrame) -> pl.Series:
    """Say of each record whether it came after the moment.

    Raises:
        ConfigError: the table has no such column, or all of its records are on one side.
        DataError: a record has no time, or none that is a number, or a date where the moment is one.

    """
    if moment.column not in frame.columns:
        raise ConfigError(f"splits.time.column: the table has no column '{moment.column}'")
    cells, dated = frame[moment.column], isinstance(moment.learn_until, dt.date)
    if dated and cells.dtype == pl.String:
        when = cells.str.strip_chars().str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False)
    elif dated != cells.dtype.is_temporal():
        kinds = ("a date", "numbers") if dated else ("a number", "dates")
        raise ConfigError(f"splits.time.learn_until is {kinds[0]}, but column '{moment.column}' holds {kinds[1]}")
    else:
        when = cells.cast(pl.Date if dated else pl.Float64, strict=False)
    unusable = int((when.is_null() | (False if dated else when.is_nan())).sum())
    if unusable:
        raise DataError(
            f"splits.time: {unusable} record(s) have no time in column '{moment.column}' that can be read, so they are "
            "neither before nor after"
        )
    after = when > moment.learn_until
    if after.all() or not after.any():
        side = "after" if after.all() else "up to"
        raise ConfigError(f"splits.time: all records are {side} {moment.learn_until}; choose a moment between them")
    return after


def _segments(scenario: Scenario, frame: pl.DataFrame) -> pl.Series:
    by = scenario.splits.by or ""
    if by not in frame.columns:
        raise ConfigError(f"splits.by: the table has no column '{by}'")
    values = frame[by].cast(pl.String)
    missing = [name for name in scenario.splits.later if not (values == name).any()]
    if missing:
        raise ConfigError(f"splits.later: no record has '{missing[0]}' in column '{by}'")
    return values.fill_null("")
