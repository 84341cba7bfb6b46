"""What is lost on the way is sent again within the round; a bank is asked the same, and counts once."""

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message

from server.journal import read_journal
from server.rounds import play_round


def losing(grid: Any, name: str, times: int, code: int | None) -> Counter[str]:
    """Let a bank's first orders vanish, silently or with one of Flower's codes; counts what each bank was sent."""
    sent: Counter[str] = Counter()
    lost: set[str] = set()
    push, pull = grid.push_messages, grid.pull_messages

    def push_and_lose(messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        ids: list[str] = push(messages)
        for message, message_id in zip(messages, ids, strict=True):
            bank = grid._nodes[message.metadata.dst_node_id].name
            sent[bank] += 1
            if bank == name and sent[bank] <= times:
                lost.add(message_id)
        return ids

    def pull_what_is_not_lost(message_ids: Iterable[str]) -> list[Message]:
        (message_id,) = message_ids
        if message_id not in lost:
            return list(pull([message_id]))
        return [] if code is None else [Message(Error(code, "gone"), reply_to=grid._waiting.pop(message_id))]

    grid.push_messages, grid.pull_messages = push_and_lose, pull_what_is_not_lost
    return sent


def record(folder: Path) -> dict[str, Any]:
    (found,) = read_journal(folder / "journal.jsonl")
    return dict(found)


@pytest.fixture
def fed(federation: Any) -> Any:
    return federation(outer={"deadline_seconds": 1.5})


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("code", [None, 3, 4, 5, 8])
def test_a_lost_order_is_sent_again_and_changes_nothing(fed: Any, tmp_path: Path, code: int | None, times: int) -> None:
    undisturbed = play_round(fed.start(), fed.plan, fed.grid(), tmp_path / "undisturbed")
    grid = fed.grid()
    sent = losing(grid, "Bank 3", times, code)
    found = play_round(fed.start(), fed.plan, grid, tmp_path / "lossy")
    np.testing.assert_array_equal(found.meta_params["theta"], undisturbed.meta_params["theta"])
    assert sent["Bank 3"] == times + 1
    assert record(tmp_path / "lossy")["absent"] == []
    assert {count for bank, count in sent.items() if bank != "Bank 3"} == {1}


def test_a_bank_that_is_gone_is_asked_three_times_and_named(fed: Any, tmp_path: Path) -> None:
    grid = fed.grid()
    sent = losing(grid, "Bank 3", 99, 5)
    play_round(fed.start(), fed.plan, grid, tmp_path)
    assert sent["Bank 3"] == 3
    assert record(tmp_path)["rejected"] == {"Bank 3": "flower-error-5"}


def test_an_order_that_ends_with_its_round_unanswered_was_not_lost(fed: Any, tmp_path: Path) -> None:
    """Flower says of an order whose time is over, as of a lost one, that it is gone: its bank was silent."""
    grid = fed.grid()
    sent = losing(grid, "Bank 3", 99, None)
    pull, end = grid.pull_messages, time.monotonic() + fed.plan.outer.deadline_seconds
    waiting: dict[str, Message] = grid._waiting

    def pull_with_the_end_of_each_order(message_ids: Iterable[str]) -> list[Message]:
        (message_id,) = message_ids
        while 0 < end - time.monotonic() < 0.2:
            time.sleep(0.05)
        found = list(pull([message_id]))
        if found or time.monotonic() < end:
            return found
        return [Message(Error(3, "gone"), reply_to=waiting[message_id])]

    grid.pull_messages = pull_with_the_end_of_each_order
    play_round(fed.start(), fed.plan, grid, tmp_path)
    assert sent["Bank 3"] == 3
    found = record(tmp_path)
    assert (found["absent"], found["rejected"]) == (["Bank 3"], {})


@pytest.mark.parametrize("code", [1, 2, 6, 7])
def test_what_a_bank_has_answered_is_not_asked_again(fed: Any, tmp_path: Path, code: int) -> None:
    grid = fed.grid()
    sent = losing(grid, "Bank 3", 99, code)
    play_round(fed.start(), fed.plan, grid, tmp_path)
    assert sent["Bank 3"] == 1
    assert record(tmp_path)["rejected"] == {"Bank 3": f"flower-error-{code}"}
