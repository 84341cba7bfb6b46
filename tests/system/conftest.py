"""A consortium of real processes on loopback: the operator's daemon, banks' daemons, TLS and node keys between them."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer

from client.charges import Charge, charges_of
from client.cli import app as client_app
from client.ledger import Ledger
from metarisk_common.errors import MetariskError
from metarisk_common.plan import Plan
from server import federation
from server.cli import app as server_app
from server.config import load_server

BIN = Path(sys.executable).parent
START_SECONDS = 120.0
RUN_SECONDS = 240.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: Callable[[], Any], seconds: float, saying: str) -> Any:
    """Poll until something is true; fails with `saying` after a while that no quick machine needs."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"waited {seconds:g} seconds in vain: {saying}"
        time.sleep(0.2)
    return found


def children_of(pid: int) -> dict[str, int]:
    """Processes that a daemon has started: its modules' names (`client.worker`) and their pids."""
    found = {}
    with suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):
                words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                found[words[words.index("-m") + 1] if "-m" in words else words[0]] = int(child)
    return found


class Wire:
    """A TCP wire between a bank and the hub that can be cut: what is on it is lost, and nothing new gets through."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._cut = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._cut.set()
        for end in tuple(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._cut.clear()

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._cut.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._open |= {near, far}
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                if self._cut.is_set():
                    break
                other.sendall(data)
        for end in (one, other):
            self._open.discard(end)
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Daemon:
    """A command that runs until it is ended; what it logs goes to a file, JSON lines."""

    def __init__(self, log: Path, environment: Mapping[str, str], *command: object) -> None:
        self.log = log
        self.leaves_behind: dict[str, int] = {}
        with log.open("ab") as stream:
            self.process = subprocess.Popen([*map(str, command)], env=dict(environment), stderr=stream, stdout=stream)

    @property
    def pid(self) -> int:
        return self.process.pid

    def child(self, name: str) -> int:
        """Pid of a child, once it has started."""
        found = wait_for(lambda: children_of(self.pid).get(name), 60, f"{name} of {self.log.stem}")
        assert isinstance(found, int)
        return found

    def kill_child(self, name: str) -> int:
        pid = self.child(name)
        os.kill(pid, signal.SIGKILL)
        return pid

    def events(self) -> list[dict[str, Any]]:
        """Complete lines of the log."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def saw(self, text: str) -> bool:
        return any(text in str(event.get("event", "")) for event in self.events())

    def end(self, number: signal.Signals = signal.SIGTERM, seconds: float = 60.0) -> int:
        """End it with its children, and give its exit code."""
        if self.process.poll() is None:
            orphans = self.leaves_behind | children_of(self.pid)
            self.process.send_signal(number)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
            finally:
                wait_for(
                    lambda: not any(map(_alive, orphans.values())), 30, f"children outlive their daemon: {orphans}"
                )
        return self.process.returncode


def _alive(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


class Consortium:
    """An operator's folder and banks' folders, made and run by the commands that people use."""

    def __init__(self, root: Path, call: Callable[..., tuple[int, str, str]]) -> None:
        self._call = call
        self.root = root
        self.folder = root / "consortium"
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.port, self.inside_port, self.metrics_port = free_port(), free_port(), free_port()
        self.hub: Daemon | None = None
        self.daemons: dict[str, Daemon] = {}
        self.cleanup = ExitStack()
        self.server(
            "init", self.folder, "--name", "test", "--host", "127.0.0.1", "--port", self.port,
            "--inside-port", self.inside_port, "--metrics-port", self.metrics_port,
        )  # fmt: skip

    wait = staticmethod(wait_for)

    # Commands, in this process: starting an interpreter for each would cost more than all else.

    def server(self, *arguments: object, code: int = 0) -> str:
        """Run a command of the operator's; what it printed."""
        return self._called(server_app, arguments, code)

    def client(self, *arguments: object, code: int = 0) -> str:
        """Run a command of a bank's; what it printed."""
        return self._called(client_app, arguments, code)

    def _called(self, app: typer.Typer, arguments: tuple[object, ...], code: int) -> str:
        got, out, err = self._call(app, *arguments)
        assert got == code, (arguments, got, out, err)
        return out if code == 0 else err

    # The operator.

    def start_hub(self) -> Daemon:
        self.hub = Daemon(self.root / "hub.log", self.environment, BIN / "metarisk-server", "up", self.folder)
        return self.hub

    @property
    def up(self) -> Daemon:
        assert self.hub is not None
        return self.hub

    def online(self) -> set[str]:
        try:
            return {name for name, here in federation.online(load_server(self.folder)).items() if here}
        except MetariskError:
            return set()

    def wait_online(self, *names: str) -> None:
        wait_for(lambda: set(names) <= self.online(), START_SECONDS, f"{names} online")

    def start_run(self, plan: Plan) -> str:
        path = self.root / f"{plan.hash()[:12]}.json"
        path.write_text(plan.to_json(), encoding="utf-8")
        said = self.server("run", path, "--folder", self.folder, "--detach", "--json")
        return str(json.loads(said)["run"])

    def resume(self, run: str) -> None:
        self.server("run", "--resume", run, "--folder", self.folder, "--detach")

    def status(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.server("status", run, "--folder", self.folder, "--json"))
        return found

    def journal(self, run: str) -> list[dict[str, Any]]:
        path = self.folder / "runs" / run / "journal.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait_round(self, run: str, number: int, seconds: float = RUN_SECONDS) -> None:
        """Wait until a round is on the disk."""
        wait_for(lambda: len(self.journal(run)) >= number, seconds, f"round {number} of {run}")

    def wait_end(self, run: str, seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """Wait until a run has ended, well or not; how it then stands."""
        server = load_server(self.folder)

        def ended() -> bool:
            try:
                found = federation.run_status(server, self.folder / "runs" / run)
            except MetariskError:
                return False
            return found is not None and found.status == "finished"

        wait_for(ended, seconds, f"the end of {run}")
        return self.status(run)

    # Banks.

    def make_bank(
        self, name: str, frame: pl.DataFrame, *, epsilon: float = 1000.0, port: int | None = None, enrol: bool = True
    ) -> Path:
        """Make a bank's folder and enrol its key. Only an infinite budget, which `init` does not make, lets a plan
        without noise pass: it is written by hand.
        """
        folder = self.root / name.lower().replace(" ", "-")
        table = self.root / f"{folder.name}.csv"
        frame.write_csv(table)
        self.client(
            "init", folder, "--name", name, "--data", table, "--declared-size", 220, "--delta", "1e-4",
            "--epsilon", 1000 if math.isinf(epsilon) else epsilon,
            "--server", f"127.0.0.1:{port or self.port}", "--ca", self.folder / "certificates" / "ca.pem", "--yes",
        )  # fmt: skip
        if math.isinf(epsilon):
            config = folder / "institution.toml"
            text = config.read_text(encoding="utf-8")
            assert "epsilon = 1000.0" in text
            config.write_text(text.replace("epsilon = 1000.0", "epsilon = inf"), encoding="utf-8")
            for path in folder.glob("ledger.*"):
                path.unlink()
        if enrol:
            self.server("enroll", name, folder / "node.pub", "--folder", self.folder)
        return folder

    def approve(self, plan: Plan, *folders: Path) -> None:
        path = self.root / f"{plan.hash()[:12]}.json"
        path.write_text(plan.to_json(), encoding="utf-8")
        for folder in folders:
            self.client("approve", path, "--folder", folder, "--yes")

    def start_bank(self, folder: Path) -> Daemon:
        log = self.root / f"{folder.name}.log"
        self.daemons[folder.name] = Daemon(log, self.environment, BIN / "metarisk-client", "up", folder)
        return self.daemons[folder.name]

    def start_program(self, name: str, *command: object) -> Daemon:
        """Start a program in the place of a bank's daemon."""
        self.daemons[name] = Daemon(self.root / f"{name}.log", self.environment, *command)
        return self.daemons[name]

    def wire(self) -> Wire:
        """Lay a wire to the hub that can be cut."""
        made = Wire(self.port)
        self.cleanup.callback(made.close)
        return made

    def charges(self, folder: Path, run: str) -> list[Charge]:
        """What a bank's ledger has charged for a run, in order."""
        run_id = json.loads((self.folder / "runs" / run / "run.json").read_text(encoding="utf-8"))["run_id"]
        with Ledger.read(folder / "ledger.sqlite") as ledger:
            return [charge for charge in charges_of(ledger.entries()) if charge.key.run_id == run_id]

    def close(self) -> None:
        """End everything, the banks first and all at once: each takes its time to drain."""
        for bank in self.daemons.values():
            bank.leaves_behind |= children_of(bank.pid)
            if bank.process.poll() is None:
                bank.process.send_signal(signal.SIGTERM)
        with ExitStack() as stack:
            stack.callback(self.cleanup.close)
            for daemon in (self.hub, *self.daemons.values()):
                if daemon is not None:
                    stack.callback(daemon.end)


@pytest.fixture(scope="module")
def consortium(
    tmp_path_factory: pytest.TempPathFactory, call: Callable[..., tuple[int, str, str]]
) -> Iterator[Consortium]:
    """A consortium without banks, whose hub does not run yet; everything ends with the module."""
    made = Consortium(tmp_path_factory.mktemp("consortium"), call)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(made.folder / "home", ignore_errors=True)
