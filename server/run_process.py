"""One run, as a process of its own: the installed `server.app`, on the grid that reaches the banks.

The hub may crash and come back, the process goes on; if the process itself is lost, the run's folder holds every
finished round, and `metarisk-server run --resume` starts another.

Run as `python -m server.run_process FOLDER`; the token that proves the hand-over comes in a line on standard input.
"""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from metarisk_common import logs
from metarisk_common.bundle import RUN_KEY
from metarisk_common.errors import ConfigError, MetariskError
from metarisk_common.flower_deployment import ServerTask
from metarisk_common.supervise import end_with_parent, only_instance

from .app import RUN_FOLDER_KEY, SERVER_FOLDER_KEY, app
from .config import Server, load_server

log = logging.getLogger("metarisk.server.run")

LOCK_FILE = "run.lock"


class _EndedError(Exception):
    """SIGTERM: the operator's daemon goes down."""


def play(server: Server, token: str) -> int:
    """Play the run of a token to its end, and tell Flower how it ended; returns the exit code."""
    try:
        return _play(server, token)
    except BaseException as error:
        if isinstance(error, Exception | SystemExit):
            raise
        # What is no Exception, Flower raises where the hub no longer takes the token: the run was stopped there.
        log.info("run ended: it was stopped")
        return 1


def _play(server: Server, token: str) -> int:
    ca = server.folder.ca_certificate.read_bytes()
    failure: str | None = None
    with ServerTask(server.inside_address, token, ca) as task:
        try:
            folder = run_folder(server, task.context.run_config.get(RUN_KEY))
            with only_instance(folder / LOCK_FILE, f"{folder}: the run goes on already; see metarisk-server status"):
                task.context.run_config = {RUN_FOLDER_KEY: str(folder), SERVER_FOLDER_KEY: str(server.folder.path)}
                log.info("run started", extra={"run": folder.name})
                with _term_raised():
                    app(task.grid, task.context)
        except MetariskError as error:
            failure = str(error)
        except _EndedError:
            failure = "the server was stopped"
        except OSError as error:
            failure = f"a file cannot be written: {error.strerror or type(error).__name__}"
        except httpx.HTTPError as error:
            failure = f"the hub gave no usable answer: {type(error).__name__}"
        except Exception as error:
            failure = f"the program failed: {type(error).__name__}; its log says where"
            log.exception("the run failed")
        log.log(logging.INFO if failure is None else logging.ERROR, "run ended: %s", failure or "completed")
        try:
            task.finish(failure)
        except httpx.HTTPError as error:
            # The daemon tells the hub again, until it is heard.
            log.error("the hub did not take that in: %s", type(error).__name__)  # noqa: TRY400 - the name says it all
            return 1
    return 0 if failure is None else 1


def run_folder(server: Server, name: object) -> Path:
    """Find the folder of a run, which lies in the operator's own and nowhere else.

    Raises:
        ConfigError: there is none of that name.

    """
    if not isinstance(name, str) or Path(name).name != name or not (server.folder.runs / name / "run.json").is_file():
        raise ConfigError("the run's configuration names no run of this server; start runs with: metarisk-server run")
    return server.folder.runs / name


@contextmanager
def _term_raised() -> Iterator[None]:
    def end(*_: object) -> None:
        raise _EndedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    end_with_parent()
    logs.set_up("run")
    sys.exit(play(load_server(Path(sys.argv[1])), sys.stdin.readline().strip()))
