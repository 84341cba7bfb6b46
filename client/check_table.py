"""The table that `metarisk-client check` shows: each input, the bank's own column behind it, and what was met there.

For the bank's eyes only. It holds names, kinds and counts, and never a cell: a category that the plan does not know is
counted and not spelt.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import polars as pl
from rich.markup import escape
from rich.table import Table

from metarisk_common.features import ColumnCounts
from metarisk_common.schema import Schema

from .config import Institution

FOR_THE_BANK: Final = "For this bank's eyes only; none of it is ever sent."

_ISO_DATE: Final = r"^\d{4}-\d{2}-\d{2}([T ].*)?$"


@dataclass(frozen=True)
class Found:
    """Where a column of the plan is read from: the bank's own columns, and what kinds of cells they hold."""

    own: tuple[str, ...]
    kinds: tuple[str, ...]


class Kinds:
    """The kind of cells of each column of a schema, put together from what each batch holds."""

    def __init__(self, schema: Schema) -> None:
        """Start with nothing seen."""
        self._met: dict[str, set[str]] = {name: set() for name in schema.required}

    def watched(self, batches: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """Pass batches on, remembering what kinds they hold."""
        for frame in batches:
            for name, kinds in self._met.items():
                if name in frame.columns:
                    kinds.add(kind_of(frame[name]))
            yield frame

    def __getitem__(self, name: str) -> str:
        """Name the kind of all cells of a column."""
        kinds = self._met[name] - {"empty"}
        if len(kinds) < 2:  # noqa: PLR2004 - one kind, or none
            return next(iter(kinds), "empty")
        if kinds == {"whole number", "number"}:
            return "number"
        return "numbers and text" if kinds & {"whole number", "number", "numbers and text"} else "text"


def found_columns(institution: Institution, schema: Schema, kinds: Kinds) -> dict[str, Found]:
    """Tell of each input, the label and the keys which of the bank's own columns is behind it, and of what kind.

    Args:
        institution: the bank's folder, whose mapping gives the names.
        schema: the plan's schema.
        kinds: of the table's columns, under the schema's names.

    """
    section = institution.config.table
    keys = (schema.label.name, schema.segment, schema.identifier, schema.privacy_unit)
    behind = {column.name: column.sources for column in schema.columns} | {name: (name,) for name in keys if name}

    def own(name: str) -> str:
        if section is None:
            return name
        return "(constant)" if name in section.constants else section.columns.get(name, name)

    return {
        column: Found(tuple(map(own, sources)), tuple(kinds[source] for source in sources))
        for column, sources in behind.items()
    }


def kind_of(cells: pl.Series) -> str:
    """Name the kind of a column's cells in plain words; of text, as all of a CSV file is, what it spells."""
    dtype = cells.dtype
    if dtype in {pl.String, pl.Categorical, pl.Enum}:
        return _kind_of_text(cells.cast(pl.String).str.strip_chars())
    kinds = {
        "empty": cells.null_count() == len(cells),
        "whole number": dtype.is_integer(),
        "number": dtype.is_numeric(),
        "true or false": dtype == pl.Boolean,
        "date": dtype.is_temporal(),
        "of another kind": True,
    }
    return next(kind for kind, fits in kinds.items() if fits)


def _kind_of_text(text: pl.Series) -> str:
    text = text.filter(text.is_not_null() & (text != ""))
    if text.is_empty():
        return "empty"
    if not text.cast(pl.Int64, strict=False).null_count():
        return "whole number"
    numeric = text.cast(pl.Float64, strict=False).is_not_null()
    if numeric.all():
        return "number"
    if text.str.contains(_ISO_DATE).all():
        return "date"
    return "numbers and text" if numeric.any() else "text"


def columns_table(title: str, found: Mapping[str, Found], columns: Mapping[str, ColumnCounts], rows: int) -> Table:
    """Lay the inputs out, and below them the label and the keys; `rows`: those that the counts are of."""
    table = Table(title=title, title_justify="left")
    for heading in ("column", "found", "type"):
        table.add_column(heading, overflow="fold")
    for heading in ("missing", "below bounds", "above bounds", "unknown categories"):
        table.add_column(heading, justify="right")
    for name, one in found.items():
        told = (name, " / ".join(one.own), " / ".join(dict.fromkeys(one.kinds)))
        counts = columns.get(name)
        met = (
            ()
            if counts is None
            else (counts.missing, counts.clipped_below, counts.clipped_above, counts.unknown_categories)
        )
        table.add_row(*map(escape, told), *(counted(count, rows) for count in met))
    return table


def counted(count: int, rows: int) -> str:
    """Write a count with its share of the rows."""
    if not count or not rows:
        return f"{count:,}"
    share = f"{count / rows:.1%}"
    return f"{count:,} ({'<0.1%' if share == '0.0%' else share})"
