"""What befalls banks during a run: the others carry it to its end, and those that were lost come back by themselves."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from metarisk_common.plan import Plan
from simulations.scenarios import load_scenario

KILLED_NODE, CUT_OFF, KILLED_WORKER, WELL = NAMES = ("Lender A", "Lender B", "Lender C", "Lender D")
ROUNDS, ROUNDS_AFTER = 5, 3
CUT_SECONDS = 60.0


pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def plan(make_scenario: Any, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """One bank is enough, and nobody waits long. Answers take a while, so that one can be caught under way."""
    replace = {
        "rounds = 12": f"rounds = {ROUNDS}\nmin_reports = 1\ndeadline_seconds = 12",
        "local_steps = 2": "local_steps = 300",
    }
    return load_scenario(make_scenario(tmp_path_factory.mktemp("plan"), replace=replace)).plan()


@pytest.fixture(scope="module")
def wanting_all(plan: Plan) -> Plan:
    """Every bank is waited for, before a round and in it."""
    patient = {"rounds": ROUNDS_AFTER, "min_reports": len(NAMES), "deadline_seconds": 120.0}
    return plan.model_copy(update={"name": "all together", "outer": plan.outer.model_copy(update=patient)})


def test_banks_that_are_lost_hold_nobody_up_and_come_back(
    consortium: Any, plan: Plan, wanting_all: Plan, make_loans: Any, assert_ledgers: Callable[..., None]
) -> None:
    frame = make_loans(lenders=len(NAMES))
    wire = consortium.wire()
    banks: dict[str, Path] = {
        name: consortium.make_bank(
            name, frame.filter(pl.col("lender") == name), port=wire.port if name == CUT_OFF else None
        )
        for name in NAMES
    }
    consortium.approve(plan, *banks.values())
    consortium.approve(wanting_all, *banks.values())
    consortium.start_hub()
    daemons = {name: consortium.start_bank(folder) for name, folder in banks.items()}
    consortium.wait_online(*NAMES)

    run = consortium.start_run(plan)
    consortium.wait_round(run, 1)
    lost = consortium.wait(lambda: in_hand(consortium, banks[KILLED_WORKER], run), 60, "an answer under way")
    worker = daemons[KILLED_WORKER].kill_child("client.worker")
    node = daemons[KILLED_NODE].kill_child("client.node")
    wire.cut()
    cut = time.monotonic()
    ended = consortium.wait_end(run)

    assert (ended["state"], ended["round"]) == ("completed", ROUNDS)
    journal = consortium.journal(run)
    assert journal[0]["admitted"] == list(NAMES)
    assert [(WELL in record["admitted"], record["quorum"]) for record in journal] == [(True, True)] * ROUNDS
    assert CUT_OFF not in journal[-1]["admitted"]
    # Paid for, though nothing has left: a crash counts too much, never too little.
    assert in_hand(consortium, banks[KILLED_WORKER], run) == lost
    assert KILLED_WORKER not in journal[lost - 1]["admitted"]
    assert_ledgers(journal, run_id(consortium, run), banks)

    consortium.wait(lambda: time.monotonic() - cut >= CUT_SECONDS, 2 * CUT_SECONDS, "the cut is long enough")
    wire.mend()
    again = consortium.start_run(wanting_all)
    ended = consortium.wait_end(again)
    assert (ended["state"], ended["round"]) == ("completed", ROUNDS_AFTER)
    assert consortium.journal(again)[-1]["admitted"] == list(NAMES)
    assert daemons[KILLED_WORKER].child("client.worker") != worker
    assert daemons[KILLED_NODE].child("client.node") != node
    assert_ledgers(consortium.journal(again), run_id(consortium, again), banks)

    # Whoever is told to stop stops, with nothing in hand, and the others do not.
    assert daemons[WELL].end(signal.SIGTERM) == 0
    assert consortium.charges(banks[WELL], run)[-1].outcome == "released"


def run_id(consortium: Any, run: str) -> str:
    return str(json.loads((consortium.folder / "runs" / run / "run.json").read_text(encoding="utf-8"))["run_id"])


def in_hand(consortium: Any, folder: Path, run: str) -> int | None:
    """The round that a bank has reserved, and not answered."""
    waiting = [charge.key.round for charge in consortium.charges(folder, run) if charge.outcome == "reserved"]
    return waiting[0] if waiting else None
