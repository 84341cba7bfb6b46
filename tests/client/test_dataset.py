"""A bank's file becomes one data set whatever its format, and a damaged one a single line without its content."""

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.dataset import Dataset, from_frame, load_dataset, read_table
from metarisk_common.errors import DataError
from metarisk_common.features import Encoder
from metarisk_common.schema import Schema

CANARY = "zq7canary"

SCHEMA = Schema.model_validate(
    {
        "label": {"name": "charged_off"},
        "institution": "bank",
        "segment": "sector",
        "identifier": "loan_id",
        "columns": [
            {"kind": "numeric", "name": "amount", "lower": 1, "upper": 1e6, "scale": "log"},
            {"kind": "numeric", "name": "employees", "lower": 0, "upper": 500, "bins": [5, 50]},
            {"kind": "categorical", "name": "year", "categories": [1990, 1991]},
            {"kind": "categorical", "name": "code", "categories": ["01", "1", "1.0"]},
            {"kind": "categorical", "name": "sector", "categories": ["retail", "trade"]},
            {"kind": "categorical", "name": "franchise", "categories": ["true", "false"]},
        ],
    },
)


def table(rows: int = 4) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "loan_id": range(rows),
            "amount": [float(10 * (row + 1)) for row in range(rows)],
            "employees": [row % 7 for row in range(rows)],
            "year": [1990 + row % 3 for row in range(rows)],
            "code": ["01" if row % 2 else "1" for row in range(rows)],
            "sector": ["retail" if row % 2 else "trade" for row in range(rows)],
            "franchise": [row % 2 == 0 for row in range(rows)],
            "charged_off": [row % 2 for row in range(rows)],
        },
    )


def identical(a: Dataset, b: Dataset) -> bool:
    return (
        a.institution == b.institution
        and a.x.tobytes() == b.x.tobytes()
        and a.y.tobytes() == b.y.tobytes()
        and a.segment is not None
        and b.segment is not None
        and a.segment.tolist() == b.segment.tolist()
        and a.counts == b.counts
    )


def test_a_dataset_has_the_promised_shapes(tmp_path: Path) -> None:
    table().write_parquet(tmp_path / "loans.parquet")
    data = load_dataset(tmp_path / "loans.parquet", SCHEMA, "North Bank")
    assert data.institution == "North Bank"
    assert data.x.shape == (4, Encoder(SCHEMA).width)
    assert data.x.dtype == data.y.dtype == np.float32
    assert data.y.tolist() == [0, 1, 0, 1]
    assert data.segment is not None
    assert data.segment.tolist() == ["trade", "retail", "trade", "retail"]
    assert data.counts.columns["year"].unknown_categories == 1


def test_a_schema_without_segments_gives_none() -> None:
    data = from_frame(table(), SCHEMA.model_copy(update={"segment": None}), "North Bank", "loans")
    assert data.segment is None


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=st.integers(1, 12))
def test_csv_and_parquet_of_the_same_rows_are_one_dataset(folder: Path, data: st.DataObject, rows: int) -> None:
    def column(cells: st.SearchStrategy[Any], *dtypes: Any) -> pl.Series:
        values = data.draw(st.lists(cells, min_size=rows, max_size=rows))
        return pl.Series(values).cast(data.draw(st.sampled_from(dtypes)))

    text = st.sampled_from(
        ["retail", "trade", "01", "1", "1.0", "2.00", "true", "True", "nan", "", " ", "a,b", 'q"t', "l\n2"]
    )
    floats = st.none() | st.floats(allow_infinity=False)
    frame = pl.DataFrame(
        {
            "loan_id": range(rows),
            "amount": column(floats, pl.Float64),
            "employees": column(st.none() | st.integers(-3, 600), pl.Int16, pl.Float64, pl.Float32),
            "year": column(st.none() | st.integers(1989, 1992), pl.Int32, pl.Float64, pl.String),
            "code": column(st.none() | text, pl.String, pl.Categorical),
            "sector": column(st.none() | text, pl.String, pl.Categorical),
            "franchise": column(st.none() | st.booleans(), pl.Boolean),
            "charged_off": column(st.booleans(), pl.Boolean, pl.Int8, pl.Float64),
        },
    )
    frame.write_csv(folder / "loans.csv")
    frame.write_parquet(folder / "loans.parquet")
    first = load_dataset(folder / "loans.csv", SCHEMA, "North Bank")
    assert identical(first, load_dataset(folder / "loans.parquet", SCHEMA, "North Bank"))
    assert identical(first, from_frame(frame, SCHEMA, "North Bank", "memory"))


def test_a_code_keeps_its_leading_zero_in_csv(tmp_path: Path) -> None:
    table().write_csv(tmp_path / "loans.CSV")
    data = load_dataset(tmp_path / "loans.CSV", SCHEMA, "North Bank")
    names = Encoder(SCHEMA).names
    assert (data.x[:, names.index("code = 01")] > 0).tolist() == [False, True, False, True]
    assert (data.x[:, names.index("code = 1")] > 0).tolist() == [True, False, True, False]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    path = tmp_path / "loans.csv"
    path.write_bytes(b"\xef\xbb\xbf" + table().write_csv().encode())
    assert len(load_dataset(path, SCHEMA, "North Bank").y) == 4


def test_text_in_the_last_of_many_rows_is_found(tmp_path: Path) -> None:
    frame = table(20_000).with_columns(pl.col("amount").cast(pl.String))
    frame[-1, "amount"] = CANARY
    frame.write_csv(tmp_path / "loans.csv")
    with pytest.raises(DataError, match=r"'amount' must hold numbers, but 1 of 20000 cells") as caught:
        load_dataset(tmp_path / "loans.csv", SCHEMA, "North Bank")
    assert CANARY not in str(caught.value)


def cut_short(path: Path) -> None:
    table(500).with_columns(sector=pl.lit(CANARY)).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-9])


def corrupted(path: Path) -> None:
    table(500).with_columns(sector=pl.lit(CANARY)).write_parquet(path)
    content = bytearray(path.read_bytes())
    content[-120:-40] = b"\xff" * 80
    path.write_bytes(content)


def semicolons(path: Path) -> None:
    table().with_columns(sector=pl.lit(CANARY)).write_csv(path, separator=";")


FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("loans.csv", lambda _: None, "no such file"),
    "folder": ("loans.parquet", lambda path: path.mkdir(), "no such file"),
    "other format": ("loans.xlsx", lambda path: path.write_text(CANARY), "only .csv and .parquet"),
    "empty csv": ("loans.csv", lambda path: path.touch(), "is empty"),
    "empty parquet": ("loans.parquet", lambda path: path.touch(), "can't be read as Parquet"),
    "header only": ("loans.csv", lambda path: table().clear().write_csv(path), "holds no rows"),
    "csv named parquet": (
        "loans.parquet",
        lambda path: path.write_text(f"a,b\n{CANARY},1\n"),
        "can't be read as Parquet",
    ),
    "parquet cut short": ("loans.parquet", cut_short, "can't be read as Parquet"),
    "parquet corrupted": ("loans.parquet", corrupted, "can't be read as Parquet"),
    "not text": ("loans.csv", lambda path: path.write_bytes(b"a,b\n\xff\xfe" + CANARY.encode() + b",1\n"), "UTF-8"),
    "ragged": (
        "loans.csv",
        lambda path: path.write_text(f"a,b\n1,2\n1,2,{CANARY}\n"),
        "line 3 has 3 cells and the header has 2",
    ),
    "cut short": ("loans.csv", lambda path: path.write_text(f"a,b,c\n1,2,3\n1,{CANARY}"), "line 3 has 2 cells"),
    "utf-16": ("loans.csv", lambda path: path.write_text(f"a,b\n{CANARY},1\n", encoding="utf-16"), "is not UTF-8"),
    "latin-1": ("loans.csv", lambda path: path.write_bytes(b"a,b\n\xe9" + CANARY.encode() + b",1\n"), "is not UTF-8"),
    "semicolons": ("loans.csv", semicolons, "separator is a comma"),
    "no header": ("loans.csv", lambda path: table().write_csv(path, include_header=False), "first line is a header"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_is_named_in_one_line_without_its_content(
    case: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name, damage, expected = FILES[case]
    path = tmp_path / name
    damage(path)
    with pytest.raises(DataError) as caught:
        load_dataset(path, SCHEMA, "North Bank")
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message
    assert CANARY not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert capfd.readouterr() == ("", "")


COLUMNS: dict[str, tuple[str, list[Any], str]] = {
    "text": ("amount", ["1", CANARY, "2", "3"], "1 of 4"),
    "infinite": ("amount", [1.0, np.inf, 2.0, 3.0], "infinite values in 1 of 4"),
    "label": ("charged_off", ["1", CANARY, "0", "0"], "1 distinct values"),
    "no label": ("charged_off", [1, 0, None, None], "empty in 2 of 4"),
    "identifier": ("loan_id", [CANARY, CANARY, "a", "b"], "repeats in 1 of 4"),
    "dates": ("amount", [dt.date(1987, 6, 5)] * 4, "'amount'"),
}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("case", COLUMNS)
def test_a_damaged_column_is_named_in_either_format(case: str, suffix: str, tmp_path: Path) -> None:
    name, cells, expected = COLUMNS[case]
    frame = table().with_columns(pl.Series(name, cells))
    path = tmp_path / f"loans.{suffix}"
    if suffix == "csv":
        frame.write_csv(path)
    else:
        frame.write_parquet(path)
    with pytest.raises(DataError) as caught:
        load_dataset(path, SCHEMA, "North Bank")
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert f"'{name}'" in message
    assert expected in message
    assert "\n" not in message
    assert CANARY not in message
    assert "1987" not in message


def test_reading_a_table_leaves_cells_of_csv_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "loans.csv").write_text("a,b\n007,\n1.50,x\n", encoding="utf-8")
    frame = read_table(tmp_path / "loans.csv")
    assert frame.to_dict(as_series=False) == {"a": ["007", "1.50"], "b": [None, "x"]}
