"""What a run is judged on: institutions that took no part, or what came later at every institution.

Where a scenario names later values of a public column (`splits.by`, `splits.later`: "transfer 2025-H1", say), nobody
learns from records of those, and every institution's records of each make one table to be judged on. A record's value
of that column is a rule on the record alone, so what is learned from and what is judged have no record in common.
"""

import numpy as np
import polars as pl

from metarisk_common.errors import ConfigError, DataError
from metarisk_common.table import labels, split_by_institution

from .scenarios import Scenario, split

SEPARATOR = " / "
"""Between institution and segment in the name of a table that is judged."""


def learned_from(scenario: Scenario, frame: pl.DataFrame) -> pl.DataFrame:
    """Return the records that training may see: those of no later segment. All institutions are still in it.

    Raises:
        ConfigError: the table lacks the column `splits.by`, or one of `splits.later` is in no record.

    """
    if scenario.splits.by is None:
        return frame
    return frame.filter(~_segments(scenario, frame).is_in(list(scenario.splits.later)))


def unseen_tasks(scenario: Scenario, frame: pl.DataFrame, where: str = "the table") -> dict[str, pl.DataFrame]:
    """Return each table to judge on by its name, in order of names.

    Without later segments: the whole tables of the institutions that take no part, by their names. With them: each
    institution's records of each later segment, as "bank 07 / transfer 2025-H1"; the column of institutions then holds
    that name, so that the tables can stand in one. A table that is too small is left out: one that would not leave
    `evaluation.min_positives` (at least 2) of each class to learn from and as many to judge on.

    Raises:
        ConfigError: as for `learned_from`.
        DataError: no table is large enough.

    """
    schema, name_of = scenario.columns, scenario.columns.institution
    tables = split_by_institution(frame, schema, where)
    if scenario.splits.by is None:
        return {name: tables[name] for name in split(scenario, list(tables)).unseen}
    _segments(scenario, frame)
    found: dict[str, pl.DataFrame] = {}
    for institution, table in sorted(tables.items()):
        own = _segments(scenario, table, known=True)
        for segment in scenario.splits.later:
            name = f"{institution}{SEPARATOR}{segment}"
            part = table.filter(own == segment)
            if part.height and _large_enough(scenario, labels(part, schema.label, name)):
                found[name] = part.with_columns(pl.lit(name).alias(name_of))
    if not found:
        raise DataError(f"{where}: no institution has enough records of any segment in splits.later")
    return found


def _large_enough(scenario: Scenario, y: np.ndarray) -> bool:
    evaluation = scenario.evaluation
    least = 2 * evaluation.min_positives
    positives = int(np.count_nonzero(y > 0.5))  # noqa: PLR2004 - halfway between the two labels
    return min(positives, len(y) - positives) >= least and len(y) >= 2 * max(evaluation.k)


def _segments(scenario: Scenario, frame: pl.DataFrame, *, known: bool = False) -> pl.Series:
    by = scenario.splits.by or ""
    if by not in frame.columns:
        raise ConfigError(f"splits.by: the table has no column '{by}'")
    values = frame[by].cast(pl.String)
    if not known:
        missing = [name for name in scenario.splits.later if not (values == name).any()]
        if missing:
            raise ConfigError(f"splits.later: no record has '{missing[0]}' in column '{by}'")
    return values.fill_null("")
