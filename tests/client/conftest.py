"""What tests of a bank's commands share: a terminal with somebody at it."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def type_at_a_terminal(folder: Path, arguments: Sequence[str], typed: Sequence[tuple[str, str]]) -> tuple[int, str]:
    """Run a command with a terminal, and type each answer once its question is on the screen."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "client.cli", *arguments]
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen, waiting, rest = "", list(typed), ""
        deadline = time.monotonic() + 60
        while select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                part = os.read(ours, 4096)
            except OSError:  # The other end is closed.
                break
            if not part:
                break
            seen, rest = seen + part.decode(), rest + part.decode()
            if waiting and waiting[0][0] in rest:
                question, answer = waiting.pop(0)
                rest = rest.split(question, 1)[1]
                os.write(ours, f"{answer}\n".encode())
        os.close(ours)
        return process.wait(60), seen


@pytest.fixture(scope="session")
def at_a_terminal() -> Callable[..., tuple[int, str]]:
    return type_at_a_terminal
