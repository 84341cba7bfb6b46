"""Prometheus metrics of a bank, on loopback: what its worker has answered, and what its ledger has spent.

Everything is read when it is asked for, from `status.json` and the ledger, so that whichever process serves it says
the same. Epsilon is told here and nowhere else: it is the bank's own business, and the hub has no such metric. Labels
are constants; nothing of a record is a label or a value.
"""

import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from metarisk_common.errors import ConfigError, IntegrityError, MetariskError
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.wire import REFUSAL_CODES

from .config import CONFIG_FILE, load_institution
from .counters import OTHER, Counters, read_counters
from .ledger import Budget, Ledger
from .signing import head_path

LOOPBACK = "127.0.0.1"
PATH = "/metrics"

_POLL_SECONDS = 0.1  # How long closing may take.

log = logging.getLogger("metarisk.client")


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


def serve_metrics(folder: Path, port: int) -> MetricsServer:
    """Serve a bank's metrics at `http://127.0.0.1:PORT/metrics`; port 0 takes any that is free.

    Raises:
        ConfigError: the port is taken, or not for this user.

    """
    registry = CollectorRegistry()
    registry.register(BankCollector(folder))
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
            f"{folder / CONFIG_FILE}: key 'metrics.port': port {port} of {LOOPBACK} cannot be used: {reason}; "
            "choose another one, or 0 for no metrics"
        ) from None


@dataclass(frozen=True)
class _Account:
    """What a ledger says, `spent` of its `events`; `budget` is None where it cannot be read."""

    budget: Budget | None = None
    entries: int = 0
    events: tuple[PrivacyEvent, ...] = ()
    spent: float = 0.0


class BankCollector(Collector):
    """Reads a bank's folder at every scrape; the ledger only where its file has changed."""

    def __init__(self, folder: Path) -> None:
        """Remember the folder; nothing is read yet."""
        self._folder = folder
        self._lock = threading.Lock()  # One scrape at a time: the account is worked out once.
        self._seen: tuple[object, ...] | None = None
        self._account = _Account()

    def describe(self) -> list[Metric]:
        """Name nothing beforehand: registering it must not read the ledger."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        yield _gauge(
            "metarisk_client_up", "1, with the installed version.", 1, {"version": version("metarisk-federated")}
        )
        yield from _of_counters(read_counters(self._folder))
        with self._lock:
            account = self._read()
        budget = account.budget
        yield _gauge(
            "metarisk_client_ledger_ok", "Whether the ledger can be read and is whole.", float(budget is not None)
        )
        if budget is not None:
            spent = "Epsilon of all that was ever reserved, at the budget's delta."
            yield _gauge("metarisk_client_epsilon_spent", spent, account.spent)
            yield _gauge("metarisk_client_epsilon_budget", "Epsilon that may be spent in all.", budget.epsilon)
            yield _gauge("metarisk_client_ledger_entries", "Entries of the ledger.", account.entries)

    def _read(self) -> _Account:
        """Read the ledger, unless it is the one that was read last."""
        try:
            institution = load_institution(self._folder)
            path = institution.ledger_path
            journal = path.resolve().with_name(f"{path.resolve().name}-wal")  # where SQLite has it
            # Reading makes an empty one where there is none.
            written = _stamp(journal) if journal.exists() and journal.stat().st_size else None
            seen = (institution.budget, _stamp(path), _stamp(head_path(path)), written)
            if seen == self._seen:
                return self._account
            account = self._open(path, institution.budget)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the ledger, the other metrics are told
            reason = str(error) if isinstance(error, MetariskError) else type(error).__name__
            if self._account.budget is not None or self._seen is None:
                log.warning("metrics: the ledger cannot be read: %s", reason)
            self._account, self._seen = _Account(), ()
            return self._account
        self._account, self._seen = account, seen
        return account

    def _open(self, path: Path, budget: Budget) -> _Account:
        if not path.exists():
            if head_path(path).exists():
                raise IntegrityError(
                    f"{path}: is gone but its signed head is not; restore the newest copy of the ledger"
                )
            return _Account(budget)  # Nothing was ever approved: there is no ledger yet.
        last = self._account
        with Ledger.read(path) as ledger:
            found = _Account(ledger.budget, ledger.counter, tuple(ledger.events()))
            # Accounting may take a second, and most entries charge nothing.
            same = last.budget is not None and (last.budget.delta, last.events) == (ledger.budget.delta, found.events)
            return replace(found, spent=last.spent if same else ledger.spent())


def _of_counters(counters: Counters) -> Iterator[Metric]:
    outcomes = {"report": counters.answered, "refusal": sum(counters.refused.values()), "error": counters.errors}
    yield _counter("metarisk_client_orders", "Orders answered, by what became of them.", "outcome", outcomes)
    codes = dict.fromkeys([*sorted(REFUSAL_CODES), OTHER], 0)
    for code, count in counters.refused.items():
        codes[code if code in codes else OTHER] += count
    yield _counter("metarisk_client_refusals", "Orders declined, by the code that left the bank.", "code", codes)
    bundles = CounterMetricFamily("metarisk_client_bundles_refused", "App bundles that were not run.")
    bundles.add_metric([], counters.bundles_refused)
    yield bundles
    if counters.last_answer_time:
        took, when = counters.last_answer_seconds, counters.last_answer_time
        yield _gauge("metarisk_client_last_answer_seconds", "How long the newest answer took.", took)
        yield _gauge("metarisk_client_last_answer_timestamp_seconds", "When it was done, since 1970, UTC.", when)
        yield _gauge("metarisk_client_last_round", "The round that it answered.", counters.last_round)


def _gauge(name: str, meaning: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    labels = labels or {}
    family = GaugeMetricFamily(name, meaning, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family


def _counter(name: str, meaning: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, meaning, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does: its number, size and time."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
