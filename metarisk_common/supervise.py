"""Keeping child processes alive: start, restart with back-off, end in good order. What both daemons share."""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from .errors import MetariskError

log = logging.getLogger("metarisk.supervise")

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 10.0
STEADY_SECONDS = 60.0
"""A child that lived this long has started well: its next failure is waited for anew."""


_LOOKS, _LOOK_SECONDS = 4, 0.05
_BRIEFLY = threading.Event()  # Never set: waiting for it is a pause.


@dataclass
class Child:
    """A process to be kept alive. `tend` it often; it never blocks.

    `clock` gives seconds that never go back, as `time.monotonic` does. `settled` are exit codes after which a restart
    is pointless: the child has said what is wrong, and only a person can mend it.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    clock: Callable[[], float]
    settled: frozenset[int] = frozenset()
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    restarts: int = field(default=0, init=False)
    _started: float = field(default=0.0, init=False)
    _next_start: float = field(default=0.0, init=False)
    _wait: float = field(default=FIRST_WAIT_SECONDS, init=False)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def tend(self) -> None:
        """Start it if it is due.

        Raises:
            MetariskError: it has ended with one of the `settled` codes.

        """
        if self.alive:
            return
        now = self.clock()
        if self.process is not None:
            code, self.process = self.process.returncode, None
            if code in self.settled:
                raise MetariskError(f"the {self.name} cannot work as it is configured; its last line above says why")
            if now - self._started >= STEADY_SECONDS:
                self._wait = FIRST_WAIT_SECONDS
            self._next_start, self._wait = now + self._wait, min(2 * self._wait, LONGEST_WAIT_SECONDS)
            self.restarts += 1
            log.warning(
                "the %s ended with code %s; it is started again in %.1f seconds",
                self.name,
                code,
                self._next_start - now,
            )
        if now >= self._next_start:
            self._started = now
            self.process = subprocess.Popen(  # noqa: S603 - a command line of our own
                self.command, env=dict(self.environment), stdin=subprocess.DEVNULL, start_new_session=True
            )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def end(self, timeout_seconds: float) -> None:
        """Ask it to end, and after a while make it."""
        end_process(self.process, timeout_seconds)
        self.process = None


def end_process(process: subprocess.Popen[bytes] | None, timeout_seconds: float) -> None:
    """SIGTERM, and SIGKILL if that is not heard in time."""
    if process is None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_with_parent(poll_seconds: float = 1.0) -> None:
    """Have this process end in good order when its parent is no more; a killed parent can't tell its children."""
    parent = os.getppid()

    def watch() -> None:
        never = threading.Event()
        while os.getppid() == parent:
            never.wait(poll_seconds)
        os.kill(os.getpid(), signal.SIGTERM)
        never.wait(10 * poll_seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or SIGINT sets, instead of ending the process."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_instance(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file while the block runs. The system lets it go with the process, however that ends.

    Raises:
        MetariskError: another process holds it; `refusal` is its text.

    """
    with path.open("a") as stream:
        # Whoever only looks whether it is held, holds it for that moment: so try more than once.
        if not any(try_lock(stream.fileno()) or _BRIEFLY.wait(_LOOK_SECONDS) for _ in range(_LOOKS)):
            raise MetariskError(refusal)
        yield


def try_lock(descriptor: int) -> bool:
    """Lock an open file if nobody else has; it is unlocked when it is closed."""
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    return True
