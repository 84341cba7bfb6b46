"""What tests of a bank's commands share: a terminal with somebody at it, and a PostgreSQL."""

import os
import pty
import pwd
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "s3cr3t-p4ss"  # noqa: S105 - of a database that lives as long as the tests


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


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A PostgreSQL of the tests' own behind a socket; its URL holds a password."""
    programs = [shutil.which(name) for name in ("initdb", "pg_ctl", "postgres")]
    if None in programs:
        pytest.skip("PostgreSQL is not installed: initdb, pg_ctl and postgres must be in PATH")
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    root = os.geteuid() == 0
    who: dict[str, Any] = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []} if root else {}
    with tempfile.TemporaryDirectory(prefix="mr-") as place:  # A socket's path must be short, and nobody's own.
        folder = Path(place)
        (folder / "password").write_text(PASSWORD)
        if root:
            for path in (folder, folder / "password"):
                shutil.chown(path, "nobody", who["group"])

        def run(*command: str) -> None:
            subprocess.run(command, check=True, cwd=place, stdout=subprocess.DEVNULL, timeout=60, **who)

        data = f"{place}/data"
        try:
            options = f"-U bank --auth=scram-sha-256 --pwfile={place}/password -N -E UTF8"
            run("initdb", "-D", data, *options.split())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"PostgreSQL cannot be set up by this user: {type(error).__name__}")
        options = f"-c listen_addresses='' -c unix_socket_directories={place} -c fsync=off"
        run("pg_ctl", "-D", data, "-w", "-o", options, "-l", f"{place}/log", "start")
        url = f"postgresql+psycopg://bank:{PASSWORD}@/postgres?host={place}"
        try:
            yield url
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
