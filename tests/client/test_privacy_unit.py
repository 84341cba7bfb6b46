"""Whose a record is: which records of a customer are used, and that a record that does not fit changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.dataset import Dataset, from_frame, load_dataset
from metarisk_common.errors import DataError
from metarisk_common.schema import Schema
from metarisk_common.table import usable_rows
from metarisk_common.tasks import tasks_of

CLEAN = {"amount": "5", "kind": "a", "outcome": "1", "customer": "x", "segment": "s"}


def schema(**changes: Any) -> Schema:
    values = {
        "label": {"name": "outcome"},
        "institution": "bank",
        "segment": "segment",
        "segments": ["s", "t"],
        "privacy_unit": "customer",
        "max_records_per_unit": 2,
        "columns": [
            {"kind": "numeric", "name": "amount", "lower": 0, "upper": 10, "missing": "refuse"},
            {"kind": "categorical", "name": "kind", "categories": ["a", "b"]},
        ],
    }
    return Schema.model_validate(values | changes)


def table(customers: list[str], segments: list[str], amounts: list[float] | None = None) -> pl.DataFrame:
    rows = len(customers)
    amounts = [float(index % 10) for index in range(rows)] if amounts is None else amounts
    return pl.DataFrame(
        {
            "amount": amounts,
            "kind": ["a", "b"] * (rows // 2) + ["a"] * (rows % 2),
            "outcome": [0, 1] * (rows // 2) + [0] * (rows % 2),
            "customer": customers,
            "segment": segments,
        },
        schema_overrides={"customer": pl.String, "segment": pl.String, "amount": pl.Float64, "kind": pl.String},
    )


def load(frame: pl.DataFrame, **changes: Any) -> Dataset:
    return from_frame(frame, schema(**changes), "A", "loans", drop_unfit=True)


def rows_of(dataset: Dataset) -> list[tuple[bytes, float, str]]:
    assert dataset.segment is not None
    return [(x.tobytes(), float(y), s) for x, y, s in zip(dataset.x, dataset.y, dataset.segment, strict=True)]


def test_the_first_records_of_a_unit_are_used_and_no_more() -> None:
    dataset = load(table(list("xyxxyz"), ["s"] * 6))
    assert dataset.unit is not None
    assert dataset.unit.tolist() == [0, 1, 0, 1, 2]
    assert dataset.dropped == 1
    everything = load(table(list("xyxxyz"), ["s"] * 6), max_records_per_unit=3)
    np.testing.assert_array_equal(dataset.x, everything.x[[0, 1, 2, 4, 5]])


def test_a_unit_belongs_to_the_segment_of_its_first_record() -> None:
    dataset = load(table(list("xxyyx"), list("stttt")))
    assert dataset.segment is not None
    assert dataset.segment.tolist() == ["s", "t", "t"]
    tasks = tasks_of("A", dataset.x, dataset.y, dataset.segment, ("s", "t"), dataset.unit)
    assert [task.unit.tolist() for task in tasks if task.unit is not None] == [[0], [0, 0]]


def test_without_a_unit_every_record_is_one() -> None:
    dataset = load(table(list("xxx"), ["s"] * 3), privacy_unit=None, max_records_per_unit=1)
    assert dataset.unit is None
    assert len(dataset.x) == 3


@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.sampled_from("uvwx"), st.sampled_from("stq")), min_size=1, max_size=14),
    st.sampled_from("uvwx"),
    st.integers(1, 3),
)
def test_a_unit_that_is_left_out_changes_nothing_of_any_other(
    records: list[tuple[str, str]], left_out: str, most: int
) -> None:
    frame = table([unit for unit, _ in records], [segment for _, segment in records])
    others = frame.filter(pl.col("customer") != left_out)
    whole, without = load(frame, max_records_per_unit=most), load(others, max_records_per_unit=most)
    assert whole.unit is not None
    assert without.unit is not None
    names = list(dict.fromkeys(frame["customer"]))
    kept = [row for row, unit in zip(rows_of(whole), whole.unit, strict=True) if names[unit] != left_out]
    assert kept == rows_of(without)
    counts = np.bincount(whole.unit, minlength=1)
    assert counts.max(initial=0) <= most
    # Each unit is in one task at most, so that tasks compose in parallel.
    for number in np.unique(whole.unit):
        assert whole.segment is not None
        assert len(set(whole.segment[whole.unit == number])) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"amount": "much"}, {"amount": "inf"}, {"amount": ""}, {"amount": "nan"}, {"outcome": "2"}, {"outcome": ""},
        {"customer": ""},
    ],
)  # fmt: skip
def test_a_record_that_does_not_fit_counts_as_none(tmp_path: Path, wrong: dict[str, str]) -> None:
    others = [CLEAN | {"amount": str(number), "customer": f"c{number}"} for number in range(5)]
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    pl.DataFrame(others).write_csv(good)
    pl.DataFrame([*others[:2], CLEAN | wrong, *others[2:]]).write_csv(bad)
    for path in (good, bad):
        found = load_dataset(path, schema(), "A", drop_unfit=True)
        assert found.dropped == (path == bad)
        assert rows_of(found) == rows_of(load_dataset(good, schema(), "A"))
    # Whoever looks after the table is told.
    with pytest.raises(DataError, match=next(iter(wrong))):
        load_dataset(bad, schema(), "A")


@pytest.mark.parametrize("wrong", [{"amount": "much"}, {"outcome": "2"}])
def test_a_table_of_which_no_record_fits_is_an_empty_one(wrong: dict[str, str]) -> None:
    dataset = load(pl.DataFrame([CLEAN | wrong]))
    assert dataset.x.shape[0] == len(dataset.y) == 0
    assert load(pl.DataFrame([CLEAN]).head(0)).x.shape == dataset.x.shape


def test_a_missing_value_with_an_indicator_fits() -> None:
    columns = [{"kind": "numeric", "name": "amount", "lower": 0, "upper": 10}]
    assert usable_rows(pl.DataFrame([CLEAN | {"amount": ""}]), schema(columns=columns), "loans").to_list() == [True]


def test_a_missing_column_is_an_error_still() -> None:
    with pytest.raises(DataError, match="column 'kind' is missing"):
        load(pl.DataFrame([CLEAN]).drop("kind"))


def test_a_unit_may_not_be_an_input_and_a_limit_needs_one() -> None:
    with pytest.raises(ValueError, match="privacy unit"):
        schema(privacy_unit="amount")
    with pytest.raises(ValueError, match="needs privacy_unit"):
        schema(privacy_unit=None)
