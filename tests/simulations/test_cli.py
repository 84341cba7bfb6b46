"""The command line: what a person is told of each mistake, and what a script can rely on."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from simulations.cli import app

Call = Callable[..., tuple[int, str, str]]
MakeScenario = Callable[..., Path]
MakeLoans = Callable[..., pl.DataFrame]

CANARY = "4242.4242"


def cell(column: str, value: str) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """Put a value in one cell of a column."""
    here = pl.when(pl.int_range(pl.len()) == 5)
    return lambda frame: frame.with_columns(
        here.then(pl.lit(value)).otherwise(pl.col(column).cast(pl.String)).alias(column)
    )


def one_class(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(
        pl.when(pl.col("lender") == "Lender C").then(pl.lit("good")).otherwise(pl.col("outcome")).alias("outcome")
    )


DAMAGED_TABLES: dict[str, tuple[Callable[[pl.DataFrame], pl.DataFrame], str]] = {
    "missing column": (lambda frame: frame.drop("age"), "loans.csv.*column 'age' is missing"),
    "renamed column": (lambda frame: frame.rename({"age": "Age "}), "loans.csv.*'age' is missing; did you mean 'Age'"),
    "no lender": (lambda frame: frame.drop("lender"), "loans.csv.*'lender'"),
    "text in a number": (cell("age", f"x{CANARY}"), "loans.csv.*column 'age' must hold numbers, but 1 of"),
    "infinite": (cell("income", "inf"), "loans.csv.*column 'income' holds infinite"),
    "three outcomes": (cell("outcome", CANARY), "loans.csv.*column 'outcome' holds 1 distinct values other"),
    "an empty outcome": (cell("outcome", ""), "loans.csv.*column 'outcome' is empty in 1"),
    "nobody's record": (cell("lender", ""), "loans.csv.*column 'lender' is empty in 1"),
    "one class": (one_class, "loans.csv: institution 'Lender C'.*one class"),
    "categories misspelt": (
        lambda frame: frame.with_columns(purpose=pl.lit(CANARY)),
        "loans.csv: column 'purpose' holds none of the schema's categories",
    ),
    "no rows": (lambda frame: frame.clear(), "loans.csv: holds no rows"),
    "too few lenders": (lambda frame: frame.filter(pl.col("lender") == "Lender A"), "1 institution"),
}  # fmt: skip
DAMAGED_SCENARIOS = {
    "unknown key": (
        {"delta = 1e-4": "dleta = 1e-4"},
        "scenario.toml: unknown key 'privacy.dleta'; did you mean 'delta'",
    ),
    "no budget": ({"epsilon = 4.0": "epsilon = 0"}, "scenario.toml: key 'privacy.epsilon'.*greater than 0"),
    "a budget of nan": ({"epsilon = 4.0": "epsilon = nan"}, "scenario.toml: key 'privacy.epsilon'"),
    "text for a number": ({"rounds = 12": 'rounds = "many"'}, "scenario.toml: key 'server.rounds'"),
    "a large delta": ({"delta = 1e-4": "delta = 1e-3"}, "privacy.delta: 0.001 is too large for 'Lender"),
    "k = 1": ({"k = [0, 10]": "k = [0, 1]"}, "scenario.toml: key 'evaluation.k'"),
    "k too large": ({"k = [0, 10]": "k = [0, 219]"}, "loans.csv: institution 'Lender .'.*too few records"),
    "a key elsewhere": ({"[data]": "missing = 1\n[data]"}, "unknown key 'missing'; it belongs in another section"),
    "names unquoted": ({"unseen = 2": "unseen = [13, 2]"}, "key 'splits.unseen': write the names in quotes"),
    "a name for no folder": ({'name = "consumer"': 'name = "My Run"'}, "key 'name': must be lower-case letters"),
    "unseen nobody": ({"unseen = 2": 'unseen = ["Lender X"]'}, "splits.unseen: there is no institution 'Lender X'"),
    "all unseen": ({"unseen = 2": "unseen = 6"}, "splits: the table has 6 institution"),
    "missing table": ({"loans.csv": "gone.csv"}, "gone.csv: there is no such file"),
    "another format": ({"loans.csv": "loans.xlsx"}, "loans.xlsx: only .csv and .parquet"),
    "no TOML": ({"[data]": "hello"}, "scenario.toml: is not valid TOML.*line"),
    "too large a quorum": ({"rounds = 12": "rounds = 12\nmin_reports = 9"}, "server.min_reports: 9"),
}


def refused(answer: tuple[int, str, str], message: str) -> None:
    """One line on standard error that names the place, exit code 2, nothing else."""
    code, out, err = answer
    assert (code, out) == (2, ""), err
    assert re.fullmatch(f"error: [^\n]*{message}[^\n]*\n", err), err
    assert CANARY not in err


@pytest.mark.parametrize("name", DAMAGED_TABLES)
def test_a_damaged_table_is_told_in_one_line(
    tmp_path: Path, make_scenario: MakeScenario, make_loans: MakeLoans, call: Call, name: str
) -> None:
    damage, message = DAMAGED_TABLES[name]
    scenario = make_scenario(tmp_path, frame=damage(make_loans(rows=40)))
    refused(call(app, "run", scenario, "--out", tmp_path / "run", "--workers", 0), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loans.csv", "scenario.toml"]


@pytest.mark.parametrize("name", DAMAGED_SCENARIOS)
def test_a_damaged_scenario_is_told_in_one_line(
    tmp_path: Path, make_scenario: MakeScenario, call: Call, name: str
) -> None:
    replace, message = DAMAGED_SCENARIOS[name]
    refused(call(app, "run", make_scenario(tmp_path, replace=replace), "--out", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("loans.csv", b"", "loans.csv: is empty"),
        ("loans.csv", b"a,b\n\xff\xfe\x00,1\n1,2,3,4\n", "loans.csv"),
        ("scenario.toml", b"\xff\xfe", "scenario.toml: is not UTF-8"),
        ("scenario.toml", None, "scenario.toml: there is no such file"),
    ],
)
def test_a_file_that_is_something_else_is_named(
    tmp_path: Path, make_scenario: MakeScenario, call: Call, file: str, content: bytes | None, message: str
) -> None:
    scenario = make_scenario(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    refused(call(app, "run", scenario, "--out", tmp_path / "run"), message)


def test_a_broken_parquet_file_is_named(tmp_path: Path, make_scenario: MakeScenario, call: Call) -> None:
    scenario = make_scenario(tmp_path, replace={"loans.csv": "loans.parquet"})
    pl.read_csv(tmp_path / "loans.csv").write_parquet(tmp_path / "loans.parquet")
    data = (tmp_path / "loans.parquet").read_bytes()
    (tmp_path / "loans.parquet").write_bytes(data[: len(data) // 2])
    refused(call(app, "run", scenario, "--out", tmp_path / "run"), "loans.parquet: can't be read as Parquet")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epsilon", "0"], "--epsilon: must be above 0"),
        (["--epsilon", "-1"], "--epsilon: must be above 0"),
        (["--epsilon", "nan"], "--epsilon: must be above 0"),
        (["--engine", "warp"], "--engine warp: choose inprocess or ray"),
        (["--seed", "1", "--system-noise"], "--seed and --system-noise exclude each other"),
    ],
)
def test_a_flag_that_cannot_be_meant_is_told(
    tmp_path: Path, make_scenario: MakeScenario, call: Call, flags: list[str], message: str
) -> None:
    refused(call(app, "run", make_scenario(tmp_path), "--out", tmp_path / "run", *flags), message)
    assert not (tmp_path / "run").exists()


def test_a_place_for_the_run_that_will_not_do_is_told(tmp_path: Path, make_scenario: MakeScenario, call: Call) -> None:
    scenario = make_scenario(tmp_path)
    refused(call(app, "run", scenario, "--out", tmp_path), "the folder is not empty; choose another with --out")
    refused(call(app, "run", scenario, "--out", scenario), "scenario.toml: is a file")
    refused(call(app, "run", scenario, "--out", scenario / "run"), "cannot be laid out here")
    refused(call(app, "run", scenario, "--resume", "--out", tmp_path / "x", "--engine", "?"), "--engine")
    refused(call(app, "run"), "name a scenario file, or an unfinished run")
    refused(call(app, "run", "--resume", "--out", tmp_path), "holds no run that could be resumed")
    refused(call(app, "demo", "--scenario", "weather"), "'weather'; choose one of: credit")


def test_a_finished_run_resumes_to_the_same_and_to_nothing_else(
    tmp_path: Path, make_scenario: MakeScenario, call: Call, finished_run: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    answers = [
        json.loads(call(app, "run", *scenario, "--resume", "--out", run, "--json", *flags)[1])
        for scenario, flags in (([], []), ([make_scenario(tmp_path)], ["--epsilon", "4", "--seed", "7"]))
    ]
    assert answers[0] == answers[1]
    for flags in (["--epsilon", "3"], ["--seed", "8"], ["--system-noise"]):
        refused(call(app, "run", "--resume", "--out", run, *flags), f"was made with another {flags[0]}")
    assert call(app, "run", "--resume", "--out", run, "--engine", "ray")[0] == 2
    other = make_scenario(tmp_path / "other", replace={"rounds = 12": "rounds = 13"})
    refused(call(app, "run", other, "--resume", "--out", run), "was made from another scenario")


def test_the_newest_run_of_the_very_name_is_resumed(
    tmp_path: Path, make_scenario: MakeScenario, call: Call, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scenario = make_scenario(tmp_path / "scenario")
    for name in ("consumer-999", "consumer-1000"):
        shutil.copytree(finished_run, tmp_path / "runs" / name)
    (tmp_path / "runs" / "consumer-loans-5000").mkdir()
    answer = json.loads(call(app, "run", scenario, "--resume", "--json")[1])
    assert answer["run"] == "runs/consumer-1000"
    code, out, _ = call(app, "list", "--json")
    assert code == 0
    assert json.loads(out)["runs"] == [
        {"run": f"runs/consumer-{number}", "round": 12, "rounds": 12} for number in (1000, 999)
    ]
    assert "credit" in json.loads(out)["scenarios"]


def strict(text: str) -> Any:
    """Read exactly one line of JSON that has no NaN and no Infinity."""
    assert text.count("\n") == 1
    return json.loads(text, parse_constant=pytest.fail)


def test_evaluate_prints_episodes_and_summary_and_nothing_else(call: Call, finished_run: Path) -> None:
    code, out, err = call(app, "evaluate", finished_run, "--json", "--k", "0,20", "--draws", 3)
    assert (code, err) == (0, "")
    answer = strict(out)
    assert set(answer) == {"episodes", "summary"}
    unseen = json.loads((finished_run / "run.json").read_text(encoding="utf-8"))["unseen"]
    assert {(item["institution"], item["k"], item["draw"], item["method"]) for item in answer["episodes"]} == {
        (name, k, draw, "dp-reptile") for name in unseen for k in (0, 20) for draw in range(3)
    }
    for item in answer["episodes"]:
        assert set(item) == {"institution", "k", "draw", "method", "auc", "ks", "log_loss", "brier", "calibration"}
    assert set(answer["summary"]) == {"dp-reptile"}
    assert set(answer["summary"]["dp-reptile"]) == {"0", "20"}
    for found in answer["summary"]["dp-reptile"].values():
        for metric in ("auc", "ks", "log_loss", "brier"):
            low, high = found[metric]["ci95"]
            assert low < found[metric]["mean"] < high
    means = [item["auc"] for item in answer["episodes"] if item["k"] == 20]
    assert answer["summary"]["dp-reptile"]["20"]["auc"]["mean"] == pytest.approx(sum(means) / len(means))


def test_evaluate_takes_a_table_of_other_lenders(
    tmp_path: Path, call: Call, finished_run: Path, make_loans: MakeLoans
) -> None:
    other = make_loans(lenders=1, seed=9).with_columns(pl.lit("New lender").alias("lender"))
    for name, write in (("x.csv", other.write_csv), ("x.parquet", other.write_parquet)):
        write(tmp_path / name)
        code, out, _ = call(app, "evaluate", finished_run, "--data", tmp_path / name, "--json", "--k", "0")
        assert code == 0
        answer = strict(out)
        assert {item["institution"] for item in answer["episodes"]} == {"New lender"}
        # One lender says nothing of how lenders differ.
        assert answer["summary"]["dp-reptile"]["0"]["auc"]["ci95"] == [None, None]
    code, out, _ = call(app, "evaluate", finished_run, "--data", tmp_path / "x.csv")
    assert code == 0
    assert "Reptile, epsilon 4" in out


def test_evaluate_refuses_what_is_no_run_and_whoever_took_part(
    tmp_path: Path, call: Call, finished_run: Path, make_loans: MakeLoans
) -> None:
    refused(call(app, "evaluate", tmp_path), "holds no run")
    refused(call(app, "evaluate", tmp_path / "gone"), "gone: holds no run")
    refused(call(app, "evaluate", finished_run, "--data", tmp_path / "gone.csv"), "gone.csv: there is no such file")
    make_loans().write_csv(tmp_path / "all.csv")
    refused(call(app, "evaluate", finished_run, "--data", tmp_path / "all.csv"), "all.csv: 4 institution.*took part")
    refused(call(app, "evaluate", finished_run, "--k", "0,400"), "institution 'Lender .'.*too few records")
    for k in ("", "1", "-3", "ten", "0,,5"):
        refused(call(app, "evaluate", finished_run, f"--k={k}"), "--k .*: give numbers of labels")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished_run, unfinished)
    shutil.rmtree(unfinished / "checkpoint")
    refused(call(app, "evaluate", unfinished), "only 0 of 12 rounds are done; continue with --resume")


def test_a_run_without_a_bound_prints_strict_json(tmp_path: Path, make_scenario: MakeScenario, call: Call) -> None:
    from client.cli import app as client_app  # noqa: PLC0415 - for its ledger

    scenario = make_scenario(tmp_path, replace={"rounds = 12": "rounds = 2", "epsilon = 4.0": "epsilon = inf"})
    out = tmp_path / "a long name [of] a folder, with spaces" / "run"
    code, text, _ = call(app, "run", scenario, "--out", out, "--workers", 0)
    assert code == 0
    assert f"Run folder: {out}\n" in text
    assert f"Report: {out / 'report.html'} " in text
    assert "NOT PRIVATE" in text
    code, text, err = call(app, "run", "--resume", "--out", out, "--json")
    assert (code, err) == (0, "")
    answer = strict(text)
    assert answer["not_private"] is True
    assert answer["privacy"]["epsilon_budget"] is None
    assert {account["spent"] for account in answer["privacy"]["by_institution"].values()} == {None}
    strict(call(app, "evaluate", out, "--json")[1])
    bank = next((out / "banks").iterdir())
    ledger = strict(call(client_app, "ledger", "show", bank, "--json")[1])
    assert (ledger["spent"], ledger["epsilon"], len(ledger["entries"])) == (None, None, 6)


def test_a_title_is_shown_as_it_is_written(tmp_path: Path, make_scenario: MakeScenario, call: Call) -> None:
    replace = {'"Consumer loans"': '"[/red] loans [bold]"', "rounds = 12": "rounds = 1"}
    code, text, _ = call(
        app, "run", make_scenario(tmp_path, replace=replace), "--out", tmp_path / "run", "--workers", 0
    )
    assert code == 0
    assert text.startswith("[/red] loans [bold]: 4 institutions learn together, 2 take no part.")


def test_epsilon_and_seed_of_the_command_line_count(tmp_path: Path, make_scenario: MakeScenario, call: Call) -> None:
    scenario = make_scenario(tmp_path, replace={"rounds = 12": "rounds = 1"})
    found = []
    for name, flags in (("a", ["--seed", "1"]), ("b", ["--seed", "2"]), ("c", ["--system-noise", "--epsilon", "1"])):
        code, text, _ = call(app, "run", scenario, "--out", tmp_path / name, "--workers", 0, "--json", *flags)
        assert code == 0
        answer = strict(text)
        found.append(answer["summary"])
        spent = {account["spent"] for account in answer["privacy"]["by_institution"].values()}
        assert len(spent) == 1
        budget = 1.0 if name == "c" else 4.0
        assert 0.999 * budget <= spent.pop() <= budget
        assert answer["not_private"] == (name != "c")
    assert found[0] != found[1]
    config = next((tmp_path / "c" / "banks").iterdir()) / "institution.toml"
    assert "seed" not in config.read_text(encoding="utf-8")


def test_every_command_shows_an_example(call: Call) -> None:
    from client.cli import app as client_app  # noqa: PLC0415 - one test for all three
    from server.cli import app as server_app  # noqa: PLC0415

    commands = [
        (app, ["demo"]), (app, ["run"]), (app, ["evaluate"]), (app, ["list"]), (app, ["bench"]),
        (server_app, ["status"]), (server_app, ["export"]),
        (client_app, ["check"]), (client_app, ["ledger", "show"]), (client_app, ["ledger", "verify"]),
    ]  # fmt: skip
    for of, words in commands:
        code, out, err = call(of, *words, "--help")
        assert (code, err) == (0, "")
        assert f" {' '.join(words)}" in out[out.index("Example: metarisk-") :]
        assert "--json" in out
    for of in (app, server_app, client_app):
        assert call(of, "--version")[1].startswith("metarisk-federated ")
        assert call(of, "--help")[0] == 0
        assert call(of, "nonsense")[0] == 2
