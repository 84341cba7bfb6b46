"""`metarisk-server`: the operator's commands."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metarisk_common import logs
from metarisk_common.commands import run_app, show_version
from metarisk_common.errors import ConfigError

from . import certificates, daemon, enrolment, federation, run_cli, setup
from .config import OutsideConfig, load_server
from .run_cli import AsJson, Home

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Version = Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")]
Place = Annotated[Path, typer.Argument(help="The consortium's folder; by default, the current one.")]


@app.callback()
def common(_: Version = False) -> None:  # noqa: FBT002 - a flag
    """Operate a consortium: its banks, its hub, its runs and their results."""


@app.command(epilog="Example: metarisk-server init consortium --name 'Loans 2027' --address hub.example.org")
def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")],
    name: Annotated[str, typer.Option(help="The consortium's name.")],
    address: Annotated[
        list[str] | None, typer.Option(help="A name or address by which banks reach the hub; may be repeated.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where the outside door listens.")] = OutsideConfig().host,
    port: Annotated[int, typer.Option(help="Port of the outside door.")] = 9092,
    inside_port: Annotated[int, typer.Option(help="Loopback port of this machine's own commands.")] = 9093,
    metrics_port: Annotated[int, typer.Option(help="Loopback port of Prometheus metrics; 0 for none.")] = 9094,
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Make a consortium's folder: configuration, certificate authority, keys, an empty allow-list."""
    made = setup.init(
        folder,
        name=name,
        names=address or [],
        outside_host=host,
        outside_port=port,
        inside_port=inside_port,
        metrics_port=metrics_port,
    )
    if as_json:
        files = {"folder": str(made.path), "ca": str(made.ca_certificate), "signing_key": str(made.signing_public_key)}
        typer.echo(json.dumps(files))
        return
    typer.echo(f"made {made.path}")
    typer.echo(f"give every bank: {made.ca_certificate} and {made.signing_public_key}")
    typer.echo("next: metarisk-server enroll NAME KEY.pub for every bank, then: metarisk-server up")


@app.command(epilog="Example: metarisk-server up consortium")
def up(folder: Place = Path()) -> None:
    """Run the hub until SIGTERM or Ctrl-C; logs are JSON lines on standard error."""
    logs.set_up("server")
    daemon.up(folder)


@app.command(epilog="Example: metarisk-server enroll 'First Bank' first-bank.pub --folder consortium")
def enroll(
    name: Annotated[str, typer.Argument(help="The bank's name, as its institution.toml says it.")],
    key: Annotated[Path, typer.Argument(help="Its node's public key: the node.pub that the bank has sent.")],
    folder: Home = Path(),
    replace: Annotated[bool, typer.Option("--replace", help="The bank has a new key; the old one is revoked.")] = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Put a bank on the allow-list. Compare the fingerprint with the bank's, over the phone."""
    server = load_server(folder)
    bank = enrolment.enroll(server.folder, name, key, datetime.now(UTC), replace=replace)
    told = _tell_hub(folder)
    mark = enrolment.fingerprint(bank.public_key)
    if as_json:
        typer.echo(json.dumps({"bank": bank.name, "fingerprint": mark, "hub_told": told}))
        return
    typer.echo(f"enrolled: {bank.name}\nfingerprint {mark}")
    if not told:
        typer.echo("the hub is down; it will know when it is up")


@app.command(epilog="Example: metarisk-server revoke 'First Bank' --folder consortium")
def revoke(
    name: Annotated[str, typer.Argument(help="The bank's name.")],
    folder: Home = Path(),
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Take a bank off the allow-list, for good: a revoked key never comes back."""
    server = load_server(folder)
    bank = enrolment.revoke(server.folder, name, datetime.now(UTC))
    told = _tell_hub(folder)
    if as_json:
        typer.echo(json.dumps({"bank": bank.name, "revoked": bank.revoked, "hub_told": told}))
        return
    typer.echo(f"revoked: {bank.name}")
    if not told:
        typer.echo("the hub is down; it will know when it is up")


def _tell_hub(folder: Path) -> bool:
    try:
        federation.agree(load_server(folder))
    except httpx.HTTPError:
        return False
    return True


@app.command(epilog="Example: metarisk-server banks --folder consortium")
def banks(folder: Home = Path(), as_json: AsJson = False) -> None:  # noqa: FBT002 - a flag
    """List every enrolment there ever was, with the fingerprint of its key."""
    found = enrolment.history(load_server(folder).folder)
    if as_json:
        rows = [bank.model_dump() | {"fingerprint": enrolment.fingerprint(bank.public_key)} for bank in found]
        typer.echo(json.dumps({"banks": rows}))
        return
    table = Table(title="Enrolments", title_justify="left")
    for heading in ("bank", "enrolled", "revoked", "fingerprint of its key"):
        table.add_column(heading, overflow="fold")
    for bank in found:
        table.add_row(escape(bank.name), bank.enrolled, bank.revoked or "-", enrolment.fingerprint(bank.public_key))
    Console().print(table)


@app.command(epilog="Example: metarisk-server certificate --renew --folder consortium")
def certificate(
    folder: Home = Path(),
    renew: Annotated[bool, typer.Option("--renew", help="A new key and certificate, of the same authority.")] = False,  # noqa: FBT002 - a flag
    rotate_authority: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--rotate-authority", help="A new authority beside the old one, in ca.pem.")
    ] = False,
    retire: Annotated[bool, typer.Option("--retire", help="Drop authorities that no certificate needs.")] = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Show how long the hub's certificate lasts and what it names; renew it, or rotate the authority.

    The authority first: banks get the new ca.pem, which holds both; then --renew, and restart the hub; then --retire.
    """
    if renew + rotate_authority + retire > 1:
        raise ConfigError("one thing at a time: --rotate-authority, then --renew, then --retire")
    server = load_server(folder)
    if rotate_authority:
        certificates.rotate_authority(server.folder)
    if renew:
        certificates.renew(server.folder, server.config.outside.names)
    if retire:
        certificates.retire_authorities(server.folder)
    days, names = certificates.days_left(server.folder), certificates.certificate_names(server.folder)
    marks = certificates.authority_fingerprints(server.folder)
    if as_json:
        typer.echo(json.dumps({"days_left": days, "names": list(names), "authorities": list(marks)}))
        return
    typer.echo(f"the hub's certificate lasts {days} days and names {', '.join(names)}")
    typer.echo(f"{server.folder.ca_certificate} holds:")
    for mark in marks:
        typer.echo(f"  {mark}")
    if renew:
        typer.echo("restart the hub: it reads its certificate when it starts")


app.command(epilog="Example: metarisk-server run plan.toml --folder consortium")(run_cli.run)
app.command(epilog="Example: metarisk-server status loans-001 --folder consortium --watch")(run_cli.status)
app.command(epilog="Example: metarisk-server stop loans-001 --folder consortium")(run_cli.stop)
app.command(epilog="Example: metarisk-server export loans-001 --folder consortium --out loans")(run_cli.export)


def main() -> None:
    """Run the command line; mistakes become one line and an exit code."""
    run_app(app)


if __name__ == "__main__":
    main()
