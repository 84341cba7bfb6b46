"""`metarisk-client init` on a bank's own database: proposed from some rows, and not a word of its address is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import sqlalchemy as sa

from client.cli import app
from client.config import CONFIG_FILE, Institution, InstitutionConfig, PolicyConfig, load_institution
from client.dataset import load_source
from client.source_config import TableSection
from client.table_sample import database_sample
from metarisk_common.errors import DataError
from metarisk_common.plan import Plan

Call = Callable[..., tuple[int, str, str]]
GIVEN = ("--name", "First Bank", "--declared-size", "1000", "--epsilon", "4")
OWN = {"income": "INCOME_EUR", "age": "AGE", "purpose": "PURPOSE_CD", "outcome": "Outcome"}
PLAN = ("--plan", "plan.json")
TABLE = ("--table", "loans")


@pytest.fixture
def loans(make_loans: Callable[..., pl.DataFrame]) -> pl.DataFrame:
    return make_loans(lenders=1, rows=400)


def fill(url: str, loans: pl.DataFrame) -> None:
    """Make a table with the bank's own names, a remark, and scanned papers, which no plan can use."""
    own = loans.select(pl.col(name).alias(other) for name, other in OWN.items())
    kinds: dict[str, Any] = {"INCOME_EUR": sa.Numeric(14, 4), "AGE": sa.Float()}
    columns: list[sa.Column[Any]] = [sa.Column(name, kinds.get(name, sa.Text())) for name in own.columns]
    table = sa.Table(
        "loans", sa.MetaData(), sa.Column("SCAN", sa.LargeBinary()), sa.Column("NOTE", sa.Text()), *columns
    )
    with sa.create_engine(url, poolclass=sa.pool.NullPool).begin() as connection:
        table.drop(connection, checkfirst=True)
        table.create(connection)
        rows = [row | {"NOTE": f"C4N4RY {i}", "SCAN": b"C4N4RY"} for i, row in enumerate(own.to_dicts())]
        connection.execute(table.insert(), rows)


@pytest.fixture(params=["sqlite", "postgresql"])
def here(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Plan, loans: pl.DataFrame
) -> Path:
    """A folder with the plan, the plain table, and the URL of a database of the same rows in a file of the bank's."""
    local = f"sqlite:///{tmp_path}/s3cr3t-p4ss.db"
    url = local if request.param == "sqlite" else request.getfixturevalue("postgresql_url")
    fill(url, loans)
    loans.with_columns(pl.col("income").round(4)).write_csv(tmp_path / "plain.csv")
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (tmp_path / "db.url").write_text(url)
    (tmp_path / "db.url").chmod(0o600)
    monkeypatch.setenv("LOANS_URL", url)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("address", [("--url-env", "LOANS_URL"), ("--url-file", "db.url")])
def test_a_database_s_table_is_found_again(call: Call, here: Path, plan: Plan, address: tuple[str, str]) -> None:
    code, out, err = call(app, "init", "bank", *GIVEN, *address, *TABLE, *PLAN, "--yes")
    assert (code, err) == (0, "")
    assert "database table 'loans': proposed from some 400 rows" in out
    told = out + (here / "bank" / CONFIG_FILE).read_text(encoding="utf-8")
    assert not {word for word in ("C4N4RY", "s3cr3t", "@/", "SCAN") if word in told}
    institution = load_institution(here / "bank")
    table = institution.config.table
    assert table is not None
    by_name = address[0] == "--url-env"
    assert (table.url_env, table.url_file) == (("LOANS_URL", None) if by_name else (None, "../db.url"))
    assert table.columns == {name: own for name, own in OWN.items() if name in plan.data.required}
    policy = PolicyConfig(epsilon=4, delta=1e-4)
    plain = Institution(here, InstitutionConfig(name="First Bank", data="plain.csv", declared_size=1000, policy=policy))
    mine, wanted = load_source(institution, plan.data), load_source(plain, plan.data)
    assert (mine.x.tobytes(), mine.y.tobytes(), mine.counts) == (wanted.x.tobytes(), wanted.y.tobytes(), wanted.counts)
    assert 0 < mine.y.sum() < len(mine.y)
    found = call(app, "check", "bank", *PLAN)
    assert found[0] == 0, found


def test_a_query_is_a_table_and_a_folder_that_is_there_learns_of_it(call: Call, here: Path) -> None:
    assert call(app, "init", "bank", *GIVEN, "--data", "plain.csv", "--yes")[0] == 0
    query = 'SELECT * FROM loans WHERE "AGE" > 40'
    shown = call(app, "init", "bank", "--url-file", "db.url", "--query", query, *PLAN, "--json")
    assert shown[0] == 0
    assert 0 < json.loads(shown[1])["sample_rows"] < 400
    assert load_institution(here / "bank").config.table is None
    assert call(app, "init", "bank", "--url-file", "db.url", "--query", query, *PLAN, "--yes")[0] == 0
    config = load_institution(here / "bank").config
    assert config.data is None
    assert config.table is not None
    assert (config.table.url_file, config.table.query) == ("../db.url", query)
    found = call(app, "check", "bank", *PLAN)
    assert found[0] == 0, found


@pytest.mark.parametrize("here", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--url-env", "LOANS_URL"), "--url-env: needs one of --table and --query"),
        (("--url-env", "LOANS_URL", *TABLE, "--query", "SELECT 1"), "--url-env: needs one of --table and --query"),
        (TABLE, "--table: a database needs --url-env or --url-file"),
        ((*TABLE, "--from", "plain.csv"), "--table: a database needs --url-env or --url-file"),
        (("--url-env", "LOANS_URL", "--url-file", "db.url", *TABLE), "leave one out"),
        (("--url-env", "LOANS_URL", *TABLE, "--from", "plain.csv"), "leave one out"),
        (("--url-env", "LOANS_URL", *TABLE, "--data", "plain.csv"), "leave one out"),
        (("--url-env", "GONE_URL", *TABLE), "GONE_URL: set this variable"),
        (("--url-env", "postgresql://u:s3cr3t@h/x", *TABLE), "key 'url_env'"),
        (("--url-file", "postgresql://u:s3cr3t@h/x", *TABLE), "key 'url_file': names the file that holds"),
        (("--url-file", "gone.url", *TABLE), "gone.url: cannot be read"),
        (("--url-env", "LOANS_URL", "--table", "gone"), "database table 'gone': cannot be read"),
    ],
)
def test_what_cannot_be_meant_makes_nothing(call: Call, here: Path, arguments: tuple[str, ...], told: str) -> None:
    code, _, err = call(app, "init", "bank", *GIVEN, *arguments, *PLAN, "--yes")
    assert (code, err.count("\n")) == (2, 1)
    assert told in err
    assert "s3cr3t" not in err
    assert not (here / "bank").exists()


@pytest.mark.parametrize("here", ["postgresql"], indirect=True)
def test_a_sample_is_of_so_many_rows_and_an_empty_table_is_told(here: Path) -> None:
    section = TableSection(url_env="LOANS_URL", query="SELECT *, 1 AS twice, 2 AS twice FROM loans")
    cells = database_sample(here, section, rows=7)
    assert (cells.height, "SCAN" in cells.columns, "twice" in cells.columns) == (7, False, False)
    empty = TableSection(url_env="LOANS_URL", query="SELECT * FROM loans WHERE 1 = 0")
    with pytest.raises(DataError, match="the database's query: has fewer than two columns, or no rows"):
        database_sample(here, empty)
