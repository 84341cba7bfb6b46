"""`metarisk-simulate`: federations on this machine, from a scenario file to a report."""

import json
import math
import os
import secrets
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from metarisk_common.commands import progress_bar, run_app, show_version
from metarisk_common.errors import ConfigError

from . import mixed_cli
from .compare_cli import compare, join_report
from .draft import draft_command
from .fetch_cli import fetch
from .verify_cli import verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Out = Annotated[Path | None, typer.Option(help="The run's folder. Default: the next free runs/NAME-001.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, or with the newest of this name.")]
Engine = Annotated[str, typer.Option(help="inprocess, or ray for Flower's own simulation engine (an extra).")]
Workers = Annotated[int | None, typer.Option(min=0, help="Worker processes; 0 runs all in one. Default: the cores.")]
Version = Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Epsilon = Annotated[float | None, typer.Option(help="Budget of every bank in place of the scenario's; inf: no noise.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the noise in place of the scenario's: NOT PRIVATE.")]
SystemNoise = Annotated[bool, typer.Option("--system-noise", help="Real randomness, whatever the scenario's seed.")]
RUNS, AUDITS = Path("runs"), Path("audits")


@app.callback()
def common(_: Version = False) -> None:  # noqa: FBT002 - a flag
    """Run federations on this machine: real Flower messages, real differential privacy, one folder a bank."""


@app.command(epilog="Example: metarisk-simulate demo")
def demo(
    scenario: Annotated[str, typer.Option(help="Built-in scenario; `list` shows them.")] = "credit",
    out: Out = None,
    resume: Resume = False,  # noqa: FBT002 - a flag
    engine: Engine = "inprocess",
    workers: Workers = None,
    epsilon: Epsilon = None,
    seed: Seed = None,
    system_noise: SystemNoise = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Train a built-in scenario under differential privacy; judge lenders, payments or assets never seen."""
    from .scenarios import built_in  # noqa: PLC0415 - see `_run`

    _run(built_in(scenario), out, resume, engine, workers, epsilon, seed, system_noise, as_json)


@app.command(epilog="Example: metarisk-simulate run my.toml --epsilon 3")
def run(
    scenario: Annotated[
        Path | None, typer.Argument(help="The scenario's TOML file; not needed with --resume --out.")
    ] = None,
    out: Out = None,
    resume: Resume = False,  # noqa: FBT002 - a flag
    engine: Engine = "inprocess",
    workers: Workers = None,
    epsilon: Epsilon = None,
    seed: Seed = None,
    system_noise: SystemNoise = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Train and evaluate the experiment that a TOML file describes, on your own data."""
    if scenario is None and not (resume and out):
        raise ConfigError("name a scenario file, or an unfinished run with --resume --out RUN")
    _run(scenario, out, resume, engine, workers, epsilon, seed, system_noise, as_json)


@app.command(epilog="Example: metarisk-simulate evaluate runs/sba-loans-001 --data lenders.parquet --k 0,20,50,100")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: Annotated[
        Path | None, typer.Option(help="CSV or Parquet of the same schema. Default: the run's unseen.")
    ] = None,
    k: Annotated[str | None, typer.Option(help="Numbers of labels, as 0,20,50,100. Default: the scenario's.")] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, help="Draws of labels for each lender. Default: the scenario's.")
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Judge a finished run on lenders that took no part in it."""
    from client.dataset import read_table  # noqa: PLC0415 - see `_run`

    _check_extra("lightgbm", "sim")
    from . import experiment, results, runfolder  # noqa: PLC0415
    from .console import results_table  # noqa: PLC0415
    from .findings import Metrics  # noqa: PLC0415, TC001

    ks = None if k is None else _numbers(k)
    folder = runfolder.open_run(run)
    path = data or folder.path / "unseen.parquet"
    frame = read_table(path)
    with progress_bar("evaluating", quiet=as_json) as advance:
        found = results.measure(
            folder, experiment.initializations(folder, workers=_workers(workers)), frame,
            where=str(path), ks=ks, draws=draws, on_progress=advance,
        )  # fmt: skip
    if as_json:
        typer.echo(_json(found.to_json()))
    else:
        Console().print(results_table(cast("Metrics", found.metrics), found.main_method))


@app.command("list", epilog="Example: metarisk-simulate list")
def list_runs(as_json: AsJson = False) -> None:  # noqa: FBT002 - a flag
    """Show the built-in scenarios, and the runs in ./runs with how far each has come."""
    from . import experiment, runfolder  # noqa: PLC0415 - see `_run`
    from .scenarios import BUILT_IN, built_in, load_scenario  # noqa: PLC0415

    scenarios = {name: load_scenario(built_in(name)).title for name in BUILT_IN}
    runs = []
    for path in sorted(RUNS.glob("*/run.json")):
        folder = runfolder.open_run(path.parent)
        rounds = experiment.rounds_done(folder)
        runs.append({"run": str(path.parent), "round": rounds, "rounds": folder.plan.outer.rounds})
    if as_json:
        typer.echo(_json({"scenarios": scenarios, "runs": runs}))
        return
    for name, title in scenarios.items():
        typer.echo(f"{name:12} {title}")
    for item in runs:
        typer.echo(f"{item['run']:32} round {item['round']} of {item['rounds']}")


@app.command(epilog="Example: metarisk-simulate bench")
def bench(as_json: AsJson = False) -> None:  # noqa: FBT002 - a flag
    """Measure a private step against a plain one, and a round on each engine, side by side."""
    from .bench import measure, table  # noqa: PLC0415 - see `_run`

    figures = measure()
    if as_json:
        typer.echo(_json(figures))
    else:
        Console().print(table(figures))


@app.command(epilog="Example: metarisk-simulate audit --epsilon 4")
def audit(
    epsilon: Annotated[float, typer.Option(help="The claim that is attacked.")] = 4.0,
    delta: Annotated[float, typer.Option(help="Delta of the claim.")] = 1e-5,
    canaries: Annotated[int | None, typer.Option(min=100, help="Planted records. Default: 4000.")] = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="20,000 canaries, in five banks.")] = False,  # noqa: FBT002 - a flag
    model: Annotated[str, typer.Option(help="scorecard or mlp.")] = "scorecard",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds, of 4 private steps each.")] = 5,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the coins, never of noise. Default: random.")] = None,
    out: Annotated[Path | None, typer.Option(help="The audit's folder. Default: the next audits/audit-001.")] = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Attack the client's privacy with planted canaries; exit code 1 unless the verdict is PASS."""
    from . import audit as attack  # noqa: PLC0415 - see `_run`
    from . import audit_page, runfolder  # noqa: PLC0415

    if thorough and canaries is not None:
        raise ConfigError("--thorough and --canaries exclude each other")
    request = attack.Request(
        folder=out or runfolder.unused_folder(AUDITS, "audit"), epsilon=epsilon, delta=delta,
        canaries=canaries or (attack.THOROUGH if thorough else attack.CANARIES), model=model, rounds=rounds,
        seed=secrets.randbits(32) if seed is None else seed,
    )  # fmt: skip
    with progress_bar("attacking", quiet=as_json) as advance:
        found = attack.audit(request, advance)
    audit_page.write(found, created=datetime.now(UTC).isoformat(timespec="seconds"))
    if as_json:
        typer.echo(_json(audit_page.summary(found)))
    else:
        typer.echo("\n".join([*audit_page.lines(found), "", f"page: {request.folder / audit_page.PAGE}"]))
    if found.findings.verdict != "PASS":
        raise typer.Exit(1)


@app.command(epilog="Example: metarisk-simulate tryout --lenders 3 --out tryout")
def tryout(
    scenario: Annotated[str, typer.Argument(help="A built-in scenario, or a scenario's TOML file.")] = "credit",
    lenders: Annotated[int, typer.Option(min=1, help="How many banks.")] = 3,
    out: Annotated[Path, typer.Option(help="The folder to write: new, or empty.")] = Path("tryout"),
    epsilon: Annotated[float, typer.Option(help="What the whole run is to cost each bank.")] = 3.0,
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Write what an operator and some banks need to try a federation by hand: each bank's own loans, and a plan."""
    from . import tryout as by_hand  # noqa: PLC0415 - see `_run`
    from .scenarios import built_in  # noqa: PLC0415

    by_hand.check_epsilon(epsilon)
    path = Path(scenario) if scenario.endswith(".toml") else built_in(scenario)
    made = by_hand.prepare(out, path, lenders=lenders, epsilon=epsilon)
    typer.echo(_json(by_hand.summary(made)) if as_json else "\n".join(by_hand.lines(made)))


app.command("draft", epilog="Example: metarisk-simulate draft loans.csv --institution lender --label defaulted")(
    draft_command
)
app.command(epilog="Example: metarisk-simulate fetch sba --out data")(fetch)
app.command(epilog="Example: metarisk-simulate verify")(verify)
mixed_cli.register(app)
app.command(epilog="Example: metarisk-simulate compare compare.toml --workers 2")(compare)
app.command("join-report", epilog="Example: metarisk-simulate join-report RUN --data ours.csv --institution Ours")(
    join_report
)


def main() -> None:
    """Run the command line; mistakes become one line and an exit code."""
    run_app(app)


def _run(
    scenario_path: Path | None,
    out: Path | None,
    resume: bool,  # noqa: FBT001 - as given
    engine: str,
    workers: int | None,
    epsilon: float | None,
    seed: int | None,
    system_noise: bool,  # noqa: FBT001 - as given
    as_json: bool,  # noqa: FBT001 - as given
) -> None:
    _check_extra("lightgbm", "sim")
    # Imported here, so that --help and a mistake in a flag need not wait for Torch.
    from .pipeline import Request, execute  # noqa: PLC0415

    if engine not in ("inprocess", "ray"):
        raise ConfigError(f"--engine {engine}: choose inprocess or ray")
    if engine == "ray":
        _check_extra("ray", "ray")
    if epsilon is not None and not epsilon > 0:
        raise ConfigError("--epsilon: must be above 0; inf switches the noise off")
    if seed is not None and system_noise:
        raise ConfigError("--seed and --system-noise exclude each other")
    request = Request(
        scenario=scenario_path, out=out, runs=RUNS, resume=resume, engine=engine, workers=_workers(workers),
        epsilon=epsilon, seed=seed, system_noise=system_noise, quiet=as_json,
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )  # fmt: skip
    answer = execute(request)
    if as_json:
        typer.echo(_json(answer))


def _workers(asked: int | None) -> int:
    if asked is not None:
        return asked
    # Not on every system can a process tell which of the cores it may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _json(value: object) -> str:
    """Write JSON; a figure without bound, such as an epsilon without noise, is null, for JSON has no infinity."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:  # noqa: ANN401 - plain values, of any depth
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_extra(module: str, extra: str) -> None:
    if find_spec(module) is None:
        raise ConfigError(f"this needs {module}, which is not installed: pip install 'metarisk-federated[{extra}]'")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        values = ()
    if not values or values[0] < 0 or 1 in values:
        raise ConfigError(f"--k {text}: give numbers of labels separated by commas, as 0,20,50,100; 1 is too few")
    return values


if __name__ == "__main__":
    main()
