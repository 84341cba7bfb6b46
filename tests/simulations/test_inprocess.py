"""The grid in this process and its workers: same numbers, failures told without data, nothing left running."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from client.app import close_banks
from client.dataset import read_table
from metarisk_common.errors import ConfigError, IntegrityError, MetariskError
from simulations import experiment, runfolder
from simulations.inprocess import InProcessGrid, Node, lost_worker_told, worker_pool
from simulations.scenarios import load_scenario

APP = """
import os
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    what = message.content["order"]["what"]
    if what == "die":
        os._exit(1)
    if what == "fail":
        raise ValueError("a row's value")
    answer = ConfigRecord({"process": os.getpid(), "node": context.node_config["me"], "id": context.node_id})
    return Message(RecordDict({"answer": answer}), reply_to=message)
"""
NODES = [Node(f"bank {index}", {"me": f"bank {index}"}) for index in range(5)]


@pytest.fixture(scope="module")
def light_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An app that takes no Torch, found by this process and by workers."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "light_bank.py").write_text(APP, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield "light_bank:app"
    sys.path.remove(str(folder))


def ask(grid: InProcessGrid, what: str, nodes: list[int] | None = None) -> list[Message]:
    messages = [
        grid.create_message(RecordDict({"order": ConfigRecord({"what": what})}), "train", node, "1", 60.0)
        for node in nodes or list(grid.get_node_ids())
    ]
    return list(grid.send_and_receive(messages, timeout=60))


def answers(replies: list[Message]) -> list[ConfigRecord]:
    return [reply.content.config_records["answer"] for reply in replies]


def test_a_bank_stays_with_its_worker_and_every_reply_is_its_own(light_app: str) -> None:
    with InProcessGrid(light_app, NODES, workers=2) as grid:
        first, second = answers(ask(grid, "hello")), answers(ask(grid, "hello"))
        assert [answer["node"] for answer in first] == [node.name for node in NODES]
        assert [answer["id"] for answer in first] == list(grid.get_node_ids())
        assert [answer["process"] for answer in first] == [answer["process"] for answer in second]
        processes = {int(str(answer["process"])) for answer in first}
        assert len(processes) == 2
        assert os.getpid() not in processes
        failed, *_ = ask(grid, "fail")
        assert failed.has_error()
        assert failed.error.reason == "ValueError"
        # One dies; the grid says so at once, and however it is asked.
        with pytest.raises(MetariskError, match=r"worker process has died.*--resume"):
            ask(grid, "die")
        with pytest.raises(MetariskError, match="worker process has died"):
            ask(grid, "hello")
    assert [process for process in processes if alive(process)] == []


def test_without_workers_banks_answer_here(light_app: str) -> None:
    with InProcessGrid(light_app, NODES) as grid:
        assert {answer["process"] for answer in answers(ask(grid, "hello"))} == {os.getpid()}
        assert {info.node_id: info.name for info in grid.get_nodes()} == {
            1000 + index: node.name for index, node in enumerate(NODES)
        }


def test_a_bank_that_fails_answers_without_its_text() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise ValueError("a row's value: 4242")

    with InProcessGrid(app, NODES) as grid:
        for reply in ask(grid, "anything"):
            assert reply.has_error()
            assert (reply.error.code, reply.error.reason) == (2, "ValueError")


def test_each_reply_is_given_once(light_app: str) -> None:
    with InProcessGrid(light_app, NODES) as grid:
        content = RecordDict({"order": ConfigRecord({"what": "hello"})})
        (message_id,) = grid.push_messages([grid.create_message(content, "train", 1000, "1")])
        assert len(grid.pull_messages([message_id])) == 1
        assert grid.pull_messages([message_id, "unknown"]) == []


def test_workers_need_an_app_that_they_can_import() -> None:
    with pytest.raises(ValueError, match=r"package\.module:name"):
        InProcessGrid(ClientApp(), NODES, workers=1)


def test_a_bank_that_cannot_be_opened_is_told_with_its_file(make_scenario: Callable[..., Path], tmp_path: Path) -> None:
    run = prepared(make_scenario(tmp_path), tmp_path / "run")
    folder = next(iter(run.bank_folders.values()))
    (folder / "ledger.sqlite").write_bytes(b"not a ledger")
    with pytest.raises(IntegrityError, match=f"{folder.name}/ledger.sqlite"):
        experiment.train(run, workers=0)
    close_banks()


def test_a_node_without_a_folder_is_told_how_to_be_started() -> None:
    with (
        InProcessGrid("client.app:app", NODES) as grid,
        pytest.raises(ConfigError, match="metarisk-institution=FOLDER"),
    ):
        ask(grid, "anything")


PARENT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from flwr.app import ConfigRecord, RecordDict
from simulations.inprocess import InProcessGrid, Node, worker_pool

if __name__ == "__main__":
    with InProcessGrid("light_bank:app", [Node("a", {"me": "a"}), Node("b", {"me": "b"})], workers=2) as grid:
        content = [RecordDict({"order": ConfigRecord({"what": "x"})}) for _ in range(2)]
        sent = [grid.create_message(c, "train", node, "1") for c, node in zip(content, grid.get_node_ids())]
        replies = grid.send_and_receive(sent)
        print(*(reply.content["answer"]["process"] for reply in replies))
        with worker_pool(1) as pool:
            print(pool.submit(os.getpid).result(), flush=True)
            sys.stdin.read()
"""


def test_a_killed_parent_leaves_no_worker_behind(light_app: str, tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT, encoding="utf-8")
    folder = Path(sys.modules["light_bank"].__file__ or "").parent
    with subprocess.Popen(
        [sys.executable, script, folder], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        workers = [int(word) for line in (parent.stdout.readline(), parent.stdout.readline()) for word in line.split()]
        assert len(workers) == 3
        assert all(alive(worker) for worker in workers)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [worker for worker in workers if alive(worker)] == []


def test_a_block_that_fails_ends_its_workers_at_once() -> None:
    processes = []

    def interrupted() -> None:
        with worker_pool(1) as pool:
            processes.append(pool.submit(os.getpid).result())
            pool.submit(time.sleep, 600)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [process for process in processes if alive(process)] == []
    assert len(processes) == 1


def test_a_lost_worker_is_told_to_a_person() -> None:
    with pytest.raises(MetariskError, match="--resume"), lost_worker_told():
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")


def test_the_grid_is_one_of_flowers() -> None:
    assert issubclass(InProcessGrid, Grid)


def prepared(scenario: Path, out: Path) -> runfolder.RunFolder:
    frame = read_table(scenario.parent / "loans.csv")
    return runfolder.prepare(out, load_scenario(scenario), frame, where="loans.csv", epsilon=None, engine="inprocess")


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not yet collected does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
