"""Scoring with an adapted model: a table in, a probability and points for each row out, in batches of bounded memory.

Scores are made and kept inside the bank; a file of them is readable by its owner alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.special import logit

from metarisk_common.adapters import predict
from metarisk_common.errors import ConfigError, DataError
from metarisk_common.features import Encoder
from metarisk_common.schema import Schema

from .artifacts import Model
from .points import PointScale
from .stream import BATCH_ROWS, Fit, Sink, Source

PROBABILITY, POINTS = "probability", "points"
RESERVED = (PROBABILITY, POINTS)

_EDGE = 1e-15
"""Probabilities nearer to 0 or 1 than this count as this: a logit must stay finite."""


@dataclass(frozen=True)
class Scored:
    """What became of a table: `rows` in it, of which `scored` have a score; `columns` at fault in the others."""

    rows: int
    scored: int
    columns: dict[str, int]


def score_rows(
    model: Model, encoder: Encoder, frame: pl.DataFrame, scale: PointScale, where: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Score rows that fit.

    Args:
        model: the adapted model.
        encoder: of its plan's schema.
        frame: one record a row, with the schema's input columns.
        scale: how to write points.
        where: opens the message of an error.

    Returns:
        probabilities (rows,) float64 of the bad outcome, and points (rows,) int64.

    Raises:
        DataError: a row does not fit the schema.

    """
    x, _ = encoder.encode(frame, where)
    probabilities = predict(model.plan.model, model.params, x)
    return probabilities, scale.points(logit(np.clip(probabilities, _EDGE, 1 - _EDGE)))


def score_file(
    model: Model,
    path: Path,
    out: Path,
    *,
    kept: tuple[str, ...] = (),
    scale: PointScale | None = None,
    keep_going: bool = False,
    batch_rows: int = BATCH_ROWS,
    on_rows: Callable[[int, int], None] | None = None,
) -> Scored:
    """Score every row of a CSV or Parquet file, in its order, into another one.

    Args:
        model: the adapted model.
        path: the table; a label is not needed.
        out: CSV or Parquet, by its suffix; a new file.
        kept: columns of the table to write before the scores, such as an identifier.
        scale: how to write points; by default as the model says.
        keep_going: write nulls for rows that do not fit, instead of refusing the file.
        batch_rows: rows in memory at a time; no score depends on it.
        on_rows: called with `(done, total)` rows; the total of a CSV file is an estimate until it is read.

    Raises:
        ConfigError: `out` is taken or cannot be written, or a kept column has a name that scores have.
        DataError: the table cannot be read or lacks a column; or rows of it do not fit, counted to the last.

    """
    check_kept(kept, RESERVED)
    encoder, chosen = Encoder(model.plan.data), scale or model.manifest.points

    def find(frame: pl.DataFrame) -> dict[str, pl.Series]:
        probabilities, points = score_rows(model, encoder, frame, chosen, str(path))
        return {PROBABILITY: pl.Series(values=probabilities), POINTS: pl.Series(values=points)}

    return write_found(
        model.plan.data, path, out, find, kept=kept, keep_going=keep_going, batch_rows=batch_rows, on_rows=on_rows
    )


def write_found(
    schema: Schema,
    path: Path,
    out: Path,
    find: Callable[[pl.DataFrame], dict[str, pl.Series]],
    *,
    kept: tuple[str, ...],
    keep_going: bool,
    batch_rows: int,
    on_rows: Callable[[int, int], None] | None,
) -> Scored:
    """Write what is found of every row beside the columns that are kept, batch by batch.

    `find` takes rows that fit `schema` and gives new columns of them; the rest, and the errors, are `score_file`'s.
    """
    where = str(path)
    source, fit = Source(path, tuple(dict.fromkeys([*kept, *input_columns(schema)]))), Fit(schema)
    with Sink(out) as sink:
        for frame in source.batches(batch_rows):
            fits = fit.look(frame, where)
            if keep_going or not fit.unfit:
                sink.write(_beside(frame.select(kept), find(frame.filter(fits)), fits))
            if on_rows is not None:
                on_rows(fit.rows, source.total(fit.rows))
        _refuse_unfit(fit, where, keep_going=keep_going)
    return Scored(fit.rows, fit.rows - fit.unfit, dict(fit.columns))


def input_columns(schema: Schema) -> tuple[str, ...]:
    """Name the columns of the table that a score is made of."""
    return tuple(dict.fromkeys(name for column in schema.columns for name in column.sources))


def check_kept(kept: tuple[str, ...], reserved: tuple[str, ...]) -> None:
    """Raise where a column that is kept would have the name of one that is written.

    Raises:
        ConfigError: naming it.

    """
    taken = [name for name in kept if name in reserved]
    if taken:
        raise ConfigError(f"column '{taken[0]}' cannot be kept, for the output has one of that name; rename it first")


def _refuse_unfit(fit: Fit, where: str, *, keep_going: bool) -> None:
    """Raise where rows do not fit, unless they are to be left without a score.

    Raises:
        DataError: with counts by column.

    """
    if fit.unfit and not keep_going:
        raise DataError(
            f"{where}: {fit.unfit} of {fit.rows} rows do not fit the model's schema ({fit.told()}); mend or leave out "
            "those rows, or say --keep-going to leave them without a score"
        )


def _beside(kept: pl.DataFrame, found: dict[str, pl.Series], fits: pl.Series) -> pl.DataFrame:
    """Put what was found of the rows that fit beside columns of all rows."""
    return pl.DataFrame([*kept.get_columns(), *(_spread(values, fits).alias(name) for name, values in found.items())])


def _spread(values: pl.Series, fits: pl.Series) -> pl.Series:
    """Put values of the rows that fit, in order, among nulls for those that do not: `(rows,)`."""
    if fits.all():
        return values
    if values.is_empty():
        return values.clear(len(fits))
    return values.gather((fits.cast(pl.Int64).cum_sum() - 1).set(~fits, None))
