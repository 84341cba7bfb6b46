"""Banks that lie: no lie is added, each is named with its reason, and what the honest banks learn is untouched."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from client.app import FOLDER_KEY
from client.app import app as client_app
from client.daemon import free_port
from metarisk_common.plan import Plan
from server.app import RUN_FOLDER_KEY
from server.app import app as server_app
from simulations.inprocess import InProcessGrid, Node, run_apps
from simulations.scenarios import load_scenario

HONEST, LIAR = "Lender A", "Lender B"
VERDICTS = {
    "nan": "not-finite", "one infinity": "not-finite", "wrong shape": "shape", "wrong type": "shape", "huge": "norm",
    "enormous": "norm", "large": "shape", "other arrays": "shape", "no arrays": "shape", "old round": "order",
    "other run": "order", "another's name": "name", "other event": "event", "too large a size": "size",
    "histograms": "order", "unknown field": "protocol", "other protocol": "protocol", "text for a number": "protocol",
    "garbage": "protocol", "pickle": "protocol", "refusal with a text": "protocol", "nothing": "protocol",
    "exception": "flower-error-2",
}  # fmt: skip
REPLAYS = {
    "honest": None, "replay": "order", "replay as of now": "ledger", "replay with a new receipt": "ledger",
    "silence": None,
}  # fmt: skip
TEXT = "Kowalska"


@pytest.fixture(scope="module")
def plan(make_scenario: Any, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan without noise, with a round for every lie; the honest bank suffices for it."""
    replace = {"rounds = 12": f"rounds = {len(VERDICTS)}\nmin_reports = 1\ndeadline_seconds = 120"}
    private = load_scenario(make_scenario(tmp_path_factory.mktemp("plan"), replace=replace)).plan()
    # Each record's gradient is clipped all the same: without, no norm would be too large to be honest.
    return private.model_copy(update={"mechanism": private.mechanism.model_copy(update={"noise_multiplier": 0.0})})


@pytest.fixture(scope="module")
def replays(plan: Plan) -> Plan:
    """A plan whose last round nobody will wait for in vain for long, and long enough for the honest bank."""
    outer = plan.outer.model_copy(update={"rounds": len(REPLAYS), "deadline_seconds": 12.0})
    return plan.model_copy(update={"outer": outer, "name": "replays"})


@pytest.fixture(scope="module")
def banks(consortium: Any, plan: Plan, replays: Plan, make_loans: Any) -> dict[str, Path]:
    """An honest bank and a liar, who has a node and a key like any other."""
    frame = make_loans(lenders=2)
    folders = {
        name: consortium.make_bank(name, frame.filter(frame["lender"] == name), epsilon=float("inf"))
        for name in (HONEST, LIAR)
    }
    consortium.approve(plan, *folders.values())
    consortium.approve(replays, *folders.values())
    consortium.start_hub()
    consortium.start_bank(folders[HONEST])
    port, program = free_port(), Path(__file__).with_name("lying_worker.py")
    lies = json.dumps([list(VERDICTS), list(REPLAYS)])
    consortium.start_program("liars-worker", sys.executable, program, folders[LIAR], port, lies)
    consortium.wait(lambda: consortium.up.saw("the hub answers"), 120, "the hub knows the allow-list")
    consortium.start_program("liars-node", sys.executable, "-m", "client.node", folders[LIAR], port)
    consortium.wait_online(HONEST, LIAR)
    return folders


def meta_params(run: Path) -> dict[str, np.ndarray]:
    (arrays,) = (run / "checkpoint").glob("*.safetensors")
    return {name: value for name, value in load_file(arrays).items() if name.startswith("meta/")}


def test_no_lie_is_added_and_each_is_named(consortium: Any, banks: dict[str, Path], plan: Plan, tmp_path: Path) -> None:
    run = consortium.start_run(plan)
    seen = consortium.wait_end(run)
    assert (seen["state"], seen["round"]) == ("completed", len(VERDICTS))
    journal = consortium.journal(run)
    assert {lie: record["rejected"] for lie, record in zip(VERDICTS, journal, strict=True)} == {
        lie: {LIAR: verdict} for lie, verdict in VERDICTS.items()
    }
    for record in journal:
        assert (record["cohort"], record["admitted"], record["quorum"]) == (2, [HONEST], True)
        assert (record["refused"], record["absent"], list(record["update_norms"])) == ({}, [], [HONEST])

    told = seen["banks"]
    assert told[LIAR]["rejected"] == Counter(VERDICTS.values())
    assert (told[LIAR]["admitted"], told[LIAR]["last_update_norm"]) == (0, None)
    assert (told[HONEST]["admitted"], told[HONEST]["rejected"]) == (len(VERDICTS), {})
    said = consortium.server("status", run, "--folder", consortium.folder)
    assert LIAR in said
    assert "not-finite" in said

    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "the honest alone"}), encoding="utf-8")
    with InProcessGrid(client_app, [Node(HONEST, {FOLDER_KEY: str(banks[HONEST])})]) as grid:
        run_apps(server_app, grid, {RUN_FOLDER_KEY: str(tmp_path)})
    there, here = meta_params(consortium.folder / "runs" / run), meta_params(tmp_path)
    assert set(there) == set(here)
    for name, value in there.items():
        np.testing.assert_array_equal(value, here[name], err_msg=name)


def test_a_report_counts_once_and_silence_stalls_nobody(consortium: Any, banks: dict[str, Path], replays: Plan) -> None:
    run = consortium.start_run(replays)
    seen = consortium.wait_end(run)
    assert seen["state"] == "completed"
    journal = consortium.journal(run)
    assert [record["admitted"] for record in journal] == [[HONEST, LIAR], *[[HONEST]] * (len(REPLAYS) - 1)]
    assert [record["rejected"] for record in journal] == [
        {} if verdict is None else {LIAR: verdict} for verdict in REPLAYS.values()
    ]
    assert [record["absent"] for record in journal] == [*[[]] * (len(REPLAYS) - 1), [LIAR]]
    liar = seen["banks"][LIAR]
    assert (liar["admitted"], liar["rejected"], liar["absent"]) == (1, {"order": 1, "ledger": 2}, 1)
    # Every order that the honest bank has answered is in its ledger once.
    assert [charge.outcome for charge in consortium.charges(banks[HONEST], run)] == ["released"] * len(REPLAYS)


def test_what_a_liar_writes_is_nowhere_at_the_server(consortium: Any, banks: dict[str, Path]) -> None:
    """Errors and refusals may carry a text to the server: only their codes are kept."""
    runs = [path.name for path in (consortium.folder / "runs").iterdir()]
    assert len(runs) == 2
    for run in runs:
        for flags in ((), ("--json",)):
            assert TEXT not in consortium.server("status", run, "--folder", consortium.folder, *flags)
    kept = [path for path in (consortium.folder / "runs").rglob("*") if path.is_file()]
    kept += [path for path in (consortium.folder / "logs").rglob("*") if path.is_file()]
    assert {path.name for path in kept} > {"journal.jsonl", "plan.json", "run.json"}
    for path in (*kept, consortium.up.log):
        assert TEXT.encode() not in path.read_bytes(), path
    assert "Traceback" not in consortium.up.log.read_text()
