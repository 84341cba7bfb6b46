"""`metarisk-client`: what a bank's own people see, and what they are told when something is wrong."""

import json
import os
import pty
import select
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from client.cli import app
from client.config import load_institution
from client.ledger import Approval, Ledger, OrderKey
from client.plain_words import epsilon_text
from metarisk_common.plan import Plan
from metarisk_common.privacy import epsilon

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bank(finished_run: Path) -> Path:
    return next(iter(sorted((finished_run / "banks").iterdir())))


def test_the_ledger_is_shown_with_what_is_spent(call: Call, bank: Path) -> None:
    code, out, err = call(app, "ledger", "show", bank, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["source"].startswith("Lender")
    assert 0.999 * 4 <= answer["spent"] <= answer["epsilon"] == 4.0
    assert [entry["kind"] for entry in answer["entries"]] == ["create", "approve", *["reserve", "release"] * 12]
    code, text, _ = call(app, "ledger", "show", bank)
    assert code == 0
    assert answer["not_private"] is True
    assert "NOT PRIVATE" in text
    assert f"{answer['source']}: epsilon {epsilon_text(answer['spent'])} spent of 4" in text


def test_an_intact_chain_is_confirmed_and_a_broken_one_is_exit_code_5(call: Call, bank: Path, tmp_path: Path) -> None:
    code, out, _ = call(app, "ledger", "verify", bank, "--json")
    assert code == 0
    head = json.loads(out)["head"]
    first, *_ = call(app, "ledger", "verify", bank)[1].splitlines()
    assert first.endswith(f"26 entries, chain intact, head {head}")
    copy = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(bank / "ledger.sqlite")) as db, closing(sqlite3.connect(copy)) as other:
        db.backup(other)
        other.execute("DROP TRIGGER entries_no_update")
        other.execute("UPDATE entries SET body = replace(body, '\"steps\":2', '\"steps\":1') WHERE seq = 1")
        other.commit()
    code, out, err = call(app, "ledger", "verify", copy)
    assert (code, out) == (5, "")
    assert err.count("\n") == 1
    assert "ledger.sqlite" in err


def test_a_table_is_checked_against_a_plan(call: Call, bank: Path, finished_run: Path) -> None:
    code, out, _ = call(app, "check", bank, "--plan", finished_run / "plan.json", "--json")
    assert code == 0
    answer = json.loads(out)
    table = pl.read_parquet(bank / "data.parquet")
    assert (answer["rows"], answer["positives"]) == (table.height, (table["outcome"] == "bad").sum())
    assert set(answer["columns"]) == {"income", "age", "purpose"}
    code, text, _ = call(app, "check", bank, "--plan", finished_run / "plan.json")
    assert code == 0
    assert "220 rows" in text


def test_what_is_not_there_is_named(
    call: Call, tmp_path: Path, make_bank: Callable[..., Path], make_loans: Callable[..., pl.DataFrame], plan: Plan
) -> None:
    bank = make_bank(tmp_path / "bank", plan, make_loans(lenders=1).drop("age"))
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    for arguments, message in (
        (["ledger", "show", tmp_path], "there is no ledger here"),
        (["ledger", "verify", tmp_path / "gone"], "there is no ledger here"),
        (["check", tmp_path, "--plan", tmp_path / "plan.json"], "institution.toml: there is no such file"),
        (["check", bank, "--plan", tmp_path / "gone.json"], "gone.json: there is no such file"),
        (["check", bank, "--plan", tmp_path / "plan.json"], "loans.csv: column 'age' is missing"),
    ):
        code, out, err = call(app, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
        assert message in err


@pytest.fixture
def folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_bank: Callable[..., Path],
    plan: Plan,
    make_loans: Callable[..., pl.DataFrame],
) -> Path:
    """A production bank that has approved nothing; its folder is the current one, and a plan waits in it."""
    folder = make_bank(tmp_path / "bank", plan, make_loans(lenders=1), seed=None)
    for path in folder.iterdir():
        if path.name.startswith("ledger."):
            path.unlink()
    (folder / "approved" / f"{plan.hash()}.json").unlink()
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def approved(folder: Path) -> dict[str, Approval]:
    with Ledger.read(folder / "ledger.sqlite") as ledger:
        return ledger.approvals()


def test_a_plan_is_approved_as_the_documents_say(call: Call, folder: Path, plan: Plan) -> None:
    code, out, err = call(app, "approve", "plan.json", "--epsilon", "2", "--until", "2127-06-30", "--yes")
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    cost = epsilon(plan.events(), 1e-4)
    for part in (
        "the chance that outcome = bad",
        "3 inputs: income; age; purpose.",
        "12 rounds of 2 steps each",
        f"One whole run spends epsilon {epsilon_text(cost)} by itself",
        "may spend epsilon 2 together",
        "It ends with 2127-06-30 (UTC).",
        "A whole run passes the cap",
    ):
        assert part in words
    assert words.endswith(f"approved: consumer, {plan.hash()}")
    terms = approved(folder)[plan.hash()]
    # Until the end of that day, wherever the bank is.
    assert (terms.epsilon, terms.until_seconds) == (2.0, datetime(2127, 7, 1, tzinfo=UTC).timestamp())
    assert load_institution(folder).approved_plan(plan.hash()) == plan


def test_an_approval_for_machines_is_one_object(call: Call, folder: Path, plan: Plan) -> None:
    os.chdir(folder.parent)
    arguments = ("approve", "bank/plan.json", "--folder", "bank", "--json")
    code, out, err = call(app, *arguments)
    assert (code, out, "--yes" in err) == (2, "", True)
    code, out, err = call(app, *arguments, "--yes")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert (answer["plan_hash"], answer["cap"], answer["until"]) == (plan.hash(), None, None)
    assert (answer["cost"], answer["spent"]) == (epsilon(plan.events(), 1e-4), 0.0)
    assert (answer["after"], answer["rounds_within"]) == (answer["cost"], 12)


def test_what_is_spent_already_counts_and_changed_terms_are_told(call: Call, folder: Path, plan: Plan) -> None:
    assert call(app, "approve", "plan.json", "--epsilon", "3.5", "--yes")[0] == 0
    institution = load_institution(folder)
    with Ledger.open(institution.ledger_path, source="Lender A", budget=institution.budget) as ledger:
        for number in (1, 2, 3):
            key = OrderKey("run-1", number, plan.hash(), "ab" * 32)
            ledger.release(ledger.reserve(key, plan.train_event()), b"report")
    code, out, _ = call(app, "approve", "plan.json", "--yes", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["spent"] == epsilon([plan.train_event()] * 3, 1e-4)
    assert answer["rounds_within"] == 9
    assert any("replaces the terms" in warning and "3.5" in warning for warning in answer["warnings"])
    listed = json.loads(call(app, "approvals", "--json")[1])["approvals"]
    assert [(row["title"], row["cap"], row["in_force"]) for row in listed] == [("consumer", None, True)]
    assert listed[0]["spent"] == answer["spent"]


def test_without_anybody_to_ask_nothing_is_approved(call: Call, folder: Path) -> None:
    code, out, err = call(app, "approve", "plan.json")
    assert code == 2
    assert "What it costs" in out
    assert err.count("\n") == 1
    assert "--yes" in err
    assert not (folder / "ledger.sqlite").exists()
    assert list((folder / "approved").iterdir()) == []


def at_a_terminal(folder: Path, typed: str) -> tuple[int, str]:
    """Run `approve` with a terminal for its input and output, and type when it asks."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "client.cli", "approve", "plan.json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen, answered = b"", False
        while select.select([ours], [], [], 60)[0]:
            try:
                part = os.read(ours, 4096)
            except OSError:  # The other end is closed.
                break
            if not part:
                break
            seen += part
            if not answered and b"Type yes" in seen:
                os.write(ours, f"{typed}\n".encode())
                answered = True
        os.close(ours)
        return process.wait(60), seen.decode()


@pytest.mark.parametrize(
    ("typed", "code", "told", "count"),
    [("yes", 0, "approved: consumer", 1), ("y", 1, "nothing was approved", 0), ("", 1, "nothing was approved", 0)],
)
def test_the_person_at_the_terminal_decides(folder: Path, typed: str, code: int, told: str, count: int) -> None:
    ended, seen = at_a_terminal(folder, typed)
    assert (ended, told in seen) == (code, True), seen
    assert "What it costs" in seen
    assert len(list((folder / "approved").iterdir())) == count


def test_a_plan_beyond_the_banks_limits_is_exit_code_3_before_anybody_is_asked(call: Call, folder: Path) -> None:
    config = (folder / "institution.toml").read_text(encoding="utf-8")
    (folder / "institution.toml").write_text(config + "max_local_steps = 1\n", encoding="utf-8")
    code, out, err = call(app, "approve", "plan.json", "--yes")
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert "max_local_steps" in err
    assert not (folder / "ledger.sqlite").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--until", "2020-01-01"], "2020-01-01 is past"),
        (["--until", "0001-01-01"], "is past"),
        (["--until", "30.6.2127"], "--until"),
        (["--epsilon", "0"], "--epsilon"),
        (["--epsilon", "inf"], "--epsilon"),
        (["--epsilon", "nan"], "--epsilon"),
        (["--epsilon", "much"], "--epsilon"),
        (["--folder", "nowhere"], "institution.toml: there is no such file"),
    ],
)
def test_terms_that_mean_nothing_are_usage_errors(call: Call, folder: Path, arguments: list[str], message: str) -> None:
    code, out, err = call(app, "approve", "plan.json", "--yes", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not (folder / "ledger.sqlite").exists()


def test_today_is_not_past_and_the_last_day_of_all_is_no_traceback(call: Call, folder: Path, plan: Plan) -> None:
    today = datetime.now(UTC).date()
    assert call(app, "approve", "plan.json", "--yes", "--until", today.isoformat())[0] == 0
    ends = approved(folder)[plan.hash()].until_seconds
    midnight = datetime(today.year, today.month, today.day, tzinfo=UTC) + timedelta(days=1)
    assert ends == midnight.timestamp()
    code, out, _ = call(app, "approvals")
    assert (code, today.isoformat() in out) == (0, True)
    assert call(app, "approve", "plan.json", "--yes", "--until", "9999-12-31")[0] == 2
    assert call(app, "approve", "plan.json", "--yes", "--until", "9999-12-30")[0] == 0
    assert "9999-12-30" in call(app, "approvals")[1]
    listed = json.loads(call(app, "approvals", "--json")[1])["approvals"]
    assert listed[0]["until"] == "9999-12-31T00:00:00.000000+00:00"
    assert call(app, "ledger", "show", ".")[0] == 0
    assert call(app, "ledger", "export", ".")[0] == 0


def test_an_approval_is_taken_back_by_file_or_by_hash(call: Call, folder: Path, plan: Plan) -> None:
    code, _, err = call(app, "revoke", "plan.json")
    assert (code, "there is no ledger yet" in err) == (2, True)
    for name in ("plan.json", plan.hash(), plan.hash()[:12].upper()):
        assert call(app, "approve", "plan.json", "--yes")[0] == 0
        code, out, err = call(app, "revoke", name)
        assert (code, out, err) == (0, f"revoked: {plan.hash()}\n", "")
        assert approved(folder) == {}
    assert "no plan is approved" in call(app, "approvals")[1]
    for name in ("plan.json", plan.hash(), plan.hash()[:4], "0" * 64, "*"):
        code, out, err = call(app, "revoke", name)
        assert (code, out, err.count("\n")) == (2, "", 1)
    code, text, _ = call(app, "ledger", "show", ".")
    assert code == 0
    assert [text.count(kind) for kind in ("approve ", "revoke ")] == [3, 3]
