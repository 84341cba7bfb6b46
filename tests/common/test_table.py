"""A damaged table gives one line that names file and column, counts, and shows no cell."""

import datetime as dt
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarisk_common.errors import DataError
from metarisk_common.schema import NumericColumn, Schema
from metarisk_common.table import (
    UNKNOWN_SEGMENT,
    categories,
    check_table,
    check_two_classes,
    labels,
    numbers,
    segments,
    split_by_institution,
)

CANARY = "zq7canary"
CANARY_NUMBER = 77310.25
WHERE = "loans.csv"

SCHEMA = Schema.model_validate(
    {
        "label": {"name": "charged_off", "positive": "yes", "negative": "no"},
        "institution": "bank",
        "segment": "sector",
        "identifier": "loan_id",
        "columns": [
            {"kind": "numeric", "name": "amount", "lower": 1, "upper": 1e6},
            {"kind": "numeric", "name": "share", "lower": 0, "upper": 1, "missing": "refuse"},
            {"kind": "categorical", "name": "year", "categories": [1990, 1991]},
            {"kind": "categorical", "name": "sector", "categories": ["retail", "trade"]},
        ],
    },
)
AMOUNT, SHARE, YEAR, SECTOR = SCHEMA.columns


def good() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "loan_id": ["l1", "l2", "l3", "l4"],
            "amount": [10.0, 20.0, None, 40.0],
            "share": [0.5, 0.5, 0.1, 0.9],
            "year": [1990, 1991, 1990, 2050],
            "sector": ["retail", "trade", None, CANARY],
            "charged_off": ["yes", "no", "no", "yes"],
            "bank": ["b", "a", "b", "a"],
        },
    )


def damaged(name: str, cells: list[Any], dtype: Any = None) -> pl.DataFrame:
    return good().with_columns(pl.Series(name, cells, dtype=dtype, strict=False))


DAY = dt.date(1987, 6, 5)
TABLES = {
    "missing column": (good().drop("amount"), "amount", ["missing"]),
    "near miss": (good().rename({"amount": "Amout "}), "amount", ["did you mean 'Amout'"]),
    "several missing": (good().drop("amount", "share"), "amount", ["and 1 more"]),
    "label column missing": (good().drop("charged_off"), "charged_off", ["missing"]),
    "headerless": (pl.DataFrame({CANARY: [1], "amoun": [2]}), "amount", ["first line is a header"]),
    "column twice": (good().with_columns(pl.lit(1).alias("amount_duplicated_0")), "amount", ["twice"]),
    "text in numbers": (damaged("amount", ["1", CANARY, "3", CANARY]), "amount", ["2 of 4 cells"]),
    "decimal comma": (damaged("amount", ["1", "7,5", "3", "4"]), "amount", ["1 of 4 cells", "1234.5"]),
    "infinite": (damaged("amount", [np.inf, 1.0, -np.inf, 2.0]), "amount", ["infinite", "2 of 4"]),
    "infinite as text": (damaged("amount", ["1", "inf", "1e999", "2"]), "amount", ["infinite", "2 of 4"]),
    "refused null": (damaged("share", [0.1, None, 0.2, None]), "share", ["2 missing values in 4 rows"]),
    "refused NaN": (damaged("share", [0.1, np.nan, 0.2, CANARY_NUMBER]), "share", ["1 missing values in 4 rows"]),
    "refused blank": (damaged("share", ["0.1", " ", "", "0.2"]), "share", ["2 missing values in 4 rows"]),
    "dates for numbers": (damaged("amount", [DAY] * 4), "amount", ["dates", "numbers"]),
    "dates for categories": (damaged("year", [DAY] * 4), "year", ["dates", "categories"]),
    "times for categories": (damaged("sector", [dt.datetime(1987, 6, 5)] * 4), "sector", ["dates or times"]),  # noqa: DTZ001
    "dates for labels": (damaged("charged_off", [DAY] * 4), "charged_off", ["dates"]),
    "lists": (damaged("amount", [[CANARY_NUMBER]] * 4), "amount", ["lists"]),
    "binary": (damaged("sector", [CANARY.encode()] * 4), "sector", ["binary"]),
    "label missing": (damaged("charged_off", ["yes", None, "", "no"]), "charged_off", ["empty in 2 of 4"]),
    "other labels": (
        damaged("charged_off", ["yes", CANARY, "zq7canaryB", CANARY]),
        "charged_off",
        ["2 distinct values", "3 of 4 rows"],
    ),
    "identifier twice": (damaged("loan_id", [CANARY, CANARY, CANARY, "l"]), "loan_id", ["repeats in 2 of 4"]),
    "identifier missing": (damaged("loan_id", ["a", None, "b", "c"]), "loan_id", ["empty in 1 of 4"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_damaged_table_is_named_in_one_line_without_its_cells(case: str) -> None:
    frame, column, parts = TABLES[case]
    with pytest.raises(DataError) as caught:
        check_table(frame, SCHEMA, WHERE)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ")
    assert f"'{column}'" in message
    assert "\n" not in message
    for part in parts:
        assert part in message
    for secret in (CANARY, "77310", "7,5", "1987", "1e999"):
        assert secret not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_sound_table_passes_and_an_empty_one_does_not() -> None:
    check_table(good(), SCHEMA, WHERE)
    with pytest.raises(DataError, match=r"^loans.csv: holds no rows; export"):
        check_table(good().clear(), SCHEMA, WHERE)


@settings(max_examples=50, deadline=None)
@given(cells=st.lists(st.text(max_size=12), min_size=4, max_size=4, unique=True))
def test_no_text_whatever_reaches_a_message(cells: list[str]) -> None:
    marked = [CANARY + cell for cell in cells]
    for name in ("amount", "share", "charged_off"):
        with pytest.raises(DataError) as caught:
            check_table(good().with_columns(pl.Series(name, marked)), SCHEMA, WHERE)
        assert CANARY not in str(caught.value)
        assert "4 of 4" in str(caught.value)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([1, None, 3], [1.0, None, 3.0]),
        ([True, False, None], [1.0, 0.0, None]),
        ([1.5, float("nan"), None], [1.5, None, None]),
        ([" 1.5", "", "1e3"], [1.5, None, 1000.0]),
        (["true", "FALSE", "nan"], [1.0, 0.0, None]),
        ([None, None, None], [None, None, None]),
    ],
)
def test_numbers_are_read_from_every_kind_that_means_them(cells: list[Any], expected: list[float | None]) -> None:
    assert isinstance(AMOUNT, NumericColumn)
    assert numbers(pl.DataFrame({"amount": cells}), AMOUNT, WHERE).to_list() == expected


@pytest.mark.parametrize("dtype", [pl.Categorical, pl.Enum(["1.5", "2"])])
def test_numbers_in_text_of_a_closed_kind_are_read(dtype: Any) -> None:
    assert isinstance(AMOUNT, NumericColumn)
    frame = pl.DataFrame({"amount": pl.Series(["1.5", "2"], dtype=dtype)})
    assert numbers(frame, AMOUNT, WHERE).to_list() == [1.5, 2.0]


def test_decimals_are_numbers() -> None:
    assert isinstance(AMOUNT, NumericColumn)
    frame = pl.DataFrame({"amount": pl.Series(["1.50", "2.25"]).cast(pl.Decimal(10, 2))})
    assert numbers(frame, AMOUNT, WHERE).to_list() == [1.5, 2.25]


@pytest.mark.parametrize(
    ("cells", "known", "expected"),
    [
        ([1990, None, 1991], ["1990"], ["1990", None, "1991"]),
        ([1990.0, float("nan"), 1990.5], ["1990"], ["1990", None, "1990.5"]),
        (["1990.0", "NaN", ""], ["1990"], ["1990", None, None]),
        (["01", "1", "1.0"], ["01", "1"], ["01", "1", "1"]),
        (["1.0", "1", "nan"], ["1.0", "nan"], ["1.0", "1", "nan"]),
        ([True, False, None], ["true"], ["true", "false", None]),
        (["True", "False", "yes"], ["true", "false"], ["true", "false", "yes"]),
        (["True", "False", "yes"], ["True"], ["True", "false", "yes"]),
    ],
)
def test_categories_have_one_spelling_and_declared_ones_are_left_alone(
    cells: list[Any],
    known: list[str],
    expected: list[str | None],
) -> None:
    schema = Schema.model_validate(
        {
            "label": {"name": "y"},
            "institution": "bank",
            "columns": [{"kind": "categorical", "name": "c", "categories": known}],
        },
    )
    (column,) = schema.columns
    assert column.kind == "categorical"
    assert categories(pl.DataFrame({"c": cells}), column, WHERE).to_list() == expected


@pytest.mark.parametrize(
    ("declared", "cells"),
    [
        ((1, 0), [1, 0, 0]),
        ((1, 0), [True, False, False]),
        ((1, 0), [1.0, 0.0, 0.0]),
        ((1, 0), ["1", "0", "0"]),
        ((1, 0), ["1.0", "0.0", "0.0"]),
        ((1, 0), ["true", "False", "false"]),
        (("yes", "no"), ["yes", "no", "no"]),
        (("paid", "1"), ["paid", "1", "1"]),
        (("true", "false"), [True, False, False]),
    ],
)
def test_labels_are_read_from_every_kind_that_means_them(declared: tuple[Any, Any], cells: list[Any]) -> None:
    schema = SCHEMA.model_copy(
        update={"label": SCHEMA.label.model_copy(update={"positive": declared[0], "negative": declared[1]})},
    )
    y = labels(pl.DataFrame({"charged_off": cells}), schema.label, WHERE)
    assert y.dtype == np.float32
    assert y.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("y", [np.zeros(5), np.ones(5), np.zeros(0)])
def test_a_lender_with_one_class_is_refused(y: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"^North Bank: .*a lender with one class"):
        check_two_classes(y, "North Bank")


def test_two_classes_are_enough() -> None:
    check_two_classes(np.array([0.0, 0.0, 1.0]), "North Bank")


def test_a_record_without_a_segment_has_one_of_its_own() -> None:
    found = segments(pl.DataFrame({"sector": ["retail", None, " "]}), "sector", WHERE)
    assert found.to_list() == ["retail", UNKNOWN_SEGMENT, UNKNOWN_SEGMENT]


@settings(max_examples=50, deadline=None)
@given(names=st.lists(st.sampled_from(["a", "b", "c", "ä"]), min_size=1, max_size=30))
def test_splitting_by_institution_keeps_every_row_in_order(names: list[str]) -> None:
    rows = len(names)
    frame = pl.concat([good()[[0]]] * rows).with_columns(
        pl.Series("bank", names, dtype=pl.Categorical),
        pl.Series("amount", range(rows)),
    )
    parts = split_by_institution(frame, SCHEMA, WHERE)
    assert list(parts) == sorted(set(names))
    for name, part in parts.items():
        assert part["amount"].to_list() == [row for row in range(rows) if names[row] == name]
        assert part.columns == frame.columns


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (good().drop("bank"), "'bank' is missing"),
        (good().rename({"bank": "banks"}), "did you mean 'banks'"),
        (damaged("bank", [CANARY, None, CANARY, ""]), "'bank' is empty in 2 of 4"),
        (damaged("bank", [DAY] * 4), "'bank' holds dates"),
    ],
)
def test_splitting_needs_an_institution_in_every_row(frame: pl.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        split_by_institution(frame, SCHEMA, WHERE)
    assert CANARY not in str(caught.value)
