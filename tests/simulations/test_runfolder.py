"""A run's folder is there whole or not at all, and holds nothing that could not be run."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from client.bank import Bank
from metarisk_common.errors import ConfigError, DataError, IntegrityError, MetariskError
from simulations import experiment, runfolder
from simulations.runfolder import RunFolder, open_run, prepare, unused_folder
from simulations.scenarios import load_scenario

MakeScenario = Callable[..., Path]
Prepare = Callable[..., RunFolder]


@pytest.fixture
def make(tmp_path: Path, make_scenario: MakeScenario, make_loans: Callable[..., pl.DataFrame]) -> Prepare:
    def call(
        *, frame: pl.DataFrame | None = None, out: Path = tmp_path / "run", epsilon: float | None = None,
        replace: dict[str, str] | None = None,
    ) -> RunFolder:  # fmt: skip
        scenario = load_scenario(make_scenario(tmp_path / "scenario", replace=replace))
        table = make_loans(rows=60) if frame is None else frame
        return prepare(out, scenario, table, where="loans.csv", epsilon=epsilon, engine="inprocess")

    return call


def named(frame: pl.DataFrame, old: str, new: str) -> pl.DataFrame:
    return frame.with_columns(pl.col("lender").replace(old, new))


def test_every_bank_has_its_own_records_and_the_plan_approved(
    make: Prepare, make_loans: Callable[..., pl.DataFrame]
) -> None:
    run = make()
    frame = make_loans(rows=60)
    unseen = pl.read_parquet(run.path / "unseen.parquet")
    tables = {name: pl.read_parquet(folder / "data.parquet") for name, folder in run.bank_folders.items()}
    assert set(tables) | set(unseen["lender"]) == set(frame["lender"])
    assert not set(tables) & set(unseen["lender"])
    for name, folder in run.bank_folders.items():
        assert tables[name].equals(frame.filter(pl.col("lender") == name))
        bank = Bank(folder, simulation=True)
        assert bank.institution.config.name == name
        assert bank.institution.config.declared_size == 60
        assert bank.institution.approved_plan(run.plan.hash()) == run.plan
        bank.close()


def test_what_was_prepared_opens_as_it_was(make: Prepare) -> None:
    run = make(epsilon=math.inf)
    again = open_run(run.path)
    assert again == run
    assert math.isinf(again.epsilon)
    text = (run.path / "run.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=pytest.fail)
    assert run.spent() == {name: {"spent": 0.0, "declared_size": 60, "entries": 2} for name in run.bank_folders}
    assert run.not_private


def test_names_of_any_script_are_kept(make: Prepare, make_loans: Callable[..., pl.DataFrame]) -> None:
    name = 'B\u00e4nk "A" \\ \U0001f3e6 [/b]\x7f\u4e00'
    run = make(frame=named(make_loans(rows=60), "Lender A", name))
    folder = run.bank_folders[name]
    bank = Bank(folder, simulation=True)
    assert bank.institution.config.name == name
    bank.close()


@pytest.mark.parametrize("content", [None, "file", "dot"])
def test_a_place_that_is_taken_is_refused(make: Prepare, tmp_path: Path, content: str | None) -> None:
    out = tmp_path / "run"
    if content is None:
        out.write_text("mine", encoding="utf-8")
    else:
        out.mkdir()
        (out / (".hidden" if content == "dot" else "file")).write_text("mine", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"{out}.*--out"):
        make()
    assert [path for path in sorted(tmp_path.rglob("*")) if "scenario" not in path.parts] == before


def test_an_empty_folder_will_do(make: Prepare, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert make().path == tmp_path / "run"


def test_a_place_that_cannot_be_written_is_told(make: Prepare, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="a run cannot be laid out here"):
        make(out=tmp_path / "file" / "run")


def test_half_a_preparation_leaves_nothing(make: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runfolder, "write_atomically", fail)
    with pytest.raises(KeyboardInterrupt):
        make()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenario"]


def test_a_delta_too_large_for_a_bank_names_the_bank(
    make: Prepare, tmp_path: Path, make_loans: Callable[..., pl.DataFrame]
) -> None:
    large = pl.concat([make_loans(rows=60), make_loans(lenders=1, rows=1000)])
    with pytest.raises(ConfigError, match=r"privacy.delta: 0.0001 is too large for 'Lender A' with 1060 records"):
        make(frame=large)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"rounds = 12": "rounds = 12\nmin_reports = 5"}, "server.min_reports: 5 can never come from 4"),
        ({"rounds = 12": "rounds = 12\nmax_declared_size = 59"}, "server.max_declared_size: 59 keeps out 'Lender"),
        ({"k = [0, 10]": "k = [0, 59]"}, "institution 'Lender .*too few records"),
    ],
)
def test_what_could_only_fail_after_training_fails_before(
    make: Prepare, tmp_path: Path, replace: dict[str, str], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        make(replace=replace)
    assert not (tmp_path / "run").exists()


def test_a_bank_that_is_too_small_to_be_judged_may_take_part(
    make: Prepare, tmp_path: Path, make_loans: Callable[..., pl.DataFrame]
) -> None:
    seen = next(iter(make(out=tmp_path / "first").bank_folders))
    frame = make_loans(rows=60)
    few = frame.filter(pl.col("lender") == seen).filter(pl.int_range(pl.len()).over("outcome") < 3)
    assert make(frame=pl.concat([frame.filter(pl.col("lender") != seen), few])).sizes[seen] == 6


def test_a_name_that_no_message_could_carry_is_refused(
    make: Prepare, make_loans: Callable[..., pl.DataFrame], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="201 characters"):
        make(frame=named(make_loans(rows=60), "Lender A", "x" * 201))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [("run.json", None), ("run.json", "[]"), ("run.json", "{}"), ("scenario.json", None), ("run.json", "{")],
)
def test_what_is_no_run_is_not_opened(make: Prepare, file: str, text: str | None) -> None:
    path = make().path / file
    if text is None:
        path.unlink()
    else:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no run"):
        open_run(path.parent)


def test_a_run_where_every_bank_declines_is_no_success(make: Prepare) -> None:
    run = make(replace={"rounds = 12": "rounds = 2"})
    for folder in run.bank_folders.values():
        shutil.rmtree(folder / "approved")
    for _ in range(2):
        with pytest.raises(MetariskError, match=r"no round had reports to learn from.*plan \(4\)"):
            experiment.train(run, workers=0)


def test_a_damaged_ledger_is_told_once_and_by_the_run_not_by_its_progress_bar(make: Prepare) -> None:
    run = make(replace={"rounds = 12": "rounds = 2"})
    folder = next(iter(run.bank_folders.values()))
    (folder / "ledger.sqlite").write_bytes(b"not a ledger")
    # An exception in the thread that follows the rounds would be a warning, and so an error of this test.
    with pytest.raises(IntegrityError, match=f"{folder.name}/ledger.sqlite"):
        experiment.train(run, workers=0, on_progress=lambda _: None)


def test_an_unfinished_run_cannot_be_judged(make: Prepare) -> None:
    with pytest.raises(ConfigError, match=r"only 0 of 12 rounds.*--resume"):
        experiment.initializations(make(), workers=0)


def test_numbers_of_runs_count_on(tmp_path: Path) -> None:
    assert unused_folder(tmp_path, "loans").name == "loans-001"
    for name in ("loans-001", "loans-009", "loans-1000", "loans-x", "loanses-2000"):
        (tmp_path / name).mkdir()
    assert unused_folder(tmp_path, "loans").name == "loans-1001"
