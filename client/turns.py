"""Whose turn it is at a bank's ledger: one order is answered at a time, and a daemon can see whether one is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from metarisk_common.supervise import try_lock

from .config import Institution

POLL_SECONDS: Final = 0.05
LONGEST_POLL_SECONDS: Final = 0.5
_SHARE_OF_IDLE = 0.1
CANNOT_OPEN: Final = 78
"""Exit code (EX_CONFIG) of a worker whose bank cannot be opened: starting it again would change nothing."""


def patience(idle_seconds: float, shortest: float, longest: float) -> float:
    """How long to wait until the next look, a tenth of the time that nothing has come, in seconds.

    So looking adds a tenth at most to any wait, and one who is idle costs next to nothing.
    """
    return min(longest, max(shortest, _SHARE_OF_IDLE * idle_seconds))


def answer_lock(institution: Institution) -> Path:
    """Lock file beside the ledger: whoever answers an order from this ledger holds it."""
    return institution.ledger_path.with_name(f"{institution.ledger_path.name}.lock")


@contextmanager
def busy(institution: Institution) -> Iterator[None]:
    """Hold the ledger's lock while an order is answered: one process at a time, and a daemon can see it."""
    with answer_lock(institution).open("a") as stream:
        while not try_lock(stream.fileno()):
            time.sleep(POLL_SECONDS)
        yield


def is_busy(institution: Institution) -> bool:
    """Whether an order is being answered at this moment."""
    with answer_lock(institution).open("a") as stream:
        return not try_lock(stream.fileno())


def is_served(institution: Institution) -> bool:
    """Whether a daemon serves this folder."""
    if not institution.daemon_lock.exists():
        return False
    with institution.daemon_lock.open("a") as stream:
        return not try_lock(stream.fileno())
