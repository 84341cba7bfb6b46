"""`metarisk-client ledger`: read, verify and export the privacy ledger, and plan what its budget allows."""

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metarisk_common.errors import ConfigError, IntegrityError
from metarisk_common.plan import read_plan
from metarisk_common.privacy import PrivacyEvent

from .charges import Tally, charges_of
from .config import CONFIG_FILE, load_institution
from .forecast import PlanForecast, for_plan, forecast, table
from .forecast import to_json as forecast_to_json
from .ledger import Budget, Entry, Ledger
from .places import Found, find
from .plain_words import delta_text, epsilon_text, remaining, remaining_text, until_text
from .statement import Statement, run_rows, statement
from .statement_page import bounded, day, plain, render, to_json

app = typer.Typer(no_args_is_help=True, help="Read, verify and export the privacy ledger; plan what it still allows.")
Place = Annotated[Path, typer.Argument(help="The bank's folder, or a ledger by itself.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]

_SHORT = 12
_LEAST_NOISE, _MOST_NOISE = 0.1, 1e6  # Between them is all that a budget could be spent on.
_RATES, _NOISES, _LOCAL_STEPS, _DELTA = (1.0, 0.25, 0.1, 0.05), (2.0, 4.0, 8.0, 16.0), 5, 1e-5


@app.command(epilog="Example: metarisk-client ledger show runs/sba-loans-001/banks/001-1st-source-bank")
def show(place: Place, as_json: AsJson = False) -> None:  # noqa: FBT002 - a flag
    """Show what the ledger has recorded, and how much of the budget is spent."""
    found = find(place)
    with Ledger.read(found.path) as ledger:
        ledger.verify()
        spent, budget, entries = ledger.spent(), ledger.budget, ledger.entries()
        answer = {
            "source": ledger.source, "spent": bounded(spent), "epsilon": bounded(budget.epsilon),
            "delta": budget.delta, "remaining": bounded(remaining(budget.epsilon, spent)),
            "not_private": bool(found.seeded) or math.isinf(spent), "head": ledger.head,
            "public_key": ledger.public_key, "fingerprint": ledger.fingerprint,
        }  # fmt: skip
    charges = charges_of(entries)
    plans = found.plans({charge.key.plan_hash for charge in charges})
    runs = run_rows(Tally(charges, budget.delta), plans)
    if as_json:
        listed = {"runs": [plain(asdict(row)) for row in runs], "entries": [vars(entry) for entry in entries]}
        typer.echo(json.dumps(answer | listed))
        return
    limit = f"{budget.epsilon:g}" if math.isfinite(budget.epsilon) else "no limit"
    title = (
        f"{answer['source']}: epsilon {epsilon_text(spent)} spent of {limit} (delta {delta_text(budget.delta)}), "
        f"{remaining_text(budget.epsilon, spent)} remaining"
    )
    stamp = "\nNOT PRIVATE: this bank's noise is seeded" if found.seeded else ""
    print_table(_entry_table(entries, escape(title + stamp)))
    if runs:
        earlier = len({charge.key.run_id for charge in charges}) - len(runs)
        caption = "Epsilons do not add: the total accounts for all runs together."
        table = Table(title=f"By run: the last {len(runs)}" if earlier else "By run", caption=caption)
        for heading in ("run", "plan", "released", "abandoned", "open", "epsilon alone", "total after it"):
            table.add_column(heading, justify="left" if heading in {"run", "plan"} else "right")
        for row in runs:
            counts = (row.released, row.abandoned, row.reserved)
            cells = (*map(str, counts), epsilon_text(row.alone), epsilon_text(row.after))
            table.add_row(escape(row.run_id), escape(row.title or row.plan_hash[:_SHORT]), *cells)
        print_table(table)


@app.command(epilog="Example: metarisk-client ledger verify ledger.sqlite --key 8f0c...")
def verify(
    place: Place,
    key: Annotated[str, typer.Option(help="The public key, or its fingerprint, that must have signed it.")] = "",
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Check the ledger's hash chain and signatures, from its first entry to its last; exit code 5 if one is broken.

    The file alone is enough: no folder around it, no private key, no network.
    """
    wanted = key.strip().lower()
    if key and not re.fullmatch("[0-9a-f]{64}|[0-9a-f]{4}(:[0-9a-f]{4}){7}", wanted):
        raise ConfigError(
            "--key: expected a public key of 64 hexadecimal digits, or its fingerprint, as `verify` prints"
        )
    path = find(place).path
    with Ledger.read(path) as ledger:
        ledger.verify()
        answer = {
            "source": ledger.source, "entries": ledger.counter, "signatures": ledger.counter, "head": ledger.head,
            "public_key": ledger.public_key, "fingerprint": ledger.fingerprint, "key_demanded": bool(key),
        }  # fmt: skip
    if wanted and wanted not in {answer["public_key"], answer["fingerprint"]}:
        raise IntegrityError(
            f"{path}: is signed by another key than the one demanded: its own is {answer['public_key']}"
        )
    if as_json:
        typer.echo(json.dumps(answer))
        return
    typer.echo(f"{answer['source']}: {answer['entries']} entries, chain intact, head {answer['head']}")
    whose = "the key demanded" if wanted else "its own key; compare it with the one you know, or give it as --key"
    typer.echo(f"{answer['signatures']} signatures valid, by {whose}")
    typer.echo(f"public key {answer['public_key']}")
    typer.echo(f"fingerprint {answer['fingerprint']}")


@app.command(epilog="Example: metarisk-client ledger export runs/sba-loans-001/banks/001-1st-source-bank")
def export(
    place: Place,
    out: Annotated[Path | None, typer.Option(help="Where to write it; by default statement-DATE.html here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every event and total as JSON, not a page.")] = False,  # noqa: FBT002
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,  # noqa: FBT002
) -> None:
    """Write the one-page statement of the ledger: by run, by month, by segment, what remains, and a chart.

    With --json, everything that the page says and every event, on standard output or in the file of --out: enough to
    compute the epsilons again with any accountant.
    """
    found = find(place)
    made = state_of(found, time.time())
    if as_json and out is None:
        typer.echo(json.dumps(to_json(made), indent=1))
        return
    folder = place if place.is_dir() else place.parent
    path = out or folder / f"statement-{day(made.made_seconds)}.html"
    _write(path, f"{json.dumps(to_json(made), indent=1)}\n" if as_json else render(made), force=force)
    typer.echo(str(path))


@app.command(epilog="Example: metarisk-client ledger plan --epsilon 3 --delta 1e-5 --local-steps 5")
def plan(
    place: Annotated[Path | None, typer.Argument(help="The bank's folder, whose budget and ledger then count.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="The budget; by default, the bank's own.")] = None,
    delta: Annotated[float | None, typer.Option(help="By default the bank's own, or 1e-5.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Private steps a round; by default 5.")] = None,
    rate: Annotated[list[float] | None, typer.Option(help="A sample rate to look at; may be repeated.")] = None,
    noise: Annotated[list[float] | None, typer.Option(help="A noise multiplier to look at; may be repeated.")] = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Answer for this plan (JSON) instead.")] = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Say how many rounds the budget affords, before joining: as a table, or for one plan."""
    if plan_file is not None and (local_steps is not None or rate or noise):
        raise ConfigError("--plan: has its own steps, rate and noise; leave out --local-steps, --rate and --noise")
    steps = _LOCAL_STEPS if local_steps is None else local_steps
    rates, noises = rate or _RATES, noise or _NOISES
    if steps < 1:
        raise ConfigError("--local-steps: must be at least 1")
    if not all(0 < value <= 1 for value in rates):
        raise ConfigError("--rate: must be above 0 and at most 1")
    if not all(_LEAST_NOISE <= value <= _MOST_NOISE for value in noises):
        raise ConfigError(f"--noise: must lie between {_LEAST_NOISE:g} and {_MOST_NOISE:g}")
    budget, spent = _means(place, epsilon, delta)
    with Console(stderr=True).status("working out how far the budget carries"):  # on a terminal only
        if plan_file is not None:
            chosen = read_plan(plan_file)
            carried = for_plan(chosen, epsilon=budget.epsilon, delta=budget.delta, spent=spent)
            answer, shown = forecast_to_json(carried), plan_table(chosen.name, carried)
        else:
            found = forecast(
                epsilon=budget.epsilon,
                delta=budget.delta,
                spent=spent,
                sample_rates=rates,
                noise_multipliers=noises,
                local_steps=steps,
            )
            answer, shown = forecast_to_json(found), table(found)
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        print_table(shown)


def plan_table(name: str, found: PlanForecast) -> Table:
    """Show how far a budget carries one plan."""
    title = (
        f"{name}: {found.rounds_affordable:,} of {found.rounds_asked:,} rounds fit into epsilon {found.epsilon:g} at "
        f"delta {delta_text(found.delta)}"
    )
    caption = f"Epsilon {epsilon_text(found.spent)} is spent already."
    shown = Table(title=escape(title), caption=caption, title_justify="left", caption_justify="left")
    for heading in ("after round", "epsilon spent", "remaining"):
        shown.add_column(heading, justify="right")
    for number, spent in found.spent_after:
        left = "passes the budget" if spent > found.epsilon else remaining_text(found.epsilon, spent)
        shown.add_row(f"{number:,}", epsilon_text(spent), left)
    return shown


def _means(place: Path | None, epsilon: float | None, delta: float | None) -> tuple[Budget, list[PrivacyEvent]]:
    """Give the budget to plan with, and what is spent of it."""
    own, spent = None, []
    if place is not None and (place / CONFIG_FILE).exists() and not load_institution(place).ledger_path.exists():
        own = load_institution(place).budget  # Nothing was ever answered: there is no ledger yet.
    elif place is not None:
        found = find(place)
        with Ledger.read(found.path) as ledger:
            own, spent = ledger.budget, ledger.events()
        own = own if found.institution is None else found.institution.budget
    if own is not None and delta not in {None, own.delta}:
        raise ConfigError(f"--delta: the bank's own delta is {own.delta:g}, which stays; leave --delta out")
    if epsilon is None and (own is None or math.isinf(own.epsilon)):
        raise ConfigError("--epsilon: say how much may be spent, or name a bank's folder that has a budget")
    if epsilon is not None and not 0 < epsilon < math.inf:
        raise ConfigError("--epsilon: must be a finite number above 0")
    if delta is not None and not 0 < delta < 1:
        raise ConfigError("--delta: must lie strictly between 0 and 1")
    own = own or Budget(0.0, _DELTA if delta is None else delta)
    return Budget(own.epsilon if epsilon is None else epsilon, own.delta), spent


def state_of(found: Found, now: float) -> Statement:
    """Verify a ledger and state what it says at this time, in seconds since 1970."""
    with Ledger.read(found.path) as ledger:
        ledger.verify()
        entries, approvals = ledger.entries(), ledger.approvals()
        return statement(
            entries,
            source=ledger.source,
            budget=ledger.budget,
            public_key=ledger.public_key,
            fingerprint=ledger.fingerprint,
            made_seconds=now,
            approvals=approvals,
            plans=found.plans({*approvals, *(charge.key.plan_hash for charge in charges_of(entries))}),
            seeded=found.seeded,
        )


def print_table(table: Table) -> None:
    """Print a table with its title and caption, which may be wider than all its columns."""
    console = Console()
    title, caption, table.title, table.caption = table.title, table.caption, None, None
    for part in (title, table, caption):
        if part:
            console.print(part, soft_wrap=part is title)


def _entry_table(entries: list[Entry], title: str) -> Table:
    table = Table(title=title)
    for heading in ("entry", "time (UTC)", "kind"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what")
    for entry in entries:
        when = datetime.fromtimestamp(entry.time_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(str(entry.seq), when, entry.kind, escape(_what(entry)))
    return table


def _what(entry: Entry) -> str:
    """Say what an entry charges or decides."""
    content = entry.content
    match entry.kind:
        case "create":
            return f"budget {_limit(content['budget'])}"
        case "budget":
            return f"budget {_limit(content)}"
        case "approve":
            cap = "" if content["epsilon"] is None else f", epsilon {content['epsilon']:g}"
            until = "" if content["until_seconds"] is None else f", until {until_text(content['until_seconds'])}"
            return f"plan {content['plan_hash'][:_SHORT]}{cap}{until}"
        case "revoke":
            return f"plan {content['plan_hash'][:_SHORT]}"
        case "reserve":
            key, event = content["key"], content["event"]
            kind = {"evaluate": " score histograms,", "constants": " bins and shares,"}.get(key["kind"], "")
            steps = f"{event['steps']} {'step' if event['steps'] == 1 else 'steps'}"
            rate = "" if event["sample_rate"] == 1 else f", rate {event['sample_rate']:g}"
            return f"round {key['round']}:{kind} {steps}, noise {event['noise_multiplier']:g}{rate}"
    return f"of entry {content['reserved']}"


def _limit(fields: dict[str, Any]) -> str:
    return f"{fields['epsilon']}, delta {delta_text(fields['delta'])}"


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise ConfigError(f"{path}: there is a file already; give another --out, or --force to replace it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written here: {error.strerror}") from None


def _write(path: Path, text: str, *, force: bool) -> None:
    """Write a file whole, for the bank's own eyes like the ledger that it tells of."""
    with _telling(path), NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".statement-") as draft:
        draft.write(text)
        draft.flush()
        if force:
            path.unlink(missing_ok=True)
        path.hardlink_to(draft.name)
