"""Explanations of single records, and of whole tables in batches: scores with their reasons, in words.

They hold what the bank's records hold: they are written where the bank asks, readable by its owner alone, and nowhere
else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from metarisk_common.errors import ConfigError, DataError
from metarisk_common.features import Encoder
from metarisk_common.schema import Schema

from .artifacts import NO_CLAIM, Model
from .explain import MOST_REASONS, Explained, Facts, explain_rows
from .points import PointScale
from .reasons import fact_names, fact_titles, fact_values, reason_text
from .score import POINTS, PROBABILITY, Scored, check_kept, input_columns, write_found
from .stream import BATCH_ROWS, Fit, Source


@dataclass(frozen=True)
class Contribution:
    """What one column does to a record's score.

    `name` and `title` of the column, `value` in the record, in words; `logit`: what it adds to the logit, `points`: to
    the points; `stability`: of a reason, the share of draws that agree, else None.
    """

    name: str
    title: str
    value: str
    logit: float
    points: float
    stability: float | None = None

    @property
    def text(self) -> str:
        """The reason in one line."""
        return reason_text(self.title, self.value, raises=self.logit > 0)


@dataclass(frozen=True)
class Explanation:
    """Why one record has its score.

    `row`: its number in the table, from 1. `reasons`: at most four, those that raise the risk most; `columns`: what
    every column does, the strongest first. Their logits sum to `logit` - `reference_logit`.
    """

    row: int
    probability: float
    points: int
    logit: float
    reference_logit: float
    reference_probability: float
    reference_points: int
    draws: int
    reasons: tuple[Contribution, ...]
    columns: tuple[Contribution, ...]


def explain_record(
    model: Model, path: Path, *, row: int | None = None, key: tuple[str, str] | None = None
) -> Explanation:
    """Explain one record of a table of any size.

    Args:
        model: the adapted model.
        path: the table, CSV or Parquet.
        row: the record's number, from 1 after the header; or
        key: the column that tells records apart, and what it holds in this one.

    Raises:
        ConfigError: neither or both are given, or the number is beyond the table.
        DataError: the table cannot be read, has no such record or several, or the record does not fit the schema.

    """
    if (row is None) == (key is None):
        raise ConfigError("say which record to explain: --row with its number, or --id with what its key column holds")
    schema = model.plan.data
    needed = input_columns(schema)
    source = Source(path, needed if key is None else tuple(dict.fromkeys([key[0], *needed])))
    if key is not None:
        number, frame = _keyed(source, *key)
    else:
        number, frame = _row(source, row or 0)
    where = f"{path}: row {number}"
    fit = Fit(schema)
    if not fit.look(frame, where).all():
        raise DataError(f"{where}: does not fit the model's schema ({fit.told()}); mend the row")
    encoder = Encoder(schema)
    facts = Facts.of(schema, encoder)
    explained = explain_rows(model, facts, encoder.encode(frame, where)[0])
    return _in_words(model, facts, explained, frame, number)


def explain_file(
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
    """Score every row of a table, with its reasons and how stable each is; arguments and errors as of `score_file`."""
    schema, where = model.plan.data, str(path)
    check_kept(kept, (PROBABILITY, POINTS, *reason_columns()))
    encoder, chosen = Encoder(schema), scale or model.manifest.points
    facts = Facts.of(schema, encoder)

    def find(frame: pl.DataFrame) -> dict[str, pl.Series]:
        explained = explain_rows(model, facts, encoder.encode(frame, where)[0])
        return {
            PROBABILITY: pl.Series(values=explained.probabilities),
            POINTS: pl.Series(values=chosen.points(explained.logits)),
            **_reason_series(schema, facts, explained, frame, where),
        }

    return write_found(
        schema, path, out, find, kept=kept, keep_going=keep_going, batch_rows=batch_rows, on_rows=on_rows
    )


def reason_columns() -> tuple[str, ...]:
    """Name the columns that reasons are written to: reason_1, stability_1, and so on."""
    return tuple(f"{what}_{rank}" for rank in range(1, MOST_REASONS + 1) for what in ("reason", "stability"))


def to_json(explanation: Explanation, model: Model) -> dict[str, Any]:
    """Give an explanation as plain values."""

    def one(part: Contribution) -> dict[str, Any]:
        return {
            "column": part.name, "title": part.title, "value": part.value, "logit": part.logit, "points": part.points,
        }  # fmt: skip

    return {
        "format": "metarisk explanation 1",
        "model": model.manifest.name,
        "claim": NO_CLAIM,
        "row": explanation.row,
        "probability": explanation.probability,
        "points": explanation.points,
        "logit": explanation.logit,
        "reference": {
            "logit": explanation.reference_logit,
            "probability": explanation.reference_probability,
            "points": explanation.reference_points,
        },
        "draws": explanation.draws,
        "reasons": [{**one(part), "text": part.text, "stability": part.stability} for part in explanation.reasons],
        "columns": [one(part) for part in explanation.columns],
    }


def _in_words(model: Model, facts: Facts, explained: Explained, frame: pl.DataFrame, number: int) -> Explanation:
    schema, scale, where = model.plan.data, model.manifest.points, f"row {number}"
    names, titles = fact_names(schema, facts), fact_titles(schema, facts)
    parts = explained.contributions[0]
    stability = {
        int(fact): float(share) for fact, share in zip(explained.reasons[0], explained.stability[0], strict=True)
    }

    def part(fact: int) -> Contribution:
        (value,) = fact_values(schema, facts, frame, fact, np.ones(1, np.bool_), where)
        logit, share = float(parts[fact]), stability.get(fact, np.nan)
        return Contribution(
            names[fact], titles[fact], value, logit, -scale.factor * logit, share if np.isfinite(share) else None
        )

    reference = np.array([explained.reference])
    return Explanation(
        row=number,
        probability=float(explained.probabilities[0]),
        points=int(scale.points(explained.logits)[0]),
        logit=float(explained.logits[0]),
        reference_logit=explained.reference,
        reference_probability=float(1 / (1 + np.exp(-explained.reference))),
        reference_points=int(scale.points(reference)[0]),
        draws=len(model.draws),
        reasons=tuple(part(int(fact)) for fact in explained.reasons[0] if fact >= 0),
        columns=tuple(part(int(fact)) for fact in np.argsort(-np.abs(parts), kind="stable")),
    )


def _reason_series(
    schema: Schema, facts: Facts, explained: Explained, frame: pl.DataFrame, where: str
) -> dict[str, pl.Series]:
    """Write the reasons of every row, `(rows,)` a column; null where no more column raises the risk."""
    titles = fact_titles(schema, facts)
    texts = np.full(explained.reasons.shape, None, object)
    for fact, title in enumerate(titles):
        rows, ranks = np.nonzero(explained.reasons == fact)
        if len(rows):
            chosen = np.zeros(frame.height, np.bool_)
            chosen[rows] = True
            values = fact_values(schema, facts, frame, fact, chosen, where)
            for row, rank, value in zip(rows, ranks, values, strict=True):  # a fact is one reason of a row at most
                texts[row, rank] = reason_text(title, value)
    found: dict[str, pl.Series] = {}
    for place in range(MOST_REASONS):
        found[f"reason_{place + 1}"] = pl.Series(values=list(texts[:, place]), dtype=pl.String)
        found[f"stability_{place + 1}"] = pl.Series(values=explained.stability[:, place], nan_to_null=True)
    return found


def _row(source: Source, row: int) -> tuple[int, pl.DataFrame]:
    before = 0
    for frame in source.batches():
        if 1 <= row <= before + frame.height:
            return row, frame.slice(row - before - 1, 1)
        before += frame.height
    raise ConfigError(f"--row {row}: {source.path} has rows 1 to {before}")


def _keyed(source: Source, name: str, wanted: str) -> tuple[int, pl.DataFrame]:
    found: list[tuple[int, pl.DataFrame]] = []
    before = count = 0
    for frame in source.batches():
        same = (frame[name].cast(pl.String) == wanted).fill_null(value=False)
        count += int(same.sum())
        if same.any() and not found:
            place = int(same.arg_max() or 0)
            found.append((before + place + 1, frame.slice(place, 1)))
        before += frame.height
    if not found:
        raise DataError(f"{source.path}: no row has that value in column '{name}'; check --id and --id-column")
    if count > 1:
        raise DataError(
            f"{source.path}: {count} rows have that value in column '{name}'; say --row, or another --id-column"
        )
    return found[0]
