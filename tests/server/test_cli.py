"""`metarisk-server` on a run that the simulation made: what an operator sees and takes out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import safe_open

from metarisk_common.plan import Plan
from server.checkpoint import load_checkpoint
from server.cli import app

Call = Callable[..., tuple[int, str, str]]


def test_status_tells_how_far_a_run_is(call: Call, finished_run: Path) -> None:
    code, out, err = call(app, "status", finished_run, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert (answer["round"], answer["rounds"], len(answer["journal"])) == (12, 12, 12)
    code, text, _ = call(app, "status", finished_run)
    assert code == 0
    assert "consumer: round 12 of 12" in text
    # The fixture's noise is seeded, so whatever shows the run must say so.
    assert answer["not_private"] is True
    assert "NOT PRIVATE" in text


def test_the_result_is_exported_with_the_plan_that_made_it(call: Call, finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.safetensors"
    code, text, _ = call(app, "export", finished_run, "--out", out, "--json")
    assert code == 0
    found = load_checkpoint(finished_run / "checkpoint")
    assert found is not None
    with safe_open(out, "numpy") as file:
        said = file.metadata()
        exported = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    assert said["privacy"].startswith("NOT PRIVATE")
    plan = Plan.model_validate_json(said["plan"])
    assert plan.hash() == said["plan_hash"] == json.loads(text)["plan_hash"]
    for name, value in found[0].meta_params.items():
        np.testing.assert_array_equal(exported[name], value.astype(np.float32))
    code, _, err = call(app, "export", finished_run, "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    assert "exists already" in err


def test_what_is_not_there_or_damaged_is_named(call: Call, finished_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run, copy)
    (arrays,) = (copy / "checkpoint").glob("*.safetensors")
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"x")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished_run, unfinished)
    shutil.rmtree(unfinished / "checkpoint")
    for arguments, expected, message in (
        (["status", tmp_path], 2, "is not a run's folder"),
        (["status", copy], 5, "checkpoint"),
        (["export", unfinished, "--out", tmp_path / "x"], 2, "has not finished"),
        (["export", finished_run, "--out", tmp_path / "no" / "x"], 2, "no: there is no such folder"),
    ):
        code, out, err = call(app, *arguments)
        assert (code, out, err.count("\n")) == (expected, "", 1), err
        assert message in err
