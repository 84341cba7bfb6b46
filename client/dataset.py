"""A bank's own table, read, checked and encoded. Nothing here leaves the bank, counts and errors included."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from polars.exceptions import NoDataError, PanicException, PolarsError

from metarisk_common.errors import DataError
from metarisk_common.features import Counts, Encoder
from metarisk_common.schema import Schema
from metarisk_common.table import check_identifiers, check_table, labels, segments, units, usable_rows

from .config import Institution
from .source_csv import check_csv
from .source_files import check_file
from .sources import read_source


@dataclass(frozen=True)
class Dataset:
    """One institution's records, ready for a model.

    Attributes:
        institution: the bank's name.
        x: (rows, width) float32 model inputs of `metarisk_common.features.Encoder`, rows of norm at most 1.
        y: (rows,) float32 labels, 0 or 1.
        segment: (rows,) of str, or None where the schema names no segment.
        unit: (rows,) int64, whose each record is, or None where every record is a privacy unit of its own. All
            records of a unit lie in one segment.
        dropped: records that were left out, because their cells do not fit or their unit has too many; private.
        counts: what the encoding met; private.

    """

    institution: str
    x: np.ndarray
    y: np.ndarray
    segment: np.ndarray | None
    counts: Counts
    unit: np.ndarray | None = None
    dropped: int = 0


def read_table(path: Path) -> pl.DataFrame:
    """Read a CSV file (UTF-8, comma, header) or a Parquet file, by its suffix.

    Cells of a CSV file stay text: what a column holds is for the schema to say, not for a guess from its first
    rows. So a code "01" keeps its zero, and a late cell of text is found and counted by `check_table`.

    Raises:
        DataError: the file is missing, empty, damaged or of another format; nothing of its content is repeated.

    """
    check_file(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            check_csv(path)
            return pl.read_csv(path, infer_schema=False)
        return pl.read_parquet(path, glob=False)
    except NoDataError:
        message = f"{path}: is empty; export the table again with a header and one row for each record"
    except PermissionError:
        message = f"{path}: may not be read by this user; change the file's permissions"
    except (PolarsError, OSError, PanicException):
        # The reader's own message may quote the line it stumbled over.
        message = (
            f"{path}: can't be read as CSV; expected UTF-8 text, commas, a header, and as many cells in every row"
            if suffix == ".csv"
            else f"{path}: can't be read as Parquet; it may be cut short or of another format: export the table again"
        )
    raise DataError(message) from None


def load_dataset(path: Path, schema: Schema, institution: str, *, drop_unfit: bool = False) -> Dataset:
    """Read, check and encode one institution's file; `drop_unfit` as for `from_frame`.

    Raises:
        DataError: the file can't be read or doesn't fit the schema.

    """
    return from_frame(read_table(path), schema, institution, str(path), drop_unfit=drop_unfit)


def load_source(institution: Institution, schema: Schema, *, drop_unfit: bool = False) -> Dataset:
    """Read, check and encode an institution's table, wherever it is; `drop_unfit` as for `from_frame`.

    Raises:
        DataError: the table can't be read or doesn't fit the schema.

    """
    frame = read_source(institution, schema)
    return from_frame(frame, schema, institution.config.name, institution.table_title, drop_unfit=drop_unfit)


def from_frame(
    frame: pl.DataFrame, schema: Schema, institution: str, where: str, *, drop_unfit: bool = False
) -> Dataset:
    """Check and encode one institution's table; `where` opens the message of an error.

    Where a privacy unit has more records than the schema's limit, or in several segments, those are kept that come
    first in the table among the records in the segment of its first one. The rule looks at one unit at a time, so a
    unit that is left out changes nothing of any other, and each belongs to one segment and thus to one task.

    Args:
        frame: one record a row.
        schema: the public schema of the plan.
        institution: the bank's name.
        where: the table's name, for messages.
        drop_unfit: leave out rows whose own cells do not fit, instead of raising. A bank that answers an order does
            so: whether one record fits may not decide what the server hears.

    Raises:
        DataError: the table doesn't fit the schema.

    """
    rows = frame.height
    if drop_unfit:
        frame = frame.filter(usable_rows(frame, schema, where))
        # All that `check_table` looks at besides single cells; encoding would raise for those once more.
        if schema.identifier is not None:
            check_identifiers(frame, schema.identifier, where)
    else:
        check_table(frame, schema, where)
    unit = None
    if schema.privacy_unit is not None:
        frame, unit = limited(frame, schema, schema.privacy_unit, where)
    x, counts = Encoder(schema).encode(frame, where)
    y = labels(frame, schema.label, where)
    segment = None if schema.segment is None else segments(frame, schema.segment, where).to_numpy().astype(np.str_)
    return Dataset(institution, x, y, segment, counts, unit, rows - frame.height)


def limited(frame: pl.DataFrame, schema: Schema, name: str, where: str) -> tuple[pl.DataFrame, np.ndarray]:
    """Keep of each unit what the schema allows, in the table's order; and number the units in order of appearance."""
    owner = units(frame, name, where)
    segment = owner if schema.segment is None else segments(frame, schema.segment, where)
    whose = pl.DataFrame({"unit": owner, "segment": segment}).with_row_index("row")
    first = pl.col("segment").first().over("unit")
    number = pl.col("row").first().over("unit").rank("dense") - 1
    kept = (
        whose.with_columns(number.cast(pl.Int64).alias("number"))
        .filter(pl.col("segment") == first)
        .filter(pl.int_range(pl.len()).over("unit") < schema.max_records_per_unit)
    )
    return frame[kept["row"]], kept["number"].to_numpy()
