# ruff: noqa: S608
"""A bank's table in a database: the same bytes as from a file, and not a word of what must stay secret."""

import datetime as dt
import logging
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
import sqlalchemy.dialects.postgresql as pg

import client.source_sql
from client.config import Institution, InstitutionConfig
from client.dataset import Dataset, load_dataset, load_source
from client.sources import Filtered, join_batches, read_source, source_batches
from metarisk_common.config import validate
from metarisk_common.errors import ConfigError, DataError, MetariskError
from metarisk_common.schema import Schema

SECRET, CANARY = "s3cr3t-p4ss", "C4N4RY"
ROWS = 40
SCHEMA = Schema.model_validate(
    {
        "label": {"name": "bad"},
        "institution": "bank",
        "segment": "sector",
        "segments": ("retail", "trade"),
        "privacy_unit": "customer",
        "max_records_per_unit": 3,
        "columns": [
            {"name": "income", "kind": "numeric", "lower": 0, "upper": 5000, "bins": [100, 500, 1000, 2000],
             "missing": "indicator"},
            {"name": "rate", "kind": "numeric", "lower": 0, "upper": 1, "bins": [0.2, 0.5], "missing": "indicator"},
            {"name": "purpose", "kind": "categorical", "categories": ["car", "house"]},
            {"name": "opened", "kind": "categorical", "categories": ["2015-01-01", "2015-01-10"]},
            {"name": "urban", "kind": "categorical", "categories": ["true"]},
        ],
    }
)  # fmt: skip
MAPPING: dict[str, Any] = {
    "order_by": "number",
    "where": {"product": ["mortgage", "consumer"]},
    "between": {"number": [2, 38]},
    "columns": {"income": "INCOME_EUR", "bad": "Out come", "purpose": "why", "opened": "select"},
    "values": {"purpose": {"car": ["01", "02"], "house": "03"}, "bad": {"1": ["D", "W"], "0": "C"}},
}
COLUMNS = ("number", "INCOME_EUR", "rate", "why", "Out come", "sector", "customer", "product", "urban", "select")


def own_rows() -> list[dict[str, object]]:
    """Nulls, decimals, doubles, booleans, dates, codes of fixed width; names that SQL would change or not take."""
    opened = [dt.date(2015, 1, 1) + dt.timedelta(days=9 * i) for i in range(ROWS)]
    return [
        dict(
            zip(
                COLUMNS,
                (
                    i, None if i % 7 == 0 else Decimal(i * 3701).scaleb(-2), i / 39 if i % 5 else None,
                    ("01", "02", "03", "99", None)[i % 5], "DCWC"[i % 4], ("retail", "trade")[i % 2],
                    (i % 30) // 2 * 2 + i % 2, ("mortgage", "card", "consumer")[i % 3], (True, False, None)[i % 3],
                    opened[i],
                ),
                strict=True,
            )
        )
        for i in range(ROWS)
    ]  # fmt: skip


def fill(engine: sa.Engine, schema: str | None) -> None:
    """Make the table, with its rows in another order than their numbers'."""
    metadata = sa.MetaData()
    kinds: tuple[Any, ...] = (
        sa.Integer, sa.Numeric(12, 2), pg.DOUBLE_PRECISION().with_variant(sa.Float(), "sqlite"), sa.String(9),
             sa.CHAR(4), sa.Text, sa.BigInteger, sa.CHAR(12), sa.Boolean, sa.Date)  # fmt: skip

    def columns() -> list[sa.Column[Any]]:
        return [sa.Column(name, kind) for name, kind in zip(COLUMNS, kinds, strict=True)]

    loans = sa.Table("Loans", metadata, *columns(), schema=schema)
    sa.Table("empty", metadata, *columns(), schema=schema)
    with engine.begin() as connection:
        if schema:
            connection.execute(sa.schema.CreateSchema(schema))
        metadata.create_all(connection)
        rows = own_rows()
        connection.execute(loans.insert(), [rows[i] for i in np.argsort([(7 * i) % ROWS for i in range(ROWS)])])


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    url = f"sqlite:///{tmp_path_factory.mktemp('db')}/own.db"
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    fill(engine, None)
    return url, "Loans"


@pytest.fixture(scope="module")
def postgresql(postgresql_url: str) -> tuple[str, str]:
    assert SECRET in postgresql_url
    fill(sa.create_engine(postgresql_url, poolclass=sa.pool.NullPool), "My-risk")
    return postgresql_url, "My-risk.Loans"


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.getfixturevalue(request.param)
    return found


def bank(folder: Path, url: str, **section: object) -> Institution:
    secret = folder / "db.url"
    secret.write_text(url + "\n")
    secret.chmod(0o600)
    values = {"name": "A", "declared_size": 20, "policy": {"epsilon": 3.0, "delta": 1e-4},
              "table": {"url_file": "db.url"} | section}  # fmt: skip
    return Institution(folder, validate(values, InstitutionConfig, where="institution.toml"))


def as_bytes(data: Dataset) -> tuple[bytes, ...]:
    assert data.unit is not None
    assert data.segment is not None
    return data.x.tobytes(), data.y.tobytes(), data.unit.tobytes(), data.segment.tobytes()


def expected(folder: Path) -> Dataset:
    frame = pl.DataFrame(own_rows(), infer_schema_length=None).filter(
        pl.col("product").is_in(["mortgage", "consumer"]) & pl.col("number").is_between(2, 38)
    )
    frame.select(
        pl.col("INCOME_EUR").alias("income"), "rate",
        pl.col("why").replace({"01": "car", "02": "car", "03": "house"}).alias("purpose"),
        pl.col("select").alias("opened"), "urban", "sector", "customer",
        pl.col("Out come").is_in(["D", "W"]).cast(pl.Int8).alias("bad"),
    ).write_csv(folder / "expected.csv")  # fmt: skip
    return load_dataset(folder / "expected.csv", SCHEMA, "A")


@pytest.mark.parametrize("batch_rows", [3, 10_000])
def test_a_database_gives_the_bytes_of_a_file(
    database: tuple[str, str], tmp_path: Path, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = expected(tmp_path)
    assert 10 < len(wanted.y) < ROWS
    monkeypatch.setattr(client.source_sql, "BATCH_ROWS", batch_rows)
    url, table = database
    assert as_bytes(load_source(bank(tmp_path, url, table=table, **MAPPING), SCHEMA)) == as_bytes(wanted)


def test_a_query_gives_them_too(database: tuple[str, str], tmp_path: Path) -> None:
    url, table = database
    name = ".".join(f'"{part}"' for part in table.split("."))
    query = f"""SELECT * FROM {name} WHERE 'a:b%c' = 'a:b%c' AND "product" <> 'card';"""
    # Of SQLite's booleans a query gives 0 and 1.
    values = {"values": MAPPING["values"] | {"urban": {"true": [1, True]}}}
    found = load_source(bank(tmp_path, url, query=query, **(MAPPING | values)), SCHEMA)
    assert as_bytes(found) == as_bytes(expected(tmp_path))


def test_filters_that_no_database_can_take_are_applied_here(database: tuple[str, str], tmp_path: Path) -> None:
    url, table = database
    section = MAPPING | {"where": {"number": ["3", "5", "11"], "urban": False, "why": ["99", "02"]}, "between": {
        "select": [dt.date(2015, 1, 20), dt.date(2015, 3, 1)]}}  # fmt: skip
    frame = read_source(bank(tmp_path, url, table=table, **section), SCHEMA)
    assert frame["rate"].to_list() == []
    section["where"] = {"number": ["3", "4", "11"]}
    assert read_source(bank(tmp_path, url, table=table, **section), SCHEMA)["purpose"].to_list() == ["99", None]


@pytest.mark.parametrize(
    "filters", [{"where": {"product": "card"}}, {"where": {"number": [1, 2]}}, {"between": {"INCOME_EUR": [10, 99.5]}}]
)
def test_what_a_database_can_filter_is_not_even_sent(
    filters: dict[str, object], database: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, table = database
    seen: list[int] = []
    frame = client.source_sql._frame

    def counted(rows: Sequence[Any], own: tuple[str, ...], where: str) -> pl.DataFrame:
        seen.append(len(rows))
        return frame(rows, own, where)

    monkeypatch.setattr(client.source_sql, "_frame", counted)
    section = {name: value for name, value in MAPPING.items() if name not in ("where", "between")} | filters
    filtered = Filtered()
    kept = join_batches(list(source_batches(bank(tmp_path, url, table=table, **section), SCHEMA, filtered)))
    assert 0 < kept.height == sum(seen) < filtered.rows == ROWS


def attacked(institution: Institution, caplog: pytest.LogCaptureFixture) -> str:
    """Provoke an error and give its text; nothing secret may be in it, in what is logged, or in the bank's repr."""
    with caplog.at_level(logging.DEBUG), pytest.raises(MetariskError) as caught:
        load_source(institution, SCHEMA)
    text = str(caught.value)
    for shown in (text, repr(caught.value), repr(institution), str(institution.config), caplog.text):
        for secret in (SECRET, "wr0ng", "postgresql+psycopg://bank", "hub-user"):
            assert secret not in shown
    assert CANARY not in text + caplog.text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert "\n" not in text
    return text


def test_a_wrong_password_is_told_without_it(
    postgresql: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = postgresql[0].replace(SECRET, "wr0ng")
    text = attacked(bank(tmp_path, url, table=postgresql[1], **MAPPING), caplog)
    assert "database table 'My-risk.Loans': cannot be reached; check the URL's host, port, user and password" in text


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (f"postgresql+psycopg://hub-user:{SECRET}@127.0.0.1:1/x", "cannot be reached"),
        (f"postgresql+psycopg://hub-user:{SECRET}@127.0.0.1:no/x", "the URL cannot be understood"),
        (f"hub-user:{SECRET}@127.0.0.1", "the URL cannot be understood"),
        (f"nodb://hub-user:{SECRET}@127.0.0.1/x", "driver is not installed"),
        (f"oracle+cx_oracle://hub-user:{SECRET}@127.0.0.1/x", "driver is not installed"),
        (f"sqlite:///{SECRET}.db", "there is no such SQLite file"),
    ],
)
def test_an_address_that_leads_nowhere_is_told_without_it(
    url: str, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert told in attacked(bank(tmp_path, url, table="loans", order_by="number"), caplog)
    assert not list(tmp_path.glob("*.db"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"table": "gone"}, "database table 'gone': cannot be read; check that it is there"),
        ({"columns": MAPPING["columns"] | {"income": "INCOME"}}, "'INCOME' is missing.*did you mean 'INCOME_EUR'"),
        ({"order_by": "nummer"}, "column 'nummer' is missing"),
        ({"where": {"product": "none such"}}, "holds no rows"),
        ({"table": None, "query": f"SELECT '{CANARY}' FROM gone"}, "the database's query: cannot be read"),
        ({"table": None, "query": f"DELETE FROM gone -- {CANARY}"}, "the database's query: cannot be read"),
        ({"table": None, "query": f"SELECT '{CANARY}' AS x"}, "column '.*' is missing like all others"),
    ],
)
def test_what_a_database_says_is_not_repeated(
    change: dict[str, object], told: str, database: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = attacked(bank(tmp_path, database[0], **({"table": database[1]} | MAPPING | change)), caplog)
    assert re.search(told, text), text


def test_a_table_without_rows_says_so(database: tuple[str, str], tmp_path: Path) -> None:
    institution = bank(tmp_path, database[0], table=database[1].replace("Loans", "empty"), **MAPPING)
    assert read_source(institution, SCHEMA).columns == list(SCHEMA.required)
    with pytest.raises(DataError, match="holds no rows"):
        load_source(institution, SCHEMA)


def test_a_cell_s_error_midway_is_not_repeated(
    postgresql: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    query = f"""SELECT l.*, CASE WHEN number > 20 THEN CAST('{CANARY}' || number AS integer) END AS broken
                FROM "My-risk"."Loans" l"""
    institution = bank(tmp_path, postgresql[0], query=query, **(MAPPING | {"where": {"broken": 1}}))
    assert "the database's query: cannot be read" in attacked(institution, caplog)


def test_nothing_can_be_written(database: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url, table = database
    before = read_source(bank(tmp_path, url, table=table, **MAPPING), SCHEMA)
    name = ".".join(f'"{part}"' for part in table.split("."))
    query = f"WITH gone AS (DELETE FROM {name} RETURNING *) SELECT * FROM gone"
    attacked(bank(tmp_path, url, query=query, **MAPPING), caplog)
    query = f"SELECT 1) AS x; DELETE FROM {name}; SELECT * FROM (SELECT 1"
    attacked(bank(tmp_path, url, query=query, **MAPPING), caplog)
    assert read_source(bank(tmp_path, url, table=table, **MAPPING), SCHEMA).equals(before)


def test_the_database_itself_refuses_to_write(database: tuple[str, str], tmp_path: Path) -> None:
    section = bank(tmp_path, database[0], table=database[1], **MAPPING).config.table or pytest.fail("no section")
    name = ".".join(f'"{part}"' for part in database[1].split("."))

    def try_to(statement: str) -> None:
        with client.source_sql._connected(tmp_path, section, "loans") as connection:
            connection.execute(sa.text(statement))
            connection.commit()

    with pytest.raises(DataError, match="cannot be read"):
        try_to(f"DELETE FROM {name}")
    assert client.source_sql.database_rows(tmp_path, section, "loans") == ROWS


def test_a_query_with_an_effect_has_none(postgresql: tuple[str, str], tmp_path: Path) -> None:
    # What a sequence gives out is not taken back with the transaction, so the transaction must not allow it.
    with sa.create_engine(postgresql[0], poolclass=sa.pool.NullPool).begin() as connection:
        connection.execute(sa.text("CREATE SEQUENCE drawn"))
    query = """SELECT l.*, nextval('drawn') AS drawn FROM "My-risk"."Loans" l"""
    with pytest.raises(DataError, match="the database's query: cannot be read"):
        read_source(bank(tmp_path, postgresql[0], query=query, **(MAPPING | {"where": {"drawn": 1}})), SCHEMA)
    with sa.create_engine(postgresql[0], poolclass=sa.pool.NullPool).begin() as connection:
        assert connection.execute(sa.text("SELECT is_called FROM drawn")).scalar_one() is False


def test_the_url_comes_from_the_environment(
    sqlite: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"name": "A", "declared_size": 20, "policy": {"epsilon": 3.0, "delta": 1e-4},
              "table": {"url_env": "OWN_DATABASE", "table": "Loans"} | MAPPING}  # fmt: skip
    institution = Institution(tmp_path, validate(values, InstitutionConfig, where="institution.toml"))
    with pytest.raises(ConfigError, match="OWN_DATABASE: set this variable"):
        load_source(institution, SCHEMA)
    monkeypatch.setenv("OWN_DATABASE", sqlite[0])
    assert as_bytes(load_source(institution, SCHEMA)) == as_bytes(expected(tmp_path))
