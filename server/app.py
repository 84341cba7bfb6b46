"""The Flower ServerApp: reads a run folder's plan, resumes or starts, and plays the rounds."""

import json
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from metarisk_common.errors import ConfigError
from metarisk_common.features import Encoder
from metarisk_common.flower_compat import node_keys
from metarisk_common.initialisation import initial_params
from metarisk_common.plan import read_plan

from .config import ServerFolder
from .enrolment import banks
from .memory import ledgers_heard
from .rounds import resume_or_start, run_rounds
from .state import initial_state, remember_ledgers

RUN_FOLDER_KEY = "metarisk-run-folder"
SERVER_FOLDER_KEY = "metarisk-server-folder"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play a run: `metarisk-run-folder` in the run's configuration names the folder with `plan.json`.

    Where `metarisk-server-folder` names an operator's folder, only banks on its allow-list take part, each under the
    name that its key was enrolled with, and what other runs have heard of the banks' ledgers is echoed. A simulation
    has none, and asks every node.

    Raises:
        ConfigError: the configuration names no folder of a run, or too few banks are online.
        IntegrityError: what the folder holds is damaged or belongs to another run.

    """
    if RUN_FOLDER_KEY not in context.run_config:
        raise ConfigError(f"start the run with {RUN_FOLDER_KEY}=FOLDER in its run configuration")
    folder = Path(str(context.run_config[RUN_FOLDER_KEY]))
    plan = read_plan(folder / "plan.json")
    start = initial_state(read_run_id(folder), plan, initial_params(plan, Encoder(plan.data).width))
    if SERVER_FOLDER_KEY not in context.run_config:
        run_rounds(resume_or_start(folder, start), plan, grid, folder)
        return
    server = ServerFolder(Path(str(context.run_config[SERVER_FOLDER_KEY])))
    state = resume_or_start(folder, start)
    state = remember_ledgers(state, ledgers_heard(server.runs, state.ledgers))
    run_rounds(state, plan, grid, folder, lambda: enrolled_online(grid, server))


def enrolled_online(grid: Grid, server: ServerFolder) -> dict[int, str]:
    """Online nodes whose key is on the operator's allow-list, under the name that stands there."""
    names = {bank.public_key: name for name, bank in banks(server).items()}
    return {node: names[key.hex()] for node, key in node_keys(grid).items() if key.hex() in names}


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
