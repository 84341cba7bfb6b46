"""The operator's daemon: keeps the hub alive and gives every run a process.

It plays the part of Flower's SuperExec, except that it starts the installed server and not the code in a bundle. A
hub that crashes is started again on the same state, and runs go on meanwhile. A run whose process is lost is told to
the hub as failed at once, so that `run --resume` can go on with it.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from metarisk_common.errors import MetariskError
from metarisk_common.flower_deployment import TaskSource
from metarisk_common.supervise import Child, end_process, only_instance, stop_on_signals

from . import federation
from .certificates import check_certificate, days_left
from .config import Server, load_server
from .metrics import serve_metrics

log = logging.getLogger("metarisk.server.daemon")

LOCK_FILE = "daemon.lock"
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0
_RUN_END_SECONDS = 15.0
_HUB_END_SECONDS = 10.0
_WARN_DAYS = 30
_SERVER_ERROR = 500


@dataclass(frozen=True)
class RunProcess:
    """The process of a run, and the token that speaks for the run at the hub."""

    process: subprocess.Popen[bytes]
    token: str


def up(path: Path) -> None:
    """Serve an operator's folder until SIGTERM or Ctrl-C.

    Raises:
        ConfigError: `server.toml` is wrong, or a port is taken.
        MetariskError: another daemon serves the folder.

    """
    server = load_server(path)
    refusal = f"{path}: another daemon serves this consortium already; stop it first"
    with stop_on_signals() as stop, ExitStack() as stack:
        stack.enter_context(only_instance(server.folder.path / LOCK_FILE, refusal))
        check_certificate(server.folder)
        days = days_left(server.folder)
        if days < _WARN_DAYS:
            log.warning(
                "the hub's certificate ends in %d days; renew it with: metarisk-server certificate --renew", days
            )
        if server.config.metrics.port:
            online = federation.CachedOnline(server, time.monotonic)
            stack.enter_context(serve_metrics(server, online, server.config.metrics.port))
        hub = Child(
            "hub", [sys.executable, "-m", "server.hub", str(server.folder.path)], environment(server), time.monotonic
        )
        source = TaskSource(
            server.inside_address,
            kind="server",
            secret=server.folder.superexec_secret.read_bytes(),
            ca=server.folder.ca_certificate.read_bytes(),
        )
        runs: list[RunProcess] = []
        lookout, next_look = Lookout(server, source), 0.0
        log.info("the server is up", extra={"consortium": server.config.name, "pid": os.getpid()})
        try:
            while not stop.is_set():
                hub.tend()
                runs = [run for run in runs if not has_ended(run, source)]
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + _LOOK_SECONDS
                    token = lookout.look()
                    if token is not None:
                        runs.append(RunProcess(start_run(server, token), token))
                stop.wait(_POLL_SECONDS)
        finally:
            log.info("stopping: what is finished of a run is kept")
            for run in runs:
                run.process.terminate()
            for run in runs:
                end_process(run.process, _RUN_END_SECONDS)
            hub.end(_HUB_END_SECONDS)
        log.info("the server is down")


@dataclass
class Lookout:
    """Keeps an eye on the hub: has it agree with the allow-list, tells which banks come and go, and finds new runs."""

    server: Server
    source: TaskSource
    _agreed: bool = field(default=False, init=False)
    _settled: bool = field(default=False, init=False)
    _online: Mapping[str, bool] = field(default_factory=dict, init=False)

    def look(self) -> str | None:
        """Look once; the token of a run that wants a process, if there is one, and none while the hub is down."""
        try:
            if not self._agreed:
                federation.agree(self.server)
                if not self._settled:
                    federation.settle(self.server)
                self._agreed = self._settled = True
                log.info("the hub answers", extra={"outside_port": self.server.config.outside.port})
            self._tell_changes()
            return self.source.acquire()
        except httpx.HTTPError:
            self._agreed = False
            return None

    def _tell_changes(self) -> None:
        try:
            now = federation.online(self.server)
        except MetariskError:
            return
        for name, here in now.items():
            if here != self._online.get(name, False):
                log.info("a bank is online" if here else "a bank is offline", extra={"bank": name})
        self._online = now


def has_ended(run: RunProcess, source: TaskSource) -> bool:
    """Whether a run's process has ended and the hub knows it; one that was killed could not tell it itself."""
    code = run.process.poll()
    if code is None:
        return False
    if code == 0:
        return True
    try:
        source.give_up(run.token, f"the run's process ended with code {code}")
    except httpx.HTTPStatusError as error:
        # The hub no longer takes the token of a run whose process has told how it ended.
        return error.response.status_code < _SERVER_ERROR
    except httpx.HTTPError:
        return False
    log.error("a run's process ended with code %d before it could tell the hub", code)
    return True


def start_run(server: Server, token: str) -> subprocess.Popen[bytes]:
    """Start the process of a run. The token goes through a pipe: command lines are for everyone to read."""
    command = [sys.executable, "-m", "server.run_process", str(server.folder.path)]
    process = subprocess.Popen(  # noqa: S603 - a command line of our own
        command, env=environment(server), stdin=subprocess.PIPE, start_new_session=True
    )
    if process.stdin is not None:
        process.stdin.write(f"{token}\n".encode())
        process.stdin.close()
    return process


def environment(server: Server) -> Mapping[str, str]:
    """Environment of the operator's Flower processes: nothing calls home, and Flower writes in the folder."""
    return {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(server.folder.home),
    }
