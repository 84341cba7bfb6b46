"""`metarisk-client adapt`, `score` and `explain`: what a bank does with a run's result. Nothing of it can be sent."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from metarisk_common.adapters import METHODS
from metarisk_common.commands import progress_bar
from metarisk_common.errors import ConfigError
from metarisk_common.files import write_new_private
from metarisk_common.manifest import STAMP

from .adapt import Choice, adapt_model, read_start
from .artifacts import Model, load_model
from .config import load_institution
from .explanation import Explanation, explain_file, explain_record, to_json
from .explanation_page import render
from .ledger_cli import AsJson, print_table
from .points import PointScale
from .score import Scored, score_file
from .stream import check_free

ALL = "all"

_DEFAULT = PointScale()
_MODEL_HELP = "The folder of an adapted model: FOLDER/models/NAME-001."

ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
TableFile = Annotated[Path, typer.Argument(metavar="FILE", help="The table: CSV or Parquet; it needs no label.")]
KeepGoing = Annotated[bool, typer.Option("--keep-going", help="Leave rows that do not fit without a score.")]
Keep = Annotated[list[str] | None, typer.Option("--keep", metavar="COLUMN", help="A column to copy; may be repeated.")]


def adapt(  # noqa: PLR0913, PLR0917 - an option each
    export: Annotated[Path, typer.Argument(help="The folder that the operator has sent, or an unsigned safetensors.")],
    key: Annotated[Path | None, typer.Option(help="The operator's signing.pub, for a folder.")] = None,
    folder: Annotated[Path, typer.Option(help="The bank's folder; by default, the current one.")] = Path(),
    data: Annotated[Path | None, typer.Option(help="The labelled table; by default the bank's own.")] = None,
    k: Annotated[str, typer.Option(metavar="N|all", help="Labelled records, drawn at random; 0 for none.")] = ALL,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "auto",
    segment: Annotated[str | None, typer.Option(help="Only records of this segment.")] = None,
    base_rate: Annotated[
        float | None,
        typer.Option(help="The true share of the bad outcome, where the labels were chosen with an eye on it: 0.01."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name, before its number; by default the plan's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="To choose the same records again; by default, new.")] = None,
    base_score: Annotated[float, typer.Option(help="Points at the base odds.")] = _DEFAULT.base_score,
    base_odds: Annotated[float, typer.Option(help="Good records to a bad one at the base score.")] = _DEFAULT.base_odds,
    pdo: Annotated[float, typer.Option(help="Points that double the odds.")] = _DEFAULT.pdo,
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Adapt a run's initialization to labelled records of the bank, and keep the model in the bank's folder.

    The model carries no DP claim: it is for use inside the bank, and no command sends it anywhere.
    """
    choice = Choice(_count(k), method, segment, seed, _scale(base_score, base_odds, pdo), base_rate)
    institution, start = load_institution(folder), read_start(export, key)
    with progress_bar("adapting", quiet=as_json) as on_draw:
        model = adapt_model(institution, start, choice, data=data, name=name, on_draw=on_draw)
    manifest = model.manifest
    if as_json:
        typer.echo(json.dumps({"model": str(model.folder), **manifest.model_dump(mode="json")}))
        return
    for line in _adapted_lines(model):
        typer.echo(line)


def score(
    model: ModelFolder,
    file: TableFile,
    out: Annotated[Path, typer.Option(help="A new file, CSV or Parquet by its name.")],
    key: Annotated[str | None, typer.Option("--id", metavar="COLUMN", help="The key, copied beside scores.")] = None,
    keep: Keep = None,
    keep_going: KeepGoing = False,  # noqa: FBT002 - a flag
    base_score: Annotated[float | None, typer.Option(help="Points at the base odds, not as adapted.")] = None,
    base_odds: Annotated[float | None, typer.Option(help="Good records to a bad one at the base score.")] = None,
    pdo: Annotated[float | None, typer.Option(help="Points that double the odds.")] = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Score a table of any size: for every row, in order, its probability of the bad outcome and its points."""
    loaded = load_model(model)
    points = loaded.manifest.points
    scale = _scale(
        points.base_score if base_score is None else base_score,
        points.base_odds if base_odds is None else base_odds,
        points.pdo if pdo is None else pdo,
    )
    with progress_bar("scoring", quiet=as_json) as on_rows:
        found = score_file(
            loaded, file, out, kept=_kept(key, keep), scale=scale, keep_going=keep_going, on_rows=on_rows
        )
    _say_scored(found, out, as_json=as_json)


def explain(
    model: ModelFolder,
    file: TableFile,
    row: Annotated[int | None, typer.Option(min=1, help="The record's number; the first is 1.")] = None,
    key: Annotated[str | None, typer.Option("--id", metavar="VALUE", help="What its key column holds.")] = None,
    key_column: Annotated[
        str | None, typer.Option("--id-column", metavar="COLUMN", help="The key; by default the plan's identifier.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one record's explanation as a page, a new file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Explain every row into a new file, CSV or Parquet.")] = None,
    keep: Keep = None,
    keep_going: KeepGoing = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Say why a record has its score: up to four reasons in plain words, how stable each is, and every contribution.

    With --out, every row gets its score with its reasons beside it.
    """
    loaded = load_model(model)
    if out is not None:
        if row is not None or key is not None or html is not None:
            raise ConfigError("--out explains every row; leave out --row, --id and --html")
        with progress_bar("explaining", quiet=as_json) as on_rows:
            found = explain_file(
                loaded, file, out, kept=_kept(key_column, keep), keep_going=keep_going, on_rows=on_rows
            )
        _say_scored(found, out, as_json=as_json)
        return
    if keep or keep_going:
        raise ConfigError("--keep and --keep-going are for --out, which explains every row")
    if html is not None:
        check_free(html)
    column = key_column or loaded.plan.data.identifier
    if key is not None and column is None:
        raise ConfigError("--id: the plan names no identifier; say which column it is in with --id-column")
    found_key = None if key is None or column is None else (column, key)
    explanation = explain_record(loaded, file, row=row, key=found_key)
    if html is not None:
        _write(html, render(explanation, loaded))
    if as_json:
        typer.echo(json.dumps(to_json(explanation, loaded)))
    else:
        _print(explanation)


def _count(k: str) -> int | None:
    if k == ALL:
        return None
    if not (k.isascii() and k.isdigit()):
        raise ConfigError("--k: give a number of labelled records, or all")
    return int(k)


def _scale(base_score: float, base_odds: float, pdo: float) -> PointScale:
    if not math.isfinite(base_score):
        raise ConfigError("--base-score: must be a finite number")
    for option, value in (("--base-odds", base_odds), ("--pdo", pdo)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{option}: must be a finite number above 0")
    return PointScale(base_score=base_score, base_odds=base_odds, pdo=pdo)


def _kept(key: str | None, keep: list[str] | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*([] if key is None else [key]), *(keep or [])]))


def _adapted_lines(model: Model) -> list[str]:
    labels, method, origin = model.manifest.labels, model.manifest.method, model.manifest.origin
    how = method.used if method.asked == method.used else f"{method.used}, chosen by {method.asked}"
    of = f" of segment '{labels.segment}'" if labels.segment is not None else ""
    signed = f"signed by {origin.signed_by}" if origin.signed_by else "unsigned: nobody vouches for this file"
    lines = [
        f"{model.folder}: adapted to {labels.k} of {labels.available} labelled records{of}, by {how}",
        f"initialization of run {origin.run_id}, {signed}",
    ]
    if labels.left_out:
        lines.append(f"{labels.left_out} rows of the table were left out; `metarisk-client check` tells why")
    if method.base_rate is not None:
        lines.append(
            f"the labels stand for a share of {method.base_rate:.2%}, as --base-rate says: {method.offset:+.2f} in log "
            "odds was taken out"
        )
    if labels.k > 0 and labels.positives in {0, labels.k}:
        lines.append("all labels are the same: the model has learned a rate from them, and hardly an order")
    if origin.not_private:
        lines.append(STAMP)
    return [*lines, f"{model.manifest.claim}: for use inside the bank; no command sends it anywhere"]


def _say_scored(found: Scored, out: Path, *, as_json: bool) -> None:
    without = found.rows - found.scored
    if as_json:
        answer = {"out": str(out), "rows": found.rows, "scored": found.scored, "unfit_by_column": found.columns}
        typer.echo(json.dumps(answer))
        return
    typer.echo(f"{out}: {found.scored:,} of {found.rows:,} rows scored")
    if without:
        told = ", ".join(f"column '{name}' in {count:,}" for name, count in found.columns.items())
        typer.echo(f"{without:,} rows do not fit the model's schema and have no score: {told}")


def _print(explanation: Explanation) -> None:
    typer.echo(
        f"row {explanation.row}: {explanation.points} points, probability {explanation.probability:.4f} "
        f"(a record at the public means: {explanation.reference_points} points, "
        f"{explanation.reference_probability:.4f})"
    )
    for rank, reason in enumerate(explanation.reasons, 1):
        share = "" if reason.stability is None else f", in {reason.stability:.0%} of {explanation.draws} draws"
        typer.echo(f"{rank}. {reason.text}: {reason.points:+.1f} points{share}")
    if not explanation.reasons:
        typer.echo("no column raises the risk noticeably above that of a record at the public means")
    table = Table(title="What every column does, the strongest first", title_justify="left")
    for heading in ("column", "value", "log odds", "points"):
        table.add_column(heading, justify="right" if heading in {"log odds", "points"} else "left")
    for part in explanation.columns:
        table.add_row(escape(part.title), escape(part.value), f"{part.logit:+.4f}", f"{part.points:+.1f}")
    print_table(table)


def _write(path: Path, text: str) -> None:
    try:
        write_new_private(path, text.encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
