"""A first scenario for somebody's own table: every column by its type, every constant marked for a person to confirm.

Bounds and categories of a scenario are public. Those in a draft come from the table that it was written for, rounded
outwards to powers of ten, and so tell something of its records: the text says so at each of them. For records that are
to stay private they are to be replaced by what everybody knows, or by `metarisk-client constants`.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Final

import polars as pl
import typer

from client.dataset import read_table
from metarisk_common.config import toml_text
from metarisk_common.errors import ConfigError, DataError
from metarisk_common.files import write_atomically

MOST_CATEGORIES: Final = 30
"""Distinct texts of a column that is still taken for one of categories."""

_LEAST_RECORDS: Final = 10
_SHARE_OF_NUMBERS: Final = 0.9
_WIDE: Final = 1000.0
_BAD_WORDS: Final = ("1", "true", "yes", "y", "bad", "default", "defaulted", "fraud", "charged_off", "chargeoff")


def draft(path: Path, *, institution: str, label: str, name: str) -> str:
    """Write a scenario for a table as commented TOML.

    Args:
        path: CSV or Parquet.
        institution: the column of institutions.
        label: the column of outcomes, which has two values.
        name: of the scenario.

    Raises:
        ConfigError: the names do not fit the table.
        DataError: the table cannot be read, or its label has not two values.

    """
    frame = read_table(path)
    for role, column in (("--institution", institution), ("--label", label)):
        if column not in frame.columns:
            raise ConfigError(f"{role} {column}: {path} has no such column; it has: {', '.join(frame.columns)}")
    outcomes = _texts(frame[label]).unique().sort().to_list()
    if len(outcomes) != 2:  # noqa: PLR2004 - good and bad
        raise DataError(f"{path}: label column '{label}' has {len(outcomes)} distinct values; an outcome has two")
    positive = next((value for value in outcomes if value.lower() in _BAD_WORDS), outcomes[-1])
    negative = next(value for value in outcomes if value != positive)
    share = float((_texts(frame[label]) == positive).mean() or 0.0)
    counts = frame.group_by(institution).len()["len"].sort()
    head = [
        f"# A draft for {path.name}, to be read before it is run. Lines with CONFIRM hold values that were read off",
        "# this table: replace them by what everybody knows, or has published, if the records are to stay private.",
        f"name = {toml_text(name)}",
        "",
        "[data]",
        f"file = {toml_text(str(path.resolve()))}",
        "",
        "[schema]",
        f"institution = {toml_text(institution)}   # {len(counts)} of them, {counts[0]} to {counts[-1]} records each",
        "# CONFIRM: positive is the event that is to be predicted.",
        f"label = {{ name = {toml_text(label)}, positive = {toml_text(positive)}, negative = {toml_text(negative)} }}",
    ]
    body: list[str] = []
    left_out: list[str] = []
    for column in frame.columns:
        if column in (institution, label):
            continue
        lines = _column(column, frame[column])
        (body.append if lines else left_out.append)(lines or column)
    if not body:
        raise DataError(f"{path}: has no column of numbers or of up to {MOST_CATEGORIES} categories to learn from")
    tail = [
        "",
        "[model]",
        f"base_rate = {min(max(_rounded(share), 0.001), 0.999):g}   # CONFIRM: public share of positives",
        "",
        "[splits]",
        f"unseen = {max(1, len(counts) // 4)}   # institutions that take no part and are judged",
        "",
        "[evaluation]",
        f"k = {_labels(int(counts[0]))}",
        "",
        "[privacy]",
        "epsilon = 3.0",
        f"delta = {_delta(int(counts[-1]))}",
    ]
    if left_out:
        tail += ["", f"# Left out, neither numbers nor few categories, or one value alone: {', '.join(left_out)}"]
    return "\n".join([*head, *body, *tail]) + "\n"


def draft_command(
    file: Annotated[Path, typer.Argument(help="The table, CSV or Parquet.")],
    institution: Annotated[str, typer.Option(help="Its column of institutions.")],
    label: Annotated[str, typer.Option(help="Its column of outcomes, which has two values.")],
    out: Annotated[Path, typer.Option(help="The scenario to write.")] = Path("scenario.toml"),
    name: Annotated[str | None, typer.Option(help="The scenario's name. Default: the table's.")] = None,
) -> None:
    """Write a first scenario for your own table, to be read and confirmed before it is run."""
    if out.exists():
        raise ConfigError(f"{out}: there is a file already; name another with --out")
    text = draft(file, institution=institution, label=label, name=name or _slug(file.stem))
    try:
        write_atomically(out, text.encode())
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written here: {error.strerror}") from None
    typer.echo(f"Wrote {out}: read it, confirm the lines marked CONFIRM, then: metarisk-simulate run {out}")


def _column(name: str, series: pl.Series) -> str:
    text = _texts(series)
    present = text.drop_nulls()
    if not len(present):
        return ""
    numbers = present.cast(pl.Float64, strict=False)
    finite = numbers.filter(numbers.is_finite().fill_null(value=False))
    distinct = present.n_unique()
    if distinct == 1 and len(present) == len(text):
        return ""  # The same in every record: nothing can be learned from it.
    head = f"\n[[schema.columns]]\nkind = {{}}\nname = {toml_text(name)}\n"
    if len(finite) >= _SHARE_OF_NUMBERS * len(present) and distinct > 2:  # noqa: PLR2004 - flags are categories
        low, high = float(finite.min() or 0.0), float(finite.max() or 0.0)  # type: ignore[arg-type]
        lower, upper = _outwards(low, high)
        scale = "log1p" if lower >= 0 and upper >= _WIDE else "linear"
        return head.format('"numeric"') + (
            f"lower = {lower:g}   # CONFIRM: public bounds; beyond them values are clipped, and counted\n"
            f'upper = {upper:g}\nscale = "{scale}"'
        )
    counts = present.value_counts(sort=True, name="n").filter(pl.col("n") >= _LEAST_RECORDS)
    if not counts.height or distinct > MOST_CATEGORIES:
        return ""
    values = ", ".join(toml_text(str(value)) for value in sorted(counts[counts.columns[0]].to_list()))
    return head.format('"categorical"') + f"categories = [{values}]   # CONFIRM: a public list; all else is 'other'"


def _texts(series: pl.Series) -> pl.Series:
    text = series.cast(pl.String, strict=False).str.strip_chars()
    return text.set(text == "", None)


def _outwards(low: float, high: float) -> tuple[float, float]:
    """Round bounds outwards to powers of ten, or to 0."""
    upper = 10.0 ** math.ceil(math.log10(high)) if high > 0 else 0.0
    lower = -(10.0 ** math.ceil(math.log10(-low))) if low < 0 else 0.0
    return (lower, upper) if lower < upper else (lower, lower + 1.0)


def _rounded(share: float) -> float:
    return float(f"{share:.1g}")


def _labels(smallest: int) -> list[int]:
    return [0, *(k for k in (20, 50, 100) if 2 * k <= smallest)]


def _delta(largest: int) -> str:
    return f"1e-{max(5, math.ceil(math.log10(10 * largest)))}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "own-data"
