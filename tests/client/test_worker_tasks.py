"""The worker waits for an order exactly as long as its node does."""

import threading
from typing import Any

import pytest

from client.worker import Tasks, _WithdrawnError


class Source:
    """The node's tasks, by their tokens."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = list(tokens)

    def acquire(self) -> str | None:
        return self.tokens.pop(0) if self.tokens else None


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()


def test_it_waits_while_the_node_has_no_other_task(stop: threading.Event) -> None:
    source: Any = Source("first")
    tasks = Tasks(source, stop)
    assert tasks.take() == "first"
    for _ in range(3):
        tasks.wait()
    assert tasks.take() is None


def test_an_order_that_the_node_has_left_for_the_next_is_given_up_and_the_next_is_taken(stop: threading.Event) -> None:
    source: Any = Source("first")
    tasks = Tasks(source, stop)
    assert tasks.take() == "first"
    tasks.wait()
    source.tokens = ["second", "third"]
    # Flower asks for pieces in several threads, and each of them is told.
    for _ in range(2):
        with pytest.raises(_WithdrawnError):
            tasks.wait()
    assert [tasks.take(), tasks.take(), tasks.take()] == ["second", "third", None]


def test_a_worker_that_is_to_end_waits_for_nothing(stop: threading.Event) -> None:
    source: Any = Source()
    tasks = Tasks(source, stop)
    stop.set()
    with pytest.raises(_WithdrawnError):
        tasks.wait()
