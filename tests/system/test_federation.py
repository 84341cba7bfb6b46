"""A federation of real processes comes to the very numbers of the engine in one process, and charges what it should."""

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from metarisk_common.plan import Plan
from metarisk_common.privacy import epsilon
from simulations.inprocess import InProcessGrid, Node
from simulations.scenarios import load_scenario

NAMES = ("Lender A", "Lender B", "Lender C")
ROUNDS = 10


@pytest.fixture(scope="module")
def private(make_scenario: Any, make_loans: Any, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Ten rounds under differential privacy that want all three banks."""
    replace = {"rounds = 12": f"rounds = {ROUNDS}\nmin_reports = 3\ndeadline_seconds = 120"}
    return load_scenario(make_scenario(tmp_path_factory.mktemp("plan"), replace=replace)).plan()


@pytest.fixture(scope="module")
def federation(consortium: Any, private: Plan, make_loans: Any) -> dict[str, Path]:
    """Three banks that are up, and the hub; folders by name."""
    frame: pl.DataFrame = make_loans()
    folders = {
        name: consortium.make_bank(name, frame.filter(pl.col("lender") == name), epsilon=float("inf")) for name in NAMES
    }
    consortium.approve(private, *folders.values())
    consortium.approve(without_noise(private), *folders.values())
    consortium.start_hub()
    for folder in folders.values():
        consortium.start_bank(folder)
    consortium.wait_online(*NAMES)
    return folders


def without_noise(plan: Plan) -> Plan:
    quiet = plan.mechanism.model_copy(update={"noise_multiplier": 0.0})
    return plan.model_copy(update={"mechanism": quiet, "name": "without noise"})


def meta_params(run: Path) -> dict[str, np.ndarray]:
    (arrays,) = (run / "checkpoint").glob("*.safetensors")
    return {name: value for name, value in load_file(arrays).items() if name.startswith("meta/")}


def test_ten_rounds_without_noise_are_those_of_one_process(
    consortium: Any, federation: dict[str, Path], private: Plan, tmp_path: Path
) -> None:
    plan = without_noise(private)
    run = consortium.start_run(plan)
    assert consortium.wait_end(run)["state"] == "completed"

    from client.app import FOLDER_KEY  # noqa: PLC0415 - Torch, in this process too
    from client.app import app as client_app  # noqa: PLC0415
    from server.app import RUN_FOLDER_KEY  # noqa: PLC0415
    from server.app import app as server_app  # noqa: PLC0415
    from simulations.inprocess import run_apps  # noqa: PLC0415

    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "in-one-process"}), encoding="utf-8")
    nodes = [Node(name, {FOLDER_KEY: str(folder)}) for name, folder in federation.items()]
    with InProcessGrid(client_app, nodes) as grid:
        run_apps(server_app, grid, {RUN_FOLDER_KEY: str(tmp_path)})
    there, here = meta_params(consortium.folder / "runs" / run), meta_params(tmp_path)
    assert set(there) == set(here)
    for name, value in there.items():
        np.testing.assert_array_equal(value, here[name], err_msg=name)


def test_ten_private_rounds_charge_each_bank_for_ten_and_tell_no_clock(
    consortium: Any, federation: dict[str, Path], private: Plan
) -> None:
    run = consortium.start_run(private)
    stamps = stamps_while_it_runs(consortium, run)
    seen = consortium.wait_end(run)
    assert (seen["state"], seen["round"]) == ("completed", ROUNDS)
    journal = consortium.journal(run)
    assert [record["admitted"] for record in journal] == [list(NAMES)] * ROUNDS
    assert {bank["admitted"] for bank in seen["banks"].values()} == {ROUNDS}
    expected = epsilon(private.events(), 1e-4)
    for folder in federation.values():
        charges = consortium.charges(folder, run)
        assert [(charge.key.round, charge.outcome) for charge in charges] == [
            (number, "released") for number in range(1, ROUNDS + 1)
        ]
        assert epsilon([charge.event for charge in charges], 1e-4) == pytest.approx(expected, rel=1e-9)
        told = json.loads(consortium.client("status", folder, "--json"))
        assert told["served"]
        # The run without noise before has cost everything: an infinite budget, and nothing less, allows for that.
        assert told["epsilon_spent"] is None

    # Flower reports each answer's duration, which grows with the number of records: stamped on it, and summed by run.
    assert stamps
    assert all(reply == order for reply, order in stamps)
    with sqlite3.connect(consortium.folder / "superlink.sqlite") as database:
        assert set(database.execute("SELECT clientapp_runtime FROM run")) == {(0.0,)}


def stamps_while_it_runs(consortium: Any, run: str) -> set[tuple[str, str]]:
    """Creation time and lifetime of the replies that were seen under way, each with those of its order."""
    stamps: set[tuple[str, str]] = set()
    with sqlite3.connect(consortium.folder / "superlink.sqlite") as database:
        while len(consortium.journal(run)) < ROUNDS - 1:
            sent = dict(database.execute("SELECT message_id, created_at || ' ' || ttl FROM message_ins"))
            answered = database.execute("SELECT reply_to_message_id, created_at || ' ' || ttl FROM message_res")
            stamps |= {(stamp, sent[order]) for order, stamp in answered if order in sent}
            time.sleep(0.05)
    return stamps
