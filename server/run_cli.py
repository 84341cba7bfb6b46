"""Commands on runs: start and follow one, see how it stands, stop it, take its result out."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from metarisk_common.commands import progress_bar
from metarisk_common.errors import ConfigError, MetariskError
from metarisk_common.flower_deployment import RunStatus
from metarisk_common.plan import OuterLoop, Plan, read_plan

from . import federation
from .config import CONFIG_FILE, Server, load_server
from .manifest import export_bundle, export_file
from .overview import Overview, overview, tables
from .robust import cut_of
from .run_process import run_folder

Home = Annotated[Path, typer.Option("--folder", help="The consortium's folder; by default, the current one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
RunName = Annotated[str, typer.Argument(help="The run: its name, or its folder.")]
_FOLLOW_SECONDS = 1.0
_FEWEST_FOR_MEDIAN = 3


def run(
    plan: Annotated[Path | None, typer.Argument(help="The plan, TOML or JSON.")] = None,
    folder: Home = Path(),
    resume: Annotated[str, typer.Option(help="Go on with this run instead of starting one.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Start, and do not wait for the end.")] = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Start a run of a plan, or go on with one, and follow it to its end; Ctrl-C leaves it running."""
    if (plan is None) == (not resume):
        raise ConfigError("name a plan to start a run, or --resume RUN to go on with one")
    server = load_server(folder)
    if plan is not None:
        chosen = read_plan(plan)
        federation.online(server)  # Nothing is laid out for a hub that does not answer.
        place = federation.prepare_run(server, chosen)
    else:
        place = named_run(resume, folder)
        chosen = read_plan(place / "plan.json")
    if not as_json:
        _announce(chosen, place)
    federation.start(server, place)
    if detach:
        typer.echo(json.dumps({"run": place.name, "plan_hash": chosen.hash()}) if as_json else f"started: {place.name}")
        return
    _conclude(_follow(server, place, chosen, quiet=as_json), place, folder, as_json=as_json)


def _conclude(status: RunStatus, place: Path, folder: Path, *, as_json: bool) -> None:
    """Say how a run ended.

    Raises:
        MetariskError: not well, or without having learned anything.

    """
    seen = overview(place, None)
    missed = sum(not record["quorum"] for record in seen.journal)
    if as_json:
        typer.echo(json.dumps(asdict(seen) | {"status": status.sub_status, "details": status.details}))
    if status.sub_status != "completed":
        how = {"failed": "has failed", "stopped": "was stopped"}.get(status.sub_status, "ended")
        resumable = f"; its {seen.round} rounds are kept: metarisk-server run --resume {place.name} --folder {folder}"
        raise MetariskError(f"the run {how}: {status.details or 'no reason was given'}{resumable}")
    if missed == len(seen.journal):
        raise MetariskError(
            f"all {missed} rounds missed the quorum: nothing was learned, and banks that answered have paid; "
            f"see: metarisk-server status {place.name} --folder {folder}"
        )
    if as_json:
        return
    if missed:
        typer.echo(f"WARNING: {missed} of {len(seen.journal)} rounds missed the quorum and changed nothing", err=True)
    typer.echo("\n".join([f"completed: {place.name}, {seen.round} rounds", *federated_metrics(seen)]))


def federated_metrics(seen: Overview) -> list[str]:
    """Say what the banks' score histograms have told last, if the plan asks for them."""
    told = [record["federated_metrics"] for record in seen.journal if "federated_metrics" in record]
    if not told or "auc" not in told[-1]:
        return []
    auc, noise, count = told[-1]["auc"], told[-1]["auc_noise_std"], len(told[-1]["admitted"])
    return [f"federated AUC {auc:.3f} (noise +-{noise:.3f}), over the records of {count} banks that it learned from"]


def _announce(plan: Plan, place: Path) -> None:
    outer = plan.outer
    typer.echo(f"run       {place.name}")
    typer.echo(f"plan      {plan.name}")
    typer.echo(f"hash      {plan.hash()}   (what every bank approves)")
    typer.echo(
        f"rounds    {outer.rounds}, quorum {outer.min_reports}, at most {outer.deadline_seconds:g} seconds each, "
        f"aggregator {outer.aggregator}"
    )
    for warning in weaknesses(outer):
        typer.echo(f"WARNING   {warning}")


def weaknesses(outer: OuterLoop) -> list[str]:
    """Say where a plan's aggregator protects less than its name promises."""
    found = []
    if outer.aggregator == "trimmed_mean" and cut_of(outer.trim, outer.min_reports) == 0:
        found.append(
            f"of {outer.min_reports} reports, which are enough for the quorum, a trim of {outer.trim:g} cuts none: "
            "that round is a plain mean"
        )
    if outer.aggregator == "median" and outer.min_reports < _FEWEST_FOR_MEDIAN:
        found.append(f"the median of {outer.min_reports} reports, which are enough for the quorum, withstands no liar")
    return found


def _follow(server: Server, place: Path, plan: Plan, *, quiet: bool) -> RunStatus:
    """Wait for a run's end. The hub may go and come back meanwhile."""
    with progress_bar(f"{plan.name}: rounds", quiet=quiet) as progress, _left_running(place):
        while True:
            try:
                status = federation.run_status(server, place)
            except federation.HubDownError:
                status = None
            progress(overview(place, None).round, plan.outer.rounds)
            if status is not None and status.status == "finished":
                return status
            time.sleep(_FOLLOW_SECONDS)


@contextmanager
def _left_running(place: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(
            f"the run goes on; see: metarisk-server status {place.name}; end it: metarisk-server stop {place.name}"
        )
        raise


def status(
    run: Annotated[str, typer.Argument(help="The run: its name, or its folder; by default, the newest.")] = "",
    folder: Home = Path(),
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every second, until Ctrl-C.")] = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Show who is online, how far a run has come, who took part, and who was refused and why."""
    place = named_run(run, folder) if run else _newest(folder)
    server = _server_of(place, folder)
    if place is None:
        _show_banks(server, as_json=as_json)
        return
    seen = _look(place, server)
    if as_json:
        typer.echo(json.dumps(asdict(seen)))
    elif not watch:
        Console().print(tables(seen))
    else:
        with Live(tables(seen), console=Console(), auto_refresh=False) as live:
            while seen.state not in {"completed", "failed", "stopped"}:
                time.sleep(_FOLLOW_SECONDS)
                seen = _look(place, server)
                live.update(tables(seen), refresh=True)


def _look(place: Path, server: Server | None) -> Overview:
    if server is None:
        return overview(place, None)
    try:
        return overview(place, federation.online(server), federation.run_status(server, place))
    except federation.HubDownError:
        return overview(place, None, hub_down=True)


def _show_banks(server: Server | None, *, as_json: bool) -> None:
    if server is None:
        raise ConfigError("here is neither a run nor a consortium's folder; name one with --folder, or a run")
    online = federation.online(server)
    if as_json:
        typer.echo(json.dumps({"consortium": server.config.name, "banks": online, "runs": []}))
        return
    typer.echo(f"{server.config.name}: no run yet, {sum(online.values())} of {len(online)} banks online")
    for name, here in online.items():
        typer.echo(f"  {name}: {'online' if here else 'offline'}")


def stop(run: RunName, folder: Home = Path(), as_json: AsJson = False) -> None:  # noqa: FBT002 - a flag
    """Stop a run. Its finished rounds are kept, and `run --resume` goes on with it."""
    place = named_run(run, folder)
    stopped = federation.stop(load_server(folder), place)
    if as_json:
        typer.echo(json.dumps({"run": place.name, "stopped": stopped}))
    else:
        typer.echo(f"stopped: {place.name}" if stopped else f"{place.name} was not running")


def export(
    run: RunName,
    out: Annotated[Path, typer.Option(help="What to write: a folder, or a file NAME.safetensors.")],
    folder: Home = Path(),
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Write a finished run's meta-initialization: a folder with plan, journal and signed manifest, or one file."""
    place = named_run(run, folder)
    if out.suffix == ".safetensors":
        made = export_file(place, out)
    else:
        made = export_bundle(place, out, _server_of(place, folder))
    answer = {
        "file": str(made.path),
        "sha256": made.sha256,
        "plan_hash": made.plan_hash,
        "not_private": made.not_private,
    }
    typer.echo(json.dumps(answer) if as_json else f"{made.path}\nsha256 {made.sha256}")


def named_run(run: str, folder: Path) -> Path:
    """Find the folder of a run by its name in the consortium's folder, or by its path.

    Raises:
        ConfigError: there is no such run.

    """
    if (Path(run) / "run.json").is_file():
        return Path(run)
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{run}: is not a run's folder; name one, or a run's name and its consortium with --folder")
    try:
        return run_folder(load_server(folder), run)
    except ConfigError:
        known = ", ".join(path.name for path in _runs(folder)[-5:]) or "none"
        raise ConfigError(f"{run}: there is no such run here; the newest: {known}") from None


def _runs(folder: Path) -> list[Path]:
    found = [path.parent for path in (folder / "runs").glob("*/run.json")]
    return sorted(found, key=lambda path: json.loads((path / "run.json").read_text(encoding="utf-8"))["created"])


def _newest(folder: Path) -> Path | None:
    runs = _runs(folder) if (folder / CONFIG_FILE).is_file() else []
    return runs[-1] if runs else None


def _server_of(place: Path | None, folder: Path) -> Server | None:
    """Give the consortium that a run belongs to; none for the run of a simulation."""
    home = folder if place is None else place.resolve().parent.parent
    return load_server(home) if (home / CONFIG_FILE).is_file() else None
