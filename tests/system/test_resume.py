"""A run is killed again and again, at the worst moments; what it learns and what it costs stay the same."""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from client.ledger import Ledger
from server.checkpoint import load_checkpoint
from server.journal import read_journal
from simulations import experiment, runfolder

ROUNDS = 12
COMMAND = Path(sys.executable).parent / "metarisk-simulate"
DEADLINE_SECONDS = 60.0


class Attempt:
    """A run of the real command in a process of its own, which is watched through the files that it writes."""

    def __init__(self, environment: dict[str, str], *arguments: object, workers: int = 0) -> None:
        self.process = subprocess.Popen(
            [COMMAND, "run", *map(str, arguments), "--workers", str(workers)],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def until(self, reached: Callable[[], bool]) -> "Attempt":
        """Wait for the moment; the process must still be there when it comes."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the moment never came: {self.end(signal.SIGKILL)}")
            time.sleep(0.001)
        return self

    def end(self, by: signal.Signals | None = None) -> tuple[int, str, str]:
        """Send a signal, if any, and wait for the end; returns exit code, standard output and standard error."""
        if by is not None:
            self.process.send_signal(by)
        try:
            out, err = self.process.communicate(timeout=DEADLINE_SECONDS)
        except BaseException:
            self.process.kill()
            self.process.communicate()
            raise
        return self.process.returncode, out, err


def kinds(folder: Path) -> list[str]:
    """Entries of a bank's ledger by kind; none while there is no ledger."""
    path = folder / "ledger.sqlite"
    if not path.exists():
        return []
    with Ledger.read(path) as ledger:
        return [entry.kind for entry in ledger.entries()]


def reserved(run: Path) -> list[Path]:
    """Banks whose newest entry is a reservation: they are computing, or died of it."""
    return [folder for folder in (run / "banks").glob("*") if kinds(folder)[-1:] == ["reserve"]]


def rounds(run: Path) -> int:
    return len(read_journal(run / "journal.jsonl"))


def test_a_run_killed_at_every_stage_ends_as_if_nothing_had_happened(
    tmp_path: Path, make_scenario: Callable[..., Path], environment: dict[str, str], finished_run: Path
) -> None:
    # As the undisturbed run, but for an evaluation that takes long enough to be hit.
    scenario = make_scenario(tmp_path, replace={"draws = 2": "draws = 150"})
    run = tmp_path / "run"

    # Before the first checkpoint, and right after a bank's first reservation.
    code, *_ = Attempt(environment, scenario, "--out", run).until(lambda: bool(reserved(run))).end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert load_checkpoint(run / "checkpoint") is None
    assert len(reserved(run)) == 1

    # Ctrl-C in the middle: nothing is lost, and the way on is told.
    again = ("--resume", "--out", run)
    code, out, err = Attempt(environment, *again).until(lambda: rounds(run) >= 2).end(signal.SIGINT)
    assert code == 130
    assert "Traceback" not in out + err
    assert f"Stopped. Go on with: metarisk-simulate run --resume --out {shlex.quote(str(run))}\n" in err
    interrupted = rounds(run)
    assert 2 <= interrupted < ROUNDS

    # In the middle of a round, wherever the banks are: two processes of them this time, for a moment without parent.
    middle = Attempt(environment, *again, workers=2).until(lambda: rounds(run) > interrupted + 1)
    code, *_ = middle.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert interrupted + 1 < rounds(run) < ROUNDS

    # After the last round, while it is evaluated.
    code, *_ = Attempt(environment, *again).until(lambda: rounds(run) == ROUNDS).end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (run / "metrics.json").exists()

    code, out, err = Attempt(environment, *again, "--json").end()
    assert (code, err) == (0, "")
    assert json.loads(out)["summary"]["dp-reptile"]["10"]["institutions"] == 2
    assert (run / "report.html").exists()

    resumed, undisturbed = runfolder.open_run(run), runfolder.open_run(finished_run)
    learned, expected = experiment.meta_params(resumed), experiment.meta_params(undisturbed)
    assert {name: value.tobytes() for name, value in learned.items()} == {
        name: value.tobytes() for name, value in expected.items()
    }
    assert [record["round"] for record in resumed.journal()] == list(range(1, ROUNDS + 1))
    assert all(record["admitted"] == sorted(resumed.sizes) for record in resumed.journal())
    for name, folder in resumed.bank_folders.items():
        with Ledger.read(folder / "ledger.sqlite") as ledger:
            ledger.verify()
            # No round is charged twice, and none is answered twice.
            assert [entry.kind for entry in ledger.entries()] == ["create", "approve", *["reserve", "release"] * ROUNDS]
            assert ledger.spent() == undisturbed.spent()[name]["spent"]
            assert 0.999 * 4 <= ledger.spent() <= 4
