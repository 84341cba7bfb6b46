"""The bank's daemon: keeps the SuperNode and the worker alive for as long as it runs itself.

SIGTERM drains: the node takes no further order and delivers the answer in hand, then the worker ends. What the
network, the hub or a killed child do to it, it goes on; what a bank would have to mend, ends it with one line.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from metarisk_common.errors import ConfigError
from metarisk_common.supervise import Child, only_instance, stop_on_signals

from .approval import open_ledger
from .config import Institution, load_institution
from .metrics import serve_metrics
from .node import LOOPBACK, arguments
from .turns import CANNOT_OPEN, is_busy

log = logging.getLogger("metarisk.client.daemon")

_POLL_SECONDS = 0.2
_DRAIN_SECONDS = 15.0
_NODE_END_SECONDS = 5.0
_ANSWER_SECONDS = 600.0


def up(folder: Path) -> None:
    """Serve a bank's folder until SIGTERM or Ctrl-C.

    Raises:
        ConfigError: `institution.toml` is wrong, or names no server.
        IntegrityError: the ledger is damaged.
        MetariskError: another daemon serves the folder.

    """
    institution = load_institution(folder.resolve())
    refusal = f"{folder}: another daemon serves this bank already; stop it first"
    with stop_on_signals() as stop, ExitStack() as stack:
        stack.enter_context(only_instance(institution.daemon_lock, refusal))
        port = free_port()
        arguments(institution, port)
        # What is wrong with the folder is said here, before anything starts.
        if institution.config.simulation is not None:
            raise ConfigError(
                f"{folder}: section [simulation] of institution.toml seeds the noise, which protects nobody"
            )
        open_ledger(institution).close()
        if institution.config.metrics.port:
            stack.enter_context(serve_metrics(institution.folder, institution.config.metrics.port))
        node, worker = children(institution, port)
        log.info("the bank is up", extra={"bank": institution.config.name, "pid": os.getpid()})
        try:
            while not stop.is_set():
                worker.tend()
                node.tend()
                stop.wait(_POLL_SECONDS)
            log.info("stopping: the answer in hand is finished first")
            drain(institution, node)
        finally:
            node.end(_NODE_END_SECONDS)
            worker.end(_ANSWER_SECONDS)
        log.info("the bank is down")


def children(institution: Institution, port: int) -> tuple[Child, Child]:
    """Describe the SuperNode and the worker of a folder, which meet at a loopback port."""
    environment = environment_of(institution)
    place = [str(institution.folder), str(port)]
    python = [sys.executable, "-m"]
    return (
        Child("node", [*python, "client.node", *place], environment, time.monotonic),
        Child("worker", [*python, "client.worker", *place], environment, time.monotonic, frozenset({CANNOT_OPEN})),
    )


def environment_of(institution: Institution) -> Mapping[str, str]:
    """Environment of the bank's Flower processes: nothing calls home, and Flower writes in the bank's folder."""
    return {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(institution.home),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def drain(institution: Institution, node: Child) -> None:
    """Let the node deliver what it has in hand and end; a node that cannot reach the hub is not waited for."""
    node.signal(signal.SIGUSR1)
    last_busy = time.monotonic()
    while node.alive and time.monotonic() - last_busy < _DRAIN_SECONDS:
        if is_busy(institution):
            last_busy = time.monotonic()
        time.sleep(_POLL_SECONDS / 2)


def free_port() -> int:
    """Find a loopback port that nobody uses."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
