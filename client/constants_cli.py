"""`metarisk-client constants`: bins and shares for a schema from a bank's own records, charged to its ledger."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from metarisk_common.errors import ConfigError
from metarisk_common.plan import read_plan

from . import constants as released
from .config import load_institution
from .ledger_cli import AsJson
from .plain_words import epsilon_text


def constants(
    folder: Annotated[Path, typer.Argument(help="The bank's folder.")],
    plan: Annotated[Path, typer.Option(help="A plan (JSON or TOML) whose schema names the columns and their bounds.")],
    epsilon: Annotated[float, typer.Option(help="What the release is to cost by itself.")],
    column: Annotated[list[str] | None, typer.Option(help="A column; several times for several. Default: all.")] = None,
    bins: Annotated[int, typer.Option(min=2, max=100, help="Bins of a numeric column.")] = 5,
    yes: Annotated[bool, typer.Option("--yes", help="Charge the ledger without asking.")] = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Release bins and shares with noise, for a schema that nobody has public constants for.

    One Gaussian release over a public grid, reserved in the ledger before the table is read. What is printed may be
    published. The same request again gives the same answer and costs nothing.
    """
    institution, schema = load_institution(folder), read_plan(plan).data
    delta = institution.config.policy.delta
    request = released.request_for(schema, tuple(column or ()), epsilon=epsilon, delta=delta)
    named = ", ".join(one.name for one in request.columns)
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise ConfigError("nobody can be asked here; say --yes to charge the ledger. Nothing was charged")
        question = (
            f"Release bins and shares of {named} at epsilon {epsilon:g}, charged to the ledger for ever? Type yes"
        )
        if typer.prompt(question, default="no", show_default=False).strip().lower() != "yes":
            typer.echo("nothing was charged")
            raise typer.Exit(1)
    found = released.release(institution, schema, request)
    text = released.toml_lines(schema, found, bins=bins)
    if as_json:
        answer = {name: [round(float(value), 2) for value in count] for name, count in found.counts.items()}
        spent = {"spent": found.epsilon, "repeated": found.repeated, "noise_std": found.std}
        typer.echo(json.dumps({"counts": answer, "toml": text} | spent))
        return
    again = ", released before and given again" if found.repeated else ""
    typer.echo(f"# counts with noise of standard deviation {found.std:.0f} a cell{again}")
    typer.echo(f"# spent of this ledger in all: epsilon {epsilon_text(found.epsilon)}\n\n{text}")
