"""The first rows of a bank's table with all its columns, under the bank's own names: what a mapping is proposed from.

Of a CSV file a block is read and of a folder of Parquet files the first one's first rows, however large they are.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import polars as pl
from polars.exceptions import PanicException, PolarsError

from metarisk_common.config import validate
from metarisk_common.errors import DataError

from . import sources
from .source_config import TableSection
from .source_csv import csv_blocks
from .source_files import check_file, files_of, is_many, partition_of

SAMPLE_ROWS: Final = 5_000
_BLOCK_BYTES: Final = 1 << 20
_HEAD_BYTES: Final = 1 << 16
_LONGEST_NAME: Final = 500
_SEPARATORS: Final = (",", ";", "\t", "|")
_COMMA_NUMBER: Final = r"^\s*[-+]?\d+,\d+\s*$"
_POINT_NUMBER: Final = r"^\s*[-+]?\d+\.\d+\s*$"


@dataclass(frozen=True)
class Sample:
    """Some first rows: `section` says how the file is read, `cells` has every own column, its numbers with points."""

    section: TableSection
    cells: pl.DataFrame


def database_sample(folder: Path, section: TableSection, rows: int = SAMPLE_ROWS) -> pl.DataFrame:
    """Read some rows of a database's table or query, in no order, with all columns that a section can name.

    Args:
        folder: the bank's, from which a relative `url_file`, and SQLite's file, are named; it need not be there yet.
        section: where the table is.
        rows: how many rows to look at, at most.

    Raises:
        ConfigError: the URL is not there, or its file is open to others.
        DataError: the database cannot be read, or the table has fewer than two columns or no rows.

    """
    return _enough(sources.database_sample(folder, section, rows), section.title)


def table_sample(path: Path, rows: int = SAMPLE_ROWS) -> Sample:
    """Read the first rows of a CSV or Parquet file, a folder of Parquet files, or a pattern of them.

    The separator is the one of comma, semicolon, tab and bar that most lines have equally often, and decimals have
    commas where more of the cells do than have points.

    Args:
        path: the table; what section `[table]` takes as its `file`.
        rows: how many rows to look at, at most.

    Raises:
        DataError: there is no such table, it is damaged, or it has fewer than two columns; nothing of it is repeated.

    """
    first, partition = _first_file(path)
    separator, message = ",", ""
    try:
        if first.suffix.lower() == ".csv":
            separator = _separator(first)
            cells = _csv_head(first, separator, rows)
        else:
            lazy = pl.scan_parquet(first, glob=False, hive_partitioning=False)
            cells = lazy.head(rows).collect()
            cells = cells.with_columns(pl.lit(value, dtype=pl.String).alias(name) for name, value in partition.items())
    except PermissionError:
        message = f"{first}: may not be read by this user; change the file's permissions"
    except (PolarsError, OSError, PanicException):
        # The reader's own message may quote the line it stumbled over.
        message = f"{first}: can't be read as a table; it may be cut short or of another format: export it again"
    if message:
        raise DataError(message) from None
    cells = _enough(cells.select(sources.plain_cells(series) for series in cells.get_columns()), str(path))
    comma = separator != "," and _has_decimal_commas(cells)
    if comma:
        swapped = pl.col(pl.String).str.contains(_COMMA_NUMBER)
        cells = cells.with_columns(
            pl.when(swapped).then(pl.col(pl.String).str.replace(",", ".", literal=True)).otherwise(pl.col(pl.String))
        )
    values = {"file": str(path), "separator": separator, "decimal_comma": comma}
    return Sample(validate(values, TableSection, where="--from"), cells)


def _first_file(path: Path) -> tuple[Path, dict[str, str | None]]:
    """Find the first file of the table, and the columns that the names of its folders give."""
    root, files = files_of(path) if is_many(path) else (path.parent, [path])
    check_file(files[0])
    return files[0], partition_of(files[0], root)


def _separator(path: Path) -> str:
    """Find the sign that cuts the header into most cells, and as many in the lines after it."""
    with path.open("rb") as file:
        lines = file.read(_HEAD_BYTES).decode("utf-8", errors="replace").splitlines()[:50]
    bare = [re.sub('"[^"]*"', "", line) for line in lines if line.strip()]

    def standing(sign: str) -> tuple[float, int]:
        wanted = bare[0].count(sign)
        return (sum(line.count(sign) == wanted for line in bare) / len(bare) if wanted else 0.0, wanted)

    return max(_SEPARATORS, key=standing) if bare else ","


def _csv_head(path: Path, separator: str, rows: int) -> pl.DataFrame:
    frames, read = [], 0
    for block in csv_blocks(path, separator, _BLOCK_BYTES):
        frames.append(pl.read_csv(block.text, infer_schema=False, separator=separator, n_rows=rows - read))
        read += frames[-1].height
        if read >= rows:
            break
    return pl.concat(frames)


def _usable(names: list[str]) -> list[str]:
    """Leave out what no section can name: columns without a name, and those that stand twice."""
    original = {name: re.sub(r"_duplicated_\d+$", "", name) for name in names}  # as Polars names what stands twice
    often = Counter(original.values())
    return [name for name in names if 0 < len(name) <= _LONGEST_NAME and often[original[name]] == 1]


def _enough(cells: pl.DataFrame, where: str) -> pl.DataFrame:
    cells = cells.select(_usable(cells.columns))
    if cells.width < 2 or not cells.height:  # noqa: PLR2004 - a label and an input
        raise DataError(f"{where}: has fewer than two columns, or no rows; check the header and the separator")
    return cells


def _has_decimal_commas(cells: pl.DataFrame) -> bool:
    texts = [series for series in cells.get_columns() if series.dtype == pl.String]
    commas = sum(int(series.str.contains(_COMMA_NUMBER).sum()) for series in texts)
    return commas > sum(int(series.str.contains(_POINT_NUMBER).sum()) for series in texts)
