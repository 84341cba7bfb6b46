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

pytestmark = pytest.mark.soak

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


def test_a_hub_that_is_killed_comes_back_and_the_run_goes_on(
    consortium: Any, plan: Plan, is_whole: Callable[[str], None]
) -> None:
    run = consortium.start_run(plan)
    consortium.wait_round(run, 2)
    dead = consortium.up.kill_child("server.hub")
    ended = consortium.wait_end(run)
    assert (ended["state"], ended["details"]) == ("completed", "")
    assert consortium.up.child("server.hub") != dead
    assert len(run_info(consortium, run)["flower_runs"]) == 1
    is_whole(run)


def test_a_run_whose_process_is_killed_is_resumed_and_its_plan_cannot_be_changed_meanwhile(
    consortium: Any, plan: Plan, is_whole: Callable[[str], None]
) -> None:
    run = consortium.start_run(plan)
    consortium.wait_round(run, 2)
    consortium.up.kill_child("server.run_process")
    ended = consortium.wait_end(run)
    # The daemon has told the hub, which by itself would have waited for a minute.
    assert (ended["state"], ended["details"]) == ("failed", "the run's process ended with code -9")
    kept = ended["round"]
    assert 2 <= kept < ROUNDS

    path = consortium.folder / "runs" / run / "plan.json"
    path.write_text(plan.model_copy(update={"name": "another"}).to_json(), encoding="utf-8")
    consortium.resume(run)
    ended = consortium.wait_end(run)
    assert ended["state"] == "failed"
    assert "belongs to another plan or run" in ended["details"]
    assert ended["round"] == kept

    path.write_text(plan.to_json(), encoding="utf-8")
    consortium.resume(run)
    assert consortium.wait_end(run)["state"] == "completed"
    is_whole(run)


def test_a_disk_that_is_full_ends_the_run_with_one_line_and_its_last_round_whole(
    consortium: Any, plan: Plan, is_whole: Callable[[str], None]
) -> None:
    run = consortium.start_run(plan)
    consortium.wait_round(run, 2)
    process = consortium.up.child("server.run_process")
    _, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (0, hard))
    ended = consortium.wait_end(run)
    assert (ended["state"], ended["details"]) == ("failed", "a file cannot be written: File too large")
    found = load_checkpoint(consortium.folder / "runs" / run / "checkpoint")
    assert found is not None
    assert 2 <= found[0].round == ended["round"] < ROUNDS

    consortium.resume(run)
    assert consortium.wait_end(run)["state"] == "completed"
    is_whole(run)


def test_a_hub_whose_disk_is_full_loses_the_run_and_no_bank(
    consortium: Any, banks: dict[str, Path], plan: Plan, assert_ledgers: Callable[..., None]
) -> None:
    run = consortium.start_run(plan)
    consortium.wait_round(run, 2)
    hub, process = consortium.up.child("server.hub"), consortium.up.child("server.run_process")
    before = resource.prlimit(hub, resource.RLIMIT_FSIZE)
    resource.prlimit(hub, resource.RLIMIT_FSIZE, (0, before[1]))
    consortium.wait(lambda: not Path(f"/proc/{process}").exists(), 120, "the end of the run's process")
    resource.prlimit(hub, resource.RLIMIT_FSIZE, before)
    ended = consortium.wait_end(run)
    assert (ended["state"], ended["details"]) == ("failed", "the run's process ended with code 1")
    assert 2 <= ended["round"] < ROUNDS
    assert consortium.up.child("server.hub") == hub

    consortium.resume(run)
    assert consortium.wait_end(run)["state"] == "completed"
    journal = consortium.journal(run)
    # A bank whose node the hub has failed may have missed a round, for which all three are wanted.
    assert journal[-1]["admitted"] == list(NAMES)
    assert_ledgers(journal, run_info(consortium, run)["run_id"], banks)


def test_an_operators_daemon_that_is_killed_takes_its_children_along_and_a_new_one_resumes(
    consortium: Any, plan: Plan, is_whole: Callable[[str], None]
) -> None:
    run = consortium.start_run(plan)
    consortium.wait_round(run, 2)
    # Which waits until the children are gone.
    assert consortium.up.end(signal.SIGKILL) == -signal.SIGKILL
    kept = len(consortium.journal(run))
    assert consortium.status(run)["state"] == "unknown"

    consortium.start_hub()
    consortium.wait_online(*NAMES)
    ended = consortium.wait_end(run)
    assert ended["state"] in {"failed", "stopped"}
    # Whoever was first has said so; nobody had to wait a minute for signs of life.
    assert "heartbeat" not in ended["details"]
    assert len(consortium.journal(run)) == kept < ROUNDS

    consortium.resume(run)
    assert consortium.wait_end(run)["state"] == "completed"
    is_whole(run)


def test_after_a_restart_with_a_changed_plan_every_bank_refuses_and_pays_nothing(
    consortium: Any, banks: dict[str, Path], plan: Plan, assert_ledgers: Callable[..., None]
) -> None:
    changed = plan.model_copy(update={"name": "changed", "outer": plan.outer.model_copy(update={"rounds": 2})})
    run = consortium.start_run(changed)
    ended = consortium.wait_end(run)
    journal = consortium.journal(run)
    assert [record["refused"] for record in journal] == [dict.fromkeys(NAMES, "plan")] * 2
    assert [(record["admitted"], record["quorum"]) for record in journal] == [([], False)] * 2
    assert {bank["refused"]["plan"] for bank in ended["banks"].values()} == {2}
    assert_ledgers(journal, run_info(consortium, run)["run_id"], banks)
    assert [consortium.charges(folder, run) for folder in banks.values()] == [[], [], []]


def test_a_bank_that_stops_and_one_without_budget_leave_the_others_a_quorum(
    consortium: Any, banks: dict[str, Path], make_scenario: Any, make_loans: Any, tmp_path: Path,
    assert_ledgers: Callable[..., None],
) -> None:  # fmt: skip
    # Answers that take a while, so that one can be caught under way.
    replace = {
        "rounds = 12": f"rounds = {ROUNDS}\nmin_reports = 2\ndeadline_seconds = 30",
        "local_steps = 2": "local_steps = 600",
    }
    private = load_scenario(make_scenario(tmp_path / "plan", replace=replace)).plan()
    frame = make_loans(lenders=4).filter(pl.col("lender") == POOR)
    budget = 1.0001 * epsilon(private.events()[: ROUNDS // 2], DELTA)
    poor = consortium.make_bank(POOR, frame, epsilon=budget)
    folders = {**banks, POOR: poor}
    consortium.approve(private, *folders.values())
    consortium.start_bank(poor)
    consortium.wait_online(*folders)

    run = consortium.start_run(private)
    consortium.wait_round(run, ROUNDS // 2)
    leaving = banks[NAMES[2]]
    number = consortium.wait(lambda: in_hand(consortium, leaving, run), 60, "an answer under way")
    assert consortium.daemons[leaving.name].end(signal.SIGTERM) == 0
    ended = consortium.wait_end(run)

    assert (ended["state"], ended["round"]) == ("completed", ROUNDS)
    journal = consortium.journal(run)
    assert all(record["quorum"] for record in journal)
    # What was in hand was finished, and arrived.
    assert in_hand(consortium, leaving, run) is None
    assert NAMES[2] in journal[number - 1]["admitted"]
    assert [record["round"] for record in journal if NAMES[2] in record["admitted"]] == list(range(1, number + 1))
    assert all({NAMES[0], NAMES[1]} <= set(record["admitted"]) for record in journal)

    told = ended["banks"][POOR]
    assert (told["admitted"], told["refused"]) == (ROUNDS // 2, {"budget": ROUNDS - ROUNDS // 2})
    with Ledger.read(poor / "ledger.sqlite") as ledger:
        assert 0.9 * budget < ledger.spent() <= budget
    assert_ledgers(journal, run_info(consortium, run)["run_id"], folders)


def in_hand(consortium: Any, folder: Path, run: str) -> int | None:
    """The round that a bank has reserved, and not answered yet."""
    waiting = [charge.key.round for charge in consortium.charges(folder, run) if charge.outcome == "reserved"]
    return waiting[0] if waiting else None
