"""A Flower `Grid` on one machine: the server app in this process, every bank's app here or in worker processes.

The apps are the production ones, unchanged, and messages are Flower's own. With workers, a message crosses to
another process in Flower's wire format; a bank always goes to the same worker, which keeps it open.
"""

import importlib
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from metarisk_common.errors import MetariskError
from metarisk_common.flower_compat import (
    NodeInfo,
    Run,
    identify_process,
    message_from_bytes,
    message_to_bytes,
    node_infos,
    set_message_id,
)

RUN_ID = 1
_SERVER_NODE_ID = 1
_FIRST_NODE_ID = 1000
_CLIENT_ERROR = 2


@dataclass(frozen=True)
class Node:
    """One bank: its name and what its node's configuration says."""

    name: str
    config: Mapping[str, str]


class InProcessGrid(Grid):
    """A grid over local banks. `workers=0` runs them in this process, one after another, as replies are pulled.

    Args:
        client_app: where the ClientApp is, as `package.module:name`; with `workers=0` the app itself will do.
        nodes: the banks; node ids are given in this order.
        workers: processes that share the banks between them.

    """

    def __init__(self, client_app: ClientApp | str, nodes: Sequence[Node], *, workers: int = 0) -> None:
        """Start the workers, if any; they import the app while this process goes on."""
        identify_process(RUN_ID, _SERVER_NODE_ID)
        self._client_app = client_app
        self._nodes = {_FIRST_NODE_ID + index: node for index, node in enumerate(nodes)}
        self._contexts = {
            node_id: Context(RUN_ID, node_id, dict(node.config), RecordDict(), {})
            for node_id, node in self._nodes.items()
        }
        self._waiting: dict[str, Message | Future[bytes]] = {}
        self._run = Run.create_empty(RUN_ID)
        self._pools: list[ProcessPoolExecutor] = []
        self._others = set(multiprocessing.active_children())
        if workers:
            if not isinstance(client_app, str):
                raise ValueError("with workers, client_app must be given as 'package.module:name'")
            self._pools = [_started_pool(1, _start_worker, client_app) for _ in range(min(workers, len(nodes)))]

    def __enter__(self) -> Self:
        """Return the grid; leaving the block ends its workers."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers: in good order, or at once if the block failed, which no bank's ledger minds."""
        if kind is not None:
            _end_children_since(self._others)
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)

    def set_run(self, run: Run) -> None:
        """Keep what Flower says of the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """What Flower says of the run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Build a message from the server to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Every bank is always online."""
        return list(self._nodes)

    def get_nodes(self) -> list[NodeInfo]:
        """Every bank with its name."""
        return node_infos((node_id, node.name) for node_id, node in self._nodes.items())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages for nodes; workers begin at once.

        Raises:
            MetariskError: a worker process has died.

        """
        ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            set_message_id(message, message_id)
            if self._pools:
                pool = self._pools[message.metadata.dst_node_id % len(self._pools)]
                config = dict(self._nodes[message.metadata.dst_node_id].config)
                with lost_worker_told():
                    self._waiting[message_id] = pool.submit(_serve, message_to_bytes(message), config)
            else:
                self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are ready, each once.

        Raises:
            MetariskError: a worker process has died.

        """
        replies = []
        for message_id in message_ids:
            item = self._waiting.get(message_id)
            if isinstance(item, Message):
                replies.append(self._answer_here(item))
            elif item is not None and item.done():
                with lost_worker_told():
                    replies.append(message_from_bytes(item.result()))
            else:
                continue
            del self._waiting[message_id]
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and wait for every reply, as Flower's own strategies do; `timeout` in seconds."""
        ids = self.push_messages(messages)
        waiting = (self._waiting[message_id] for message_id in ids)
        wait_for([item for item in waiting if isinstance(item, Future)], timeout)
        return self.pull_messages(ids)

    def _answer_here(self, message: Message) -> Message:
        app = load_app(self._client_app) if isinstance(self._client_app, str) else self._client_app
        return answer(app, message, self._contexts[message.metadata.dst_node_id])


def answer(app: ClientApp, message: Message, context: Context) -> Message:
    """Let an app answer; an exception becomes Flower's code for one, without its text.

    Raises:
        MetariskError: the bank could not be opened. Of that the person at the simulation should hear: the text
            names the file, and holds no data.

    """
    try:
        reply = app(message, context)
    except MetariskError:
        raise
    except Exception as error:  # noqa: BLE001 - as Flower does: the node reports a failure, the round goes on
        reply = Message(Error(_CLIENT_ERROR, type(error).__name__), reply_to=message)
    set_message_id(reply, uuid.uuid4().hex)
    return reply


def load_app(reference: str) -> ClientApp:
    """Import `package.module:name`."""
    module, _, name = reference.partition(":")
    app: ClientApp = getattr(importlib.import_module(module), name)
    return app


def run_apps(server_app: ServerApp, grid: InProcessGrid, run_config: Mapping[str, Any]) -> None:
    """Run a ServerApp on the grid until it ends; its exceptions pass."""
    context = Context(RUN_ID, _SERVER_NODE_ID, {}, RecordDict(), dict(run_config))
    server_app(grid, context)


@contextmanager
def worker_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that leave Ctrl-C to this one, end with it, and are ended at once if the block fails."""
    others = set(multiprocessing.active_children())
    pool = _started_pool(processes, _bind_to_parent)
    try:
        with lost_worker_told():
            yield pool
    except BaseException:
        _end_children_since(others)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def lost_worker_told() -> Iterator[None]:
    """Turn the death of a worker process into a MetariskError that says what can be done."""
    try:
        yield
    except BrokenProcessPool:
        raise MetariskError("a worker process has died; what is finished is kept: go on with --resume") from None


def _end_children_since(others: set[BaseProcess]) -> None:
    for process in set(multiprocessing.active_children()) - others:
        process.terminate()


def _started_pool(processes: int, prepare: Callable[..., None], *arguments: str) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=prepare, initargs=arguments)
    # Workers inherit the mask: Ctrl-C while they still import would make each of them print a traceback.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        pool.submit(os.getpid)  # Without something to do, none would start before the first order.
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return pool


_worker_app: ClientApp | None = None


def _start_worker(reference: str) -> None:
    """Prepare a worker of the grid: import the app."""
    _bind_to_parent()
    identify_process(RUN_ID, _FIRST_NODE_ID)
    global _worker_app  # noqa: PLW0603 - a worker process serves one app for its whole life
    _worker_app = load_app(reference)


def _bind_to_parent() -> None:
    """Leave Ctrl-C to the parent, and end when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent can't tell its workers; a pool's worker would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _serve(data: bytes, node_config: dict[str, str]) -> bytes:
    message = message_from_bytes(data)
    if _worker_app is None:
        raise RuntimeError("the worker was not started")
    context = Context(RUN_ID, message.metadata.dst_node_id, dict(node_config), RecordDict(), {})
    return message_to_bytes(answer(_worker_app, message, context))
