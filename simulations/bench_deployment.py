"""What a round between real processes costs beside the banks' own work: ours, and the same with Flower as it comes.

Both have two banks and a model of this size, on this machine. Flower as it comes has no TLS and no node keys here,
which spares it work; ours has both.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import httpx

from client import setup as bank_setup
from client.approval import approve
from client.daemon import free_port
from metarisk_common.bundle import build_bundle
from metarisk_common.errors import MetariskError
from metarisk_common.features import Encoder
from metarisk_common.flower_deployment import Control
from metarisk_common.plan import Plan
from metarisk_common.supervise import end_process
from server import enrolment, federation
from server import setup as server_setup
from server.config import LOOPBACK, Server, load_server
from server.journal import read_journal
from server.rounds import JOURNAL

from .runfolder import RunFolder

ROUNDS: Final = 6
BANKS: Final = 2
_START_SECONDS = 120.0
_END_SECONDS = 300.0
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.5


def measure(run: RunFolder, folder: Path) -> dict[str, float]:
    """Measure both on the first two banks of a prepared run; medians of the rounds after the first, in seconds."""
    return {"metarisk, TLS and node keys": _ours(run, folder), "Flower as it comes": _stock(run.plan)}


def _ours(run: RunFolder, folder: Path) -> float:
    ports = [free_port() for _ in range(2)]
    made = server_setup.init(
        folder / "consortium",
        name="bench",
        outside_host=LOOPBACK,
        outside_port=ports[0],
        inside_port=ports[1],
        metrics_port=0,
    )
    outer = run.plan.outer.model_copy(update={"rounds": ROUNDS, "min_reports": BANKS})
    plan = run.plan.model_copy(update={"outer": outer})
    places = []
    for name, source in list(run.bank_folders.items())[:BANKS]:
        answers = bank_setup.Answers(
            name=name,
            data=source / "data.parquet",
            declared_size=run.sizes[name],
            epsilon=100.0,
            delta=plan.mechanism.delta,
            server=f"{LOOPBACK}:{ports[0]}",
            ca=made.ca_certificate.read_bytes(),
        )
        place = bank_setup.lay_out(folder / name, answers).institution.folder
        approve(place, plan)
        enrolment.enroll(made, name, place / "node.pub", datetime.now(UTC))
        places.append(place)
    server = load_server(made.path)
    with ExitStack() as stack:
        stack.enter_context(_process([sys.executable, "-m", "server.cli", "up", str(made.path)], os.environ))
        for place in places:
            stack.enter_context(_process([sys.executable, "-m", "client.cli", "up", str(place)], os.environ))
        _wait(lambda: _all_online(server), _START_SECONDS)
        started = federation.prepare_run(server, plan)
        federation.start(server, started)
        _wait(lambda: _finished(server, started), _END_SECONDS)
        return statistics.median(float(record["seconds"]) for record in read_journal(started / JOURNAL)[1:])


def _all_online(server: Server) -> bool:
    try:
        return all(federation.online(server).values())
    except MetariskError:
        return False


def _finished(server: Server, folder: Path) -> bool:
    status = federation.run_status(server, folder)
    if status is None or status.status != "finished":
        return False
    if status.sub_status != "completed":
        raise MetariskError(f"the benchmark's run was {status.sub_status}: {status.details}")
    return True


_STOCK_PROJECT = """\
[project]
name = "stock-rounds"
version = "1.0.0"
description = "Rounds with Flower as it comes."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "stock_rounds:server"
clientapp = "stock_rounds:client"

[tool.flwr.app.config]
out = ""
size = 1
rounds = 1
"""

_STOCK_APP = """\
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server, client = ServerApp(), ClientApp()


@server.main()
def main(grid, context):
    config = context.run_config
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    seconds = []
    for number in range(config["rounds"]):
        started = time.monotonic()
        messages = []
        for node in grid.get_node_ids():
            weights = {"w": np.zeros(config["size"], np.float32), "b": np.zeros(1, np.float32)}
            arrays = ArrayRecord({name: Array(value) for name, value in weights.items()})
            content = RecordDict({"arrays": arrays, "head": ConfigRecord({"round": number})})
            messages.append(Message(content, node, MessageType.TRAIN, group_id=str(number)))
        replies = list(grid.send_and_receive(messages))
        assert all(reply.has_content() for reply in replies)
        seconds.append(time.monotonic() - started)
    Path(config["out"]).write_text(json.dumps(seconds))


@client.train()
def train(message, context):
    import opacus  # What a client under differential privacy needs, in every process that Flower starts.
    import torch
    return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)
"""


def _stock(plan: Plan) -> float:
    """Flower's own processes with its own defaults, but for what would download packages or call home."""
    root = Path(tempfile.mkdtemp(prefix="metarisk-stock-"))
    try:
        return _stock_rounds(root, Encoder(plan.data).width)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _stock_rounds(root: Path, size: int) -> float:
    port, folder = free_port(), Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",  # Flower starts its helpers by name.
        "FLWR_HOME": str(root / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    address, out = f"{LOOPBACK}:{port}", root / "seconds.json"
    link = [
        str(folder / "flower-superlink"), "--insecure", "--host", LOOPBACK, "--port", str(port),
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(_process(link, environment))
        for _ in range(BANKS):
            node = [str(folder / "flower-supernode"), "--insecure", "--superlink", address, "--port", str(free_port())]
            stack.enter_context(_process(node, environment))
        control = stack.enter_context(Control(address, None))
        _wait(lambda: _reachable(control), _START_SECONDS)
        control.start_run(_stock_bundle(), {"out": str(out), "size": size, "rounds": ROUNDS})
        _wait(out.exists, _END_SECONDS)
        return float(statistics.median(json.loads(out.read_text(encoding="utf-8"))[1:]))


def _stock_bundle() -> bytes:
    files = {"pyproject.toml": _STOCK_PROJECT, "stock_rounds.py": _STOCK_APP, "LICENSE": "Apache-2.0\n"}
    return build_bundle({name: text.encode() for name, text in files.items()})


def _reachable(control: Control) -> bool:
    try:
        control.nodes()
    except httpx.HTTPError:
        return False
    return True


def _wait(what: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() >= end:
            raise MetariskError("the processes of the benchmark did not answer in time; is the machine busy?")
        time.sleep(_POLL_SECONDS)


@contextmanager
def _process(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[None]:
    """Run a process while the block does; what it says is for nobody."""
    process = subprocess.Popen(  # noqa: S603 - command lines of our own
        command, env=dict(environment), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        end_process(process, _STOP_SECONDS)
