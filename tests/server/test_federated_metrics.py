"""Score histograms through real messages: summed, judged, kept, and refused where they are not what was promised."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import server.rounds
from metarisk_common.wire import EvaluateOrder, encode_order
from server.checkpoint import load_checkpoint
from server.journal import read_journal
from server.rounds import CHECKPOINT, JOURNAL, resume_or_start, run_rounds

METRICS = {"bins": 4, "noise_multiplier": 0.0, "every": 2}


def play(made: Any, folder: Path, grid: Any) -> list[dict[str, Any]]:
    run_rounds(resume_or_start(folder, made.start()), made.plan, grid, folder)
    return read_journal(folder / JOURNAL)


def test_the_sum_over_banks_is_judged_after_the_rounds_that_the_plan_names(
    federation: Callable[..., Any], tmp_path: Path
) -> None:
    made = federation(metrics=METRICS, outer={"rounds": 5})
    records = play(made, tmp_path, made.grid())
    assert [("federated_metrics" in record) for record in records] == [False, True, False, True, True]
    size = sum(task.size for task in made.tasks)
    found = records[-1]["federated_metrics"]
    assert sum(found["histograms"]["positives"]) == 8 * size
    assert found["histograms"]["negatives"] == [0, 40 * size, 0, 0]
    theta = load_checkpoint(tmp_path / CHECKPOINT)
    assert theta is not None
    # Judged are the meta-parameters that the round ended with.
    higher = float(theta[0].meta_params["theta"].sum()) > 0
    assert found["auc"] == (1.0 if higher else 0.5)
    assert found["base_rate"] == pytest.approx(1 / 6)
    assert len(found["admitted"]) == len(made.tasks)
    assert theta[0].ledgers["Bank 3"] == (51, "receipt of Bank 3 for round 5, evaluated")


@pytest.mark.parametrize(
    "reaction", ["sends NaN", "sends far too much", "answers another order", "answers garbage", "fails", "refuses"]
)
def test_a_bank_that_gives_no_good_histograms_is_left_out_and_named(
    federation: Callable[..., Any], tmp_path: Path, reaction: str
) -> None:
    made = federation(metrics=METRICS, outer={"rounds": 1})
    (record,) = play(made, tmp_path, made.grid(b7=reaction))
    found = record["federated_metrics"]
    assert found["admitted"] == [f"Bank {number}" for number in range(7)]
    assert "Bank 7" in {**found["refused"], **found["rejected"]}
    assert found["histograms"]["negatives"][1] == 40 * sum(task.size for task in made.tasks[:7])


def test_below_the_quorum_no_histogram_is_kept(federation: Callable[..., Any], tmp_path: Path) -> None:
    made = federation(metrics=METRICS, outer={"rounds": 1, "min_reports": 8})
    (record,) = play(made, tmp_path, made.grid(b7="refuses"))
    assert record["federated_metrics"]["histograms"] is None
    assert "auc" not in record["federated_metrics"]


def test_every_order_echoes_what_was_last_heard_of_the_banks_ledger(
    federation: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int, str]] = []

    def watched(order: Any) -> Any:
        seen.append((isinstance(order, EvaluateOrder), order.ledger_counter, order.ledger_receipt))
        return encode_order(order)

    monkeypatch.setattr(server.rounds, "encode_order", watched)
    made = federation(metrics=METRICS, outer={"rounds": 3})
    play(made, tmp_path, made.grid([2]))
    receipt = "receipt of Bank 2 for round {}".format
    assert seen == [
        (False, 0, ""),
        (False, 10, receipt(1)),
        (True, 20, receipt(2)),
        (False, 21, f"{receipt(2)}, evaluated"),
        (True, 30, receipt(3)),
    ]
