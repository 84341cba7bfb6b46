"""A reply that never arrives whole holds up neither the others nor the round."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run

from metarisk_common.flower_compat import identify_process
from metarisk_common.flower_grid import SteadyGrid


class Hub:
    """The hub's side of the Runtime API, for replies; it hands each out once, as the real one does."""

    def __init__(self, replies: dict[str, Message]) -> None:
        self._replies = dict(replies)
        self.pieces = {
            piece: value.deflate()
            for reply in replies.values()
            for piece, value in get_all_nested_objects(reply).items()
        }
        self.here = set(self.pieces)
        self.asked: list[str] = []
        self.confirmed: list[str] = []
        self.questions = 0

    def of(self, reply: Message) -> set[str]:
        return set(get_all_nested_objects(reply))

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802 - Flower's name
        self.questions += 1
        found = [self._replies.pop(asked) for asked in request.message_ids if asked in self._replies]
        return PullAppMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(reply)) for reply in found],
            message_object_trees=[get_object_tree(reply) for reply in found],
        )

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802 - as above
        piece = request.object_id
        self.asked.append(piece)
        there = piece in self.here
        content = self.pieces.get(piece, b"") if there else b""
        return PullObjectResponse(object_found=piece in self.pieces, object_available=there, object_content=content)

    def ConfirmMessageReceived(self, request: ConfirmMessageReceivedRequest) -> None:  # noqa: N802 - as above
        self.confirmed.append(request.message_object_id)


class Grid(SteadyGrid):
    def __init__(self, hub: Hub) -> None:
        super().__init__("127.0.0.1:1", b"", "token")
        self.hub: Any = hub
        self.set_run(Run.create_empty(7))

    @property
    def _runtime_client(self) -> Any:
        return self.hub


def reply(to: str, value: float) -> Message:
    identify_process(7, 3)
    order = Message(RecordDict(), 3, MessageType.TRAIN, ttl=60.0)
    order.metadata.__dict__["_message_id"] = to
    content = RecordDict({"update": ArrayRecord({"w": Array(np.full(5, value))})})
    made = Message(content, reply_to=order)
    made.metadata.__dict__["_message_id"] = made.object_id
    return made


@pytest.fixture
def replies() -> dict[str, Message]:
    return {"one": reply("one", 1.0), "two": reply("two", 2.0)}


def values(messages: Iterable[Message]) -> list[float]:
    return [float(message.content.array_records["update"].to_numpy_ndarrays()[0][0]) for message in messages]


def test_whole_replies_are_given_and_confirmed(replies: dict[str, Message]) -> None:
    hub = Hub(replies)
    found = list(Grid(hub).pull_messages(["one", "two", "three"]))
    assert values(found) == [1.0, 2.0]
    assert hub.confirmed == [message.metadata.message_id for message in found]
    assert [message.metadata.reply_to_message_id for message in found] == ["one", "two"]


def test_one_that_is_not_here_whole_holds_up_no_other_and_is_given_once_it_is(replies: dict[str, Message]) -> None:
    hub = Hub(replies)
    grid = Grid(hub)
    late = hub.of(replies["one"])
    hub.here -= {max(late)}
    assert values(grid.pull_messages(["one", "two"])) == [2.0]
    assert list(grid.pull_messages(["one"])) == []
    hub.here |= late
    asked = len(hub.asked)
    assert values(grid.pull_messages(["one"])) == [1.0]
    # What had arrived before was kept.
    assert hub.asked[asked:] == [max(late)]
    assert list(grid.pull_messages(["one"])) == []


def test_one_that_the_hub_has_given_up_is_an_error_as_flowers_own(replies: dict[str, Message]) -> None:
    hub = Hub(replies)
    del hub.pieces[max(hub.of(replies["one"]))]
    (found,) = Grid(hub).pull_messages(["one"])
    assert found.has_error()
    assert found.error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert found.metadata.reply_to_message_id == "one"


def test_looking_for_one_after_the_other_asks_once_for_all(replies: dict[str, Message]) -> None:
    hub = Hub(replies)
    grid = Grid(hub)
    grid._awaited = {"one", "two", "three", "four"}
    found = [list(grid.pull_messages([order])) for order in ("one", "two", "three", "four")]
    assert [len(pulled) for pulled in found] == [1, 1, 0, 0]
    assert hub.questions == 1
    assert list(grid.pull_messages(["three"])) == []
    assert hub.questions == 2
