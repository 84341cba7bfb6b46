"""`metarisk-client`: what a bank asks of its own folder. Everything shown here stays at the bank."""

import json
import math
import re
import sys
import time
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metarisk_common.commands import run_app, show_version
from metarisk_common.errors import ConfigError
from metarisk_common.features import Encoder
from metarisk_common.initialisation import meta_shapes
from metarisk_common.plan import read_plan

from . import approval, constants_cli, ledger_cli, model_cli, run_cli, setup_cli
from .charges import charges_of
from .checking import plan_cost
from .config import Institution, load_institution
from .ledger import Approval, Ledger
from .ledger_cli import AsJson, print_table
from .places import find
from .plain_words import PlainPlan, Terms, describe, epsilon_text, until_text
from .policy import check_plan
from .statement import approval_rows
from .statement_page import plain

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(ledger_cli.app, name="ledger")
Version = Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")]
Home = Annotated[Path, typer.Option("--folder", help="The bank's folder; by default, the current one.")]


@app.callback()
def common(_: Version = False) -> None:  # noqa: FBT002 - a flag
    """Look after a bank's own folder: its table, its approvals, its privacy ledger. Nothing here leaves the bank."""


app.command(
    epilog="Example: metarisk-client init banks/first --name 'First Bank' --data a.csv --declared-size 5000 --epsilon 3"
)(setup_cli.init)
app.command(epilog="Example: metarisk-client node-key banks/first")(setup_cli.node_key)
app.command(epilog="Example: metarisk-client check banks/first --plan plan.json")(setup_cli.check)
app.command(epilog="Example: metarisk-client budget banks/first --epsilon 4")(setup_cli.budget)
app.command(epilog="Example: metarisk-client constants banks/first --plan draft.toml --epsilon 0.2 --column income")(
    constants_cli.constants
)
app.command(epilog="Example: metarisk-client up banks/first")(run_cli.up)
app.command(epilog="Example: metarisk-client status banks/first")(run_cli.status)
app.command(epilog="Example: metarisk-client verify loans-001 --key signing.pub")(run_cli.verify)
app.command(epilog="Example: metarisk-client adapt loans-001 --key signing.pub --folder first-bank --k 200")(
    model_cli.adapt
)
app.command(epilog="Example: metarisk-client score first-bank/models/loans-001 new.csv --out scores.csv --id number")(
    model_cli.score
)
app.command(epilog="Example: metarisk-client explain first-bank/models/loans-001 new.csv --row 17 --html row-17.html")(
    model_cli.explain
)


@app.command(epilog="Example: metarisk-client approve plan.json --epsilon 2 --until 2027-06-30")
def approve(
    plan: Annotated[Path, typer.Argument(help="The plan (JSON), as the consortium publishes it.")],
    folder: Home = Path(),
    epsilon: Annotated[float | None, typer.Option(help="The most that all runs under the plan may spend.")] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The last day of the approval (UTC).")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking.")] = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Show a plan in plain words with what it would cost, ask, and approve it: then its orders are answered."""
    until_seconds = _end_of(until)
    if epsilon is not None and not 0 < epsilon < math.inf:
        raise ConfigError("--epsilon: the cap must be a finite number above 0; leave it out for no cap of its own")
    institution, chosen = load_institution(folder), read_plan(plan)
    check_plan(chosen, institution.config)
    cost, standing = plan_cost(institution, chosen, epsilon)
    size = sum(math.prod(shape) for shape in meta_shapes(chosen, Encoder(chosen.data).width).values())
    terms = Terms(epsilon, None if until_seconds is None else until_text(until_seconds))
    words = describe(chosen, cost, size=size, terms=terms, standing=standing)
    if not as_json:
        _print_plan(words)
    if not yes:
        _confirm(asked=not as_json)
    approval.approve(folder, chosen, epsilon=epsilon, until_seconds=until_seconds)
    if as_json:
        given = {"plan_hash": chosen.hash(), "name": chosen.name, "cap": epsilon, "until_seconds": until_seconds}
        expected = {"cost": cost.plan, "spent": cost.spent, "after": cost.after, "rounds_within": cost.rounds_within}
        typer.echo(json.dumps(plain(given | expected) | {"warnings": list(words.warnings)}))
    else:
        typer.echo(f"approved: {chosen.name}, {chosen.hash()}")


@app.command(epilog="Example: metarisk-client revoke plan.json --folder banks/001-1st-source-bank")
def revoke(
    plan: Annotated[str, typer.Argument(help="The plan's file, its hash, or the first 8 digits of it or more.")],
    folder: Home = Path(),
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Take an approval back: nothing more leaves under the plan. What was spent stays spent."""
    institution = load_institution(folder)
    with Ledger.read(_existing_ledger(institution)) as ledger:
        approved = ledger.approvals()
    plan_hash = _hash_of(plan, approved)
    approval.revoke(folder, plan_hash)
    typer.echo(json.dumps({"plan_hash": plan_hash, "revoked": True}) if as_json else f"revoked: {plan_hash}")


@app.command(epilog="Example: metarisk-client approvals banks/001-1st-source-bank")
def approvals(
    folder: Annotated[Path, typer.Argument(help="The bank's folder; by default, the current one.")] = Path(),
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """List the approved plans: what each has spent of its cap, and when it ends."""
    found = find(folder)
    with Ledger.read(found.path) as ledger:
        approved, entries, delta, source = ledger.approvals(), ledger.entries(), ledger.budget.delta, ledger.source
    now = max([time.time(), *(entry.time_seconds for entry in entries)])
    rows = approval_rows(approved, charges_of(entries), found.plans(set(approved)), delta, now)
    if as_json:
        typer.echo(json.dumps({"source": source, "approvals": [plain(asdict(row)) for row in rows]}))
        return
    table = Table(title=f"{escape(source)}: approved plans", title_justify="left")
    for heading in ("plan", "hash", "epsilon spent", "cap", "until (UTC)", "in force"):
        table.add_column(heading, justify="right" if heading in {"epsilon spent", "cap"} else "left")
    for row in rows:
        cap = "the budget" if row.cap is None else f"{row.cap:g}"
        until = "no end" if row.until_seconds is None else until_text(row.until_seconds)
        in_force = "yes" if row.in_force else "no, ended"
        table.add_row(escape(row.title), row.plan_hash[:12], epsilon_text(row.spent), cap, until, in_force)
    if rows:
        print_table(table)
    else:
        typer.echo(f"{source}: no plan is approved")


def _end_of(day: datetime | None) -> float | None:
    """Give the end of a day in UTC, in seconds since 1970; the ConfigError says that no approval can end then."""
    if day is None:
        return None
    if day.date() == date.max:
        raise ConfigError("--until: leave it out for an approval without an end")
    end = day.replace(tzinfo=UTC).timestamp() + timedelta(days=1).total_seconds()
    if end <= time.time():
        raise ConfigError(f"--until: {day:%Y-%m-%d} is past; give the last day on which orders may be answered")
    return end


def _print_plan(words: PlainPlan) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 1, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for fact in words.facts:
        table.add_row(fact.heading, escape(fact.text))
    for warning in words.warnings:
        table.add_row("WARNING", escape(warning), style="yellow")
    Console().print(table)


def _confirm(*, asked: bool) -> None:
    """Have the person at the terminal type yes.

    Raises:
        ConfigError: nobody can be asked.
        typer.Exit: anything else was typed; nothing was approved.

    """
    if not (asked and sys.stdin.isatty()):
        raise ConfigError("nobody can be asked here; read what `approve` prints, then say --yes. Nothing was approved")
    if typer.prompt("Approve this plan? Type yes", default="no", show_default=False).strip().lower() != "yes":
        typer.echo("nothing was approved")
        raise typer.Exit(1)


def _existing_ledger(institution: Institution) -> Path:
    if not institution.ledger_path.exists():
        raise ConfigError(f"{institution.ledger_path}: there is no ledger yet, and so no approval")
    return institution.ledger_path


def _hash_of(plan: str, approved: dict[str, Approval]) -> str:
    """Find the plan that a file or the start of a hash names."""
    if Path(plan).is_file():
        return read_plan(Path(plan)).hash()
    matches = [plan_hash for plan_hash in approved if plan_hash.startswith(plan.lower())]
    if not re.fullmatch("[0-9a-fA-F]{8,64}", plan) or len(matches) != 1:
        known = ", ".join(plan_hash[:12] for plan_hash in approved) or "none"
        raise ConfigError(f"{plan}: is neither a plan's file nor the hash of one that is approved; approved: {known}")
    return matches[0]


def main() -> None:
    """Run the command line; mistakes become one line and an exit code."""
    run_app(app)


if __name__ == "__main__":
    main()
