"""The commands `compare` and `join-report` of `metarisk-simulate`."""

import json
import os
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from metarisk_common.commands import progress_bar
from metarisk_common.errors import ConfigError

COMPARISONS = Path("comparisons")


Out = Annotated[Path | None, typer.Option(help="Its folder. Default: the next free comparisons/NAME-001.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes; 0 does all in one. Default: the cores.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on in --out, or in the newest folder of this name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]


def compare(
    comparison: Annotated[Path, typer.Argument(help="The comparison's TOML file.")],
    out: Out = None,
    workers: Workers = None,
    resume: Resume = False,  # noqa: FBT002 - a flag
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Train and judge methods x epsilons x seeds, side by side: one table, and plots on one page."""
    _check_lightgbm()
    # Imported here, so that --help and a mistake in a flag need not wait for Torch.
    from . import compare_page, compare_print, compare_tables  # noqa: PLC0415
    from .compare import carry_out  # noqa: PLC0415
    from .comparison import load_comparison  # noqa: PLC0415

    loaded = load_comparison(comparison)
    folder = _folder(out, loaded.comparison.name, resume=resume)
    try:
        with progress_bar("comparing", quiet=as_json) as advance:
            outcome = carry_out(loaded, folder, workers=_workers(workers), on_progress=advance)
    except KeyboardInterrupt:
        again = f"metarisk-simulate compare {shlex.quote(str(comparison))} --resume --out {shlex.quote(str(folder))}"
        typer.echo(f"Stopped; what is finished is kept. Go on with: {again}", err=True)
        raise
    table = compare_tables.tabulate(loaded, outcome)
    compare_page.write(folder, table)
    if as_json:
        typer.echo(json.dumps(table, allow_nan=False))
        return
    console = Console()
    console.print(compare_print.lines(table))
    console.print(f"Table and page: {folder / compare_page.PAGE}", markup=False, highlight=False, soft_wrap=True)


def join_report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run that the bank took no part in.")],
    data: Annotated[Path, typer.Option(help="CSV or Parquet of the run's schema: the bank's records, or more banks'.")],
    institution: Annotated[str, typer.Option(help="The bank.")],
    out: Annotated[Path, typer.Option(help="The page; the JSON goes beside it.")] = Path("join.html"),
    draws: Annotated[int, typer.Option(min=2, max=1000, help="Draws of labels.")] = 30,
    adaptation: Annotated[str, typer.Option(help="How the shared start is adapted to labels.")] = "auto",
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Should we join? What one bank gains, for how many labels, at what epsilon; and no when it is no."""
    _check_lightgbm()
    from client.dataset import read_table  # noqa: PLC0415 - see `compare`
    from metarisk_common.adapters import METHODS  # noqa: PLC0415

    from . import join_page, runfolder  # noqa: PLC0415
    from .join_report import judge  # noqa: PLC0415

    if adaptation not in METHODS:
        raise ConfigError(f"--adaptation {adaptation}: choose one of: {', '.join(METHODS)}")
    folder = runfolder.open_run(run)
    with progress_bar("judging", quiet=as_json) as advance:
        found = judge(
            folder, read_table(data), institution,
            where=str(data), draws=draws, adaptation=adaptation, on_progress=advance,
        )  # fmt: skip
    join_page.write(out, found)
    typer.echo(
        json.dumps(found, allow_nan=False) if as_json else "\n".join([*join_page.lines(found), "", f"page: {out}"])
    )


def _folder(out: Path | None, name: str, *, resume: bool) -> Path:
    made = [item for item in COMPARISONS.glob(f"{name}-*") if re.fullmatch(rf"{name}-\d{{3,}}", item.name)]
    newest = max(made, key=lambda item: int(item.name.rpartition("-")[2]), default=None)
    folder = out or (newest if resume and newest else None)
    if folder is None:
        number = int(newest.name.rpartition("-")[2]) + 1 if newest else 1
        folder = COMPARISONS / f"{name}-{number:03d}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a folder with --out")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: the folder is not empty; go on in it with --resume, or choose another with --out")
    return folder


def _workers(asked: int | None) -> int:
    if asked is not None:
        return asked
    # Not on every system can a process tell which of the cores it may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_lightgbm() -> None:
    if find_spec("lightgbm") is None:
        raise ConfigError("this needs lightgbm, which is not installed: pip install 'metarisk-federated[sim]'")
