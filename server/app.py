"""The Flower ServerApp: reads a run folder's plan, resumes or starts, and plays the rounds."""

import json
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from metarisk_common.errors import ConfigError
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.plan import read_plan

from .rounds import resume_or_start, run_rounds
from .state import initial_state

RUN_FOLDER_KEY = "metarisk-run-folder"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play a run: `metarisk-run-folder` in the run's configuration names the folder with `plan.json`.

    Raises:
        ConfigError: the configuration names no folder of a run, or no bank is online.
        IntegrityError: what the folder holds is damaged or belongs to another run.

    """
    if RUN_FOLDER_KEY not in context.run_config:
        raise ConfigError(f"start the run with {RUN_FOLDER_KEY}=FOLDER in its run configuration")
    folder = Path(str(context.run_config[RUN_FOLDER_KEY]))
    plan = read_plan(folder / "plan.json")
    start = initial_state(read_run_id(folder), plan, initial_params(plan, Encoder(plan.data).width))
    run_rounds(resume_or_start(folder, start), plan, grid, folder)


def is_not_private(folder: Path) -> bool:
    """Whether the run's description says that its noise was seeded or switched off, so that it protects nobody.

    Raises:
        ConfigError: the folder is not that of a run.

    """
    return bool(_read_info(folder).get("not_private", False))


def read_run_id(folder: Path) -> str:
    """Read the run's name for itself, which every order carries.

    Raises:
        ConfigError: the folder is not that of a run.

    """
    return str(_read_info(folder)["run_id"])


def _read_info(folder: Path) -> dict[str, Any]:
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        info = None
    if not isinstance(info, dict) or "run_id" not in info:
        raise ConfigError(f"{folder}: is not a run's folder (its run.json is missing or damaged)")
    return info
