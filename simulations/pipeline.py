"""`run` and `demo` from end to end: prepare, train, compare, evaluate, report. Every stage can be taken up again."""

import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from client.dataset import read_table
from metarisk_common.commands import progress_bar
from metarisk_common.errors import ConfigError
from metarisk_common.schema import Schema
from metarisk_common.yardsticks import YARDSTICKS

from . import experiment, results, runfolder
from .console import RoundProgress, differences_table, federated_line, privacy_lines, results_table
from .findings import Account, Metrics, Privacy, Round, told
from .market_classes import class_tables
from .report import ReportData, write_report
from .runfolder import RunFolder
from .scenarios import Scenario, load_scenario
from .tables import read_scenario_table, table_name


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    scenario: Path | None
    out: Path | None
    runs: Path
    resume: bool
    engine: str
    workers: int
    epsilon: float | None
    seed: int | None
    system_noise: bool
    quiet: bool
    command: str


def execute(request: Request) -> dict[str, Any]:
    """Do what was asked, show it unless `quiet`, and return what `--json` prints."""
    out = Console(quiet=request.quiet)
    started = time.monotonic()
    run = _open(request)
    _print(
        out,
        f"{run.scenario.title or run.scenario.name}: {len(run.bank_folders)} institutions learn together, "
        f"{len(run.info['unseen'])} {judged_by(run)}. Run folder: {run.path}",
    )
    try:
        measured = _play(run, request)
    except KeyboardInterrupt:
        folder = shlex.quote(str(run.path))
        _print(Console(stderr=True), f"Stopped. Go on with: metarisk-simulate run --resume --out {folder}")
        raise
    privacy = privacy_of(run)
    write_report(run.path / "report.html", report_data(run, measured, privacy, request.command))
    shown = cast("Metrics", measured.metrics)
    out.print(results_table(shown, measured.main_method))
    differences = differences_table(shown, measured.main_method)
    if differences is not None:
        out.print(differences)
    for table in class_tables(shown, measured.main_method):
        out.print(table)
    records = cast("list[Round]", run.journal())
    federated = records[-1].get("federated_metrics")
    words = told(shown).yardstick.words
    line = federated_line(federated, words)
    if line is not None:
        out.print(line)
    out.print(privacy_lines(privacy, words))
    short = sum(not record["quorum"] for record in records)
    if short:
        _print(out, f"{short} round(s) had too few reports to learn from; see: metarisk-server status {run.path}")
    if run.not_private:
        _print(out, stamp(run))
    _print(out, f"Report: {run.path / 'report.html'}   ({time.monotonic() - started:.0f} seconds)")
    return {
        "run": str(run.path),
        "not_private": run.not_private,
        "summary": measured.metrics["summary"],
        "paired": measured.metrics["paired"],
        **({"classes": measured.metrics["classes"]} if "classes" in measured.metrics else {}),
        "privacy": privacy,
        "federated_metrics": federated,
    }


def _play(run: RunFolder, request: Request) -> results.Results:
    _train(run, request)
    with progress_bar("rivals", quiet=request.quiet) as advance:
        found = experiment.initializations(run, workers=request.workers, on_step=advance)
    unseen = run.path / "unseen.parquet"
    with progress_bar("evaluating", quiet=request.quiet) as advance:
        measured = results.measure(run, found, read_table(unseen), where=str(unseen), on_progress=advance)
    results.save_results(run, measured)
    return measured


def _print(console: Console, text: str) -> None:
    # A path or a title is no markup, and a line that is to be copied is not to be broken.
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def judged_by(run: RunFolder) -> str:
    """Say what is judged, in the words that follow how many there are."""
    if run.scenario.splits.judges_what_came_later:
        return "tasks of kinds that nobody learns from are judged"
    words = YARDSTICKS[run.scenario.evaluation.field].words
    return f"{words.unseen[1]} take no part" if words.unseen else "take no part"


def stamp(run: RunFolder) -> str:
    """Say why the run's artifacts protect nobody."""
    if run.info["seed"] is None:
        return "NOT PRIVATE: the noise is switched off."
    return f"NOT PRIVATE: a simulation whose noise comes from the seed {run.info['seed']}, so that it can be repeated."


def privacy_of(run: RunFolder) -> Privacy:
    """Return the claim and what every bank's ledger says was spent of it."""
    return {
        "epsilon_budget": run.epsilon,
        "delta": run.plan.mechanism.delta,
        "unit": _unit(run.plan.data),
        "by_institution": cast("dict[str, Account]", run.spent()),
    }


def _unit(schema: Schema) -> str:
    if schema.privacy_unit is None:
        return "one record of one institution"
    return f"all records of one '{schema.privacy_unit}' (at most {schema.max_records_per_unit}) of one institution"


def report_data(run: RunFolder, measured: results.Results, privacy: Privacy, command: str) -> ReportData:
    """Collect what the report says from the run's own files."""
    return ReportData(
        title=run.scenario.title or run.scenario.name,
        scenario=run.scenario.name,
        created=run.info["created"],
        not_private=run.not_private,
        versions=run.info["versions"],
        plan=run.plan.model_dump(mode="json"),
        privacy=privacy,
        journal=cast("list[Round]", run.journal()),
        metrics=cast("Metrics", measured.metrics),
        main_method=measured.main_method,
        command=command,
    )


def _open(request: Request) -> RunFolder:
    if request.resume:
        path = request.out or _newest(request)
        if path is not None and (path / "run.json").exists():
            return _resumed(path, request)
        if request.scenario is not None:
            _print(Console(stderr=True), "There is no run to resume; this is a new one.")
    if request.scenario is None:
        raise ConfigError(f"{request.out}: holds no run that could be resumed; name a scenario to start one")
    scenario = _scenario(request, request.scenario)
    table, where = read_scenario_table(scenario, request.scenario), table_name(scenario, request.scenario)
    path = request.out or runfolder.unused_folder(request.runs, scenario.name)
    return runfolder.prepare(path, scenario, table, where=where, epsilon=request.epsilon, engine=request.engine)


def _resumed(path: Path, request: Request) -> RunFolder:
    run = runfolder.open_run(path)
    asked = (
        ("--epsilon", request.epsilon not in (None, run.epsilon)),
        ("--seed", request.seed not in (None, run.info["seed"])),
        ("--system-noise", request.system_noise and run.info["seed"] is not None),
        ("--engine", request.engine not in ("inprocess", run.info["engine"])),
    )
    for flag, differs in asked:
        if differs:
            raise ConfigError(f"{path}: was made with another {flag}; resume it without that flag")
    if request.scenario is not None and _scenario(request, request.scenario) != run.scenario:
        message = f"{path}: was made from another scenario than {request.scenario}; resume it without naming one"
        raise ConfigError(message)
    return run


def _newest(request: Request) -> Path | None:
    if request.scenario is None:
        return None
    name = load_scenario(request.scenario).name
    # Only NAME-001 and the like: another scenario's name may begin with this one's.
    runs = {int(found[1]): item for item in request.runs.glob(f"{name}-*") if (found := _numbered(name, item))}
    return runs[max(runs)] if runs else None


def _numbered(name: str, item: Path) -> re.Match[str] | None:
    return re.fullmatch(rf"{name}-(\d{{3,}})", item.name)


def _scenario(request: Request, path: Path) -> Scenario:
    scenario = load_scenario(path)
    if request.system_noise:
        return scenario.model_copy(update={"seed": None})
    return scenario if request.seed is None else scenario.model_copy(update={"seed": request.seed})


def _train(run: RunFolder, request: Request) -> None:
    with RoundProgress(run.plan.outer.rounds, run.epsilon, quiet=request.quiet) as bar:
        experiment.train(
            run,
            workers=request.workers,
            on_progress=lambda at: bar.update(at.round, at.mean_update_norm, at.epsilon_spent),
        )
