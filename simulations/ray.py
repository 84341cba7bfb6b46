"""The same apps on Flower's own simulation engine, which runs every bank's app in Ray actors."""

import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from metarisk_common.errors import ConfigError, MetariskError
from metarisk_common.flower_compat import run_on_ray
from server.app import RUN_FOLDER_KEY

from .inprocess import Node, load_app

_POLL_SECONDS = 0.05
_START_SECONDS = 120.0


class _StoppedError(Exception):
    """Ctrl-C, where the server runs."""


def run_apps_on_ray(
    server_app: ServerApp, client_app: str, nodes: Sequence[Node], *, workers: int, run_config: dict[str, Any]
) -> None:
    """Run a ServerApp with one virtual node a bank.

    Flower gives its virtual nodes a number and no configuration, so a thin app in front looks the bank up by
    that number and hands the message on, unchanged, to the production app. Flower also starts the server before
    its nodes are there, in a thread that does not hear of Ctrl-C, so a thin app stands in front of it as well.

    Raises:
        ConfigError: the extra `ray` is not installed.
        MetariskError: Ray has not brought up every node in time.
        KeyboardInterrupt: Ctrl-C; the last finished round is on the disk.

    """
    configs = [dict(node.config) for node in nodes]
    front = ClientApp()
    waiting = ServerApp()

    @front.train()
    def train(message: Message, context: Context) -> Message:
        config = {**context.node_config, **configs[int(context.node_config["partition-id"])]}
        inner = Context(context.run_id, context.node_id, config, context.state, context.run_config)
        return load_app(client_app)(message, inner)

    with _interrupts_noted() as stopped:

        @waiting.main()
        def main(grid: Grid, context: Context) -> None:
            _wait_for_nodes(grid, len(nodes), stopped)
            server_app(_stoppable(grid, stopped), context)

        try:
            home = Path(str(run_config[RUN_FOLDER_KEY])) / "flower"
            run_on_ray(waiting, front, nodes=len(nodes), run_config=run_config, workers=max(1, workers), home=home)
        except ImportError:
            message = "--engine ray needs the extra: pip install 'metarisk-federated[ray]'"
            raise ConfigError(message) from None
        except _StoppedError:
            raise KeyboardInterrupt from None


def _wait_for_nodes(grid: Grid, count: int, stopped: threading.Event) -> None:
    end = time.monotonic() + _START_SECONDS
    while len(list(grid.get_node_ids())) < count:
        if time.monotonic() > end:
            raise MetariskError(f"Ray has not started {count} nodes within {_START_SECONDS:.0f} seconds")
        if stopped.wait(_POLL_SECONDS):
            raise _StoppedError


def _stoppable(grid: Grid, stopped: threading.Event) -> Grid:
    """Let the server end at its next look for replies once `stopped` is set."""
    pull = grid.pull_messages

    def pull_unless_stopped(message_ids: Iterable[str]) -> Iterable[Message]:
        if stopped.is_set():
            raise _StoppedError
        return pull(message_ids)

    grid.pull_messages = pull_unless_stopped  # type: ignore[method-assign]  # of this one grid, for one run
    return grid


@contextmanager
def _interrupts_noted() -> Iterator[threading.Event]:
    """Note Ctrl-C instead of raising it in the main thread, where Flower would first wait for the run's end."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # Signals are for the main thread alone.
        return
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
