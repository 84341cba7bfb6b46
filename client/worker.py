"""The worker: one warm process that answers the bank's orders with the code that is installed here, and no other.

Flower would unpack the bundle that the server sent and run what is inside. The worker looks at the bundle's SHA-256
alone: it must be that of the installed version's own bundle, which holds no code, or one that `institution.toml`
approves; even then one that carries more than its description is refused. What leaves the bank is what
`client.app` answers, or a constant.

Run as `python -m client.worker FOLDER PORT`.
"""

import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import httpx
from flwr.app import Error, Message

from metarisk_common import logs
from metarisk_common.bundle import app_bundle, digest, surplus
from metarisk_common.errors import MetariskError
from metarisk_common.flower_deployment import ClientTask, TaskSource
from metarisk_common.supervise import end_with_parent, only_instance, stop_on_signals
from metarisk_common.wire import Refusal, TrainReport, decode_reply

from .app import FOLDER_KEY, app, open_bank
from .config import Institution, load_institution
from .counters import count_answer
from .node import LOOPBACK
from .turns import CANNOT_OPEN, LONGEST_POLL_SECONDS, POLL_SECONDS, busy, patience

log = logging.getLogger("metarisk.client.worker")

_CLIENT_ERROR, _BUNDLE_REFUSED = 2, 7  # Flower's codes for an app that failed and a bundle that is not accepted


class _WithdrawnError(Exception):
    """The order that is being fetched will never be here whole."""


class Worker:
    """Answers tasks of the bank's own SuperNode, one after another."""

    def __init__(self, institution: Institution) -> None:
        """Learn which bundles are approved."""
        self._institution = institution
        server = institution.config.server
        self._approved = {digest(app_bundle()), *(() if server is None else server.bundles)}

    def work(self, source: TaskSource, stop: threading.Event) -> None:
        """Answer until `stop` is set; the SuperNode may come and go."""
        reachable, last_work = True, time.monotonic()
        tasks = Tasks(source, stop)
        while not stop.is_set():
            try:
                token = tasks.take()
                reachable = True
            except httpx.HTTPError as error:
                if reachable:
                    log.info("the bank's node does not answer (%s); waiting for it", type(error).__name__)
                reachable, token = False, None
            if token is None:
                idle = time.monotonic() - last_work
                stop.wait(patience(idle, POLL_SECONDS, LONGEST_POLL_SECONDS) if reachable else LONGEST_POLL_SECONDS)
                continue
            try:
                # Busy only from when the order is here: with the hub gone it may never be, and a drain waits for none.
                with source.client_task(token, tasks.wait) as task, busy(self._institution):
                    task.answer(self.reply(task))
            except _WithdrawnError:
                log.warning("an order did not come whole: its run was ended meanwhile")
            except Exception as error:  # noqa: BLE001 - what Flower raises where an order or an answer is lost
                # The ledger holds what was released; if the order comes again, so does the very same report.
                log.warning("the bank's node was lost with an answer under way: %s", type(error).__name__)
            last_work = time.monotonic()

    def reply(self, task: ClientTask) -> Message:
        """Answer one message; no exception passes, and of none the text."""
        started = time.monotonic()
        complaint = self._judge(task.bundle)
        if complaint is not None:
            log.error("bundle refused: %s; nothing of it was run", complaint, extra={"sha256": digest(task.bundle)})
            self._count("bundle")
            return Message(Error(_BUNDLE_REFUSED, "the bundle is not approved"), reply_to=task.message)
        # The server's run configuration does not reach the app, and the folder is this process' own.
        task.context.run_config = {}
        task.context.node_config = {FOLDER_KEY: str(self._institution.folder)}
        try:
            message = app(task.message, task.context)
            answer = decode_reply(message.content)
        except Exception as error:  # noqa: BLE001 - whatever went wrong, only a constant may leave the bank
            log.error("the order could not be answered: %s", type(error).__name__)  # noqa: TRY400 - as in client.bank
            self._count("error")
            return Message(Error(_CLIENT_ERROR, "the bank cannot answer"), reply_to=task.message)
        seconds = time.monotonic() - started
        code = answer.code if isinstance(answer, Refusal) else ""
        self._count("refusal" if code else "report", code, answer, seconds)
        known = {"run": answer.run_id, "round": answer.round, "code": code, "seconds": round(seconds, 4)}
        log.info("order refused" if code else "order answered", extra=known)
        return message

    def _count(
        self,
        kind: Literal["report", "refusal", "error", "bundle"],
        code: str = "",
        answer: TrainReport | Refusal | None = None,
        seconds: float = 0.0,
    ) -> None:
        run_id, number = ("", 0) if answer is None else (answer.run_id, answer.round)
        folder, now = self._institution.folder, time.time()
        count_answer(folder, kind=kind, code=code, run_id=run_id, round=number, seconds=seconds, now=now)

    def _judge(self, bundle: bytes) -> str | None:
        try:
            more = surplus(bundle)
        except ValueError as error:
            return f"it is {error}"
        if more:
            # The names come from the server: shown cut short, and the log's encoding keeps them in one line.
            return "it carries " + ", ".join(name[:60] for name in more)
        return None if digest(bundle) in self._approved else "its SHA-256 is not approved; both sides need one version"


class Tasks:
    """Tokens of the tasks that the bank's node has, one after another."""

    def __init__(self, source: TaskSource, stop: threading.Event) -> None:
        """Take none yet."""
        self._source, self._stop = source, stop
        self._next: str | None = None
        self._lock = threading.Lock()

    def take(self) -> str | None:
        """Token of the next task; none if there is none."""
        with self._lock:
            token, self._next = self._next, None
        return self._source.acquire() if token is None else token

    def wait(self) -> None:
        """Wait on for an order that is not here whole.

        The node fetches one order at a time: if it has another task, it has given the order up. It does so, and tells
        nobody, if the order's run is ended meanwhile; Flower would wait hours for the rest.

        Raises:
            _WithdrawnError: the order will never be here, or this process is to end.

        """
        with self._lock:
            if self._next is None:
                self._next = self._source.acquire()
            if self._next is not None or self._stop.is_set():
                raise _WithdrawnError


def main(folder: Path, port: int) -> None:
    """Open the bank, then answer until SIGTERM; the order in hand is finished first."""
    institution = load_institution(folder)
    source = TaskSource(f"{LOOPBACK}:{port}", kind="client", secret=institution.superexec_secret.read_bytes())
    with stop_on_signals() as stop, only_instance(folder / "worker.lock", "another worker serves this folder"):
        open_bank(folder)
        log.info("the bank is open")
        Worker(institution).work(source, stop)
    source.close()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    end_with_parent()
    logs.set_up("worker")
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except MetariskError as error:
        log.error("the bank cannot be opened: %s", error)  # noqa: TRY400 - the text says it all
        sys.exit(CANNOT_OPEN)
