"""A bank's table, wherever it is and whatever its columns are called, with the names and codes of the plan's schema.

Rows are read in batches, and of each only the columns that the schema needs are kept, so that memory is bounded by what
is kept. A CSV file, a Parquet folder and a database that hold the same rows give the same cells: decimals and dates
become their text, and blanks after a text, which columns of fixed width have, count for nothing.
"""

import datetime as dt
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import polars as pl
from polars.exceptions import PanicException, PolarsError

from metarisk_common.errors import DataError
from metarisk_common.schema import CategoricalColumn, Label, NumericColumn, NumericLabel, Schema
from metarisk_common.table import require_columns

from .config import Institution
from .source_config import Scalar, TableSection, cell_text
from .source_csv import Block, csv_blocks
from .source_files import check_file, files_of, is_many, partition_of

BATCH_ROWS: Final = 65_536

_WHOLE_NUMBER_AS_FLOAT = r"^(-?\d+)\.0+$"


@dataclass
class Filtered:
    """What the bank's own filters do, counted while a table is read.

    Attributes:
        rows: in the file, the folder or the database, before any filter.
        by_column: rows that the filter on each column removes; a row may be counted under several. A database applies
            its filters itself, and only the total is known.

    """

    rows: int = 0
    by_column: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Reading:
    """What is wanted: `own` columns of the bank's, of which `numeric` hold numbers; `plain`: cells stay as they are."""

    table: TableSection
    schema: Schema
    own: tuple[str, ...]
    numeric: frozenset[str]
    where: str
    plain: bool
    filtered: Filtered = field(default_factory=Filtered)


def read_source(institution: Institution, schema: Schema) -> pl.DataFrame:
    """Read the columns that a schema requires, under the schema's names, of every row that the bank's filters keep.

    Raises:
        DataError: the table cannot be read, lacks a column or is damaged; nothing of its content is repeated, and
            nothing of a database's address.

    """
    return join_batches(list(source_batches(institution, schema)))


def source_batches(
    institution: Institution, schema: Schema, filtered: Filtered | None = None
) -> Iterator[pl.DataFrame]:
    """Yield what `read_source` gives in batches, in the table's order; the first has no rows, and all columns.

    Where `filtered` is given, what the bank's filters remove is counted in it. A database is then asked for the number
    of its rows too.

    Raises:
        DataError: as `read_source`.

    """
    section, plain = institution.config.table, institution.config.table is None
    table = TableSection(file=str(institution.config.data)) if section is None else section
    reading = replace(_reading(institution, table, schema, plain=plain), filtered=filtered or Filtered())
    _check_values(reading)
    yield pl.DataFrame(schema=dict.fromkeys(schema.required, pl.String))
    if table.file is None and schema.privacy_unit is not None and not table.order_by:
        raise DataError(
            f"{reading.where}: the plan uses the first records of each '{schema.privacy_unit}', and a database "
            "promises no order of rows: name columns that give one as `order_by` in section table of institution.toml"
        )
    if table.file is not None:
        batches = _files(institution.folder / table.file, reading)
    else:
        from .source_sql import database_batches, database_rows  # noqa: PLC0415 - SQLAlchemy takes a while; few need it

        if filtered is not None and (table.where or table.between):
            filtered.rows += database_rows(institution.folder, table, reading.where)
        batches = database_batches(institution.folder, table, reading.own, reading.where)
    for batch in batches:
        if table.file is not None or not (table.where or table.between):
            reading.filtered.rows += batch.height
        frame = batch if plain else _kept(batch.select(map(plain_cells, batch.get_columns())), reading)
        if frame.height:
            yield _named(frame, reading)


def database_sample(folder: Path, table: TableSection, rows: int) -> pl.DataFrame:
    """Read some rows of a table in a database under the bank's own names, all columns of it.

    Raises:
        DataError: the database cannot be reached or read; nothing of its address or content is repeated.

    """
    from .source_sql import database_head  # noqa: PLC0415 - as above

    cells = database_head(folder, table, rows, table.title)
    return cells.select(map(plain_cells, cells.get_columns()))


def join_batches(batches: list[pl.DataFrame]) -> pl.DataFrame:
    """Put batches below each other; a column that is of several kinds becomes numbers, or else text."""
    batches = [batch for batch in batches if batch.height] or batches[:1]
    target: dict[Any, pl.DataType] = {}
    for name in batches[0].columns:
        kinds = {batch[name].dtype for batch in batches} - {pl.Null()}
        if len(kinds) > 1:
            target[name] = pl.Float64() if all(kind.is_numeric() for kind in kinds) else pl.String()
        else:
            target[name] = next(iter(kinds), pl.String())
    return pl.concat([batch.cast(target) for batch in batches])


def _reading(institution: Institution, table: TableSection, schema: Schema, *, plain: bool) -> _Reading:
    own_names = {name: table.columns.get(name, name) for name in schema.required if name not in table.constants}
    numbers = {name for one in schema.columns if isinstance(one, NumericColumn) for name in one.sources}
    if isinstance(schema.label, NumericLabel):
        numbers.add(schema.label.name)
    by_number = {
        name
        for name, values in itertools.chain(table.where.items(), table.between.items())
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    }
    numeric = {own for name, own in own_names.items() if name in numbers} | by_number
    own = tuple(dict.fromkeys([*own_names.values(), *table.where, *table.between]))
    where = institution.table_title
    return _Reading(table, schema, own, frozenset(numeric), where, plain)


def _check_values(reading: _Reading) -> None:
    """Raise where codes are given for what the schema does not know; the table itself is not looked at."""
    schema = reading.schema
    known: dict[str, tuple[str, ...]] = {
        column.name: column.categories for column in schema.columns if isinstance(column, CategoricalColumn)
    }
    if isinstance(schema.label, Label):
        known[schema.label.name] = (str(schema.label.positive), str(schema.label.negative))
    for name, codes in reading.table.values.items():
        strange = [category for category in codes if category not in known.get(name, codes)]
        if strange:
            raise DataError(
                f"institution.toml: table.values.{name}: '{strange[0]}' is not among what the plan's column '{name}' "
                f"may be: {', '.join(known[name])}"
            )


def _files(place: Path, reading: _Reading) -> Iterator[pl.DataFrame]:
    """Read one file after another, those of a folder in the order of their names."""
    root, files = files_of(place) if not reading.plain and is_many(place) else (place.parent, [place])
    for path in files:
        check_file(path)
        for frame in _one_file(path, partition_of(path, root), reading, str(path)):
            yield frame.select(reading.own)


def _one_file(path: Path, partition: dict[str, str | None], reading: _Reading, where: str) -> Iterator[pl.DataFrame]:
    lits = [pl.lit(value, dtype=pl.String).alias(name) for name, value in partition.items()]
    separator = reading.table.separator
    is_csv = path.suffix.lower() == ".csv"
    blocks: Iterator[Block] = iter(())
    message = ""
    try:
        if is_csv:
            blocks = csv_blocks(path, separator)
            head = pl.read_csv(next(blocks).text, infer_schema=False, separator=separator)
        else:
            head = pl.scan_parquet(path, glob=False, hive_partitioning=False).head(0).collect()
        require_columns(head.with_columns(lits), reading.own, where)
        if _passed_over(path, partition, reading):
            return
        needed = [name for name in reading.own if name in head.columns and name not in partition]
        if not is_csv:
            lazy = pl.scan_parquet(path, glob=False, hive_partitioning=False).select(needed or head.columns[:1])
            for frame in lazy.collect_batches(chunk_size=BATCH_ROWS, maintain_order=True):
                yield frame.with_columns(lits)
        for block in blocks:
            frame = pl.read_csv(block.text, infer_schema=False, separator=separator, columns=needed or head.columns[:1])
            if frame.height != block.records:
                raise DataError(f"{where}: can't be read as CSV: cells with quotes in them need quotes around")
            yield _decimal_points(frame, reading).with_columns(lits)
    except PermissionError:
        message = f"{path}: may not be read by this user; change the file's permissions"
    except (PolarsError, OSError, PanicException):
        # The reader's own message may quote the line it stumbled over.
        message = (
            f"{path}: can't be read as CSV; expected UTF-8 text, a header, and as many cells in every row"
            if is_csv
            else f"{path}: can't be read as Parquet; it may be cut short or of another format: export the table again"
        )
    if message:
        raise DataError(message) from None


def _decimal_points(frame: pl.DataFrame, reading: _Reading) -> pl.DataFrame:
    """Turn the number 1,5 into 1.5, and 1.500 into 1,500, which is no number: nobody can tell which it was."""
    if not reading.table.decimal_comma:
        return frame
    names = [name for name in frame.columns if name in reading.numeric]
    swapped = [pl.col(name).str.replace_many([",", "."], [".", ","]).alias(name) for name in names]
    return frame.with_columns(swapped)


def plain_cells(series: pl.Series) -> pl.Series:
    """Bring cells to what a CSV file would hold, but for numbers and booleans, which the schema's reading knows."""
    kind = series.dtype
    if kind.is_decimal() or kind in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    elif kind == pl.Date:
        series = series.dt.to_string("%Y-%m-%d")
    elif isinstance(kind, pl.Datetime):
        series = series.dt.to_string("%Y-%m-%d %H:%M:%S%.f")
    elif kind == pl.Time:
        series = series.dt.to_string("%H:%M:%S%.f")
    return series.str.strip_chars_end(" ") if series.dtype == pl.String else series


def _kept(frame: pl.DataFrame, reading: _Reading) -> pl.DataFrame:
    kept = pl.Series(values=[True], dtype=pl.Boolean).new_from_index(0, frame.height)
    for name, fits in _filters(frame, reading.table):
        if reading.table.file is not None:
            reading.filtered.by_column[name] += int((~fits).sum())
        kept = kept & fits
    return frame if kept.all() else frame.filter(kept)


def _filters(frame: pl.DataFrame, table: TableSection) -> Iterator[tuple[str, pl.Series]]:
    """Tell for each filter on a column of the frame which rows it keeps; an empty cell fits none."""
    for name, values in table.where.items():
        if name in frame.columns:
            yield name, _is_among(frame[name], values).fill_null(value=False)
    for name, (low, high) in table.between.items():
        if name in frame.columns:
            yield name, _is_between(frame[name], low, high).fill_null(value=False)


def _passed_over(path: Path, partition: dict[str, str | None], reading: _Reading) -> bool:
    """Tell whether a filter on the names of folders removes a whole file, which is then counted and not read."""
    cells = pl.DataFrame({name: pl.Series([value], dtype=pl.String) for name, value in partition.items()})
    removing = [name for name, fits in _filters(cells, reading.table) if not fits.all()]
    if removing:
        rows = int(pl.scan_parquet(path, glob=False, hive_partitioning=False).select(pl.len()).collect().item())
        reading.filtered.rows += rows
        reading.filtered.by_column.update(dict.fromkeys(removing, rows))
    return bool(removing)


def _is_number(value: Scalar) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_among(series: pl.Series, values: tuple[Scalar, ...]) -> pl.Series:
    if all(map(_is_number, values)):
        return _numbers(series).is_in([float(value) for value in values if not isinstance(value, (str, dt.date))])
    return _texts(series).is_in(list(map(cell_text, values)))


def _is_between(series: pl.Series, low: Scalar, high: Scalar) -> pl.Series:
    if isinstance(low, (int, float)) and isinstance(high, (int, float)):
        return _numbers(series).is_between(float(low), float(high))
    return _texts(series).is_between(pl.lit(cell_text(low)), pl.lit(cell_text(high)))


def _numbers(series: pl.Series) -> pl.Series:
    text = series.str.strip_chars() if series.dtype == pl.String else series
    return text.cast(pl.Float64, strict=False)


def _texts(series: pl.Series) -> pl.Series:
    """Spell cells alike, whatever kind a file or database gave them: 1990 and 1990.0 are "1990", True is "true"."""
    text = series.cast(pl.String).str.replace(_WHOLE_NUMBER_AS_FLOAT, "$1")
    return text.replace({"True": "true", "False": "false"})


def _named(frame: pl.DataFrame, reading: _Reading) -> pl.DataFrame:
    """Give a batch the schema's names, constants and codes."""
    table = reading.table
    columns = []
    for name in reading.schema.required:
        if name in table.constants:
            text = pl.Series(name, [cell_text(table.constants[name])], dtype=pl.String)
            columns.append(text.new_from_index(0, frame.height))
            continue
        series = frame[table.columns.get(name, name)].alias(name)
        codes = table.values.get(name)
        columns.append(series if codes is None else _decoded(series, codes))
    return pl.DataFrame(columns)


def _decoded(series: pl.Series, codes: dict[str, tuple[Scalar, ...]]) -> pl.Series:
    """Replace the bank's codes; what is listed nowhere stays as it is, for the schema to judge."""
    meaning = {cell_text(code): category for category, some in codes.items() for code in some}
    exact, spelled = series.cast(pl.String), _texts(series)
    by_spelling = spelled.replace_strict(meaning, default=None, return_dtype=pl.String)
    return exact.replace_strict(meaning, default=by_spelling.fill_null(exact), return_dtype=pl.String).alias(
        series.name
    )
