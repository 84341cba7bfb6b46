"""A bank's process is killed at random moments of a run; what left it is charged, and its ledger never forgets."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Self

import polars as pl
from flwr.app import Message, MessageType

from client.ledger import Ledger
from metarisk_common.features import Encoder
from metarisk_common.flower_compat import identify_process, message_from_bytes, message_to_bytes
from metarisk_common.initialisation import initial_params
from metarisk_common.plan import Plan
from metarisk_common.wire import TrainOrder, TrainReport, decode_reply, encode_order, report_to_bytes

KILLS = 50


# A bank's own process: production code, the system's randomness, and orders as Flower carries them. The imports take
# seconds, so a process that has done them, and nothing else, forks each life that is to be killed.
SERVE = """
import os, sys
from multiprocessing.connection import Client
from pathlib import Path
from flwr.app import Message
from client.bank import Bank
from metarisk_common.flower_compat import identify_process, message_from_bytes, message_to_bytes
for line in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    identify_process(1, 2)
    pipe = Client(sys.argv[2])
    bank = Bank(Path(sys.argv[1]))
    while True:
        order = message_from_bytes(pipe.recv_bytes())
        pipe.send_bytes(message_to_bytes(Message(bank.answer(order.content), reply_to=order)))
"""


class Server:
    """What the other side has seen: the reports that arrived, by round, and the round that it asks for next."""

    def __init__(self, plan: Plan) -> None:
        identify_process(1, 1)
        self.order = TrainOrder("run", 1, plan.hash(), initial_params(plan, Encoder(plan.data).width))
        self.arrived: dict[int, bytes] = {}

    def ask(self, pipe: Connection) -> None:
        content = encode_order(replace(self.order, round=len(self.arrived) + 1))
        pipe.send_bytes(message_to_bytes(Message(content, 2, MessageType.TRAIN, ttl=60.0)))

    def take(self, pipe: Connection) -> None:
        report = decode_reply(message_from_bytes(pipe.recv_bytes()).content)
        assert isinstance(report, TrainReport), report
        assert report.round == len(self.arrived) + 1
        self.arrived[report.round] = report_to_bytes(report)


class Nursery:
    """Starts banks' processes on one folder, one after another, and kills them."""

    def __init__(self, folder: Path, address: str, environment: dict[str, str]) -> None:
        path = os.pathsep.join(sys.path)
        self._listener = Listener(address)
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE, folder, address], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**environment, "PYTHONPATH": path},
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._process.kill()
        self._process.communicate()

    def live(self, server: Server, *, reports: int, seconds: float) -> float:
        """Let a bank give so many reports, ask it again, and kill it so many seconds later; tell how long it lived.

        With no seconds it is not asked again, and dies between two rounds.
        """
        child = int(self._say("start"))
        started = time.monotonic()
        pipe = self._listener.accept()
        try:
            for _ in range(reports):
                server.ask(pipe)
                server.take(pipe)
            if seconds:
                server.ask(pipe)
                time.sleep(seconds)
            lived = time.monotonic() - started
            os.kill(child, signal.SIGKILL)
            assert self._say() == str(-signal.SIGKILL)
            # What was written before has left the bank, and arrives.
            with suppress(EOFError, ConnectionResetError):
                while True:
                    server.take(pipe)
        finally:
            pipe.close()
        return lived

    def _say(self, line: str | None = None) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if line is not None:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def test_a_bank_killed_at_fifty_moments_forgets_nothing_and_releases_nothing_uncharged(
    tmp_path: Path, make_bank: Callable[..., Path], make_loans: Callable[..., pl.DataFrame], plan: Plan,
    environment: dict[str, str],
) -> None:  # fmt: skip
    endless = plan.model_copy(
        update={
            "mechanism": plan.mechanism.model_copy(update={"noise_multiplier": 60.0}),
            "outer": plan.outer.model_copy(update={"rounds": 100_000}),
        }
    )
    folder = make_bank(tmp_path / "bank", endless, make_loans(lenders=1), epsilon=50.0, seed=None)
    server = Server(endless)
    with Nursery(folder, str(tmp_path / "pipe"), environment) as nursery:
        # Reading the table and the first answer take longest: kills fall into them, and into what comes before.
        window = 1.5 * nursery.live(server, reports=1, seconds=0.0)
        moments, wanted = random.Random(20), 1
        spent, ends = 0.0, Counter[str]()
        for _ in range(KILLS):
            reports = moments.choice([0, 0, 1])
            nursery.live(server, reports=reports, seconds=moments.choice([0.0, *[moments.uniform(0.0, window)] * 9]))
            wanted += reports
            with Ledger.read(folder / "ledger.sqlite") as ledger:
                ledger.verify()
                assert ledger.spent() >= spent, "epsilon on disk never falls"
                spent = ledger.spent()
                entries = ledger.entries()
                ends[entries[-1].kind] += 1
                reserved = {entry.content["key"]["round"]: entry.seq for entry in entries if entry.kind == "reserve"}
                released = {
                    entry.content["reserved"]: entry.content["report_sha256"]
                    for entry in entries
                    if entry.kind == "release"
                }
                assert len(ledger.events()) == len(reserved), "a round is charged once"
            for number, report in server.arrived.items():
                assert released[reserved[number]] == hashlib.sha256(report).hexdigest(), "what left is what was charged"
            assert len(reserved) <= len(server.arrived) + 1
    # The moments were worth something: banks died at work and between two rounds, and the run went on.
    assert ends["reserve"] > 0, ends
    assert ends["release"] > 0, ends
    assert len(server.arrived) >= wanted > 10
