"""Tables of any size, read and written in batches, so that memory stays that of one batch.

A batch is read by the schema as a whole table is (`metarisk_common.table`), so that a record's score does not depend on
the file's format or on the records around it.
"""

import csv
import itertools
import os
import secrets
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import BinaryIO, Final, Self

import polars as pl
from polars.exceptions import PanicException, PolarsError

from metarisk_common.errors import ConfigError, DataError
from metarisk_common.schema import NumericColumn, Schema
from metarisk_common.table import require_columns, usable_rows

BATCH_ROWS: Final = 16_384
SUFFIXES: Final = (".csv", ".parquet")


class Source:
    """A CSV or Parquet file that is read in batches, always from its beginning."""

    def __init__(self, path: Path, needed: tuple[str, ...]) -> None:
        """Look at the file's head.

        Raises:
            DataError: it is missing, damaged, of another format, or lacks a column that is needed.

        """
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: only .csv and .parquet files are read; export the table as one of them")
        if not path.is_file():
            raise DataError(f"{path}: there is no such file; check the path, and that the table was exported")
        self.path, self._csv, self._needed = path, path.suffix.lower() == ".csv", needed
        self._read = self._total = 0  # bytes of a CSV file, rows of a Parquet file
        with _reading(path):
            if self._csv:
                self._total = path.stat().st_size
                with path.open("rb") as file:
                    head = pl.read_csv(next(_records(file, path))[1], infer_schema=False)
            else:
                head = pl.scan_parquet(path, glob=False).head(0).collect()
                self._total = int(pl.scan_parquet(path, glob=False).select(pl.len()).collect().item())
        require_columns(head, needed, str(path))

    def batches(self, batch_rows: int = BATCH_ROWS) -> Iterator[pl.DataFrame]:
        """Yield the needed columns in the file's order, at most `batch_rows` rows at a time.

        Raises:
            DataError: the file is damaged, or holds no rows.

        """
        empty = True
        self._read = 0
        with _reading(self.path):
            for frame in self._csv_batches(batch_rows) if self._csv else self._parquet_batches(batch_rows):
                empty = False
                yield frame
        if empty:
            raise DataError(f"{self.path}: holds no rows; export the table again with one row for each record")

    def total(self, rows: int) -> int:
        """Tell how many rows the file has: of a CSV file estimated, after `rows` were read, by the bytes they took."""
        return round(rows * self._total / self._read) if self._csv and self._read else max(rows, self._total)

    def _csv_batches(self, batch_rows: int) -> Iterator[pl.DataFrame]:
        """Cut the file between records: Polars' own streaming holds a quarter of a gigabyte at a time."""
        with self.path.open("rb") as file:
            records = _records(file, self.path)
            width, header = next(records)
            while batch := list(itertools.islice(records, batch_rows)):
                if any(cells != width for cells, _ in batch):
                    raise DataError(
                        f"{self.path}: some rows have more or fewer cells than the header's {width}; the file may have "
                        "been cut short, or a cell with a comma lacks its quotes"
                    )
                text = header + b"".join(record for _, record in batch)
                frame = pl.read_csv(text, infer_schema=False, columns=list(self._needed))
                if frame.height != len(batch):
                    raise DataError(f"{self.path}: can't be read as CSV: cells with quotes in them need quotes around")
                self._read = file.tell()
                yield frame

    def _parquet_batches(self, batch_rows: int) -> Iterator[pl.DataFrame]:
        lazy = pl.scan_parquet(self.path, glob=False).select(self._needed)
        yield from lazy.collect_batches(chunk_size=batch_rows, maintain_order=True)


@dataclass
class Fit:
    """Tells which rows a model can score, by the rule that decides what is learned from, and counts the others.

    `unfit`: rows that do not fit, `columns`: for each column at fault, in how many of them.
    """

    schema: Schema
    rows: int = 0
    unfit: int = 0
    columns: dict[str, int] = field(default_factory=dict)

    def look(self, frame: pl.DataFrame, where: str) -> pl.Series:
        """Tell of every row whether it fits, `(rows,)` booleans; a label is not asked for.

        Raises:
            DataError: a column is missing, or of a kind that the schema cannot mean.

        """
        fits = self._usable(frame, self.schema, where)
        self.rows += frame.height
        if not fits.all():
            self.unfit += int((~fits).sum())
            for column in self.schema.columns:
                single = self.schema.model_copy(update={"columns": (column,)})
                wrong = int((~self._usable(frame, single, where)).sum()) if isinstance(column, NumericColumn) else 0
                if wrong:
                    self.columns[column.name] = self.columns.get(column.name, 0) + wrong
        return fits

    def told(self) -> str:
        """Say which columns are at fault, and in how many rows; never what they hold."""
        return ", ".join(f"column '{name}' in {count}" for name, count in self.columns.items())

    @staticmethod
    def _usable(frame: pl.DataFrame, schema: Schema, where: str) -> pl.Series:
        inputs = {"segment": None, "segments": (), "identifier": None, "privacy_unit": None}
        bare = schema.model_copy(update=inputs)
        outcome = pl.lit(str(schema.outcome.positive)).alias(schema.label.name)
        return usable_rows(frame.with_columns(outcome), bare, where)


class Sink:
    """A CSV or Parquet file that appears, whole and for its owner alone, when the block that writes it ends well."""

    def __init__(self, path: Path) -> None:
        """Check that the file can be written.

        Raises:
            ConfigError: the path is taken, in no folder, or of another format.

        """
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"{path}: only .csv and .parquet files are written; give --out such a name")
        check_free(path)
        self.path = path
        self._parts = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
        self._count = 0

    def __enter__(self) -> Self:
        """Begin a draft beside the file.

        Raises:
            ConfigError: the folder cannot be written.

        """
        with _writing(self.path):
            self._parts.mkdir(mode=0o700)
        return self

    def write(self, frame: pl.DataFrame) -> None:
        """Add rows; every call with the same columns.

        Raises:
            ConfigError: the disk is full, or columns are of a kind that CSV cannot hold.

        """
        with _writing(self.path):
            if self.path.suffix.lower() == ".csv":
                with (self._parts / "whole.csv").open("ab") as file:
                    frame.write_csv(file, include_header=self._count == 0)
            else:
                frame.write_parquet(self._parts / f"{self._count:09}.parquet")
        self._count += 1

    def __exit__(self, kind: object, *_: object) -> None:
        """Put the file in its place, or leave nothing."""
        try:
            if kind is None:
                with _writing(self.path):
                    whole = self._whole()
                    whole.chmod(0o600)
                    with whole.open("rb") as file:
                        os.fsync(file.fileno())
                    check_free(self.path)
                    whole.rename(self.path)
        finally:
            rmtree(self._parts, ignore_errors=True)

    def _whole(self) -> Path:
        whole = self._parts / f"whole{self.path.suffix.lower()}"
        if whole.suffix == ".parquet":
            parts = [self._parts / f"{number:09}.parquet" for number in range(self._count)]
            pl.scan_parquet(parts, glob=False).sink_parquet(whole)
        return whole


def check_free(path: Path) -> None:
    """Raise unless a file can be made at a path.

    Raises:
        ConfigError: something is there already, or its folder is not.

    """
    if os.path.lexists(path):
        raise ConfigError(f"{path}: exists already; choose another name with --out")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent}: there is no such folder")


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield of a CSV file's header and of every record how many cells it has, and its bytes; blank lines are none.

    Raises:
        DataError: the file is empty or no CSV in UTF-8.

    """
    raw: list[bytes] = []

    def lines() -> Iterator[str]:
        while line := file.readline():
            raw.append(line.removeprefix(BOM_UTF8) if not number else line)
            yield raw[-1].decode("utf-8")

    number = 0
    try:
        reader = csv.reader(lines())
        for cells in reader:
            record = b"".join(raw)
            raw.clear()
            number = reader.line_num
            if cells:
                yield len(cells), record
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text (near line {number + 1}); save or export it as UTF-8") from None
    except csv.Error:
        raise DataError(f"{path}: can't be read as CSV (near line {number + 1}); export the table again") from None
    if not number:
        raise DataError(f"{path}: is empty; export the table again with a header and one row for each record")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise DataError(f"{path}: may not be read by this user; change the file's permissions") from None
    except (PolarsError, OSError, PanicException):
        # The reader's own message may quote the line it stumbled over.
        raise DataError(f"{path}: can't be read; it is damaged or of another format: export the table again") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    except (PolarsError, PanicException):
        raise ConfigError(f"{path}: cannot be written as {path.suffix}; choose the other format") from None
