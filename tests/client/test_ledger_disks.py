"""The ledger where it cannot write: full disks, files and folders that are not its own, and other processes at work."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.ledger import Budget, Ledger, OrderKey
from metarisk_common.errors import MetariskError
from metarisk_common.privacy import PrivacyEvent

BUDGET = Budget(epsilon=3.0, delta=1e-5)
EVENT = PrivacyEvent("poisson_gaussian", 50.0, 1.0, 5)
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
UNSHARE = ("unshare", "--mount")
CAN_MOUNT = (
    sys.platform == "linux"
    and os.geteuid() == 0
    and subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode == 0
)


def key(number: int) -> OrderKey:
    return OrderKey(run_id="run", round=number, plan_hash="plan", order_digest="digest")


def open_ledger(path: Path) -> Ledger:
    ledger = Ledger.open(path, source="loans", budget=BUDGET)
    ledger.approve("plan")
    return ledger


def turn(ledger: Ledger, number: int) -> None:
    ledger.release(ledger.reserve(key(number), EVENT), b"report")


def run(script: str, *arguments: object, command: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    line = [*command, sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(line, check=False, capture_output=True, text=True, env=ENVIRONMENT)


# Disks that are full.

# Turns until the disk is full, says how that was told, checks that nothing is lost, and goes on when there is room.
FILL = """
import sys
from pathlib import Path
from client.ledger import Budget, Ledger, OrderKey
from metarisk_common.errors import MetariskError
from metarisk_common.privacy import PrivacyEvent
event = PrivacyEvent("poisson_gaussian", 50.0, 1.0, 5)
path = Path(sys.argv[1])
def open_ledger():
    ledger = Ledger.open(path, source="loans", budget=Budget(1e9, 1e-5))
    ledger.approve("plan")
    return ledger
def turn(ledger, number):
    key = OrderKey("run", number, "plan", "digest")
    if ledger.released_report(key) is None:
        ledger.release(ledger.reserve(key, event), bytes(2000))
def fill(limit, lift):
    ledger = open_ledger()
    limit()
    number = 0
    try:
        while True:
            turn(ledger, number)
            number += 1
    except MetariskError as error:
        print(type(error).__name__, error)
    before, spent = ledger.entries(), ledger.spent()
    try:
        turn(ledger, number)
    except MetariskError:
        pass
    else:
        raise SystemExit("it went on")
    assert number > 2 and (ledger.entries(), ledger.spent()) == (before, spent), (number, before)
    with Ledger.read(path) as reader:
        assert reader.entries() == before
    lift()
    turn(ledger, number)
    turn(ledger, number + 1)
    ledger.close()
    with open_ledger() as again:
        again.verify()
        assert again.entries()[:len(before)] == before and len(again.events()) == number + 2
"""
SIZE_LIMIT = """
import resource
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
fill(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, most)),
     lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
"""
SMALL_DISK = """
import subprocess
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", path.parent], check=True)
ballast = path.parent / "ballast"
fill(lambda: ballast.write_bytes(bytes(100_000)), ballast.unlink)
"""


def test_a_file_that_may_not_grow_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    result = run(FILL + SIZE_LIMIT, tmp_path / "ledger.sqlite")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"MetariskError {tmp_path / 'ledger.sqlite'}: could not be written")
    assert "see to room on the disk" in result.stdout


@pytest.mark.skipif(not CAN_MOUNT, reason="a disk of its own, to be filled, needs the right to mount one")
def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    result = run(FILL + SMALL_DISK, tmp_path / "disk" / "ledger.sqlite", command=UNSHARE)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"MetariskError {tmp_path / 'disk'}")
    assert "is full" in result.stdout or "No space left" in result.stdout


# Files that may not be written.

BOUND_BY_MODES = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root passes over a file's mode
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, which binds from the next program on
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""
TRY = """
import os, sys
from pathlib import Path
from client.ledger import Budget, Ledger
from metarisk_common.errors import MetariskError
path, target, right = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if os.access(target, right):
    raise SystemExit("the mode does not bind")
for attempt in (Ledger.read, lambda path: Ledger.open(path, source="loans", budget=Budget(2.0, 1e-5))):
    try:
        with attempt(path) as ledger:
            print(ledger.counter)
    except MetariskError as error:
        print(type(error).__name__, error)
"""


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Callable[[str, int, int], list[str]]]:
    """Change a file's mode, and give what reading and then writing the ledger says to a user whom the mode binds."""
    folder = tmp_path / "bank"
    folder.mkdir()
    path = folder / "ledger.sqlite"
    with open_ledger(path) as ledger:
        turn(ledger, 1)

    def tell(name: str, mode: int, right: int) -> list[str]:
        (folder / name).chmod(mode)
        result = run(BOUND_BY_MODES, TRY, path, folder / name, right)
        (folder / name).chmod(0o700)
        if "the mode does not bind" in result.stderr:
            pytest.skip("this user's rights over the file cannot be taken away")
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.splitlines()

    yield tell
    (folder / "ledger.key").chmod(0o600)
    with open_ledger(path) as ledger:
        assert ledger.counter == 4


@pytest.mark.parametrize(("name", "mode"), [("ledger.sqlite", 0o400), (".", 0o500)])
def test_what_may_not_be_written_is_read_and_said(
    told: Callable[[str, int, int], list[str]], name: str, mode: int
) -> None:
    read, written = told(name, mode, os.W_OK)
    assert read == "4"
    assert written.startswith("ConfigError ")
    assert "ledger.sqlite: " in written
    assert "must be allowed to write" in written


def test_a_ledger_that_may_not_be_read_is_said(told: Callable[[str, int, int], list[str]]) -> None:
    for line in told("ledger.sqlite", 0o000, os.R_OK):
        assert line.startswith("ConfigError ")
        assert "ledger.sqlite: unable to open database file; this user must be allowed" in line


def test_a_key_that_may_not_be_read_is_said(told: Callable[[str, int, int], list[str]]) -> None:
    read, written = told("ledger.key", 0o000, os.R_OK)
    assert read == "4"
    assert written.startswith("ConfigError ")
    assert "ledger.key: the ledger's private key cannot be read: Permission denied" in written


# Other processes.


def test_a_ledger_that_is_held_too_long_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.sqlite"
    monkeypatch.setattr("client.ledger_file._BUSY_SECONDS", 0.05)
    with open_ledger(path) as ledger:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(MetariskError, match=rf"{path}: another process has held the ledger"):
            ledger.reserve(key(1), EVENT)
        other.execute("ROLLBACK")
        other.close()
        turn(ledger, 1)


RACE = """
import sys
from pathlib import Path
from client.ledger import Budget, Ledger, OrderKey
from metarisk_common.privacy import PrivacyEvent
ledger = Ledger.open(Path(sys.argv[1]), source="loans", budget=Budget(1e9, 1e-5))
ledger.approve("plan")
print("ready", flush=True)
sys.stdin.readline()
for number in range(30):
    order = OrderKey(sys.argv[2], number, "plan", "digest")
    ledger.release(ledger.reserve(order, PrivacyEvent("poisson_gaussian", 50.0, 1.0, 5)), b"report")
"""


def test_two_processes_leave_a_head_that_names_the_newest_entry(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, path, run_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        for run_id in ("one", "other")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # both are at work before either is waited for
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    with Ledger.read(path) as reader:
        reader.verify()
        assert reader.counter == 2 + 2 * 2 * 30
        head = json.loads((tmp_path / "ledger.head").read_text(encoding="utf-8"))
        assert (head["counter"], head["digest"]) == (reader.counter - 1, reader.head)
