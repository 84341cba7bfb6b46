"""The ledger against whoever edits its file, against processes that die and against processes that race."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.ledger import Budget, Ledger, OrderKey
from metarisk_common.errors import IntegrityError
from metarisk_common.privacy import PrivacyEvent, epsilon

BUDGET = Budget(epsilon=3.0, delta=1e-5)
EVENT = PrivacyEvent("poisson_gaussian", 50.0, 1.0, 5)


def key(number: int) -> OrderKey:
    return OrderKey(run_id="run", round=number, plan_hash="plan", order_digest="digest")


def open_ledger(path: Path) -> Ledger:
    ledger = Ledger.open(path, source="loans", budget=BUDGET)
    ledger.approve("plan")
    return ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with open_ledger(path) as opened:
        yield opened


def tamper(path: Path, *statements: str) -> None:
    """Do what a person with the file and an editor can do: the triggers do not stop them."""
    db = sqlite3.connect(path)
    triggers = db.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        db.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        db.execute(statement)
    for _, sql in triggers:
        db.execute(sql)
    db.commit()
    db.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = '{}'",
        "DELETE FROM entries",
        "DELETE FROM entries WHERE seq = 1",
        "INSERT OR REPLACE INTO entries VALUES (1, '{}', '')",
        "INSERT INTO entries VALUES (7, '{}', '')",
        "UPDATE signatures SET signature = ''",
        "DELETE FROM signatures",
        "INSERT OR REPLACE INTO signatures VALUES (1, '')",
        "INSERT INTO signatures VALUES (7, '')",
    ],
)
def test_the_table_is_append_only(ledger: Ledger, path: Path, statement: str) -> None:
    ledger.reserve(key(1), EVENT)
    db = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute(statement)
    db.close()
    ledger.verify()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = replace(body, '\"steps\":5', '\"steps\":1') WHERE seq = 2",
        "UPDATE entries SET digest = upper(digest) WHERE seq = 2",
        "DELETE FROM entries WHERE seq = 1",
        "DELETE FROM entries WHERE seq = 0",
        "DELETE FROM entries",
        "DELETE FROM entries WHERE seq = 4",
        "DELETE FROM signatures WHERE seq = 2",
        "UPDATE signatures SET signature = (SELECT signature FROM signatures WHERE seq = 3) WHERE seq = 4",
        "UPDATE entries SET seq = seq + 100 WHERE seq >= 2",
        "DROP TRIGGER entries_no_update",
        "CREATE TABLE more (x)",
    ],
)
def test_a_changed_file_is_refused(path: Path, statement: str) -> None:
    with open_ledger(path) as ledger:
        for number in range(3):
            ledger.reserve(key(number), EVENT)
    if statement.startswith(("DROP", "CREATE")):
        db = sqlite3.connect(path)
        db.execute(statement)
        db.close()
    else:
        tamper(path, statement)
    for attempt in (open_ledger, Ledger.read):
        with pytest.raises(IntegrityError, match=f"{path}: "):
            attempt(path)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = replace(body, '\"steps\":5', '\"steps\":1') WHERE seq = 2",
        "DELETE FROM entries WHERE seq = 3",
        "UPDATE entries SET digest = upper(digest) WHERE seq = 3",
    ],
)
def test_a_change_under_an_open_ledger_is_noticed(ledger: Ledger, path: Path, statement: str) -> None:
    for number in range(2):
        ledger.reserve(key(number), EVENT)
    tamper(path, statement)
    with pytest.raises(IntegrityError, match=f"{path}: "):
        ledger.verify()
    if "seq = 3" in statement:  # The head is checked at every step, the whole chain when asked for.
        with pytest.raises(IntegrityError, match="no longer what it was"):
            ledger.reserve(key(2), EVENT)


def test_a_changed_report_is_not_sent(ledger: Ledger, path: Path) -> None:
    ledger.release(ledger.reserve(key(1), EVENT), b"report")
    tamper(path, "UPDATE outbox SET report = x'00'")
    with pytest.raises(IntegrityError, match="not the one released"):
        ledger.released_report(key(1))


# Processes that die or race.

TURNS = """
import sys
from pathlib import Path
from client.ledger import Budget, Ledger, OrderKey
from metarisk_common.errors import BudgetExhaustedError
from metarisk_common.privacy import PrivacyEvent
path, run, stop_after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
event = PrivacyEvent("poisson_gaussian", 50.0, 1.0, 5)
ledger = Ledger.open(path, source="loans", budget=Budget(3.0, 1e-5))
ledger.approve("plan")
print("ready", flush=True)
sys.stdin.readline()
try:
    for number in range(10_000):
        reservation = ledger.reserve(OrderKey(run, number, "plan", "digest"), event)
        print("reserved", number, ledger.spent(), flush=True)
        if number == stop_after:
            sys.stdin.readline()
        ledger.release(reservation, b"report %d" % number)
        print("released", number, ledger.spent(), flush=True)
except BudgetExhaustedError:
    print("exhausted", flush=True)
"""


def start(path: Path, run: str, stop_after: int = -1) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", TURNS, str(path), run, str(stop_after)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def read_until(process: subprocess.Popen[str], line_start: str) -> list[str]:
    lines: list[str] = []
    assert process.stdout is not None
    while not lines or not lines[-1].startswith(line_start):
        lines.append(process.stdout.readline())
        assert lines[-1], "the process ended early"
    return lines


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_process_killed_between_reserve_and_release_leaves_the_charge(path: Path) -> None:
    process = start(path, "run", stop_after=2)
    go(process)
    lines = read_until(process, "reserved 2 ")
    kill(process)
    with open_ledger(path) as ledger:
        ledger.verify()
        assert ledger.spent() == float(lines[-1].split()[2]) == epsilon([EVENT] * 3, BUDGET.delta)
        assert ledger.released_report(key(1)) == b"report 1"
        # Nothing left the bank under the third: trying again costs nothing, and ends in one output.
        again = ledger.reserve(key(2), EVENT)
        assert len(ledger.events()) == 3
        ledger.release(again, b"report 2")
        assert ledger.released_report(key(2)) == b"report 2"


@pytest.mark.parametrize("number", [1, 13])
def test_a_process_killed_at_any_moment_never_undercounts(path: Path, number: int) -> None:
    process = start(path, "run")
    go(process)
    told = read_until(process, f"released {number} ")
    process.send_signal(signal.SIGKILL)
    told += process.communicate()[0].splitlines(keepends=True)
    whole = [line.split() for line in told if line.endswith("\n")]
    with open_ledger(path) as ledger:
        ledger.verify()
        assert ledger.spent() >= float(whole[-1][2])
        assert len(ledger.events()) >= sum(words[0] == "reserved" for words in whole)


def test_two_processes_at_once_never_pass_the_budget(path: Path) -> None:
    open_ledger(path).close()
    processes = [start(path, run) for run in ("one", "other")]
    for process in processes:
        go(process)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert all(output.endswith("exhausted\n") for output in outputs)
    with open_ledger(path) as ledger:
        ledger.verify()
        events = ledger.events()
        assert len(events) == sum(output.count("reserved") for output in outputs)
        assert min(output.count("reserved") for output in outputs) > 0
        assert ledger.spent() <= BUDGET.epsilon < epsilon([*events, EVENT], BUDGET.delta)


def test_processes_that_create_the_ledger_at_once_share_it(path: Path) -> None:
    processes = [start(path, run, stop_after=0) for run in ("one", "other")]
    for process in processes:
        go(process)
        read_until(process, "reserved 0 ")
    with open_ledger(path) as ledger:
        assert len(ledger.events()) == 2
    for process in processes:
        kill(process)
