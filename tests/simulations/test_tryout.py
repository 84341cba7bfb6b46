"""A try-out: what a stranger needs for a first federation by hand, and nothing that a bank would not have."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from client.cli import app as client_app
from metarisk_common.errors import ConfigError
from metarisk_common.plan import read_plan
from metarisk_common.privacy import epsilon
from server.cli import app as server_app
from simulations.cli import app
from simulations.scenarios import built_in
from simulations.tryout import TryOut, lines, prepare, rounded, summary

Call = Callable[..., tuple[int, str, str]]
MakeScenario = Callable[..., Path]
APPS = {"metarisk-server": server_app, "metarisk-client": client_app}


@pytest.fixture
def scenario(tmp_path: Path, make_scenario: MakeScenario) -> Path:
    return make_scenario(tmp_path / "scenario")


@pytest.fixture
def made(tmp_path: Path, scenario: Path) -> TryOut:
    return prepare(tmp_path / "tryout", scenario, lenders=3, epsilon=3.0)


def test_each_bank_has_its_own_loans_and_no_column_says_whose(made: TryOut, scenario: Path) -> None:
    frame = pl.read_csv(scenario.parent / "loans.csv", infer_schema=False)
    for lender in made.lenders:
        own = frame.filter(pl.col("lender") == lender.name).drop("lender")
        assert pl.read_csv(lender.table, infer_schema=False).equals(own)
        assert lender.rows == own.height
    assert {path.name for path in made.path.iterdir()} == {"plan.json", *(one.table.name for one in made.lenders)}


def test_the_plan_costs_what_was_asked_and_goes_on_without_one_bank(made: TryOut) -> None:
    plan = read_plan(made.path / "plan.json")
    assert plan == made.plan
    assert (plan.outer.rounds, plan.outer.min_reports, plan.outer.deadline_seconds) == (10, 2, 60.0)
    assert epsilon(plan.events(), plan.mechanism.delta) == pytest.approx(3.0, rel=2e-3)
    assert epsilon(plan.events() * 2, plan.mechanism.delta) < made.budget


def test_one_bank_alone_is_its_own_quorum(tmp_path: Path, scenario: Path) -> None:
    assert prepare(tmp_path / "one", scenario, lenders=1, epsilon=3.0).plan.outer.min_reports == 1


def test_the_built_in_lenders_differ_in_size(tmp_path: Path) -> None:
    made = prepare(tmp_path / "tryout", built_in("credit"), lenders=3, epsilon=3.0)
    assert [lender.declared_size for lender in made.lenders] == [2000, 1700, 1500]


@pytest.mark.parametrize(
    ("size", "declared"), [(1, 10), (14, 10), (57, 60), (220, 220), (1683, 1700), (1996, 2000), (123_456, 120_000)]
)
def test_a_declared_size_is_rounded(size: int, declared: int) -> None:
    assert rounded(size) == declared


def test_the_printed_commands_make_a_federation(
    made: TryOut, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in lines(made) if line.startswith("metarisk-")]
    assert [words[:2] for words in commands[-1:]] == [["metarisk-server", "run"]]
    for name, verb, *arguments in commands[:-1]:
        if verb != "up":
            said = ["--yes"] if verb == "approve" else []
            code, out, err = call(APPS[name], verb, *arguments, *said)
            assert code == 0, (verb, out, err)
    code, out, _ = call(server_app, "banks", "--folder", "consortium", "--json")
    assert [bank["name"] for bank in json.loads(out)["banks"]] == [lender.name for lender in made.lenders]
    for lender in made.lenders:
        code, out, _ = call(client_app, "approvals", lender.folder, "--json")
        assert [row["plan_hash"] for row in json.loads(out)["approvals"]] == [made.plan.hash()]


def test_for_machines_it_is_one_object(tmp_path: Path, scenario: Path, call: Call) -> None:
    code, out, err = call(app, "tryout", scenario, "--lenders", 2, "--out", tmp_path / "here", "--json")
    assert (code, err) == (0, "")
    said: dict[str, Any] = json.loads(out)
    assert said["plan_hash"] == read_plan(Path(said["plan"])).hash()
    assert (said["rounds"], said["quorum"], said["epsilon"]) == (10, 1, 3.0)
    assert [(one["declared_size"], Path(one["table"]).is_file()) for one in said["lenders"]] == [(220, True)] * 2


def test_the_exact_number_of_a_banks_records_is_not_told(tmp_path: Path, scenario: Path) -> None:
    frame = pl.read_csv(scenario.parent / "loans.csv", infer_schema=False)
    frame.filter(pl.int_range(pl.len()).over("lender") < 217).write_csv(scenario.parent / "loans.csv")
    shorter = prepare(tmp_path / "shorter", scenario, lenders=4, epsilon=3.0)
    told = json.dumps(summary(shorter)) + "\n".join(lines(shorter))
    assert {lender.rows for lender in shorter.lenders} == {217}
    assert "220" in told
    assert not re.search(r"\b217\b", told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lenders", "5"], "--lenders 5: the table has 4 that take part"),
        (["--epsilon", "0"], "--epsilon: must be a finite number above 0"),
        (["--epsilon", "inf"], "--epsilon: must be a finite number above 0"),
        (["--epsilon", "nan"], "--epsilon: must be a finite number above 0"),
    ],
)
def test_what_cannot_be_meant_is_said(
    scenario: Path, tmp_path: Path, call: Call, arguments: list[str], message: str
) -> None:
    code, out, err = call(app, "tryout", scenario, "--out", tmp_path / "here", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert not (tmp_path / "here").exists()


def test_a_folder_in_use_is_left_alone(made: TryOut, scenario: Path, call: Call) -> None:
    before = {path: path.read_bytes() for path in made.path.iterdir()}
    code, _, err = call(app, "tryout", scenario, "--out", made.path)
    assert (code, err) == (2, f"error: {made.path}: the folder is not empty; choose another with --out\n")
    assert {path: path.read_bytes() for path in made.path.iterdir()} == before


def test_a_scenario_that_is_none_is_named(tmp_path: Path, call: Call) -> None:
    code, _, err = call(app, "tryout", "sba", "--out", tmp_path / "here")
    assert code == 2
    assert "there is no built-in scenario 'sba'" in err


def test_a_delta_too_large_for_the_largest_bank_is_refused(tmp_path: Path, make_scenario: MakeScenario) -> None:
    path = make_scenario(tmp_path / "scenario", replace={"delta = 1e-4": "delta = 1e-3"})
    with pytest.raises(ConfigError, match=r"privacy\.delta: 0\.001 is too large for a bank of 220 records"):
        prepare(tmp_path / "here", path, lenders=2, epsilon=3.0)


def test_what_no_noise_makes_so_cheap_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--epsilon 0\.1: no noise makes the plan so cheap"):
        prepare(tmp_path / "here", built_in("credit"), lenders=2, epsilon=0.1)
    assert list(tmp_path.iterdir()) == []


def test_names_that_look_alike_get_files_of_their_own(
    tmp_path: Path, make_scenario: MakeScenario, make_loans: Callable[..., pl.DataFrame]
) -> None:
    frame = make_loans().with_columns(pl.col("lender").replace({"Lender A": "lender-b", "Lender C": "(lender) b"}))
    path = make_scenario(tmp_path / "scenario", frame=frame)
    made = prepare(tmp_path / "here", path, lenders=4, epsilon=3.0)
    assert len({lender.table for lender in made.lenders}) == 4
    assert all(pl.read_csv(lender.table).height == 220 for lender in made.lenders)
