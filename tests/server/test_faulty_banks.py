"""What one bank can do to a round: be absent from it, and be named in the journal. Nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.journal import read_journal
from server.rounds import JOURNAL, play_round, run_rounds

FAULTS = {
    "refuses": ("refused", "budget"),
    "answers nothing": ("rejected", "protocol"),
    "answers garbage": ("rejected", "protocol"),
    "says too much": ("rejected", "protocol"),
    "sends NaN": ("rejected", "not-finite"),
    "sends far too much": ("rejected", "norm"),
    "sends the wrong shape": ("rejected", "shape"),
    "fails": ("rejected", "flower-error-2"),
    "takes another's name": ("rejected", "name"),
    "takes another's receipt": ("rejected", "duplicate"),
    "answers another order": ("rejected", "order"),
    "spent less": ("rejected", "event"),
    "has an old ledger": ("rejected", "ledger"),
    "claims too large a size": ("rejected", "size"),
}


def last(folder: Path) -> dict[str, Any]:
    return read_journal(folder / JOURNAL)[-1]


def bits(state: Any) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in {**state.meta_params, **state.optimizer_state}.items()}


def without_bank_7(fed: Any, folder: Path) -> dict[str, bytes]:
    return bits(run_rounds(fed.start(), fed.plan, fed.grid(range(7)), folder))


def test_every_reaction_is_tried(reactions: list[str]) -> None:
    assert [*FAULTS] == [name for name in reactions if name != "honest"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_bank_is_left_out_and_named(tmp_path: Path, federation: Any, fault: str) -> None:
    fed = federation(outer={"rounds": 2, "weighting": "declared_size"})
    end = run_rounds(fed.start(), fed.plan, fed.grid(b7=fault), tmp_path / "a")
    assert bits(end) == without_bank_7(fed, tmp_path / "b")
    kind, verdict = FAULTS[fault]
    for record in read_journal(tmp_path / "a" / JOURNAL):
        assert record["admitted"] == [f"Bank {number}" for number in range(7)]
        assert record[kind] == {"Bank 7": verdict}
        assert {"refused": {}, "rejected": {}, "absent": []} | {kind: {"Bank 7": verdict}} == {
            name: record[name] for name in ("refused", "rejected", "absent")
        }
        assert record["cohort"] == 8
    assert "40211" not in (tmp_path / "a" / JOURNAL).read_text(encoding="utf-8")


def test_a_bank_that_never_answers_is_waited_for_until_the_deadline(tmp_path: Path, federation: Any) -> None:
    fed = federation(outer={"rounds": 2, "deadline_seconds": 0.2})
    grid = fed.grid()
    grid.silent = {"Bank 7"}
    end = run_rounds(fed.start(), fed.plan, grid, tmp_path / "a")
    assert bits(end) == without_bank_7(fed, tmp_path / "b")
    for record in read_journal(tmp_path / "a" / JOURNAL):
        assert (record["absent"], record["rejected"]) == (["Bank 7"], {})


def test_nodes_that_died_are_named_though_flower_speaks_for_them(tmp_path: Path, federation: Any) -> None:
    fed = federation(outer={"rounds": 1})
    grid = fed.grid()
    grid.dead = {"Bank 2", "Bank 7"}
    play_round(fed.start(), fed.plan, grid, tmp_path)
    record = last(tmp_path)
    assert record["rejected"] == {"Bank 2": "flower-error-5", "Bank 7": "flower-error-5"}
    assert record["absent"] == []


def test_a_bank_that_changes_its_size_is_left_out(tmp_path: Path, federation: Any) -> None:
    fed = federation()
    state = play_round(fed.start(), fed.plan, fed.grid(), tmp_path)
    fed.tasks[7] = type(fed.tasks[7])(fed.tasks[7].a, fed.tasks[7].c, 1000)
    state = play_round(state, fed.plan, fed.grid(), tmp_path)
    assert last(tmp_path)["rejected"] == {"Bank 7": "size"}
    assert state.declared_sizes["Bank 7"] == 80


def test_a_size_is_remembered_from_a_round_without_quorum_too(tmp_path: Path, federation: Any) -> None:
    fed = federation(outer={"min_reports": 8})
    state = play_round(fed.start(), fed.plan, fed.grid([6, 7]), tmp_path)
    assert state.declared_sizes == {"Bank 6": 70, "Bank 7": 80}


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_below_the_quorum_everything_stays(tmp_path: Path, federation: Any, optimizer: str) -> None:
    fed = federation(outer={"min_reports": 8, "optimizer": optimizer})
    before = play_round(fed.start(), fed.plan, fed.grid(), tmp_path)
    assert last(tmp_path)["quorum"]
    after = play_round(before, fed.plan, fed.grid(b7="refuses"), tmp_path)
    assert bits(after) == bits(before)
    assert after.round == 2
    record = last(tmp_path)
    assert not record["quorum"]
    assert record["aggregate_norm"] is None
    assert record["admitted"] == [f"Bank {number}" for number in range(7)]
    # And the run goes on once they are back.
    moved = play_round(after, fed.plan, fed.grid(), tmp_path)
    assert not np.array_equal(moved.meta_params["theta"], before.meta_params["theta"])


def test_with_every_bank_faulty_the_run_ends_where_it_began(tmp_path: Path, federation: Any) -> None:
    fed = federation()
    everybody = {f"b{number}": fault for number, fault in enumerate(list(FAULTS)[:8])}
    end = run_rounds(fed.start(), fed.plan, fed.grid(**everybody), tmp_path)
    assert bits(end) == bits(fed.start())
    assert end.round == fed.plan.outer.rounds
    record = last(tmp_path)
    assert (record["admitted"], record["quorum"], record["mean_update_norm"]) == ([], False, None)
    assert len({**record["refused"], **record["rejected"]}) == 8
