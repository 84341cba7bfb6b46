"""`metarisk-client init --from`: the embedded loans as a bank would have them, found again by name, kind and code."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from client.checking import check_data
from client.cli import app
from client.config import Institution, InstitutionConfig, PolicyConfig, load_institution
from client.dataset import load_source
from client.sources import read_source
from client.table_sample import table_sample
from metarisk_common.errors import DataError
from metarisk_common.plan import Plan
from simulations.scenarios import load_scenario

Call = Callable[..., tuple[int, str, str]]
SIMULATIONS = Path(__file__).resolve().parents[2] / "simulations"
GIVEN = ("--name", "First Bank", "--declared-size", "1000", "--epsilon", "4")
OWN = {
    "approved_amount": "APPR_AMT_USD", "guaranteed_amount": "GUARANTEED_AMT_USD", "employees": "NO_OF_EMPL",
    "jobs_created": "JOBS_CRTD", "jobs_retained": "JOBS_RET", "approval_year": "APPROVAL_FY", "sector": "BRANCHE",
    "business_age": "BusinessAge", "location": "LOC_CD", "revolving_credit": "REV_CREDIT_FLG", "low_doc": "LOWDOC_FLAG",
    "franchise": "Franchise", "lender_in_state": "BANK_IN_STATE", "charged_off": "LOAN_STATUS",
}  # fmt: skip
CODES = {
    "sector": {"retail": "Retail ", "other_services": "OTHER-SERVICES", "real_estate": "Real Estate"},
    "business_age": {"existing": "EXISTING", "new": "NEW"},
    "location": {"urban": "U", "rural": "R", "unknown": "UNKNOWN"},
    "revolving_credit": {"yes": "Y", "no": "N"}, "low_doc": {"yes": "1", "no": "0"},
    "franchise": {"yes": "J", "no": "N"},
    "lender_in_state": {"yes": "TRUE", "no": "FALSE"}, "charged_off": {"1": "CHGOFF", "0": "P I F"},
}  # fmt: skip
EXTRA = ("LOAN_NR", "NOTE")


@pytest.fixture(scope="module")
def loans() -> tuple[Plan, pl.DataFrame]:
    """The plan of the embedded loans and one lender's records, as text."""
    frame = pl.read_parquet(SIMULATIONS / "data" / "sba_loans.parquet").with_columns(pl.all().cast(pl.String))
    return load_scenario(SIMULATIONS / "sba.toml").plan(), frame.filter(pl.col("bank") == frame["bank"][0])


def recoded(frame: pl.DataFrame) -> pl.DataFrame:
    """The bank's own table: its names, its codes, decimal commas, and columns that are none of the plan's business."""
    own = frame.with_columns(
        *(pl.col(name).replace(codes) for name, codes in CODES.items()),
        *(pl.col(name) + ",00" for name in ("approved_amount", "guaranteed_amount")),
    )
    extra = {
        "LOAN_NR": [f"4711-{i}" for i in range(frame.height)],
        "NOTE": [f"C4N4RY {i}" for i in range(frame.height)],
    }
    chosen = own.select(pl.col(name).alias(other) for name, other in OWN.items())
    return pl.DataFrame(extra).hstack(chosen.select(reversed(chosen.columns)))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loans: tuple[Plan, pl.DataFrame]) -> Path:
    plan, frame = loans
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    frame.write_csv(tmp_path / "plain.csv")
    recoded(frame).write_csv(tmp_path / "own.csv", separator=";")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FROM = ("--from", "own.csv", "--plan", "plan.json")


def test_a_recoded_table_is_the_same_to_the_plan(call: Call, here: Path, loans: tuple[Plan, pl.DataFrame]) -> None:
    schema = loans[0].data
    code, out, err = call(app, "init", "bank", *GIVEN, *FROM, "--yes")
    assert (code, err) == (0, ""), out
    assert "metarisk-client check bank --plan plan.json" in out
    assert "C4N4RY" not in out
    assert "4711" not in out
    institution = load_institution(here / "bank")
    table = institution.config.table
    assert table is not None
    assert (table.separator, table.decimal_comma, table.file) == (";", True, "../own.csv")
    assert table.columns == {name: OWN[name] for name in schema.required}
    policy = PolicyConfig(epsilon=4, delta=1e-4)
    plain = Institution(here, InstitutionConfig(name="First Bank", data="plain.csv", declared_size=1000, policy=policy))
    numbers = [pl.col(name).cast(pl.Float64) for name in ("approved_amount", "guaranteed_amount")]
    assert_frame_equal(
        read_source(institution, schema).with_columns(numbers), read_source(plain, schema).with_columns(numbers)
    )
    mine, wanted = load_source(institution, schema), load_source(plain, schema)
    assert (mine.x.tobytes(), mine.y.tobytes(), mine.counts) == (wanted.x.tobytes(), wanted.y.tobytes(), wanted.counts)
    assert mine.y.sum() > 0
    assert check_data(institution, loans[0]).problems == ()
    assert call(app, "check", "bank", "--plan", "plan.json")[0] == 0


def test_a_huge_table_is_not_read_whole(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = b"1;2,5;retail\n"
    with (here / "huge.csv").open("wb") as file:
        file.write(b"a;b;c\n" + line * 400_000 + b"damaged\n")
    read: list[int] = []
    whole = pl.read_csv

    def counted(*args: object, **kwargs: object) -> pl.DataFrame:
        frame = whole(*args, **kwargs)  # type: ignore[arg-type]
        read.append(frame.height)
        return frame

    monkeypatch.setattr(pl, "read_csv", counted)
    sample = table_sample(here / "huge.csv")
    assert (sample.section.separator, sample.section.decimal_comma) == (";", True)
    assert sample.cells.height == sum(read) == 5_000  # The damaged last line was never met.
    assert sample.cells["b"].unique().to_list() == ["2.5"]


def test_a_table_of_other_things_is_refused_in_one_line(call: Call, here: Path) -> None:
    pl.DataFrame({"C4N4RY": ["C4N4RY-1", "x"], "temperature": [1.5, 2.5]}).write_csv(here / "own.csv")
    code, out, err = call(app, "init", "bank", *GIVEN, *FROM, "--yes")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no column is like any of the plan's 14" in err
    assert "C4N4RY" not in err
    assert not (here / "bank").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*FROM,), "say --yes to take this proposal"),
        (("--from", "own.csv", "--yes"), "--plan: is missing"),
        ((*FROM, "--data", "own.csv"), "leave one out"),
        (("--data", "plain.csv", "--plan", "plan.json"), "--plan: goes with --from"),
        (("--from", "gone.csv", "--plan", "plan.json", "--yes"), "gone.csv: there is no such file"),
        (("--from", "plan.json", "--plan", "plan.json", "--yes"), "only .csv and .parquet"),
    ],
)
def test_what_cannot_be_meant_makes_nothing(call: Call, here: Path, arguments: tuple[str, ...], told: str) -> None:
    code, _, err = call(app, "init", "bank", *GIVEN, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert told in err
    assert not (here / "bank").exists()


def test_for_machines_the_proposal_is_one_object_and_nothing_is_made(call: Call, here: Path) -> None:
    code, out, err = call(app, "init", "bank", *FROM, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert {one["column"]: one["own"] for one in answer["columns"]} == OWN
    assert (answer["open"], answer["table"]["columns"]["sector"]) == ([], "BRANCHE")
    assert not (here / "bank").exists()
    code, out, err = call(app, "init", "bank", *GIVEN, *FROM, "--json", "--yes")
    assert (code, json.loads(out)["proposal"], err) == (0, answer, "")
    assert (here / "bank").is_dir()


def test_what_stays_open_is_written_down_and_named_by_check(call: Call, here: Path) -> None:
    own = pl.read_csv(here / "own.csv", separator=";", infer_schema=False).rename({"JOBS_RET": "K17"})
    own = own.with_columns(pl.col("BRANCHE").replace({"manufacturing": "0815"}))
    own.write_csv(here / "own.csv", separator=";")
    code, out, _ = call(app, "init", "bank", *GIVEN, *FROM, "--yes")
    assert code == 0
    assert "where institution.toml says OPEN: jobs_retained" in out
    assert "sector: OPEN, none of the plan's: '0815'" in out
    text = (here / "bank" / "institution.toml").read_text(encoding="utf-8")
    assert 'your codes "0815" are none of the plan\'s' in text
    code, _, err = call(app, "check", "bank", "--plan", "plan.json")
    assert (code, "column 'jobs_retained' is missing" in err) == (2, True)
    # The comment's own line, filled in, is all that is missing.
    text = text.replace('# "jobs_retained" = ""', '"jobs_retained" = "K17"')
    (here / "bank" / "institution.toml").write_text(text, encoding="utf-8")
    assert call(app, "check", "bank", "--plan", "plan.json")[0] == 0


def test_a_folder_that_is_there_learns_of_the_table_when_the_plan_comes(call: Call, here: Path) -> None:
    assert call(app, "init", "bank", *GIVEN, "--data", "plain.csv")[0] == 0
    before = load_institution(here / "bank").config
    text = (here / "bank" / "institution.toml").read_bytes()
    code, _, err = call(app, "init", "bank", *FROM)
    assert (code, "say --yes" in err) == (2, True)
    assert (here / "bank" / "institution.toml").read_bytes() == text
    code, out, err = call(app, "init", "bank", *FROM, "--yes")
    assert (code, err) == (0, "")
    assert "Next: metarisk-client check bank --plan plan.json" in out
    after = load_institution(here / "bank").config
    assert after.table is not None
    assert after.model_copy(update={"table": None, "data": before.data}) == before
    assert (here / "bank" / "institution.toml.old").read_bytes() == text
    assert {(here / "bank" / name).stat().st_mode & 0o777 for name in ("institution.toml", "institution.toml.old")} == {
        0o600
    }
    assert call(app, "check", "bank", "--plan", "plan.json")[0] == 0


@pytest.mark.parametrize("asked", ["parts", "parts/*.parquet"])
def test_a_folder_of_parquet_is_a_table(call: Call, here: Path, loans: tuple[Plan, pl.DataFrame], asked: str) -> None:
    (here / "parts").mkdir()
    plain, own = (
        loans[1],
        recoded(loans[1]).with_columns(
            pl.col("APPR_AMT_USD", "GUARANTEED_AMT_USD").str.replace(",", ".").cast(pl.Decimal(12, 2))
        ),
    )
    for number in range(2):
        own[number * 300 : (number + 1) * 300].write_parquet(here / "parts" / f"{number}.parquet")
    (here / "parts" / "_SUCCESS").touch()
    code, _, err = call(app, "init", "bank", *GIVEN, "--from", asked, "--plan", "plan.json", "--yes")
    assert (code, err) == (0, "")
    schema = loans[0].data
    assert read_source(load_institution(here / "bank"), schema)["sector"].equals(plain["sector"][:600])
    # Without a plan the same places will do for --data.
    code, _, err = call(app, "init", "other", *GIVEN, "--data", asked)
    assert (code, err) == (0, "")
    table = load_institution(here / "other").config.table
    assert table is not None
    assert table.file == f"../{asked}"
    (here / "parts" / "1.parquet").write_bytes(b"PAR1 cut short")
    code, _, err = call(app, "init", "third", *GIVEN, "--data", asked)
    assert (code, "can't be read as Parquet" in err) == (2, True)


def test_a_header_that_says_a_name_twice_is_not_proposed(here: Path) -> None:
    (here / "own.csv").write_text("age,age,income,\n1,2,3,4\n")
    with pytest.raises(DataError, match="fewer than two columns"):
        table_sample(here / "own.csv")


@pytest.mark.parametrize(("typed", "made"), [("n\n", False), ("y\n\n\nyes\n", True)])
def test_a_person_sees_it_and_decides(
    call: Call, here: Path, typed: str, monkeypatch: pytest.MonkeyPatch, *, made: bool
) -> None:
    terminal = io.StringIO(typed)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    code, out, _ = call(app, "init", "bank", *GIVEN, *FROM)
    assert "APPR_AMT_USD" in out
    assert (code, "nothing was made" in out) == ((0, False) if made else (1, True)), out
    assert (here / "bank").is_dir() == made


def test_a_sample_spells_the_names_of_folders_and_dates_as_an_order_reads_them(here: Path) -> None:
    own = pl.DataFrame({"amount": ["1", "2"], "opened": ["2020-01-31", "2020-02-01"]})
    place = here / "parts" / "sector=real%20estate" / "region=__HIVE_DEFAULT_PARTITION__"
    place.mkdir(parents=True)
    own.with_columns(pl.col("opened").str.to_datetime("%Y-%m-%d")).write_parquet(place / "0.parquet")
    cells = table_sample(here / "parts").cells
    assert cells["sector"].to_list() == ["real estate", "real estate"]
    assert cells["region"].null_count() == 2
    assert cells["opened"][0].startswith("2020-01-31 00:00:00")
