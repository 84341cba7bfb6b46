"""`metarisk-client init`, `node-key`, `check` and `budget`: what a bank does with its folder before anything runs."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metarisk_common.errors import ConfigError, DataError, MetariskError, RefusedError
from metarisk_common.plan import Plan, read_plan

from . import setup
from .check_table import FOR_THE_BANK, columns_table
from .checking import Check, PlanCheck, check_cost, check_data
from .config import CONFIG_FILE, load_institution
from .ledger import Ledger
from .ledger_cli import AsJson, print_table
from .node_key import old_path, read_public, rotate
from .plain_words import delta_text, epsilon_text, remaining, remaining_text
from .proposal_cli import Asked, Place, Proposed, proposal_of
from .statement_page import bounded, plain

Folder = Annotated[Path, typer.Argument(help="The bank's folder.")]
Value = TypeVar("Value")

_EPSILON = "3"
_DATA_LINE = "The table, CSV or Parquet, or a folder of Parquet; it stays where it is."


def init(  # noqa: PLR0913, PLR0917 - an option each
    folder: Annotated[Path, typer.Argument(help="The folder to make: new, or empty.")],
    name: Annotated[str | None, typer.Option(help="The bank's name, as the other parties read it.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="The table, CSV or Parquet, or a folder of Parquet; it stays where it is.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Instead of --data: a table in your own words; needs --plan.")
    ] = None,
    url_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead of --from: the variable that holds a database's URL.")
    ] = None,
    url_file: Annotated[
        Path | None, typer.Option(help="Or the file that holds it, which only you may read (chmod 600).")
    ] = None,
    table: Annotated[str | None, typer.Option(help="In the database, as name or schema.name.")] = None,
    query: Annotated[str | None, typer.Option(help="Instead of --table: one SELECT.")] = None,
    plan: Annotated[Path | None, typer.Option(help="With one of these: the plan whose columns are looked for.")] = None,
    declared_size: Annotated[
        int | None, typer.Option(min=1, help="Public and rounded: how many records the bank says that it has.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="The privacy budget of these records, for ever.")] = None,
    delta: Annotated[float | None, typer.Option(help="By default just below 1 / (10 * declared size).")] = None,
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="The consortium's hub.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The operator's certificate authority (PEM); copied.")] = None,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Prometheus on loopback; 0: none.")] = 0,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Make a bank's folder: its configuration, its node's key, and its privacy ledger with the budget in it.

    With --plan and --from, or a database, propose first which of your own columns and codes are the plan's, and ask; in
    a folder that is there already, this changes the table alone. --json without --yes shows the proposal and makes
    nothing.
    """
    place = Place(source, url_env, url_file, table, query)
    found = proposal_of(folder, place, data, plan, Asked(yes=yes, as_json=as_json))
    setup.check_place(folder)
    asks = sys.stdin.isatty() and not (yes or as_json)
    if name is None:
        name = _answer("--name", "The other parties read it in every report.", str, asks=asks)
    if data is None and found is None:
        data = _answer("--data", _DATA_LINE, setup.table_at, asks=asks)
    if declared_size is None:
        line = "Public: a rounded number of records, never the exact count."
        declared_size = _answer("--declared-size", line, setup.size_of, asks=asks)
    if epsilon is None:
        line = "The most that may ever be spent of these records' privacy: 1 protects strongly, above 10 hardly."
        epsilon = _answer("--epsilon", line, setup.epsilon_of, _EPSILON, asks=asks)
    if delta is None:
        delta = setup.default_delta(declared_size)
        if asks:
            line, parse = "The chance that epsilon does not hold; the ledger keeps it.", setup.delta_for(declared_size)
            delta = _answer("--delta", line, parse, f"{delta:g}", asks=asks)
    if server is None and ca is None and asks:
        line = "The consortium's hub, host:port; leave it empty if it is not known yet."
        server = _answer("--server", line, setup.server_of, "", asks=asks)
    if server is not None and ca is None:
        line = "The operator's certificate authority, which they have as certificates/ca.pem; it is copied."
        ca = _answer("--ca", line, setup.certificate_at, asks=asks)
    answers = setup.Answers(
        name=name,
        data=data,
        declared_size=declared_size,
        epsilon=epsilon,
        delta=delta,
        server=server,
        ca=None if ca is None else setup.read_ca(ca),
        metrics_port=metrics_port,
        table=None if found is None else found.section,
        pairs=() if found is None else found.pairs,
    )
    if asks:
        kept = f"epsilon {epsilon:g} at delta {delta_text(delta)}, over the whole life of these records"
        _typed_yes(f"Make {folder} for '{name}', with a budget of {kept}? Type yes", "nothing was made")
    _say_laid_out(folder, setup.lay_out(folder, answers), answers, found, plan, as_json=as_json)


def node_key(
    folder: Folder,
    new: Annotated[bool, typer.Option("--new", help="Make a new pair; the old one is kept.")] = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Show the fingerprint of the node's key, or make a new pair.

    To change keys: stop `up`; say --new; send node.pub to the operator, who enrols it in place of the old one; start
    `up`; once it has connected, delete node.key.old and node.pub.old. Until then, putting both back undoes it.
    """
    institution = load_institution(folder)
    public = rotate(institution) if new else read_public(institution)
    kept = old_path(institution.node_key)
    if as_json:
        answer = {"fingerprint": public.fingerprint, "public_key": str(institution.node_public_key), "new": new}
        typer.echo(json.dumps(answer | {"old_key": str(kept) if kept.exists() else None}))
        return
    typer.echo(public.listing)
    if new:
        typer.echo(
            f"\nNext: send {institution.node_public_key} to the operator and compare the fingerprint over another "
            f"channel; when it is enrolled in place of the old one, start: metarisk-client up {folder}\n"
            f"Once that has connected, delete {kept} and {old_path(institution.node_public_key)}."
        )
    elif kept.exists():
        typer.echo(f"The key before it is kept as {kept}; once the bank has connected with the new one, delete it.")


def check(
    folder: Folder,
    plan: Annotated[Path, typer.Option(help="The plan (JSON or TOML) that the table should fit.")],
    strict: Annotated[bool, typer.Option("--strict", help="Fail for any cell that does not fit.")] = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Check the bank's table and policy against a plan: what would be used, left out or clipped, and what it costs."""
    institution, chosen = load_institution(folder), read_plan(plan)
    with Console(stderr=True).status("reading the table") as told:  # on a terminal only
        data = check_data(
            institution, chosen, strict=strict, on_rows=lambda rows: told.update(f"reading the table: {rows:,} rows")
        )
    with Console(stderr=True).status("accounting for the plan"):  # on a terminal only
        cost = check_cost(institution, chosen)
    if as_json:
        typer.echo(json.dumps(_check_json(data, cost, chosen, institution.config.declared_size)))
    else:
        _print_check(data, cost, chosen, institution.config.name)
    if data.problems:
        raise DataError(data.problems[0])
    if cost.refusal:
        raise RefusedError(f"{folder / CONFIG_FILE}: {cost.refusal}")


def budget(
    folder: Folder,
    epsilon: Annotated[float, typer.Option(help="The new budget, as institution.toml says it already.")],
    yes: Annotated[bool, typer.Option("--yes", help="Record it without asking.")] = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Raise or lower the ledger's budget, deliberately: it is recorded, signed, and stands from then on.

    First edit policy.epsilon in institution.toml, and in every folder that shares the ledger. What is spent stays.
    """
    setup.check_epsilon(epsilon)
    institution = load_institution(folder)
    if institution.config.policy.epsilon != epsilon:
        raise ConfigError(
            f"{folder / CONFIG_FILE}: says policy.epsilon = {institution.config.policy.epsilon:g}, not {epsilon:g}; "
            "edit it there first, so that both agree, and then say this again"
        )
    if not institution.ledger_path.exists():
        raise ConfigError(f"{institution.ledger_path}: there is no ledger yet; it will be made with this budget")
    with Ledger.read(institution.ledger_path) as ledger:
        before, spent = ledger.budget, ledger.spent()
    changes = before.epsilon != epsilon
    if changes:
        if not as_json:
            _print_budget(before.epsilon, epsilon, spent, before.delta)
        if not yes:
            if as_json or not sys.stdin.isatty():
                raise ConfigError("nobody can be asked here; say --yes. Nothing was recorded")
            _typed_yes("Record this budget? Type yes", "nothing was recorded")
        with Ledger.open(
            institution.ledger_path, source=institution.source, budget=institution.budget, allow_increase=True
        ) as ledger:
            spent = ledger.spent()
    if as_json:
        answer = {"before": before.epsilon, "epsilon": epsilon, "delta": before.delta, "spent": spent}
        typer.echo(json.dumps(plain(answer | {"remaining": remaining(epsilon, spent)}) | {"recorded": changes}))
    else:
        typer.echo(f"recorded: epsilon {epsilon:g}" if changes else f"the budget is epsilon {epsilon:g} already")


# Asking.


def _answer(option: str, line: str, parse: Callable[[str], Value], default: str | None = None, *, asks: bool) -> Value:
    """Ask the person at the terminal until the answer can be meant; in a script, name the option that is missing."""
    if not asks:
        raise ConfigError(f"{option}: is missing, and nobody can be asked here; nothing was made")

    def checked(text: str) -> Value:
        try:
            return parse(text)
        except MetariskError as error:
            raise click.BadParameter(str(error).removeprefix(f"{option}: ")) from None

    typer.echo(line)
    answer: Value = typer.prompt(option.removeprefix("--").replace("-", " "), default=default, value_proc=checked)
    return answer


def _typed_yes(question: str, otherwise: str) -> None:
    if typer.prompt(question, default="no", show_default=False).strip().lower() != "yes":
        _stop(otherwise)


def _stop(told: str) -> NoReturn:
    typer.echo(told)
    raise typer.Exit(1)


# Telling.


def _say_laid_out(
    folder: Path, made: setup.LaidOut, answers: setup.Answers, found: Proposed | None, plan: Path | None, *,
    as_json: bool,
) -> None:  # fmt: skip
    public, ca = made.institution.node_public_key, None if answers.ca is None else setup.ca_fingerprint(answers.ca)
    if as_json:
        policy = made.institution.config.policy
        answer = {
            "folder": str(folder), "name": answers.name, "declared_size": answers.declared_size,
            "epsilon": policy.epsilon, "delta": policy.delta, "server": answers.server, "ca_sha256": ca,
            "public_key": str(public), "fingerprint": made.public_key.fingerprint,
            "ledger_fingerprint": made.ledger_fingerprint,
        }  # fmt: skip
        typer.echo(json.dumps(answer if found is None else answer | {"proposal": found.json}))
        return
    typer.echo(f"made: {folder}")
    typer.echo(f"node key: {made.public_key.listing}")
    typer.echo(f"ledger key: {made.ledger_fingerprint}")
    if ca is not None:
        typer.echo(f"operator's authority: SHA256 {ca}\n  (have the operator read theirs out to you)")
    hub = "" if answers.server else f" Name the hub in {folder / CONFIG_FILE}, section [server], when you know it."
    typer.echo(
        f"\nNext:\n1. Send {public} to the operator, and tell them the node key's fingerprint over another channel.\n"
        f"2. Read the plan that they propose: metarisk-client check {folder} --plan {plan or 'PLAN'}, and approve it: "
        f"metarisk-client approve {plan or 'PLAN'} --folder {folder}\n3. Start: metarisk-client up {folder}{hub}\n"
        f"Keep backups of {folder / 'ledger.key'} and {made.institution.node_key}; never of the ledger in their place."
    )


def _print_budget(before: float, after: float, spent: float, delta: float) -> None:
    typer.echo(
        f"present budget: epsilon {before:g} at delta {delta_text(delta)}; spent {epsilon_text(spent)}, "
        f"{remaining_text(before, spent)} remaining\n"
        f"new budget:     epsilon {after:g}; {remaining_text(after, spent)} remaining"
    )
    if after < spent:
        typer.echo("WARNING: less than is spent already: nothing more will be answered")


def _check_json(data: Check, cost: PlanCheck, plan: Plan, declared_size: int) -> dict[str, object]:
    budget = cost.cost.budget
    return {
        "plan_hash": plan.hash(),
        **asdict(data),
        "declared_size": declared_size,
        "warnings": [*data.warnings, *cost.warnings],
        "approved": cost.standing is not None,
        "refusal": cost.refusal or None,
        "cost": plain({"cost": cost.cost.plan, "spent": cost.cost.spent, "after": cost.cost.after})
        | {"epsilon": bounded(budget.epsilon), "delta": budget.delta}
        | {"rounds": plan.outer.rounds, "rounds_within": cost.cost.rounds_within, "stopped_by": cost.cost.stopped_by},
    }


def _positives(data: Check, plan: Plan) -> str:
    if plan.data.regression:
        return ""
    return f", {data.positives:,} with {plan.data.label.name} = {plan.data.outcome.positive}"


def _print_check(data: Check, cost: PlanCheck, plan: Plan, name: str) -> None:
    """Show it all, for the bank's eyes only."""
    unit = plan.data.privacy_unit
    units = "" if unit is None else f" of {data.units:,} {unit}"
    title = escape(f"{name}: {data.rows:,} rows, {data.used:,} would be used{units}{_positives(data, plan)}")
    typer.echo(FOR_THE_BANK)
    print_table(columns_table(title, data.found, data.columns, data.encoded))
    if data.unfit:
        unfit = _table_of(f"{data.unfit_rows:,} rows would be left out", "column", "rows", "because the cell")
        for one in data.unfit:
            unfit.add_row(escape(one.column), f"{one.rows:,}", one.why)
        print_table(unfit)
    if data.segments:
        segments = _table_of("By segment", "segment", "rows", *([] if unit is None else [escape(unit)]), "positives")
        for part in data.segments:
            counts_of = (part.rows, part.positives) if unit is None else (part.rows, part.units, part.positives)
            segments.add_row(escape(part.segment), *(f"{count:,}" for count in counts_of))
        print_table(segments)
    found = cost.cost
    limit = f"epsilon {found.budget.epsilon:g}" if math.isfinite(found.budget.epsilon) else "no limit"
    typer.echo(
        f"A whole run costs epsilon {epsilon_text(found.plan)} by itself; with {epsilon_text(found.spent)} spent "
        f"already, {epsilon_text(found.after)} of {limit} at delta {delta_text(found.budget.delta)}: "
        f"{found.rounds_within:,} of {plan.outer.rounds:,} rounds fit."
    )
    typer.echo(f"The bank's policy {'does not take' if cost.refusal else 'takes'} the plan.")
    for kind, told in (("WARNING", (*data.warnings, *cost.warnings)), ("PROBLEM", data.problems)):
        for text in told:
            typer.echo(f"{kind}: {text}")
    typer.echo(FOR_THE_BANK)


def _table_of(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(
            heading, justify="right" if heading not in {"column", "segment", "because the cell"} else "left"
        )
    return table
