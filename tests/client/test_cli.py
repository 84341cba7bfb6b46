"""`metarisk-client`: what a bank's own people see, and what they are told when something is wrong."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest

from client.cli import app
from metarisk_common.plan import Plan

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
    assert [entry["kind"] for entry in answer["entries"]] == ["create", *["reserve", "release"] * 12]
    code, text, _ = call(app, "ledger", "show", bank)
    assert code == 0
    assert answer["not_private"] is True
    assert "NOT PRIVATE" in text
    assert f"{answer['source']}: epsilon {answer['spent']:.4f} spent of 4" in text


def test_an_intact_chain_is_confirmed_and_a_broken_one_is_exit_code_5(call: Call, bank: Path, tmp_path: Path) -> None:
    code, out, _ = call(app, "ledger", "verify", bank, "--json")
    assert code == 0
    head = json.loads(out)["head"]
    assert call(app, "ledger", "verify", bank)[1].strip().endswith(f"25 entries, chain intact, head {head}")
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
