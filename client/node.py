"""The bank's SuperNode as a process of its own: it speaks with the hub and hands orders to the worker.

It polls as often as there is work: a tenth of the time that nothing has come, between a tenth of a second and
three, so a round waits little and an idle bank costs the hub next to nothing. SIGUSR1 drains it: it finishes the
message that it has in hand, and ends.

Run as `python -m client.node FOLDER PORT`.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import uvicorn.config

from metarisk_common import logs
from metarisk_common.errors import ConfigError
from metarisk_common.flower_deployment import run_supernode
from metarisk_common.supervise import end_with_parent

from .config import Institution, load_institution
from .turns import patience

log = logging.getLogger("metarisk.client.node")

LOOPBACK: Final = "127.0.0.1"
SHORTEST_POLL_SECONDS: Final = 0.1
LONGEST_POLL_SECONDS: Final = 3.0
LINGER_SECONDS: Final = 3.0
"""The hub forgets an answer that the server has not fetched when its node leaves: a drained node leaves this late."""
_FLOWER_IDLE_SECONDS = 3.0
_HUB_LOST = 75  # EX_TEMPFAIL


class Patience:
    """How long to wait until the next look for a message, by how long none has come.

    `clock` and `sleep` are those of `time`; `drained` is called once a drain was asked for and nothing is in hand.
    """

    def __init__(self, clock: Callable[[], float], sleep: Callable[[float], None], drained: Callable[[], None]) -> None:
        """Begin as if a message had just come."""
        self._clock, self._sleep, self._drained = clock, sleep, drained
        self._last_work = self._idle_since = clock()
        self._connected = self._idle = False
        self.draining = False

    def __call__(self, seconds: float) -> None:
        """Wait instead of Flower, which asks for 3 seconds where it found nothing and for less while it has work."""
        if not self._connected:
            # Flower asks for the first time once the hub has let the node in.
            self._connected = True
            log.info("connected to the hub")
        if seconds < _FLOWER_IDLE_SECONDS:
            self._last_work, self._idle = self._clock(), False
            self._sleep(min(seconds, SHORTEST_POLL_SECONDS / 2))
            return
        if not self._idle:
            self._idle_since, self._idle = self._clock(), True
        if self.draining:
            self._sleep(max(0.0, LINGER_SECONDS - (self._clock() - self._idle_since)))
            self._drained()
        self._sleep(patience(self._clock() - self._last_work, SHORTEST_POLL_SECONDS, LONGEST_POLL_SECONDS))


def arguments(institution: Institution, port: int) -> list[str]:
    """Command line of the SuperNode for a bank's folder.

    Raises:
        ConfigError: the folder names no server.

    """
    server = institution.config.server
    if server is None:
        raise ConfigError(f"{institution.folder}: institution.toml has no section [server] with address and ca")
    return [
        "--superlink", server.address,
        "--root-certificates", str(institution.folder / server.ca),
        "--auth-supernode-private-key", str(institution.node_key),
        "--host", LOOPBACK, "--port", str(port),
        "--isolation", "process", "--superexec-auth-secret-file", str(institution.superexec_secret),
    ]  # fmt: skip


def end_with_any_thread() -> None:
    """Have this process end, in good order, when one of its threads fails; the daemon starts another.

    Flower's thread that tells the hub that the node is there ends for ever at one answer that it does not expect, as
    from a hub whose disk is full. The node would go on, and be taken for offline.
    """
    said = threading.excepthook

    def end(caught: threading.ExceptHookArgs) -> None:
        said(caught)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.excepthook = end


def serve(institution: Institution, port: int) -> None:
    """Run the SuperNode until it is drained or a signal ends it."""
    patience = Patience(time.monotonic, time.sleep, lambda: os.kill(os.getpid(), signal.SIGTERM))

    def drain(*_: object) -> None:
        patience.draining = True

    signal.signal(signal.SIGUSR1, drain)
    end_with_any_thread()
    # Of every message Flower says four lines, one of them empty; what the bank did with it, its worker says.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    # Flower starts a server with uvicorn's own logging, which would write lines of another kind between these.
    uvicorn.config.LOGGING_CONFIG.clear()
    uvicorn.config.LOGGING_CONFIG.update(version=1, disable_existing_loggers=False)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    try:
        run_supernode(arguments(institution, port), patience)
        log.warning("the hub was lost within a handshake, after which Flower does not try again")
    except Exception as error:  # noqa: BLE001 - whatever ends it, the daemon is to start another
        log.error("the node failed: %s", type(error).__name__)  # noqa: TRY400 - as in client.bank
    # Flower's local server would keep this process alive, and the daemon would take it for a node.
    os._exit(_HUB_LOST)


if __name__ == "__main__":
    end_with_parent()
    logs.set_up("node")
    serve(load_institution(Path(sys.argv[1])), int(sys.argv[2]))
