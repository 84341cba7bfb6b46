"""A bank's table, wherever it is: the same rows make the same bytes, whatever held them."""

import datetime as dt
import decimal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from client.config import Institution, InstitutionConfig, institution_toml
from client.dataset import Dataset, load_dataset, load_source
from client.source_csv import csv_blocks
from client.sources import Filtered, read_source, source_batches
from metarisk_common.config import load_toml, validate
from metarisk_common.errors import ConfigError, DataError
from metarisk_common.schema import Schema

CANARY = "C4N4RY"
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
            {"name": "purpose", "kind": "categorical", "categories": ["car", "house"]},
            {"name": "region", "kind": "categorical", "categories": ["north"]},
            {"name": "year", "kind": "categorical", "categories": ["2015", "2016"]},
            {"name": "urban", "kind": "categorical", "categories": ["true"]},
        ],
    }
)  # fmt: skip
MAPPING = {
    "where": {"product": ["mortgage", "consumer"]},
    "between": {"year": [2015, 2017], "opened": [dt.date(2015, 1, 1), dt.date(2015, 12, 30)]},
    "columns": {"income": "INCOME_EUR", "bad": "Outcome", "purpose": "why"},
    "values": {"purpose": {"car": ["01", "02"], "house": "03"}, "bad": {"1": ["D", "W"], "0": "C"}},
    "constants": {"region": "north"},
}


def own_table(rows: int = ROWS) -> pl.DataFrame:
    """The bank's own table: its names and codes, with nulls, decimals, booleans, dates and codes of fixed width."""
    n = np.arange(rows)
    income = [None if i % 7 == 0 else decimal.Decimal(i * 3701).scaleb(-2) for i in range(rows)]
    return pl.DataFrame(
        {
            "number": n,
            "INCOME_EUR": pl.Series(income, dtype=pl.Decimal(12, 2)),
            "why": [("01", "02", "03", "99", None)[i % 5] for i in n],
            "Outcome": [("D  ", "C  ", "W  ", "C  ")[i % 4] for i in n],
            "sector": [("retail", "trade")[i % 2] for i in n],
            "customer": (n % 30) // 2 * 2 + n % 2,
            "product": [("mortgage", "card", "consumer")[i % 3] for i in n],
            "year": 2014 + n % 4,
            "urban": [(True, False, None)[i % 3] for i in n],
            "opened": [dt.date(2015, 1, 1) + dt.timedelta(days=int(i) * 9) for i in n],
            "note": [CANARY] * rows,
        }
    )


def bank(folder: Path, table: dict[str, object] | None, data: str | None = None) -> Institution:
    values = {"name": "A", "declared_size": 20, "policy": {"epsilon": 3.0, "delta": 1e-4}}
    values |= {"data": data} if data else {"table": table}
    return Institution(folder, validate(values, InstitutionConfig, where="institution.toml"))


def from_csv(folder: Path) -> Institution:
    own_table().write_csv(folder / "own.csv", separator=";")
    return bank(folder, MAPPING | {"file": "own.csv", "separator": ";"})


def from_comma_decimals(folder: Path) -> Institution:
    comma = pl.col("INCOME_EUR").cast(pl.String).str.replace(".", ",", literal=True)
    own_table().with_columns(comma).write_csv(folder / "comma.csv", separator=";")
    return bank(folder, MAPPING | {"file": "comma.csv", "separator": ";", "decimal_comma": True})


def from_parquet(folder: Path) -> Institution:
    own_table().write_parquet(folder / "own.parquet")
    return bank(folder, MAPPING | {"file": "own.parquet"})


def from_parts(folder: Path) -> Institution:
    """Several files, of which one has other kinds of columns for the same cells."""
    (folder / "parts").mkdir()
    for start in range(0, ROWS, 15):
        part = own_table()[start : start + 15]
        if start == 15:
            part = part.with_columns(pl.col("INCOME_EUR").cast(pl.Float64), pl.col("year").cast(pl.Int16))
        part.write_parquet(folder / "parts" / f"part-{start:03}.parquet")
    return bank(folder, MAPPING | {"file": "parts"})


def from_partitions(folder: Path) -> Institution:
    """Partitioned by runs of rows, so that the files' order is the rows'; the key is a column of the names."""
    for start in range(0, ROWS, 8):
        for offset in range(8):
            row = own_table()[start + offset : start + offset + 1]
            place = folder / f"hive/run={start + offset:03}/year={row['year'][0]}"
            place.mkdir(parents=True)
            row.drop("year").write_parquet(place / "0.parquet")
    (folder / "hive" / "_SUCCESS.parquet").touch()
    return bank(folder, MAPPING | {"file": "hive"})


def from_pattern(folder: Path) -> Institution:
    return bank(folder, from_parts(folder).config.table.model_dump() | {"file": "parts/part-*.parquet"})  # type: ignore[union-attr]


FILES = [from_csv, from_comma_decimals, from_parquet, from_parts, from_partitions, from_pattern]


def as_bytes(data: Dataset) -> tuple[bytes, bytes, bytes, bytes]:
    assert data.unit is not None
    assert data.segment is not None
    return data.x.tobytes(), data.y.tobytes(), data.unit.tobytes(), data.segment.tobytes()


def expected(folder: Path) -> Dataset:
    """The same records as a file in the plan's own words, by a route of its own."""
    frame = own_table().filter(
        pl.col("product").is_in(["mortgage", "consumer"])
        & pl.col("year").is_between(2015, 2017)
        & pl.col("opened").is_between(dt.date(2015, 1, 1), dt.date(2015, 12, 30))
    )
    frame = frame.select(
        pl.col("INCOME_EUR").alias("income"),
        pl.col("why").replace({"01": "car", "02": "car", "03": "house"}).alias("purpose"),
        pl.col("Outcome").str.strip_chars().is_in(["D", "W"]).cast(pl.Int8).alias("bad"),
        "sector", "customer", "year", "urban", region=pl.lit("north"),
    )  # fmt: skip
    frame.write_csv(folder / "expected.csv")
    return load_dataset(folder / "expected.csv", SCHEMA, "A")


@pytest.mark.parametrize("make", FILES)
def test_the_same_rows_are_the_same_bytes_in_any_file(make: object, tmp_path: Path) -> None:
    wanted = expected(tmp_path)
    assert 10 < len(wanted.y) < ROWS
    assert 0 < wanted.y.sum() < len(wanted.y)
    institution = make(tmp_path)  # type: ignore[operator]
    assert as_bytes(load_source(institution, SCHEMA)) == as_bytes(wanted)


@pytest.mark.parametrize("make", FILES)
def test_what_each_filter_removes_is_counted(make: Callable[[Path], Institution], tmp_path: Path) -> None:
    own, filtered = own_table(), Filtered()
    kept = sum(batch.height for batch in source_batches(make(tmp_path), SCHEMA, filtered))
    assert (filtered.rows, kept) == (ROWS, len(expected(tmp_path).y))
    product = own.filter(~pl.col("product").is_in(["mortgage", "consumer"])).height
    year = own.filter(~pl.col("year").is_between(2015, 2017)).height
    if (
        make is from_partitions
    ):  # Files passed over for their folder's name are not opened: only that filter is counted.
        assert filtered.by_column["year"] == year
        assert 0 < filtered.by_column["product"] < product
    else:
        assert (filtered.by_column["product"], filtered.by_column["year"]) == (product, year)


def test_only_the_schema_s_columns_are_kept_and_in_its_words(tmp_path: Path) -> None:
    frame = read_source(from_csv(tmp_path), SCHEMA)
    assert tuple(frame.columns) == SCHEMA.required
    assert set(frame["region"]) == {"north"}
    assert set(frame["purpose"]) == {"car", "house", "99", None}
    assert set(frame["bad"]) == {"0", "1"}


def test_batches_join_whatever_the_first_ones_lacked(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    parts: list[list[float | str | None]] = [[None, None], ["1.5", None], [2.5, 7.0]]
    for number, cells in enumerate(parts):
        part = own_table(2).with_columns(pl.Series("INCOME_EUR", cells))
        part.write_parquet(tmp_path / "parts" / f"{number}.parquet")
    frame = read_source(
        bank(tmp_path, {"file": "parts", "columns": MAPPING["columns"], "constants": {"region": "n"}}), SCHEMA
    )
    assert frame["income"].to_list() == [None, None, "1.5", None, "2.5", "7.0"]
    assert sum(batch.height for batch in source_batches(from_csv(tmp_path), SCHEMA)) > 10


def test_a_table_in_the_plan_s_own_words_is_read_as_ever(tmp_path: Path) -> None:
    wanted = expected(tmp_path)
    assert as_bytes(load_source(bank(tmp_path, None, "expected.csv"), SCHEMA)) == as_bytes(wanted)


def test_a_number_with_a_point_is_none_where_numbers_have_commas(tmp_path: Path) -> None:
    own_table(3).with_columns(INCOME_EUR=pl.Series(["1.500", "1,5", "1.000,5"])).write_csv(
        tmp_path / "a.csv", separator=";"
    )
    section = {"file": "a.csv", "separator": ";", "decimal_comma": True, "columns": MAPPING["columns"],
               "values": MAPPING["values"], "constants": {"region": "n"}}  # fmt: skip
    with pytest.raises(DataError, match="'income' must hold numbers, but 2 of 3 cells"):
        load_source(bank(tmp_path, section), SCHEMA)


@pytest.mark.parametrize("block_bytes", [5, 7, 64, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_is_cut_between_records_wherever_a_block_ends(block_bytes: int, end: str, tmp_path: Path) -> None:
    rows = ["a,b", '1,"x, ""y"""', f'2,"two{end}lines"', "3,é", "", "4,last"]
    text = end.join(rows)
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    frames = []
    for block in csv_blocks(tmp_path / "a.csv", block_bytes=block_bytes):
        frames.append(pl.read_csv(block.text, infer_schema=False))
        assert frames[-1].height == block.records
    assert pl.concat(frames).equals(pl.read_csv(text.encode(), infer_schema=False))


@pytest.mark.parametrize("block_bytes", [16, 1 << 20])
def test_a_short_row_is_found_in_any_block(block_bytes: int, tmp_path: Path) -> None:
    lines = ["a,b", *(f'{i},"x,\n{i}"' for i in range(50)), "short", *(f"{i},y" for i in range(50))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match="line 102 has 1 cells and the header has 2"):
        list(csv_blocks(tmp_path / "a.csv", block_bytes=block_bytes))


def test_a_quote_that_is_never_closed_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n1,"' + f"{CANARY},\n" * 50)
    with pytest.raises(DataError, match="a quote is never closed") as caught:
        list(csv_blocks(tmp_path / "a.csv", block_bytes=16))
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"columns": {"income": "INCOME"}}, "column 'INCOME' is missing.*did you mean 'INCOME_EUR'"),
        ({"where": {"produkt": "card"}}, "column 'produkt' is missing.*did you mean 'product'"),
        ({"file": "gone.csv"}, "gone.csv: there is no such file"),
        ({"file": "."}, "has no Parquet file"),
        ({"file": "gone*.parquet"}, "has no Parquet file"),
        ({"file": "own.xlsx"}, "only .csv and .parquet"),
        ({"where": {"product": "none such"}}, "holds no rows"),
        ({"values": {"purpose": {"carr": "01"}}}, "'carr' is not among what the plan's column 'purpose' may be"),
        ({"values": {"bad": {"default": "D"}}}, "'default' is not among what the plan's column 'bad' may be: 1, 0"),
        ({"separator": "|"}, "like all others of the schema; check that the first line is a header"),
    ],
)
def test_a_wrong_section_is_told_in_one_line(change: dict[str, object], told: str, tmp_path: Path) -> None:
    section = from_csv(tmp_path).config.table
    assert section is not None
    with pytest.raises(DataError, match=told) as caught:
        load_source(bank(tmp_path, section.model_dump() | change), SCHEMA)
    assert "\n" not in str(caught.value)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"file": "a.csv", "url_env": "X"},
        {"url_env": "X"},
        {"url_env": "X", "table": "t", "query": "SELECT 1"},
        {"url_env": "postgresql://u:p@h/d", "table": "t"},
        {"file": "a.csv", "table": "t"},
        {"file": "a.csv", "order_by": "x"},
        {"file": "a.csv", "separator": '"'},
        {"file": "a.csv", "decimal_comma": True},
        {"file": "a.csv", "encoding": "latin-1"},
        {"file": "a.csv", "columns": {"x": "X"}, "constants": {"x": 1}},
        {"file": "a.csv", "values": {"x": {"a": ["1", 1], "b": "2"}}},
        {"file": "a.csv", "between": {"x": [1, "b"]}},
        {"file": "a.csv", "where": {"x": []}},
    ],
)
def test_a_section_that_cannot_be_meant_is_refused(section: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        bank(tmp_path, section)
    assert "u:p@h" not in str(caught.value)


def test_the_table_is_said_once(tmp_path: Path) -> None:
    values = {"name": "A", "declared_size": 1, "policy": {"epsilon": 1, "delta": 1e-3}}
    with pytest.raises(ConfigError, match="key 'data' is missing"):
        validate(values, InstitutionConfig, where="x")
    with pytest.raises(ConfigError, match="not both"):
        validate(values | {"data": "a.csv", "table": {"file": "b.csv"}}, InstitutionConfig, where="x")


@pytest.mark.parametrize(
    "where", [{"file": 'own "x".csv'}, {"url_env": "DB", "query": "SELECT '\\' FROM t", "order_by": ["a", "b c"]}]
)
def test_a_section_is_written_as_it_is_read(where: dict[str, object], tmp_path: Path) -> None:
    config = bank(tmp_path, MAPPING | where | {"constants": {"a b": True, "ü": 1.5, "d": dt.date(2020, 1, 2)}}).config
    (tmp_path / "institution.toml").write_text(institution_toml(config), encoding="utf-8")
    read = load_toml(tmp_path / "institution.toml", InstitutionConfig)
    assert read == config
    assert read.table is not None
    assert read.table.constants["a b"] is True


def test_the_example_in_the_comments_can_be_used(tmp_path: Path) -> None:
    text = institution_toml(bank(tmp_path, None, "loans.csv").config).replace('data = "loans.csv"', "")
    example = [line.removeprefix("#   ") if line.startswith("#   ") else line for line in text.splitlines()]
    (tmp_path / "institution.toml").write_text("\n".join(example), encoding="utf-8")
    read = load_toml(tmp_path / "institution.toml", InstitutionConfig)
    assert read.table is not None
    assert read.table.values == {"purpose": {"car": ("01", "02")}}


def test_rows_without_an_order_are_refused_where_it_matters(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no order of rows: name columns that give one as `order_by`"):
        read_source(bank(tmp_path, MAPPING | {"url_env": "NOT_EVEN_ASKED", "table": "loans"}), SCHEMA)
