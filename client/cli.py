"""`metarisk-client`: what a bank asks of its own folder. Everything shown here stays at the bank."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from metarisk_common.commands import run_app, show_version
from metarisk_common.errors import ConfigError
from metarisk_common.plan import read_plan
from metarisk_common.table import check_two_classes

from .config import CONFIG_FILE, load_institution
from .dataset import load_dataset
from .ledger import Ledger

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
ledger_app = typer.Typer(no_args_is_help=True, help="Read and verify the privacy ledger.")
app.add_typer(ledger_app, name="ledger")
Folder = Annotated[Path, typer.Argument(help="The bank's folder.")]
Version = Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]


@app.callback()
def common(_: Version = False) -> None:  # noqa: FBT002 - a flag
    """Look after a bank's own folder: its table and its privacy ledger. Nothing shown here leaves the bank."""


@app.command(epilog="Example: metarisk-client check runs/sba-loans-001/banks/001-1st-source-bank --plan plan.json")
def check(
    folder: Folder,
    plan: Annotated[Path, typer.Option(help="The plan (JSON) whose schema the table should fit.")],
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Check the bank's table against a plan's schema, and count what would be clipped or is missing."""
    institution = load_institution(folder)
    schema = read_plan(plan).data
    dataset = load_dataset(institution.data_path, schema, institution.config.name)
    check_two_classes(dataset.y, str(institution.data_path))
    positives = int(dataset.y.sum())
    if as_json:
        columns = {name: vars(counts) for name, counts in dataset.counts.columns.items()}
        typer.echo(json.dumps({"rows": dataset.counts.rows, "positives": positives, "columns": columns}))
        return
    outcome = f"{schema.label.name} = {schema.label.positive}"
    title = f"{institution.config.name}: {dataset.counts.rows} rows, {positives} with {outcome}"
    table = Table(title=title, caption="For this bank's eyes only; none of it is ever sent.", title_justify="left")
    table.add_column("column")
    for heading in ("missing", "below bounds", "above bounds", "unknown categories"):
        table.add_column(heading, justify="right")
    for name, counts in dataset.counts.columns.items():
        table.add_row(
            name,
            str(counts.missing),
            str(counts.clipped_below),
            str(counts.clipped_above),
            str(counts.unknown_categories),
        )
    Console().print(table)


@ledger_app.command(epilog="Example: metarisk-client ledger show runs/sba-loans-001/banks/001-1st-source-bank")
def show(folder: Folder, as_json: AsJson = False) -> None:  # noqa: FBT002 - a flag
    """Show what the ledger has recorded, and how much of the budget is spent."""
    path = _ledger_path(folder)
    stamp = "\nNOT PRIVATE: this bank's noise is seeded" if _is_seeded(path.parent) else ""
    with Ledger.read(path) as ledger:
        ledger.verify()
        spent, budget, entries = ledger.spent(), ledger.budget, ledger.entries()
        if as_json:
            answer = {
                "source": ledger.source, "spent": _bounded(spent), "epsilon": _bounded(budget.epsilon),
                "delta": budget.delta, "not_private": bool(stamp),
                "head": ledger.head, "entries": [vars(entry) for entry in entries],
            }  # fmt: skip
            typer.echo(json.dumps(answer))
            return
        title = f"{ledger.source}: epsilon {spent:.4f} spent of {budget.epsilon:g} (delta {budget.delta:g}){stamp}"
    table = Table(title=title, title_justify="left")
    for heading in ("entry", "time (UTC)", "kind", "round", "noise", "rate", "steps"):
        table.add_column(heading, justify="right")
    for entry in entries:
        event, key = entry.content.get("event", {}), entry.content.get("key", {})
        when = datetime.fromtimestamp(entry.time_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
        cells = [key.get("round"), event.get("noise_multiplier"), event.get("sample_rate"), event.get("steps")]
        table.add_row(str(entry.seq), when, entry.kind, *("" if cell is None else f"{cell:g}" for cell in cells))
    Console().print(table)


@ledger_app.command(epilog="Example: metarisk-client ledger verify runs/sba-loans-001/banks/001-1st-source-bank")
def verify(folder: Folder, as_json: AsJson = False) -> None:  # noqa: FBT002 - a flag
    """Check the ledger's hash chain from its first entry to its last; exit code 5 if it is broken."""
    with Ledger.read(_ledger_path(folder)) as ledger:
        ledger.verify()
        answer = {"source": ledger.source, "entries": ledger.counter, "head": ledger.head}
    text = f"{answer['source']}: {answer['entries']} entries, chain intact, head {answer['head']}"
    typer.echo(json.dumps(answer) if as_json else text)


def _bounded(value: float) -> float | None:
    # JSON has no infinity: null says that there is no bound.
    return value if math.isfinite(value) else None


def _is_seeded(folder: Path) -> bool:
    # A ledger may also be looked at by itself, without the bank's folder around it.
    return (folder / CONFIG_FILE).exists() and load_institution(folder).config.simulation is not None


def _ledger_path(folder: Path) -> Path:
    path = folder / "ledger.sqlite" if folder.is_dir() else folder
    if not path.exists():
        raise ConfigError(f"{path}: there is no ledger here; name a bank's folder or the ledger itself")
    return path


def main() -> None:
    """Run the command line; mistakes become one line and an exit code."""
    run_app(app)


if __name__ == "__main__":
    main()
