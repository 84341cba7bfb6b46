"""`metarisk-server`: what an operator asks of a run's folder."""

import hashlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save

from metarisk_common.commands import run_app, show_version
from metarisk_common.errors import ConfigError
from metarisk_common.files import write_atomically
from metarisk_common.plan import read_plan

from .app import is_not_private
from .checkpoint import load_checkpoint
from .journal import read_journal
from .rounds import CHECKPOINT, JOURNAL

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Folder = Annotated[Path, typer.Argument(help="The run's folder.")]
Version = Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
_SHOWN = 10
_NONE = "-"
STAMP = "NOT PRIVATE: the noise of this run was seeded or switched off"


@app.callback()
def common(_: Version = False) -> None:  # noqa: FBT002 - a flag
    """Look into a run as its operator, and take its result out."""


@app.command(epilog="Example: metarisk-server status runs/sba-loans-001")
def status(run: Folder, as_json: AsJson = False) -> None:  # noqa: FBT002 - a flag
    """Show how far a run has come, who took part, and who was refused and why."""
    plan = read_plan(run / "plan.json")
    records = read_journal(run / JOURNAL)
    found = load_checkpoint(run / CHECKPOINT)
    done = 0 if found is None else found[0].round
    not_private = is_not_private(run)
    if as_json:
        answer = {
            "run": str(run),
            "not_private": not_private,
            "plan_hash": plan.hash(),
            "round": done,
            "rounds": plan.outer.rounds,
            "journal": records,
        }
        typer.echo(json.dumps(answer))
        return
    title = f"{plan.name}: round {done} of {plan.outer.rounds}   plan {plan.hash()[:12]}"
    if len(records) > _SHOWN:
        title += f"   (its last {_SHOWN} rounds)"
    table = Table(title=f"{title}\n{STAMP}" if not_private else title, title_justify="left")
    for heading in ("round", "cohort", "admitted", "refused", "rejected", "mean update norm", "seconds"):
        table.add_column(heading, justify="right")
    for record in records[-_SHOWN:]:
        norm = record["mean_update_norm"]
        table.add_row(
            str(record["round"]), str(record["cohort"]), str(len(record["admitted"])), _named(record["refused"]),
            _named(record["rejected"]), _NONE if norm is None else f"{norm:.4f}", f"{record['seconds']:.1f}",
        )  # fmt: skip
    Console().print(table)


@app.command(epilog="Example: metarisk-server export runs/sba-loans-001 --out sba.safetensors")
def export(
    run: Folder,
    out: Annotated[Path, typer.Option(help="File to write; it must not exist.")],
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Write the meta-parameters as safetensors, with the plan that made them in the file's metadata."""
    plan = read_plan(run / "plan.json")
    found = load_checkpoint(run / CHECKPOINT)
    if found is None or found[0].round < plan.outer.rounds:
        raise ConfigError(f"{run}: the run has not finished; there is nothing to export yet")
    if out.exists():
        raise ConfigError(f"{out}: exists already; choose another name with --out")
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent}: there is no such folder")
    arrays = {name: np.ascontiguousarray(value, plan.dtype) for name, value in found[0].meta_params.items()}
    metadata = {"plan": plan.to_json(), "plan_hash": plan.hash(), "run_id": found[0].run_id}
    if is_not_private(run):
        metadata["privacy"] = STAMP
    data = save(arrays, metadata=metadata)
    write_atomically(out, data)
    digest = hashlib.sha256(data).hexdigest()
    answer = {"file": str(out), "sha256": digest, "plan_hash": plan.hash(), "not_private": is_not_private(run)}
    typer.echo(json.dumps(answer) if as_json else f"{out}\nsha256 {digest}")


def _named(items: dict[str, str]) -> str:
    if not items:
        return _NONE
    name, code = next(iter(items.items()))
    return f"{name}: {code}" + (f" and {len(items) - 1} more" if len(items) > 1 else "")


def main() -> None:
    """Run the command line; mistakes become one line and an exit code."""
    run_app(app)


if __name__ == "__main__":
    main()
