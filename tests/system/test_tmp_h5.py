"""What befalls the operator's side during a run: it is completed, to the very numbers, and every ledger is right.

Every run here wants all three banks in every round and has no noise, so what an undisturbed run learns is known.
"""

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from client.app import FOLDER_KEY
from client.app import app as client_app
from client.ledger import Ledger
from metarisk_common.plan import Plan
from metarisk_common.privacy import epsilon
from server.app import RUN_FOLDER_KEY
from server.app import app as server_app
from server.checkpoint import load_checkpoint
from simulations.inprocess import InProcessGrid, Node, run_apps
from simulations.scenarios import load_scenario

NAMES = ("Lender A", "Lender B", "Lender C")
POOR = "Lender D"
ROUNDS = 6
DELTA = 1e-4

Params = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def plan(make_scenario: Any, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    replace = {"rounds = 12": f"rounds = {ROUNDS}\nmin_reports = 3\ndeadline_seconds = 120"}
    return load_scenario(make_scenario(tmp_path_factory.mktemp("plan"), replace=replace)).plan(epsilon=float("inf"))


@pytest.fixture(scope="module")
def banks(consortium: Any, plan: Plan, make_loans: Any) -> dict[str, Path]:
    """Three banks that are up, and the hub; folders by name."""
    frame: pl.DataFrame = make_loans(lenders=3)
    folders = {
        name: consortium.make_bank(name, frame.filter(pl.col("lender") == name), epsilon=float("inf")) for name in NAMES
    }
    consortium.approve(plan, *folders.values())
    consortium.start_hub()
    for folder in folders.values():
        consortium.start_bank(folder)
    consortium.wait_online(*NAMES)
    return folders


@pytest.fixture(scope="module")
def undisturbed(banks: dict[str, Path], plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Params:
    """What the same plan comes to in one process, where nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"run_id": "in-one-process"}), encoding="utf-8")
    nodes = [Node(name, {FOLDER_KEY: str(place)}) for name, place in banks.items()]
    with InProcessGrid(client_app, nodes) as grid:
        run_apps(server_app, grid, {RUN_FOLDER_KEY: str(folder)})
    return meta_params(folder)


def meta_params(run: Path) -> Params:
    (arrays,) = (run / "checkpoint").glob("*.safetensors")
    return {name: value for name, value in load_file(arrays).items() if name.startswith("meta/")}


def run_info(consortium: Any, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((consortium.folder / "runs" / run / "run.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def is_whole(
    consortium: Any, banks: dict[str, Path], undisturbed: Params, assert_ledgers: Callable[..., None]
) -> Callable[[str], None]:
    """Asserts that a run is complete, as if nothing had happened: every bank in every round, charged once for each."""

    def check(run: str) -> None:
        journal, learned = consortium.journal(run), meta_params(consortium.folder / "runs" / run)
        assert [record["admitted"] for record in journal] == [list(NAMES)] * ROUNDS
        assert set(learned) == set(undisturbed)
        for name, value in learned.items():
            np.testing.assert_array_equal(value, undisturbed[name], err_msg=name)
        assert_ledgers(journal, run_info(consortium, run)["run_id"], banks)
        for folder in banks.values():
            assert [charge.outcome for charge in consortium.charges(folder, run)] == ["released"] * ROUNDS

    return check


def test_experiment(consortium: Any, plan: Plan, is_whole: Callable[[str], None]) -> None:
    run = consortium.start_run(plan)
    consortium.wait_round(run, 2)
    pid = consortium.up.child("server.hub")
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    import time

    t0 = time.monotonic()
    while time.monotonic() - t0 < 20:
        time.sleep(1)
    print("JOURNAL", len(consortium.journal(run)))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    print("CHILD", consortium.up.child("server.hub"), pid)
    print("END", consortium.wait_end(run)["state"], consortium.status(run)["details"], time.monotonic() - t0)
    if consortium.status(run)["state"] != "completed":
        consortium.resume(run)
        print("END", consortium.wait_end(run)["state"], consortium.status(run)["details"], time.monotonic() - t0)
    is_whole(run)
