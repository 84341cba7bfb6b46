"""`metarisk-client ledger`: what a risk officer and an auditor get out of a real ledger, and what stops them."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from client.cli import app
from client.ledger import Budget, Ledger, OrderKey
from metarisk_common.plan import Plan
from metarisk_common.privacy import PrivacyEvent, epsilon

Call = Callable[..., tuple[int, str, str]]
ROUNDS = 6
DAY = 86_400.0


@pytest.fixture(scope="module")
def bank(
    tmp_path_factory: pytest.TempPathFactory,
    make_bank: Callable[..., Path],
    make_loans: Callable[..., pl.DataFrame],
    plan: Plan,
) -> Path:
    """A production bank that has answered six rounds, of which it abandoned the third; tests only read it."""
    folder = make_bank(tmp_path_factory.mktemp("banks") / "a", plan, make_loans(lenders=1), seed=None)
    with Ledger.open(folder / "ledger.sqlite", source="Lender A", budget=Budget(4.0, 1e-4)) as ledger:
        for number in range(1, ROUNDS + 1):
            charge(ledger, plan, number, abandoned=number == 3)
    return folder


def charge(ledger: Ledger, plan: Plan, number: int, *, run: str = "run-1", abandoned: bool = False) -> None:
    reservation = ledger.reserve(OrderKey(run, number, plan.hash(), "ab" * 32), plan.train_event())
    if abandoned:
        ledger.abandon(reservation)
    else:
        ledger.release(reservation, b"the report")


@pytest.fixture
def copy(bank: Path, tmp_path: Path) -> Path:
    """The ledger's file by itself, as an auditor gets it."""
    path = tmp_path / "audited.sqlite"
    with closing(sqlite3.connect(bank / "ledger.sqlite")) as db, closing(sqlite3.connect(path)) as other:
        db.backup(other)
    return path


@pytest.fixture
def locked(copy: Path) -> Iterator[Path]:
    """The file by itself, in a folder that cannot be written."""
    copy.chmod(0o400)
    copy.parent.chmod(0o500)
    yield copy
    copy.parent.chmod(0o700)


def spent_by(plan: Plan, rounds: int) -> float:
    return epsilon([plan.train_event()] * rounds, 1e-4)


def test_show_tells_what_is_spent_what_remains_and_each_run(call: Call, bank: Path, plan: Plan) -> None:
    code, out, err = call(app, "ledger", "show", bank, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["spent"] == pytest.approx(spent_by(plan, ROUNDS))
    assert answer["remaining"] == pytest.approx(4 - answer["spent"])
    assert answer["not_private"] is False
    assert [(row["run_id"], row["title"], row["released"], row["abandoned"]) for row in answer["runs"]] == [
        ("run-1", "consumer", 5, 1)
    ]
    assert answer["runs"][0]["after"] == answer["spent"]
    assert [entry["kind"] for entry in answer["entries"]][:4] == ["create", "approve", "reserve", "release"]
    code, text, _ = call(app, "ledger", "show", bank)
    assert code == 0
    assert "remaining" in text
    assert plan.hash()[:12] in text
    assert "By run" in text
    assert "NOT PRIVATE" not in text


def test_verify_needs_nothing_but_the_file(call: Call, locked: Path) -> None:
    code, out, err = call(app, "ledger", "verify", locked, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert (answer["source"], answer["entries"], answer["signatures"]) == ("Lender A", 14, 14)
    code, text, _ = call(app, "ledger", "verify", locked)
    assert code == 0
    for part in ("14 entries, chain intact", "14 signatures valid", answer["public_key"], answer["fingerprint"]):
        assert part in text


def test_a_key_can_be_demanded(call: Call, copy: Path) -> None:
    known = json.loads(call(app, "ledger", "verify", copy, "--json")[1])
    for key in (known["public_key"], known["public_key"].upper(), known["fingerprint"]):
        code, text, _ = call(app, "ledger", "verify", copy, "--key", key)
        assert (code, "by the key demanded" in text) == (0, True)
    for other in ("0" * 64, "0000:" * 7 + "0000"):
        code, out, err = call(app, "ledger", "verify", copy, "--key", other)
        assert (code, out, err.count("\n")) == (5, "", 1)
        assert "signed by another key" in err
    code, out, err = call(app, "ledger", "verify", copy, "--key", "abc")
    assert (code, out) == (2, "")
    assert "--key" in err


def test_a_file_that_was_changed_is_exit_code_5_everywhere(call: Call, copy: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(copy)) as db:
        db.execute("DROP TRIGGER entries_no_update")
        db.execute("UPDATE entries SET body = replace(body, 'Lender A', 'Lender B') WHERE seq = 0")
        db.commit()
    for arguments in (["show"], ["verify"], ["export"], ["export", "--json"], ["plan"]):
        code, out, err = call(app, "ledger", *arguments, copy)
        assert (code, out, err.count("\n")) == (5, "", 1)
        assert "audited.sqlite" in err
    assert list(tmp_path.glob("statement*")) == []


def test_export_writes_a_page_beside_the_ledger_and_never_over_another(call: Call, bank: Path, copy: Path) -> None:
    code, out, err = call(app, "ledger", "export", copy)
    assert (code, err) == (0, "")
    page = Path(out.strip())
    assert (page.parent, page.name[:10], page.suffix) == (copy.parent, "statement-", ".html")
    assert page.stat().st_mode & 0o077 == 0
    assert "Lender A" in page.read_text(encoding="utf-8")
    assert "cannot say whether the bank's noise came from a seed" in page.read_text(encoding="utf-8")
    assert [path.name for path in copy.parent.iterdir() if path.name.startswith(".statement")] == []
    page.write_text("signed by the risk officer", encoding="utf-8")
    code, out, err = call(app, "ledger", "export", copy)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--force" in err
    assert page.read_text(encoding="utf-8") == "signed by the risk officer"
    code, out, _ = call(app, "ledger", "export", copy, "--force", "--out", page)
    assert (code, out.strip()) == (0, str(page))
    assert "Lender A" in page.read_text(encoding="utf-8")
    gone = copy.parent / "gone" / "statement.html"
    code, out, err = call(app, "ledger", "export", bank, "--out", gone)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "statement.html: cannot be written here" in err


def test_the_page_knows_what_the_folder_says(call: Call, bank: Path, tmp_path: Path) -> None:
    out = tmp_path / "statement.html"
    assert call(app, "ledger", "export", bank, "--out", out)[0] == 0
    text = out.read_text(encoding="utf-8")
    assert "consumer" in text
    assert "seed" not in text
    folder = tmp_path / "seeded"
    shutil.copytree(bank, folder)
    with (folder / "institution.toml").open("a", encoding="utf-8") as config:
        config.write("[simulation]\nseed = 1\n")
    assert call(app, "ledger", "export", folder, "--out", out, "--force")[0] == 0
    assert "NOT PRIVATE" in out.read_text(encoding="utf-8")


def test_the_export_for_machines_has_every_event_and_the_same_totals(call: Call, bank: Path, tmp_path: Path) -> None:
    code, out, err = call(app, "ledger", "export", bank, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    events = [
        PrivacyEvent(*(event[name] for name in ("mechanism", "noise_multiplier", "sample_rate", "steps", "segment")))
        for event in answer["events"]
    ]
    assert len(events) == ROUNDS
    assert answer["spent"] == epsilon(events, answer["budget"]["delta"])
    assert answer["spent"] == json.loads(call(app, "ledger", "show", bank, "--json")[1])["spent"]
    assert answer["approvals"][0]["cap"] is None
    path = tmp_path / "statement.json"
    assert call(app, "ledger", "export", bank, "--json", "--out", path)[:2] == (0, f"{path}\n")
    assert json.loads(path.read_text(encoding="utf-8"))["events"] == answer["events"]


def plan_json(call: Call, *arguments: object) -> Any:
    code, out, err = call(app, "ledger", "plan", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_rounds_are_planned_before_joining(call: Call) -> None:
    found = plan_json(
        call, "--epsilon", 3, "--delta", 1e-5, "--local-steps", 5, "--rate", 1, "--noise", 8, "--noise", 16
    )
    for row in found["rows"]:
        fits = [PrivacyEvent("poisson_gaussian", row["noise_multiplier"], 1.0, 5)] * row["rounds"]
        assert epsilon(fits, 1e-5) <= 3 < epsilon([*fits, fits[0]], 1e-5)
    assert [row["noise_multiplier"] for row in found["rows"]] == [8.0, 16.0]
    code, text, _ = call(app, "ledger", "plan", "--epsilon", 3, "--rate", 1, "--noise", 16)
    assert code == 0
    assert "Rounds that fit into epsilon 3 at delta 1e-05" in text


def test_a_banks_own_budget_and_what_is_spent_of_it_count(call: Call, bank: Path, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    whole = plan_json(call, "--plan", path, "--epsilon", 4, "--delta", 1e-4)
    assert (whole["rounds_affordable"], whole["fits"]) == (12, True)
    rest = plan_json(call, bank, "--plan", path)
    assert (rest["epsilon"], rest["delta"], rest["fits"]) == (4.0, 1e-4, False)
    assert rest["spent"] == pytest.approx(spent_by(plan, ROUNDS))
    # The plan is calibrated to its twelve rounds, six of which are spent.
    assert rest["rounds_affordable"] == 12 - ROUNDS
    code, text, _ = call(app, "ledger", "plan", bank, "--plan", path)
    assert code == 0
    assert "6 of 12 rounds fit into epsilon 4" in " ".join(text.split())
    assert "passes the budget" in text
    asked = plan_json(call, bank, "--epsilon", 5, "--rate", 1, "--noise", 16)
    assert (asked["epsilon"], asked["spent"]) == (5.0, rest["spent"])


def test_a_bank_without_a_ledger_plans_with_its_policy(call: Call, bank: Path, tmp_path: Path) -> None:
    shutil.copy(bank / "institution.toml", tmp_path)
    found = plan_json(call, tmp_path, "--rate", 1, "--noise", 16)
    assert (found["epsilon"], found["delta"], found["spent"]) == (4.0, 1e-4, 0.0)
    assert not (tmp_path / "ledger.sqlite").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--epsilon"),
        (["--epsilon", "0"], "--epsilon"),
        (["--epsilon", "nan"], "--epsilon"),
        (["--epsilon", "inf"], "--epsilon"),
        (["--epsilon", "3", "--delta", "0"], "--delta"),
        (["--epsilon", "3", "--rate", "1.5"], "--rate"),
        (["--epsilon", "3", "--noise", "-1"], "--noise"),
        (["--epsilon", "3", "--noise", "nan"], "--noise"),
        (["--epsilon", "3", "--rate", "0"], "--rate"),
        (["--epsilon", "3", "--local-steps", "0"], "--local-steps"),
        (["--epsilon", "3", "--plan", "gone.json"], "gone.json: there is no such file"),
        (["--epsilon", "3", "--plan", "plan.json", "--rate", "1"], "--plan"),
        (["nowhere"], "nowhere: there is no ledger here"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(call: Call, arguments: list[str], message: str) -> None:
    code, out, err = call(app, "ledger", "plan", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_the_banks_own_delta_stays(call: Call, bank: Path) -> None:
    code, _, err = call(app, "ledger", "plan", bank, "--delta", 1e-6)
    assert (code, "--delta" in err) == (2, True)


def test_a_ledger_that_only_lies_in_a_banks_folder_is_not_taken_for_its_own(
    call: Call, bank: Path, copy: Path, tmp_path: Path
) -> None:
    config = (bank / "institution.toml").read_text(encoding="utf-8") + "[simulation]\nseed = 1\n"
    (tmp_path / "institution.toml").write_text(config, encoding="utf-8")
    assert json.loads(call(app, "ledger", "export", copy, "--json")[1])["noise_seeded"] is None
