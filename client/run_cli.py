"""`metarisk-client up`, `status` and `verify`: the bank in a federation."""

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metarisk_common import logs

from . import daemon
from .config import load_institution
from .counters import Counters, read_counters
from .ledger import Ledger
from .ledger_cli import AsJson
from .plain_words import epsilon_text
from .statement_page import bounded
from .turns import is_busy, is_served
from .verify import verify_export

Folder = Annotated[Path, typer.Argument(help="The bank's folder; by default, the current one.")]


def up(folder: Folder = Path()) -> None:
    """Answer the consortium's orders until SIGTERM or Ctrl-C; logs are JSON lines on standard error."""
    logs.set_up("daemon")
    daemon.up(folder)


def status(folder: Folder = Path(), as_json: AsJson = False) -> None:  # noqa: FBT002 - a flag
    """Show whether the daemon serves this bank, what it has answered and refused, and what that has cost."""
    institution = load_institution(folder)
    counters = read_counters(folder)
    spent, entries = 0.0, 0
    if institution.ledger_path.exists():
        with Ledger.read(institution.ledger_path) as ledger:
            spent, entries = ledger.spent(), ledger.counter
    served = is_served(institution)
    answer = {
        "bank": institution.config.name,
        "served": served,
        "busy": served and is_busy(institution),
        "epsilon_spent": spent,
        "epsilon_budget": institution.config.policy.epsilon,
        "ledger_entries": entries,
        **asdict(counters),
    }
    if as_json:
        values = {name: bounded(value) if isinstance(value, float) else value for name, value in answer.items()}
        typer.echo(json.dumps(values))
        return
    table = Table(title=escape(institution.config.name), show_header=False, title_justify="left")
    for heading, text in _rows(
        institution.config.policy.epsilon, counters, spent=spent, entries=entries, served=served
    ):
        table.add_row(heading, text)
    Console().print(table)


def _rows(budget: float, counters: Counters, *, spent: float, entries: int, served: bool) -> list[tuple[str, str]]:
    refused = ", ".join(f"{code} {count}" for code, count in sorted(counters.refused.items())) or "none"
    last = "never"
    if counters.last_answer_time:
        moment = datetime.fromtimestamp(counters.last_answer_time, UTC)
        ago = max(0.0, time.time() - counters.last_answer_time)
        last = f"{moment:%Y-%m-%d %H:%M:%S} UTC, {ago:.0f} s ago, in {counters.last_answer_seconds:.2f} s"
    return [
        ("daemon", "serves this bank" if served else "does not run; start it with: metarisk-client up"),
        ("epsilon", f"{epsilon_text(spent)} of {budget:g} spent, {entries} ledger entries"),
        ("answered", str(counters.answered)),
        ("refused", refused),
        ("errors", str(counters.errors)),
        ("bundles refused", str(counters.bundles_refused)),
        ("last answer", last),
        ("last order", f"run {counters.last_run[:12]}, round {counters.last_round}" if counters.last_run else "none"),
    ]


def verify(
    export: Annotated[Path, typer.Argument(help="The folder that the operator's `export` has written.")],
    key: Annotated[Path, typer.Option(help="The operator's signing.pub.")],
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Check an export's signature and every digest in it before its meta-initialization is used."""
    found = verify_export(export, key)
    manifest = found.manifest
    answer = {
        "run_id": manifest.run_id,
        "plan": found.plan.name,
        "plan_hash": manifest.plan_hash,
        "rounds": manifest.rounds,
        "not_private": manifest.not_private,
        "signed_by": found.key_fingerprint,
        "unsigned": list(found.unsigned),
    }
    if as_json:
        typer.echo(json.dumps(answer))
        return
    typer.echo(
        f"genuine: {found.plan.name}, {manifest.rounds} rounds\nplan {manifest.plan_hash}\n"
        f"signed by {found.key_fingerprint}"
    )
    if manifest.not_private:
        typer.echo("NOT PRIVATE: the noise of this run was seeded or switched off")
    if found.unsigned:
        typer.echo(f"besides, and not signed: {', '.join(found.unsigned)}")
