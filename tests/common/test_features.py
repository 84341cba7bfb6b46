"""Inputs are bounded, finite, one record's own business, and equal to what can be worked out by hand."""

import itertools
import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarisk_common.errors import ConfigError, DataError
from metarisk_common.features import ColumnCounts, Encoder, _Categorical, _Numeric
from metarisk_common.schema import CategoricalColumn, NumericColumn, Schema


def schema_of(*columns: dict[str, Any], **encoding: float) -> Schema:
    return Schema.model_validate(
        {"label": {"name": "y"}, "institution": "bank", "columns": columns, "encoding": encoding},
    )


AMOUNT = {"kind": "numeric", "name": "amount", "lower": 0, "upper": 100, "bins": [50]}
COLOUR = {"kind": "categorical", "name": "colour", "categories": ["red", "blue"], "shares": [0.5, 0.25]}
TINY = schema_of(AMOUNT, COLOUR, variance_power=0.5, intercept=0.6)
WIDE = schema_of(
    {"kind": "numeric", "name": "amount", "lower": 1000, "upper": 5e6, "bins": [2e4, 5e4, 1e5], "scale": "log"},
    {"kind": "numeric", "name": "rate", "lower": -1, "upper": 1},
    {"kind": "categorical", "name": "sector", "categories": ["retail", "other"]},
    {"kind": "categorical", "name": "rare", "categories": ["a", "b"], "shares": [0.9999, 0.00001]},
)

NUMBERS = st.none() | st.floats(allow_infinity=False)
ROWS = st.lists(
    st.tuples(NUMBERS, NUMBERS, st.none() | st.sampled_from(["retail", "other", "x", ""]), st.sampled_from("abc")),
    min_size=1,
    max_size=40,
)


def wide_frame(rows: list[Any]) -> pl.DataFrame:
    columns = {"amount": pl.Float64, "rate": pl.Float64, "sector": pl.String, "rare": pl.String}
    return pl.DataFrame(rows, schema=columns, orient="row")


def test_names_and_groups_are_for_people() -> None:
    encoder = Encoder(TINY)
    assert encoder.names == (
        "amount",
        "amount > 0",
        "amount > 50",
        "amount is missing",
        "colour = red",
        "colour = blue",
        "colour is other",
        "intercept",
    )
    assert encoder.groups == (*["amount"] * 4, *["colour"] * 3, "intercept")
    assert encoder.width == 8


def test_known_answer_inside_the_unit_ball() -> None:
    # By hand: the standardised value is (75 - 50) / (100 / sqrt 12). Bins have means 3/4 and 1/4 and variance 5/48.
    # At variance power 1/2 each of the 7 inputs has second moment 1, so that the constant is 0.8 / sqrt 7.
    x, _ = Encoder(TINY).encode(pl.DataFrame({"amount": [75.0], "colour": ["red"]}))
    bins = 0.25 / math.sqrt(5 / 48)
    colour = [0.5 / 0.5, -0.25 / math.sqrt(3 / 16), -0.25 / math.sqrt(3 / 16)]
    expected = np.array([math.sqrt(12) / 4, bins, bins, -0.02 / 0.14, *colour]) * 0.8 / math.sqrt(7)
    assert x.shape == (1, 8)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[0], [*expected, 0.6], rtol=1e-6)


def test_known_answer_of_a_missing_value_brought_to_norm_one() -> None:
    # Missing: the column's other inputs are 0 and the indicator is 0.98 / 0.14 = 7. The intercept isn't shrunk.
    x, counts = Encoder(TINY).encode(pl.DataFrame({"amount": [None], "colour": ["blue"]}))
    raw = np.array([0, 0, 0, 7, -1, 0.75 / math.sqrt(3 / 16), -0.25 / math.sqrt(3 / 16)])
    np.testing.assert_allclose(x[0], [*raw * 0.8 / np.linalg.norm(raw), 0.6], rtol=1e-6)
    assert np.linalg.norm(x[0]) == pytest.approx(1, abs=1e-6)
    assert counts.columns["amount"] == ColumnCounts(missing=1)


def test_variance_power_and_its_floor() -> None:
    # A category of share 1e-5 is scaled as if its variance were 1e-3.
    encoder = Encoder(WIDE)
    shares = np.array([0.9999, 0.00001, 0.01]) / 1.00991
    variance = shares * (1 - shares)
    expected = variance * np.maximum(variance, 1e-3) ** -0.7
    ratio = encoder.second_moment[-4:-1] / expected
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
    assert encoder.second_moment[-1] == pytest.approx(0.25**2)
    assert encoder.second_moment.sum() == pytest.approx(1)


@settings(max_examples=50, deadline=None)
@given(rows=ROWS)
def test_rows_are_finite_and_of_norm_at_most_one(rows: list[Any]) -> None:
    x, counts = Encoder(WIDE).encode(wide_frame(rows))
    assert np.isfinite(x).all()
    assert (np.linalg.norm(x.astype(np.float64), axis=1) <= 1 + 1e-6).all()
    assert (x[:, -1] == np.float32(0.25)).all()
    assert x.flags.c_contiguous
    assert counts.rows == len(rows)


@settings(max_examples=30, deadline=None)
@given(rows=ROWS)
def test_a_record_is_encoded_alike_whatever_stands_beside_it(rows: list[Any]) -> None:
    encoder = Encoder(WIDE)
    together, _ = encoder.encode(wide_frame(rows))
    for number, row in enumerate(rows):
        alone, _ = encoder.encode(wide_frame([row]))
        assert np.array_equal(together[number], alone[0])


@settings(deadline=None)
@given(
    value=st.floats(1e-3, 1e7),
    inner=st.sets(st.floats(2, 900), max_size=5),
    scale=st.sampled_from(["linear", "log"]),
)
def test_bins_are_piecewise_linear_on_the_columns_scale(value: float, inner: set[float], scale: Any) -> None:
    # Gorishniy et al. 2022, equation 1, word for word.
    column = NumericColumn(kind="numeric", name="v", lower=1, upper=1000, bins=tuple(sorted(inner)), scale=scale)
    place = math.log if scale == "log" else float
    bins = [float(edge) for edge in sorted(inner)]
    low, high = place(1.0), place(1000.0)
    edges = [low, *map(place, bins), high] if bins else [low + (high - low) * j / 6 for j in range(7)]
    try:
        found, _ = _Numeric(column, 3.0).read(pl.DataFrame({"v": [value]}), "file")
    except ConfigError:
        assert min(b - a for a, b in itertools.pairwise(edges)) < 1e-12
        return
    inside = place(min(max(value, 1.0), 1000.0))
    for left, right, z in zip(edges, edges[1:], list(found)[1:-1], strict=False):
        expected = 0.0 if inside < left else 1.0 if inside >= right else (inside - left) / (right - left)
        assert z[0] == pytest.approx(expected, abs=1e-12 * high / (right - left))


@pytest.mark.parametrize(
    ("bins", "scale"),
    [((), "linear"), ((), "log"), ((3.0, 20.0, 500.0), "log"), ((900.0,), "linear")],
)
def test_public_moments_are_those_of_the_public_claim(bins: tuple[float, ...], scale: Any) -> None:
    # As many values in each bin, evenly spread on the column's scale: their moments are the encoder's constants.
    column = NumericColumn(kind="numeric", name="v", lower=1, upper=1000, bins=bins, scale=scale, missing="refuse")
    to, back = (np.log, np.exp) if scale == "log" else (np.array, np.array)
    edges = to(np.array([1.0, *bins, 1000.0])) if bins else np.linspace(to(1.0), to(1000.0), 7)
    steps = (np.arange(4000) + 0.5) / 4000
    values = back(np.concatenate([a + (b - a) * steps for a, b in itertools.pairwise(edges)]))
    numeric = _Numeric(column, 100.0)
    found, _ = numeric.read(pl.DataFrame({"v": values}), "file")
    inputs = np.stack(list(found))
    np.testing.assert_allclose(inputs.mean(axis=1), numeric.mean, atol=1e-6)
    np.testing.assert_allclose(inputs.var(axis=1), numeric.variance, atol=1e-6)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.5, 0.25], [0.5, 0.25, 0.25]),
        ([0.6, 0.4], [0.6 / 1.01, 0.4 / 1.01, 0.01 / 1.01]),
        ([], [0.5 / 1.01, 0.5 / 1.01, 0.01 / 1.01]),
    ],
)
def test_shares_are_the_declared_ones_and_something_is_left_for_other(
    shares: list[float], expected: list[float]
) -> None:
    column = CategoricalColumn(kind="categorical", name="c", categories=("a", "b"), shares=tuple(shares))
    np.testing.assert_allclose(_Categorical(column).mean, expected)


def test_the_standardised_input_is_clipped() -> None:
    schema = schema_of({**AMOUNT, "bins": [1, 2, 3, 4], "missing": "refuse"}, clip_standardised=0.5)
    loose = schema_of({**AMOUNT, "bins": [1, 2, 3, 4], "missing": "refuse"}, clip_standardised=50)
    frame = pl.DataFrame({"amount": [100.0]})
    clipped, unclipped = (Encoder(each).encode(frame)[0][0] for each in (schema, loose))
    # The row is shrunk as a whole, so compare with an input that the clip leaves alone.
    assert clipped[0] / clipped[1] < unclipped[0] / unclipped[1]
    assert clipped[0] / clipped[-2] == pytest.approx(0.5 / ((1 - 0.1) * (0.2 / 3 - 0.01) ** -0.35), rel=1e-5)


def test_counts_say_what_was_met() -> None:
    frame = pl.DataFrame(
        {
            "amount": [-1.0, 0.0, 100.0, 101.0, 1e300, None, float("nan")],
            "colour": ["red", None, "", "x", "y", "x", "blue"],
        },
    )
    _, counts = Encoder(TINY).encode(frame)
    assert counts.rows == 7
    assert counts.columns == {
        "amount": ColumnCounts(missing=2, clipped_below=1, clipped_above=2),
        "colour": ColumnCounts(missing=2, unknown_categories=3),
    }


def test_values_outside_the_bounds_are_encoded_as_the_bound() -> None:
    x, _ = Encoder(TINY).encode(pl.DataFrame({"amount": [-5.0, 0.0, 100.0, 1e308], "colour": ["red"] * 4}))
    assert np.array_equal(x[0], x[1])
    assert np.array_equal(x[2], x[3])
    assert not np.array_equal(x[0], x[2])


def test_null_and_nan_are_the_same_and_so_are_unknown_and_missing_categories() -> None:
    frame = pl.DataFrame({"amount": [None, float("nan"), 1.0, 1.0], "colour": ["red", "red", None, "mauve"]})
    x, _ = Encoder(TINY).encode(frame)
    assert np.array_equal(x[0], x[1])
    assert np.array_equal(x[2], x[3])


def test_a_category_called_other_is_not_the_catch_all() -> None:
    encoder = Encoder(WIDE)
    assert len(set(encoder.names)) == encoder.width
    x, _ = encoder.encode(wide_frame([(None, 0.0, "other", "a"), (None, 0.0, "else", "a")]))
    assert x[0, encoder.names.index("sector = other")] > 0 > x[0, encoder.names.index("sector is other")]
    assert x[1, encoder.names.index("sector is other")] > 0 > x[1, encoder.names.index("sector = other")]


def test_bins_that_nobody_declared_are_even_and_named_apart() -> None:
    log = {"kind": "numeric", "name": "v", "lower": 1, "upper": 1e6, "scale": "log"}
    assert Encoder(schema_of(log)).names[1:7] == tuple(f"v > {edge}" for edge in (1, 10, 100, 1000, 10000, 100000))
    narrow = {"kind": "numeric", "name": "v", "lower": 1_000_000, "upper": 1_000_001}
    assert len(set(Encoder(schema_of(narrow)).names)) == 9


@pytest.mark.parametrize(
    "column",
    [
        {"lower": -1e308, "upper": 1e308},
        {"lower": 1e15, "upper": math.nextafter(1e15, math.inf), "scale": "log"},
        {"lower": 0, "upper": 1e300, "bins": [1e-300, 2e-300]},
    ],
)
def test_bounds_and_bins_that_arithmetic_cannot_tell_apart_are_refused(column: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^column 'v': .*can't be told apart"):
        Encoder(schema_of({"kind": "numeric", "name": "v", **column}))


def test_encoding_needs_no_label_but_every_input() -> None:
    with pytest.raises(DataError, match=r"^scores.csv: column 'colour' is missing; did you mean 'color'\?"):
        Encoder(TINY).encode(pl.DataFrame({"amount": [1.0], "color": ["red"]}), "scores.csv")


def test_no_rows_give_no_rows() -> None:
    x, counts = Encoder(TINY).encode(pl.DataFrame({"amount": [], "colour": []}))
    assert x.shape == (0, 8)
    assert counts.rows == 0


def test_a_quotient_is_read_from_two_columns_and_a_zero_divisor_is_missing() -> None:
    share = {"kind": "numeric", "name": "share", "lower": 0, "upper": 1, "bins": [0.5]}
    x, counts = Encoder(schema_of({**share, "source": "part", "divide_by": "whole"})).encode(
        pl.DataFrame({"part": [1, 3, 1], "whole": [2, 4, 0]})
    )
    direct, _ = Encoder(schema_of(share)).encode(pl.DataFrame({"share": [0.5, 0.75, None]}))
    assert np.array_equal(x, direct)
    assert counts.columns["share"].missing == 1


def test_declared_shares_of_bins_are_the_public_expectation() -> None:
    shares = (0.7, 0.2, 0.1)
    jobs = {"kind": "numeric", "name": "jobs", "lower": 0, "upper": 30, "bins": [10, 20], "shares": shares}
    column = _Numeric(NumericColumn.model_validate({**jobs, "missing": "refuse"}), clip_standardised=50)
    spread = [low + 10 * (np.arange(4000 * p) + 0.5) / (4000 * p) for low, p in zip((0, 10, 20), shares, strict=True)]
    inputs = np.stack(list(column.read(pl.DataFrame({"jobs": np.concatenate(spread)}), "t")[0]))
    assert inputs.mean(axis=1) == pytest.approx(column.mean, abs=1e-6)
    assert inputs.var(axis=1) == pytest.approx(column.variance, abs=1e-3)


def test_log1p_takes_zero_and_spaces_values_as_its_name_says() -> None:
    jobs = {"kind": "numeric", "name": "jobs", "lower": 0, "upper": 3, "bins": [1], "scale": "log1p"}
    column = _Numeric(NumericColumn.model_validate(jobs), clip_standardised=3)
    values = column.read(pl.DataFrame({"jobs": [0.0, 1.0, math.sqrt(2) - 1]}), "t")[0]
    next(values)
    assert next(values) == pytest.approx([0.0, 1.0, 0.5])
