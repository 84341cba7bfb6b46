"""Children are kept alive, restarted with patience, ended in good order, and never outlive their parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from metarisk_common.errors import MetariskError
from metarisk_common.supervise import (
    FIRST_WAIT_SECONDS,
    LONGEST_WAIT_SECONDS,
    STEADY_SECONDS,
    Child,
    end_process,
    only_instance,
    stop_on_signals,
)

PYTHON = sys.executable


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def child(clock: Clock, code: str, settled: frozenset[int] = frozenset()) -> Child:
    return Child("child", [PYTHON, "-c", code], dict(os.environ), clock, settled)


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(one: Child) -> None:
    assert one.process is not None
    one.process.wait(60)


def test_a_child_that_fails_is_started_again_later_and_later() -> None:
    clock = Clock()
    one = child(clock, "raise SystemExit(1)")
    waits: list[float] = []
    for _ in range(7):
        one.tend()
        ended(one)
        one.tend()  # Notes the end; not due yet.
        assert one.process is None
        wait = FIRST_WAIT_SECONDS
        while True:
            clock.now += 0.25
            one.tend()
            if one.process is not None:
                break
            wait += 0.25
        waits.append(wait)
    assert waits == sorted(waits)
    assert waits[-1] <= LONGEST_WAIT_SECONDS + FIRST_WAIT_SECONDS
    assert waits[0] <= FIRST_WAIT_SECONDS + 0.25
    one.end(10)


def test_a_child_that_has_lived_is_started_again_at_once() -> None:
    clock = Clock()
    one = child(clock, "raise SystemExit(1)")
    for _ in range(5):
        one.tend()
        ended(one)
        one.tend()
        clock.now += LONGEST_WAIT_SECONDS
    one.tend()
    ended(one)
    clock.now += STEADY_SECONDS
    one.tend()
    clock.now += FIRST_WAIT_SECONDS
    one.tend()
    assert one.process is not None
    one.end(10)


def test_what_no_restart_mends_ends_the_daemon() -> None:
    one = child(Clock(), "raise SystemExit(78)", frozenset({78}))
    one.tend()
    ended(one)
    with pytest.raises(MetariskError, match="the child cannot work as it is configured"):
        one.tend()


def test_who_does_not_hear_is_made_to_end() -> None:
    code = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"deaf\n"
    end_process(process, 0.2)
    assert process.returncode == -signal.SIGKILL
    process.stdout.close()


def test_one_instance_at_a_time_whatever_became_of_the_last(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom metarisk_common.supervise import only_instance\n"
        f"with only_instance(Path({str(lock)!r}), 'taken'):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    other = subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(MetariskError, match="taken"), only_instance(lock, "taken"):
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    with only_instance(lock, "taken"):
        pass


def test_a_killed_parent_takes_its_children_along(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    inner = (
        "import os, time\nfrom pathlib import Path\nfrom metarisk_common.supervise import end_with_parent\n"
        f"end_with_parent(0.05)\nPath({str(mark)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    )
    outer = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {inner!r}]).wait()"
    parent = subprocess.Popen([PYTHON, "-c", outer])
    wait_for(lambda: mark.exists() and mark.read_text())
    pid = int(mark.read_text())
    parent.kill()
    parent.wait()

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_for(gone)


def test_signals_set_the_event_and_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(10)
    assert signal.getsignal(signal.SIGTERM) == before
