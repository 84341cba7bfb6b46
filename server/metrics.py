"""Prometheus metrics of the operator, on loopback: how the runs go and which banks are online.

Everything is read when it is asked for, from the runs' journals, so that it says the same whichever process serves it
and whichever has died. Labels are the operator's own run names, the banks' enrolled names and the constants of
refusals and rejections. There is no metric of a bank's epsilon: that is the bank's business, and it alone tells it.
"""

import errno
import logging
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from metarisk_common.errors import ConfigError, MetariskError
from metarisk_common.plan import read_plan

from .config import LOOPBACK, Server
from .journal import read_journal
from .rounds import JOURNAL

PATH = "/metrics"
MAX_RUNS = 20
"""Only the newest runs are told: each is a label, and labels must not grow for ever."""
OTHER = "other"

BanksOnline = Callable[[], Mapping[str, bool] | None]
"""Tells which enrolled banks are online, by name; None where the hub does not answer."""

log = logging.getLogger("metarisk.server")

_POLL_SECONDS: Final = 0.1  # How long closing may take.
_CODE: Final = re.compile("[a-z][a-z-]{0,30}|flower-error-[0-9]{1,2}")
_PLAN, _INFO = "plan.json", "run.json"
_OUTCOMES: Final = ("admitted", "refused", "rejected", "absent")


class _Handler(WSGIRequestHandler):
    """Answers one request; scrapes are no news."""

    timeout = 10.0

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the standard library's name
        """Say nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request: a caller that stalls holds up nobody else."""

    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without looking up this machine's name, which may wait for a network that is gone."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.socket.getsockname()[1]
        self.setup_environ()

    def handle_error(self, *_: object) -> None:
        """Log what the standard way would print, the text of an exception included."""
        log.warning("a scrape was not answered", exc_info=sys.exception())


class MetricsServer:
    """A running server of metrics; a context manager, closed at its end."""

    def __init__(self, server: WSGIServer) -> None:
        """Serve in a thread that does not keep the process alive."""
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(_POLL_SECONDS,), name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_port)

    def __enter__(self) -> Self:
        """Give the server itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop serving."""
        self.close()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(server: Server, banks_online: BanksOnline, port: int) -> MetricsServer:
    """Serve the operator's metrics at `http://127.0.0.1:PORT/metrics`; port 0 takes any that is free.

    Args:
        server: the operator's folder.
        banks_online: asked at every scrape, from the server's threads, one at a time; a scrape waits for it.
        port: on loopback.

    Raises:
        ConfigError: the port is taken, or not for this user.

    """
    registry = CollectorRegistry()
    registry.register(ServerCollector(server.folder.runs, banks_online))
    ProcessCollector(registry=registry)
    metrics = make_wsgi_app(registry)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        status, text = "404 Not Found", f"metrics are at {PATH}\n"
        if environ.get("PATH_INFO") == PATH:
            try:
                return list(metrics(environ, start_response))
            except Exception:
                log.exception("metrics could not be collected")
                status, text = "500 Internal Server Error", "metrics could not be collected; the log says more\n"
        start_response(status, [("Content-Type", "text/plain")])
        return [text.encode()]

    try:
        return MetricsServer(make_server(LOOPBACK, port, application, _Server, _Handler))
    except OSError as error:
        reason = "another process has it" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
        raise ConfigError(
            f"{server.folder.config_file}: key 'metrics.port': port {port} of {LOOPBACK} cannot be used: {reason}; "
            "choose another one, or 0 for no metrics"
        ) from None


@dataclass(frozen=True)
class RunCounts:
    """What a run's journal adds up to; `intact` is False where it could not be read, and nothing else is then known."""

    intact: bool = True
    round: int = 0
    seconds: float | None = None
    update_norm: float | None = None
    quorum_missed: int = 0
    outcomes: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[str, int] = field(default_factory=dict)
    rejections: Mapping[str, int] = field(default_factory=dict)


def count_rounds(records: list[dict[str, Any]]) -> RunCounts:
    """Add up a journal's records; a run that has not played a round yet has none.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: a record is not one of a round.

    """
    refusals: Counter[str] = Counter()
    rejections: Counter[str] = Counter()
    outcomes = dict.fromkeys(_OUTCOMES, 0)
    for record in records:
        refusals.update(map(_code, record["refused"].values()))
        rejections.update(map(_code, record["rejected"].values()))
        for outcome in _OUTCOMES:
            outcomes[outcome] += len(record[outcome])
    last: dict[str, Any] = records[-1] if records else {"round": 0, "seconds": None, "mean_update_norm": None}
    norm, seconds = last["mean_update_norm"], last["seconds"]
    return RunCounts(
        round=int(last["round"]),
        seconds=None if seconds is None else float(seconds),
        update_norm=None if norm is None else float(norm),
        quorum_missed=sum(not record["quorum"] for record in records),
        outcomes=outcomes,
        refusals=refusals,
        rejections=rejections,
    )


class ServerCollector(Collector):
    """Reads the runs at every scrape; of a run, only the files that have changed."""

    def __init__(self, runs: Path, banks_online: BanksOnline) -> None:
        """Remember where the runs are; nothing is read yet."""
        self._runs = runs
        self._banks_online = banks_online
        self._lock = threading.Lock()
        self._journals: dict[Path, tuple[object, RunCounts]] = {}
        self._rounds: dict[Path, tuple[object, int | None]] = {}
        self._asked = True

    def describe(self) -> list[Metric]:
        """Name nothing beforehand: registering it must not read the runs."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        with self._lock:
            runs = newest_runs(self._runs)
            counts = {_label(run): self._counts(run) for run in runs}
            planned = {_label(run): self._planned(run) for run in runs}
            self._journals = {run: self._journals[run] for run in runs}
            self._rounds = {run: self._rounds[run] for run in runs}
            banks = self._banks()
        yield _gauge(
            "metarisk_server_up", "1, with the installed version.", {version("metarisk-federated"): 1}, "version"
        )
        yield _gauge("metarisk_server_hub_reachable", "Whether the hub answers.", {"": banks is not None})
        yield _gauge("metarisk_server_bank_online", "Whether an enrolled bank is online.", banks or {}, "bank")
        yield _gauge("metarisk_server_rounds", "Rounds that the run's plan asks for.", planned, "run")
        yield from _of_runs(counts)

    def _counts(self, run: Path) -> RunCounts:
        path = run / JOURNAL
        stamp = _stamp(path)
        seen, counts = self._journals.get(run, (None, RunCounts()))
        if run not in self._journals or seen != stamp:
            try:
                counts = count_rounds(read_journal(path))
            except (MetariskError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
                log.warning("metrics: the journal of run %s cannot be read: %s", run.name, error)
                counts = RunCounts(intact=False)
            self._journals[run] = (stamp, counts)
        return counts

    def _planned(self, run: Path) -> int | None:
        path = run / _PLAN
        stamp = _stamp(path)
        if run not in self._rounds or self._rounds[run][0] != stamp:
            try:
                rounds = read_plan(path).outer.rounds
            except MetariskError:  # A run that is being started, or is none.
                rounds = None
            self._rounds[run] = (stamp, rounds)
        return self._rounds[run][1]

    def _banks(self) -> Mapping[str, bool] | None:
        try:
            banks = self._banks_online()
        except Exception as error:  # noqa: BLE001 - a hub that is down or odd must not hide the runs
            if self._asked:  # Once, not at every scrape.
                log.warning("metrics: the hub cannot be asked which banks are online: %s", error)
            self._asked = False
            return None
        self._asked = True
        return banks


def newest_runs(runs: Path) -> list[Path]:
    """List the folders of the runs that were at work last, at most `MAX_RUNS`, newest first."""
    try:
        folders = [path for path in runs.iterdir() if (path / _INFO).is_file() or (path / _PLAN).is_file()]
    except OSError:
        return []
    return sorted(folders, key=lambda run: (_touched(run), run.name), reverse=True)[:MAX_RUNS]


def _label(run: Path) -> str:
    """A run's name, in characters that can be sent."""
    return run.name.encode(errors="replace").decode()


def _touched(run: Path) -> int:
    """When a run last wrote its journal, or before its first round, was made; in nanoseconds."""
    stamps = [_stamp(run / name) for name in (JOURNAL, _INFO, _PLAN)]
    return next((stamp[2] for stamp in stamps if stamp is not None), 0)


def _of_runs(runs: Mapping[str, RunCounts]) -> Iterator[Metric]:
    whole = {run: counts for run, counts in runs.items() if counts.intact}
    intact = {run: counts.intact for run, counts in runs.items()}
    yield _gauge("metarisk_server_journal_ok", "Whether the run's journal can be read and is whole.", intact, "run")
    played = {run: counts.round for run, counts in whole.items()}
    yield _gauge("metarisk_server_round", "The run's last round that is written down.", played, "run")
    took = {run: counts.seconds for run, counts in whole.items()}
    yield _gauge("metarisk_server_round_seconds", "How long the run's last round took.", took, "run")
    norms = {run: counts.update_norm for run, counts in whole.items()}
    yield _gauge("metarisk_server_update_norm_mean", "Mean norm of the last round's admitted updates.", norms, "run")
    missed = CounterMetricFamily("metarisk_server_quorum_missed", "Rounds below the plan's quorum.", labels=("run",))
    for run, counts in whole.items():
        missed.add_metric((run,), counts.quorum_missed)
    yield missed
    for name, meaning, label, parts in (
        ("reports", "What became of the orders, by bank and round.", "outcome", "outcomes"),
        ("refusals", "Orders that banks declined, by code.", "code", "refusals"),
        ("rejections", "Reports that were not admitted, by code.", "code", "rejections"),
    ):
        family = CounterMetricFamily(f"metarisk_server_{name}", meaning, labels=("run", label))
        for run, counts in whole.items():
            for value, count in getattr(counts, parts).items():
                family.add_metric((run, value), count)
        yield family


def _gauge(name: str, meaning: str, values: Mapping[str, float | None], label: str = "") -> Metric:
    """Build a gauge of one value a label, without those that are not known; "" for no label."""
    family = GaugeMetricFamily(name, meaning, labels=(label,) if label else ())
    for key, value in values.items():
        if value is not None:
            family.add_metric((key,) if label else (), float(value))
    return family


def _code(code: object) -> str:
    """Keep a code that is one of the constants; a number out of a bank's message must not make labels."""
    return code if isinstance(code, str) and _CODE.fullmatch(code) else OTHER


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does: its number, size and time."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
