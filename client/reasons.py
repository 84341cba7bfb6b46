"""Reason codes in plain words: what a column is called, what it holds in a record, and what that does to the risk.

The words come from the plan's public schema, its titles and units, and from the bank's own record. They are for the
bank and its customer; nothing of them is logged.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl

from metarisk_common.interactions import INTERACTIONS
from metarisk_common.schema import NumericColumn, Schema
from metarisk_common.table import categories, numbers

from .explain import Facts

MISSING: Final = "missing"
TOGETHER: Final = "Several columns together"
"""Title of what the leaves of `encoding.interactions` do: it belongs to no column alone."""
COMBINED: Final = "as they are combined here"

_GROUPED_FROM: Final = 10_000
"""Numbers from here on have commas between thousands; below lie the years, which have none."""


def fact_names(schema: Schema, facts: Facts) -> tuple[str, ...]:
    """Name each fact for machines: by the first of its columns."""
    return tuple(schema.columns[positions[0]].name if positions else INTERACTIONS for positions in facts.columns)


def fact_titles(schema: Schema, facts: Facts) -> tuple[str, ...]:
    """Name each fact for people: by the first of its columns that has a title, else by its name."""
    columns = [[schema.columns[position] for position in positions] for positions in facts.columns]
    return tuple(
        next((column.title for column in group if column.title), group[0].name) if group else TOGETHER
        for group in columns
    )


def fact_values(
    schema: Schema, facts: Facts, frame: pl.DataFrame, fact: int, rows: npt.NDArray[np.bool_], where: str
) -> list[str]:
    """Write what a fact is in the records chosen by `rows`, `(frame rows,)`, in order.

    Raises:
        DataError: a cell does not fit the schema.

    """
    if not facts.columns[fact]:
        return [COMBINED] * int(rows.sum())
    column = schema.columns[facts.columns[fact][0]]
    chosen = pl.Series(values=rows)
    if isinstance(column, NumericColumn):
        write = _number_writer(column)
        return [MISSING if value is None else write(value) for value in numbers(frame, column, where).filter(chosen)]
    known = set(column.categories)
    return [_category(text, known) for text in categories(frame, column, where).filter(chosen)]


def reason_text(title: str, value: str, *, raises: bool = True) -> str:
    """Say in one line what a column does: "Jobs to be created: 0 (raises the risk)"."""
    return f"{title}: {value} ({'raises' if raises else 'lowers'} the risk)"


def number_text(value: float) -> str:
    """Write a number of a record as people do: four digits where it is no whole number."""
    if abs(value) >= _GROUPED_FROM:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value == round(value) else f"{value:.4g}"


def _number_writer(column: NumericColumn) -> Callable[[float], str]:
    unit = f" {column.unit}" if column.unit else ""

    def write(value: float) -> str:
        counted = min(max(value, column.lower), column.upper)
        beyond = "" if counted == value else f", counted as {number_text(counted)}"
        return f"{number_text(value)}{unit}{beyond}"

    return write


def _category(text: str | None, known: set[str]) -> str:
    if text is None:
        return MISSING
    return text if text in known else f"{text}, counted as other"
