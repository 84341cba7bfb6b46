"""What one bank can do to a round: be absent from it, and be named in the journal. Nothing else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from metarisk_common.flower_compat import node_names
from metarisk_common.params import scale
from metarisk_common.wire import TrainReport, decode_reply, encode_reply
from server.admission import norm_bound
from server.aggregators import update_norm
from server.journal import read_journal
from server.rounds import JOURNAL, play_round, run_rounds, stream_replies
from server.strategy import aggregate_train, configure_train

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


# What a bank can put into its reply to the second round, by what the server calls it. The list of `FAULTS` goes on here
# with what takes the exact order or the reply of the round before.

CLIP = {"noise_multiplier": 0.0, "max_grad_norm": 5.0, "sample_rate": 1.0}
Forgery = Callable[[TrainReport, TrainReport, float], TrainReport | RecordDict]


def head_with(report: TrainReport, field: str, value: Any) -> RecordDict:
    content = encode_reply(report)
    head = content["head"]
    assert isinstance(head, ConfigRecord)
    head[field] = value
    return content


def of_norm(report: TrainReport, norm: float) -> TrainReport:
    return replace(report, update=scale(report.update, norm / update_norm(report.update)))


FORGERIES: dict[str, tuple[Forgery, str | None]] = {
    "honest": (lambda report, *_: report, None),
    "another protocol": (lambda report, *_: head_with(report, "protocol", 2), "protocol"),
    "a text for a round": (lambda report, *_: head_with(report, "round", "2"), "protocol"),
    "the reply of the round before": (lambda _, before, __: before, "order"),
    "that reply, dated anew": (lambda report, before, _: replace(before, round=report.round), "ledger"),
    "that reply as a new entry": (lambda report, _, __: replace(report, counter=10), "ledger"),
    "another plan": (lambda report, *_: replace(report, plan_hash="0" * 64), "order"),
    "another run": (lambda report, *_: replace(report, run_id="run-2"), "order"),
    "a round to come": (lambda report, *_: replace(report, round=3), "order"),
    "single precision": (lambda report, *_: with_array(report, lambda value: value.astype(np.float32)), "shape"),
    "one value too many": (lambda report, *_: with_array(report, lambda value: np.append(value, 0.0)), "shape"),
    "another axis": (lambda report, *_: with_array(report, lambda value: value[None]), "shape"),
    "infinity": (lambda report, *_: with_array(report, lambda value: np.full_like(value, np.inf)), "not-finite"),
    "as much as may be": (lambda report, _, bound: of_norm(report, bound * (1 - 1e-9)), None),
    "a little more": (lambda report, _, bound: of_norm(report, bound * (1 + 1e-9)), "norm"),
    "a name that nobody has": (lambda report, *_: replace(report, institution="Bank 8"), "name"),
    "no name": (lambda report, *_: replace(report, institution=""), "name"),
}


def with_array(report: TrainReport, change: Callable[[np.ndarray], np.ndarray]) -> TrainReport:
    return replace(report, update={name: change(value) for name, value in report.update.items()})


class SecondRound:
    """The second round of eight honest banks, its replies at hand before the server has seen them."""

    def __init__(self, fed: Any, folder: Path) -> None:
        self.fed, grid = fed, fed.grid()
        start = fed.start()
        self.before = self._replies(grid, start)
        self.state = play_round(start, fed.plan, grid, folder)
        self.order, self.cohort = configure_train(self.state, fed.plan), node_names(grid)
        self.replies = self._replies(grid, self.state)
        (self.node,) = (node for node, name in self.cohort.items() if name == "Bank 7")

    def _replies(self, grid: Any, state: Any) -> dict[int, Message]:
        order = configure_train(state, self.fed.plan)
        return dict(stream_replies(grid, order, node_names(grid), 60.0, state.ledgers))

    def report(self, replies: dict[int, Message]) -> TrainReport:
        found = decode_reply(replies[self.node].content)
        assert isinstance(found, TrainReport)
        return found

    def forged(self, content: RecordDict | TrainReport) -> Message:
        """Bank 7's message with another content, as Flower would bring it."""
        message = self.replies[self.node]
        message.content = content if isinstance(content, RecordDict) else encode_reply(content)
        return message

    def end(self, replies: list[tuple[int, Message]]) -> tuple[Any, dict[str, Any]]:
        return aggregate_train(self.state, self.fed.plan, self.order, self.cohort, replies)

    def honest(self, *, but: int | None = None) -> list[tuple[int, Message]]:
        return [(node, message) for node, message in self.replies.items() if node != but]


@pytest.fixture
def second(federation: Any, tmp_path: Path) -> SecondRound:
    return SecondRound(federation(mechanism=CLIP), tmp_path)


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_reply_has_its_verdict_and_changes_nothing(second: SecondRound, forgery: str) -> None:
    change, verdict = FORGERIES[forgery]
    bound = norm_bound(second.fed.plan, 80, 5)
    without, _ = second.end(second.honest(but=second.node))
    content = change(second.report(second.replies), second.report(second.before), bound)
    state, record = second.end([*second.honest(but=second.node), (second.node, second.forged(content))])
    assert record["rejected"] == ({} if verdict is None else {"Bank 7": verdict})
    assert ("Bank 7" in record["admitted"]) == ("Bank 7" in record["update_norms"]) == (verdict is None)
    assert (bits(state) == bits(without)) == (verdict is not None)
    assert (record["absent"], record["refused"], record["cohort"]) == ([], {}, 8)


def test_a_reply_from_a_node_that_nobody_asked_is_not_even_read(second: SecondRound) -> None:
    expected, _ = second.end(second.honest())
    stranger = second.replies[second.node]
    state, record = second.end([(99, stranger), *second.honest()])
    assert bits(state) == bits(expected)
    assert record["rejected"] == {"99": "node"}
    assert len(record["admitted"]) == 8


def test_a_banks_first_answer_counts_and_no_other(second: SecondRound) -> None:
    expected, _ = second.end(second.honest())
    twice = [pair for pair in second.honest() for _ in range(2)]
    state, record = second.end(twice)
    assert bits(state) == bits(expected)
    assert record["admitted"] == [f"Bank {number}" for number in range(8)]
    assert record["rejected"] == {f"Bank {number}": "duplicate" for number in range(8)}


def test_after_a_bad_answer_a_good_one_comes_too_late(second: SecondRound) -> None:
    expected, _ = second.end(second.honest(but=second.node))
    good = second.replies[second.node]
    other = Message(encode_reply(of_norm(second.report(second.replies), 1e9)), 1, "train")
    state, record = second.end([(second.node, other), (second.node, good), *second.honest(but=second.node)])
    assert bits(state) == bits(expected)
    assert record["rejected"] == {"Bank 7": "norm"}


def test_under_its_own_name_a_bank_cannot_send_what_another_sent(second: SecondRound) -> None:
    """Not even renamed: the receipt, of the other's ledger, gives it away to the server that has it already."""
    theirs = decode_reply(second.honest()[0][1].content)
    assert isinstance(theirs, TrainReport)
    renamed = replace(theirs, institution="Bank 7", declared_size=80)
    expected, _ = second.end(second.honest(but=second.node))
    state, record = second.end([*second.honest(but=second.node), (second.node, second.forged(renamed))])
    assert bits(state) == bits(expected)
    assert record["rejected"] == {"Bank 7": "duplicate"}
