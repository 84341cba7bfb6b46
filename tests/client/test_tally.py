"""A table of any size is counted in batches: the same figures as in one piece, and no batch kept."""

import gc
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.check_table import Kinds
from client.dataset import from_frame
from client.tally import Tally, tally
from metarisk_common.errors import DataError
from metarisk_common.schema import Schema

SCHEMA: dict[str, Any] = {
    "institution": "bank",
    "identifier": "loan",
    "privacy_unit": "customer",
    "max_records_per_unit": 2,
    "segment": "sector",
    "segments": ["retail", "trade"],
    "label": {"name": "outcome", "positive": "bad", "negative": "good"},
    "columns": [
        {"kind": "numeric", "name": "amount", "lower": 0, "upper": 100, "missing": "indicator"},
        {"kind": "categorical", "name": "code", "categories": ["a", "b"]},
    ],
}


def cut(frame: pl.DataFrame, at: list[int]) -> list[pl.DataFrame]:
    ends = sorted({min(end, frame.height) for end in at} | {0, frame.height})
    return [frame.clear(), *(frame[start:end] for start, end in pairwise(ends))]


def counted(batches: list[pl.DataFrame], schema: Schema) -> tuple[Tally, int]:
    unfit: list[int] = []
    return tally(batches, schema, "loans", on_unfit=lambda frame: unfit.append(frame.height)), len(unfit)


@st.composite
def tables(draw: st.DrawFn) -> pl.DataFrame:
    rows = draw(st.integers(0, 40))

    def column(*values: str | None) -> pl.Series:
        cells = draw(st.lists(st.sampled_from(values), min_size=rows, max_size=rows))
        return pl.Series(cells, dtype=pl.String)

    return pl.DataFrame(
        {
            "loan": column("L1", "L2", "L3", *map(str, range(60))),
            "customer": column("C1", "C2", "C3", "C4", "C5", None),
            "sector": column("retail", "trade", "boats", None),
            "amount": column("1", "101", "-3", "x", "", "50"),
            "code": column("a", "q", None),
            "outcome": column("bad", "good", "maybe"),
        }
    )


@settings(max_examples=80, deadline=None)
@given(frame=tables(), at=st.lists(st.integers(0, 40), max_size=6), by_unit=st.booleans())
def test_batches_change_no_figure_and_each_is_what_an_order_would_use(
    frame: pl.DataFrame, at: list[int], *, by_unit: bool
) -> None:
    values = SCHEMA if by_unit else SCHEMA | {"privacy_unit": None, "max_records_per_unit": 1}
    schema = Schema.model_validate(values)
    whole, _ = counted([frame], schema)
    found, _ = counted(cut(frame, at), schema)
    for name in ("rows", "fitting", "encoded", "columns", "repeats"):
        assert getattr(found, name) == getattr(whole, name), name
    for name in ("records", "positives", "units", "lowest", "highest"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    used = from_frame(frame, schema.model_copy(update={"identifier": None}), "A", "loans", drop_unfit=True)
    assert (found.encoded, found.columns) == (len(used.y), used.counts.columns)
    assert used.segment is not None
    for place, name in enumerate(["retail", "trade"]):
        here = used.segment == name
        unit = np.arange(len(used.y)) if used.unit is None else used.unit
        expected = int(here.sum()), int(used.y[here].sum()), len(np.unique(unit[here]))
        assert (found.records[place], found.positives[place], found.units[place]) == expected
    assert found.records[-1] == (~np.isin(used.segment, ["retail", "trade"])).sum()


def test_many_units_over_many_batches_are_limited_as_in_one_piece() -> None:
    random = np.random.default_rng(5)
    rows = 30_000
    frame = pl.DataFrame(
        {
            "loan": [f"L{row}" for row in range(rows)],
            "customer": random.integers(0, 9_000, rows).astype(str),
            "sector": random.choice(["retail", "trade", "boats"], rows, p=[0.9, 0.05, 0.05]),
            "amount": ["5"] * rows,
            "code": ["a"] * rows,
            "outcome": random.choice(["bad", "good"], rows),
        }
    )
    schema = Schema.model_validate(SCHEMA)
    found, _ = counted([frame[start : start + 700] for start in range(0, rows, 700)], schema)
    used = from_frame(frame, schema, "A", "loans", drop_unfit=True)
    assert used.unit is not None
    assert used.segment is not None
    assert (found.encoded, found.repeats, int(found.units.sum())) == (len(used.y), 0, len(np.unique(used.unit)))
    assert found.records[0] == (used.segment == "retail").sum()


def test_repeats_are_found_between_batches() -> None:
    frame = pl.DataFrame(
        {
            "loan": ["L1", "L2", "L1", "L3", "L1"],
            "customer": [f"C{row}" for row in range(5)],
            "sector": ["retail"] * 5,
            "amount": ["1"] * 5,
            "code": ["a"] * 5,
            "outcome": ["bad", "good", "bad", "good", "bad"],
        }
    )
    schema = Schema.model_validate(SCHEMA)
    assert counted(cut(frame, [1, 2, 3, 4]), schema)[0].repeats == 2


def test_no_batch_is_kept(tmp_path: Path) -> None:
    """Were the batches kept, a table larger than the memory could not be checked."""
    alive: list[weakref.ref[pl.DataFrame]] = []
    most = 0

    def batches() -> Iterator[pl.DataFrame]:
        nonlocal most
        for number in range(20):
            gc.collect()
            most = max(most, sum(one() is not None for one in alive))
            frame = pl.DataFrame(
                {
                    "loan": [f"L{number}"],
                    "customer": [f"C{number}"],
                    "sector": ["retail"],
                    "amount": ["x" if number % 2 else "1"],
                    "code": ["a"],
                    "outcome": ["bad"],
                }
            )
            alive.append(weakref.ref(frame))
            yield frame

    schema = Schema.model_validate(SCHEMA)
    kinds = Kinds(schema)
    found = tally(kinds.watched(batches()), schema, "loans", on_unfit=lambda _: None)
    assert (found.rows, found.fitting) == (20, 10)
    assert most <= 2
    assert kinds["amount"] == "numbers and text"


def test_strict_names_the_rows_of_a_later_batch() -> None:
    frame = pl.DataFrame(
        {
            "loan": ["L1", "L2", "L3"],
            "customer": ["C1", "C2", "C3"],
            "sector": ["retail"] * 3,
            "amount": ["1", "2", "secret"],
            "code": ["a"] * 3,
            "outcome": ["bad", "good", "bad"],
        }
    )
    schema = Schema.model_validate(SCHEMA)
    with pytest.raises(DataError, match=r"loans, rows 3 to 3: column 'amount' must hold numbers") as caught:
        tally(cut(frame, [2]), schema, "loans", on_unfit=lambda _: None, strict=True)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ([["1", "2"], ["3"]], "whole number"),
        ([["1"], ["2.5"]], "number"),
        ([["1"], [""]], "whole number"),
        ([["a"], ["2020-01-01"]], "text"),
        ([["2020-01-01"], ["2021-01-01"]], "date"),
        ([["1"], ["a"]], "numbers and text"),
        ([[""], [""]], "empty"),
    ],
)
def test_a_kind_is_that_of_all_batches(cells: list[list[str]], kind: str) -> None:
    schema = Schema.model_validate(SCHEMA)
    kinds = Kinds(schema)
    for _ in kinds.watched(pl.DataFrame({"amount": part}) for part in cells):
        pass
    assert kinds["amount"] == kind
