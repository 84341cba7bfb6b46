"""`metarisk-client budget`: a budget that moves only when the configuration and a person say so."""

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from client.approval import approve, open_ledger
from client.cli import app
from client.config import load_institution
from client.ledger import Ledger, OrderKey
from client.setup import Answers, lay_out
from metarisk_common.errors import ConfigError
from metarisk_common.plan import Plan

Call = Callable[..., tuple[int, str, str]]
Terminal = Callable[..., tuple[int, str]]


@pytest.fixture
def bank(tmp_path: Path, plan: Plan, make_loans: Callable[..., pl.DataFrame]) -> Path:
    """A bank with a budget of 4, of which one round is spent."""
    make_loans(lenders=1).write_csv(tmp_path / "loans.csv")
    made = lay_out(tmp_path / "bank", Answers("A", tmp_path / "loans.csv", 220, 4.0, 1e-4)).institution
    approve(made.folder, plan)
    with open_ledger(made) as ledger:
        ledger.reserve(OrderKey("run-1", 1, plan.hash(), "ab" * 32), plan.train_event())
    return made.folder


def say(bank: Path, epsilon: float) -> None:
    """Edit the configuration as the person does."""
    text = (bank / "institution.toml").read_text(encoding="utf-8")
    assert text.count("\nepsilon = 4.0\n") == 1
    (bank / "institution.toml").write_text(
        text.replace("\nepsilon = 4.0\n", f"\nepsilon = {epsilon}\n"), encoding="utf-8"
    )


def state(bank: Path) -> tuple[float, float, int]:
    with Ledger.read(bank / "ledger.sqlite") as ledger:
        ledger.verify()
        return ledger.budget.epsilon, ledger.spent(), ledger.counter


@pytest.mark.parametrize("epsilon", [5.0, 0.25])
def test_a_budget_moves_when_both_say_so(call: Call, bank: Path, epsilon: float) -> None:
    _, spent, entries = state(bank)
    say(bank, epsilon)
    before = (bank / "institution.toml").read_bytes()
    code, out, err = call(app, "budget", bank, "--epsilon", epsilon, "--yes")
    assert (code, err) == (0, "")
    assert state(bank) == (epsilon, spent, entries + 1)
    assert (bank / "institution.toml").read_bytes() == before
    assert "present budget: epsilon 4 at delta 0.0001" in out
    assert ("nothing more will be answered" in out) == (epsilon < spent)
    open_ledger(load_institution(bank)).close()
    code, out, _ = call(app, "budget", bank, "--epsilon", epsilon, "--json")
    answer = json.loads(out)
    assert (code, answer["recorded"], answer["spent"], answer["before"]) == (0, False, spent, epsilon)
    assert state(bank)[2] == entries + 1


def test_without_the_command_a_larger_budget_is_refused(bank: Path) -> None:
    say(bank, 5.0)
    with pytest.raises(ConfigError, match="change of policy"):
        open_ledger(load_institution(bank))


def test_a_budget_stays_unless_somebody_says_yes(call: Call, at_a_terminal: Terminal, bank: Path) -> None:
    before = state(bank)
    code, out, err = call(app, "budget", bank, "--epsilon", 5, "--yes")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "says policy.epsilon = 4, not 5" in err
    say(bank, 5.0)
    for arguments in ([], ["--json"]):
        code, _, err = call(app, "budget", bank, "--epsilon", 5, *arguments)
        assert (code, "--yes" in err) == (2, True)
    ended, seen = at_a_terminal(bank, ["budget", ".", "--epsilon", "5"], [("Type yes", "y")])
    assert (ended, "nothing was recorded" in seen) == (1, True), seen
    assert state(bank) == before
    ended, seen = at_a_terminal(bank, ["budget", ".", "--epsilon", "5"], [("Type yes", "yes")])
    assert (ended, "recorded: epsilon 5" in seen) == (0, True), seen
    assert state(bank) == (5.0, before[1], before[2] + 1)


@pytest.mark.parametrize("epsilon", ["0", "-1", "inf", "nan"])
def test_a_budget_is_a_finite_number_above_0(call: Call, bank: Path, epsilon: str) -> None:
    before = state(bank)
    code, out, err = call(app, "budget", bank, "--epsilon", epsilon, "--yes")
    assert (code, out, "--epsilon" in err) == (2, "", True)
    assert state(bank) == before


def test_no_ledger_no_change(call: Call, bank: Path) -> None:
    for path in bank.glob("ledger.*"):
        path.unlink()
    code, out, err = call(app, "budget", bank, "--epsilon", "4", "--yes")
    assert (code, out, "there is no ledger yet" in err) == (2, "", True)
    assert not list(bank.glob("ledger.*"))
