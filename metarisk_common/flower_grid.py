"""Flower's grid, as a server that keeps its deadlines needs it."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, cast

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.superlink.grid import HttpGrid

_PULLS_AT_ONCE: Final = 2


@dataclass
class _Announced:
    """A reply that the hub knows of, and what has arrived of it."""

    tree: ObjectTree
    pieces: dict[str, bytes] = field(default_factory=dict)


class SteadyGrid(HttpGrid):
    """Flower's grid, but a reply that is announced and has not arrived whole holds nobody up.

    Flower waits for the rest of it, for minutes and past every deadline, and meanwhile the other replies expire: one
    bank that is cut off as it answers, or that means ill, would cost everybody the round. And whoever looks for one
    reply after the other asks the hub for all of them at once: it is as much work to it as asking for one.
    """

    def __init__(self, address: str, ca: bytes, token: str) -> None:
        """Connect lazily; `ca`: PEM of who vouches for the address."""
        super().__init__(address, insecure=False, root_certificates=ca, token=token)
        self._awaited: set[str] = set()
        self._announced: dict[str, _Announced] = {}
        self._quiet: set[str] = set()  # Those that the last question to the hub did not find, until they are asked for.
        self._group = ""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send orders; with the first of another group (a round), replies to earlier ones are no longer waited for."""
        orders = list(messages)
        if orders and orders[0].metadata.group_id != self._group:
            self._group = orders[0].metadata.group_id
            self._awaited, self._announced, self._quiet = set(), {}, set()
        ids = list(super().push_messages(orders))
        self._awaited.update(filter(None, ids))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Give the replies to messages, as far as they are here whole; it never waits."""
        replies = map(self._reply_to, message_ids)
        return [reply for reply in replies if reply is not None]

    def _look_for(self, message_id: str) -> None:
        """Ask which replies are there, unless this one was not when the hub was asked last."""
        if message_id in self._quiet:
            self._quiet.remove(message_id)
            return
        wanted = sorted((self._awaited | {message_id}) - self._announced.keys())
        found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=wanted))
        for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            self._announced[head.metadata.reply_to_message_id] = _Announced(tree)
        self._quiet = set(wanted) - self._announced.keys() - {message_id}

    def _reply_to(self, message_id: str) -> Message | None:
        client, run_id = self._runtime_client, self.run.run_id
        if message_id not in self._announced:
            self._look_for(message_id)
        if message_id not in self._announced:
            return None
        reply = self._announced[message_id]
        look = make_pull_object_fn_protobuf(client.PullObject, self.node, run_id)

        def fetch(piece: str) -> bool:
            if piece not in reply.pieces:
                try:
                    reply.pieces[piece] = look(piece)
                except ObjectUnavailableError:
                    return False
            return True

        try:
            with ThreadPoolExecutor(_PULLS_AT_ONCE) as pool:
                whole = all(pool.map(fetch, [part.object_id for part in iterate_object_tree(reply.tree)]))
        except ObjectPullError:
            self._awaited.discard(message_id)
            return self._lost(message_id)
        if not whole:
            return None
        head = reply.tree.object_id
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=head)
        )
        del self._announced[message_id]
        self._awaited.discard(message_id)
        message = cast("Message", inflate_object_from_contents(head, reply.pieces))
        vars(message.metadata)["_message_id"] = head
        return message

    def _lost(self, message_id: str) -> Message:
        """Say, as Flower does, that the hub has given a reply up."""
        me, kind = self.node.node_id, SYSTEM_MESSAGE_TYPE
        metadata = Metadata(self.run.run_id, "", me, me, message_id, "", 0.0, 0.0, kind)
        return make_message(metadata=metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, "the reply did not arrive"))
