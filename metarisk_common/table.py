"""Checks of a table against its schema, and the one way in which its cells become numbers and text.

Both CSV and Parquet pass through here, so the same rows give the same values whatever file they came from:
a cell is read by what the schema says of its column, never by what a reader guessed. Every error is one
line that names the file and the column, counts the cells, and never repeats one.
"""

from typing import Final

import numpy as np
import polars as pl

from .errors import DataError
from .schema import CategoricalColumn, Label, NumericColumn, NumericLabel, Schema
from .table_words import near_miss, wrong_kind

UNKNOWN_SEGMENT: Final = "unknown"
"""Segment of a record whose segment is missing."""

_WHOLE_NUMBER_AS_FLOAT: Final = r"^(-?\d+)\.0+$"


def check_table(frame: pl.DataFrame, schema: Schema, where: str) -> None:
    """Raise unless `frame` can be learned from: every column of the schema there, and every cell of its kind.

    Args:
        frame: one record a row; columns that the schema doesn't name are left alone.
        schema: the public schema of the plan.
        where: opens the error's message, usually the file's path.

    Raises:
        DataError: columns are missing or stand twice, there are no rows, a column holds another kind of value,
            infinite values, missing values where they are refused, labels other than the two declared, or an
            identifier that repeats.

    """
    require_columns(frame, schema.required, where)
    if frame.height == 0:
        raise DataError(f"{where}: holds no rows; export the table again with one row for each record")
    for column in schema.columns:
        if isinstance(column, NumericColumn):
            numbers(frame, column, where)
        else:
            categories(frame, column, where)
    labels(frame, schema.label, where)
    if schema.segment is not None:
        segments(frame, schema.segment, where)
    if schema.identifier is not None:
        check_identifiers(frame, schema.identifier, where)
    if schema.privacy_unit is not None:
        units(frame, schema.privacy_unit, where)


def usable_rows(frame: pl.DataFrame, schema: Schema, where: str) -> pl.Series:
    """Tell of every row whether its own cells fit the schema: `(rows,)` booleans.

    Each answer depends on that one record, so whoever leaves out the others makes a record that does not fit count
    as zero, and nothing that happens afterwards can tell that it was there.

    Raises:
        DataError: what is wrong is not a row: a column is missing, or is of a kind that the schema cannot mean.

    """
    require_columns(frame, schema.required, where)
    fits = pl.Series(values=[True], dtype=pl.Boolean).new_from_index(0, frame.height)
    for column in schema.columns:
        if isinstance(column, NumericColumn):
            for name in column.sources:
                values, other = _read_floats(frame, name, where)
                fits = fits & ~other & ~values.is_infinite().fill_null(value=False)
            if column.missing == "refuse":
                fits = fits & _quotient(frame, column, where).is_not_null()
    fits = fits & _label_fits(frame, schema.label, where)
    for key in (schema.identifier, schema.privacy_unit):
        if key is not None:
            fits = fits & _texts(frame, key, where).is_not_null()
    return fits


def units(frame: pl.DataFrame, name: str, where: str) -> pl.Series:
    """Read whose each record is: the privacy unit's column as text.

    Raises:
        DataError: the column is missing or has no plain text, or some records belong to nobody.

    """
    require_columns(frame, (name,), where)
    text = _texts(frame, name, where)
    absent = text.null_count()
    if absent:
        raise DataError(
            f"{where}: privacy unit column '{name}' is empty in {absent} of {frame.height} rows; "
            "every record must say whose it is, or it cannot be protected together with the others",
        )
    return text


def check_two_classes(y: np.ndarray, where: str) -> None:
    """Raise unless both outcomes occur in `y: (rows,)` of 0 and 1, or several values of a numeric label.

    Raises:
        DataError: every label is the same.

    """
    if len(y) == 0 or (y == y[0]).all():
        raise DataError(
            f"{where}: every record has the same label (a lender with one class), so nothing can be learned or "
            "judged; use a longer period, or check the label's 'positive' and 'negative' in the schema",
        )


def require_columns(frame: pl.DataFrame, names: tuple[str, ...], where: str) -> None:
    """Raise unless each of `names` is exactly one column of `frame`.

    Raises:
        DataError: naming the first column that is missing, with a near miss from the header if there is one.

    """
    missing = [name for name in names if name not in frame.columns]
    if missing and len(missing) == len(names):
        # Without one known name the first line may well be a record, so nothing of it may be shown.
        raise DataError(
            f"{where}: column '{missing[0]}' is missing{' like all others of the schema' if len(names) > 1 else ''}; "
            "check that the first line is a header and that the separator is a comma",
        )
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(
            f"{where}: column '{missing[0]}' is missing{more}{near_miss(missing[0], names, frame)}; "
            "add or rename the column in the table",
        )
    for name in names:
        if f"{name}_duplicated_0" in frame.columns:  # the name that Polars gives to a repeated header
            raise DataError(f"{where}: column '{name}' stands twice in the header; keep one of them")


def numbers(frame: pl.DataFrame, column: NumericColumn, where: str) -> pl.Series:
    """Read the cells of a numeric column as Float64, with null for whatever is missing (null, NaN, blank text).

    Booleans count as 0 and 1, and text that reads as a number counts as that number. A column with `divide_by` is
    the quotient of two; it is missing where either is, or where the divisor is 0.

    Raises:
        DataError: cells that aren't numbers, infinite values, or missing values where the schema refuses them.

    """
    for name in column.sources:
        _check_floats(frame, name, where)
    values = _quotient(frame, column, where)
    absent = values.null_count()
    if absent and column.missing == "refuse":
        raise DataError(
            f"{where}: column '{column.name}' has {absent} missing values in {frame.height} rows and the schema "
            'refuses them; fill or leave out those rows, or agree on missing = "indicator" in the schema',
        )
    return values


def categories(frame: pl.DataFrame, column: CategoricalColumn, where: str) -> pl.Series:
    """Read the cells of a categorical column as text, unknown ones included, with null for whatever is missing.

    Raises:
        DataError: the column holds dates, lists or another kind that has no plain text.

    """
    return _texts(frame, column.name, where, known=column.categories)


def segments(frame: pl.DataFrame, name: str, where: str) -> pl.Series:
    """Read the segment of each record as text; a record without one belongs to `UNKNOWN_SEGMENT`.

    The rule reads one record and nothing else, so that segments stay disjoint whatever other records there are.

    Raises:
        DataError: the column is missing or has no plain text.

    """
    require_columns(frame, (name,), where)
    return _texts(frame, name, where).fill_null(UNKNOWN_SEGMENT)


def labels(frame: pl.DataFrame, label: Label | NumericLabel, where: str) -> np.ndarray:
    """Read the labels, `(rows,) float32`: 1 where the cell is `label.positive`, 0 where it is `label.negative`.

    Of a numeric label: the value, clipped to its bounds, less its centre, over its scale.

    Raises:
        DataError: the column is missing, or holds missing cells or any value but the two declared.

    """
    if isinstance(label, NumericLabel):
        return _numeric_labels(frame, label, where)
    text = _label_texts(frame, label, where)
    absent = text.null_count()
    if absent:
        raise DataError(
            f"{where}: label column '{label.name}' is empty in {absent} of {frame.height} rows; "
            "leave out the records whose outcome is not known yet",
        )
    other = text.filter(~text.is_in(_outcomes(label)))
    if len(other):
        raise DataError(
            f"{where}: label column '{label.name}' holds {other.n_unique()} distinct values other than the two that "
            f"the schema declares, in {len(other)} of {frame.height} rows; leave those rows out or recode them",
        )
    return (text == str(label.positive)).cast(pl.Float32).to_numpy()


def split_by_institution(frame: pl.DataFrame, schema: Schema, where: str) -> dict[str, pl.DataFrame]:
    """One table for each institution, sorted by its name, rows in their order.

    Raises:
        DataError: a column of the schema is missing, or the institution is empty in some rows.

    """
    require_columns(frame, (*schema.required, schema.institution), where)
    names = _texts(frame, schema.institution, where)
    absent = names.null_count()
    if absent:
        raise DataError(
            f"{where}: institution column '{schema.institution}' is empty in {absent} of {frame.height} rows; "
            "every record must say whose it is",
        )
    rows_of = pl.DataFrame({"name": names}).with_row_index("row").group_by("name").agg("row").sort("name")
    return {name: frame[rows] for name, rows in zip(rows_of["name"], rows_of["row"], strict=True)}


def check_identifiers(frame: pl.DataFrame, name: str, where: str) -> None:
    """Raise unless every record has an identifier of its own.

    Raises:
        DataError: some have none, or one that another has.

    """
    require_columns(frame, (name,), where)
    text = _texts(frame, name, where)
    absent = text.null_count()
    if absent:
        raise DataError(
            f"{where}: identifier column '{name}' is empty in {absent} of {frame.height} rows; "
            "give every record its own",
        )
    check_repeats(len(text) - text.n_unique(), frame.height, name, where)


def check_repeats(repeated: int, rows: int, name: str, where: str) -> None:
    """Raise where `repeated` of a table's rows have an identifier that another has.

    Raises:
        DataError: some have.

    """
    if repeated:
        raise DataError(
            f"{where}: identifier column '{name}' repeats in {repeated} of {rows} rows, and a record that "
            "stands twice is protected half as well; keep one row for each record",
        )


def _numeric_labels(frame: pl.DataFrame, label: NumericLabel, where: str) -> np.ndarray:
    require_columns(frame, (label.name,), where)
    _check_floats(frame, label.name, where)
    values, _ = _read_floats(frame, label.name, where)
    absent = values.null_count()
    if absent:
        raise DataError(
            f"{where}: label column '{label.name}' is empty in {absent} of {frame.height} rows; "
            "leave out the records whose outcome is not known yet",
        )
    standardised = (np.clip(values.to_numpy(), label.lower, label.upper) - label.centre) / label.scale
    return np.asarray(standardised, dtype=np.float32)


def _label_fits(frame: pl.DataFrame, label: Label | NumericLabel, where: str) -> pl.Series:
    if isinstance(label, NumericLabel):
        values, _ = _read_floats(frame, label.name, where)
        return values.is_finite().fill_null(value=False)
    return _label_texts(frame, label, where).is_in(_outcomes(label)).fill_null(value=False)


def _outcomes(label: Label) -> list[str]:
    return [str(label.positive), str(label.negative)]


def _label_texts(frame: pl.DataFrame, label: Label, where: str) -> pl.Series:
    require_columns(frame, (label.name,), where)
    outcomes = _outcomes(label)
    text = _texts(frame, label.name, where, known=tuple(outcomes))
    return text.replace({"true": "1", "false": "0"}) if set(outcomes) == {"0", "1"} else text


def _quotient(frame: pl.DataFrame, column: NumericColumn, where: str) -> pl.Series:
    values, _ = _read_floats(frame, column.sources[0], where)
    if column.divide_by is None:
        return values
    divisor, _ = _read_floats(frame, column.divide_by, where)
    return values / divisor.replace(0.0, None)


def _read_floats(frame: pl.DataFrame, name: str, where: str) -> tuple[pl.Series, pl.Series]:
    """Read a column as Float64, with null for what is missing or no number, and tell which cells are no numbers."""
    series = frame[name]
    if series.dtype.is_numeric() or series.dtype in (pl.Boolean, pl.Null):
        values = series.cast(pl.Float64)
        other = values.is_null() & series.is_not_null()
    elif series.dtype in (pl.String, pl.Categorical, pl.Enum):
        text = _without_blanks(series.cast(pl.String).str.strip_chars().str.to_lowercase())
        values = text.replace({"true": "1", "false": "0"}).cast(pl.Float64, strict=False)
        other = values.is_null() & text.is_not_null()
    else:
        raise DataError(wrong_kind(where, name, series.dtype, "numbers"))
    return values.fill_nan(None), other


def _check_floats(frame: pl.DataFrame, name: str, where: str) -> None:
    values, others = _read_floats(frame, name, where)
    other, infinite = int(others.sum()), int(values.is_infinite().sum())
    if other:
        raise DataError(
            f"{where}: column '{name}' must hold numbers, but {other} of {frame.height} cells hold other text; "
            "write numbers like 1234.5, and leave a cell empty where the value is missing",
        )
    if infinite:
        raise DataError(
            f"{where}: column '{name}' holds infinite values in {infinite} of {frame.height} rows; "
            "leave a cell empty where the value is missing",
        )


def _texts(frame: pl.DataFrame, name: str, where: str, known: tuple[str, ...] = ()) -> pl.Series:
    # What is known is kept as it stands. The rest is brought to one spelling, since the same column may arrive
    # as numbers, as booleans or as their text: 1990 and 1990.0 are "1990"; True is "true"; NaN and blank are missing.
    series = frame[name]
    plain = series.dtype.is_numeric() or series.dtype in (pl.Boolean, pl.Null, pl.String, pl.Categorical, pl.Enum)
    if not plain:
        raise DataError(wrong_kind(where, name, series.dtype, "categories (text, whole numbers or true and false)"))
    text = _without_blanks(series.cast(pl.String))
    # Blanks after a text, which columns of fixed width have, count for nothing.
    spelled = (
        text.str.strip_chars_end(" ")
        .str.replace(_WHOLE_NUMBER_AS_FLOAT, "$1")
        .replace({"True": "true", "False": "false"})
    )
    spelled = spelled.set(spelled.is_in(["NaN", "nan"]), None)
    return spelled.zip_with(~text.is_in(list(known)).fill_null(value=False), text) if known else spelled


def _without_blanks(text: pl.Series) -> pl.Series:
    return text.set(text.str.strip_chars() == "", None)
