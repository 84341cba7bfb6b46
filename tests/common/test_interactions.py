"""Leaves of public random trees as inputs: nothing in them depends on records, and rows keep their bound."""

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarisk_common.errors import ConfigError
from metarisk_common.features import Encoder
from metarisk_common.schema import (
    CategoricalColumn,
    Encoding,
    Interactions,
    Label,
    NumericColumn,
    Schema,
    canonical_json,
)

COLUMNS = (
    NumericColumn(kind="numeric", name="income", lower=0, upper=100, bins=(10, 50), shares=(0.2, 0.3, 0.5)),
    NumericColumn(kind="numeric", name="age", lower=18, upper=90),
    CategoricalColumn(kind="categorical", name="purpose", categories=("car", "home"), shares=(0.6, 0.3)),
    CategoricalColumn(kind="categorical", name="sector", categories=tuple("abcdefgh")),
)


def schema(**spec: Any) -> Schema:
    trees = Interactions(**spec) if spec else None
    return Schema(label=Label(name="bad"), institution="bank", columns=COLUMNS, encoding=Encoding(interactions=trees))


def frame(rows: list[tuple[Any, ...]]) -> pl.DataFrame:
    types = {"income": pl.Float64, "age": pl.Float64, "purpose": pl.String, "sector": pl.String}
    return pl.DataFrame(rows, schema=types, orient="row")


ROWS = st.lists(
    st.tuples(
        st.none() | st.floats(-50, 200), st.none() | st.floats(0, 120),
        st.sampled_from(["car", "home", "boat", None]), st.sampled_from([*"abcdefgh", "z", None]),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


def drawn(rows: int, seed: int = 0) -> pl.DataFrame:
    """Records as the public shares say, columns independent."""
    random = np.random.default_rng(seed)
    stretch = random.choice(3, rows, p=[0.2, 0.3, 0.5])
    income = np.array([0, 10, 50])[stretch] + random.uniform(0, 1, rows) * np.array([10, 40, 50])[stretch]
    age = random.uniform(18, 90, rows)
    purpose = random.choice(["car", "home", "boat"], rows, p=[0.6, 0.3, 0.1])
    sector = random.choice([*"abcdefgh", "z"], rows, p=[*[0.99 / 8] * 8, 0.01])
    return pl.DataFrame({"income": income, "age": age, "purpose": purpose, "sector": sector})


@settings(max_examples=40)
@given(rows=ROWS)
def test_rows_are_finite_of_norm_at_most_one_and_alone(rows: list[Any]) -> None:
    encoder = Encoder(schema(trees=20, depth=3))
    together, _ = encoder.encode(frame(rows))
    assert np.isfinite(together).all()
    assert np.linalg.norm(together.astype(np.float64), axis=1).max() <= 1 + 1e-6
    alone = np.concatenate([encoder.encode(frame([row]))[0] for row in rows])
    np.testing.assert_array_equal(together, alone)


def test_a_row_is_in_one_leaf_of_each_tree() -> None:
    encoder = Encoder(schema(trees=15, depth=2))
    x, _ = encoder.encode(drawn(200))
    leaves = np.array(encoder.groups) == "interactions"
    assert leaves.sum() == 15 * 4
    inside = (x[:, leaves].reshape(200, 15, 4) > 0).sum(axis=2)
    assert (inside == 1).all()


def test_a_leaf_is_what_its_name_says() -> None:
    encoder = Encoder(schema(trees=30, depth=2))
    table = drawn(300)
    x, _ = encoder.encode(table)

    def holds(question: str) -> np.ndarray:
        if question.startswith("not "):
            return ~holds(question[4:])
        if " from " in question:
            column, edge = question.split(" from ")
            return np.asarray(table[column].to_numpy() >= float(edge))
        column, values = question.split(" in ")
        known = next(each.categories for each in COLUMNS if each.name == column and isinstance(each, CategoricalColumn))
        named = [value if value in known else "other" for value in table[column]]
        return np.isin(named, values.split(", "))

    checked = 0
    for index, name in enumerate(encoder.names):
        if name.startswith("interactions"):
            first, second = name.split(": ", 1)[1].split("; ")
            np.testing.assert_array_equal(x[:, index] > 0, holds(first) & holds(second), err_msg=name)
            checked += 1
    assert checked == 120


def test_public_moments_are_those_of_the_public_claim() -> None:
    encoder = Encoder(schema(trees=40, depth=2))
    assert encoder.second_moment.sum() == pytest.approx(1)
    x, _ = encoder.encode(drawn(20_000))
    leaves = np.array(encoder.groups) == "interactions"
    # Rows that are brought to their bound lose a little; the mean is about zero, as centred inputs' is.
    found = np.square(x[:, leaves].astype(np.float64)).sum(axis=1).mean()
    assert found == pytest.approx(encoder.second_moment[leaves].sum(), rel=0.25)
    assert np.abs(x[:, leaves].mean(axis=0)).max() < 0.03


def test_shares_of_the_norm_are_the_schemas() -> None:
    x, _ = Encoder(schema(trees=20, depth=2, share=0.25)).encode(drawn(500))
    groups = np.array(Encoder(schema(trees=20, depth=2, share=0.25)).groups)
    squares = np.square(x.astype(np.float64))
    assert squares[:, groups == "interactions"].sum(axis=1).max() <= 0.25 * (1 - 0.25**2) + 1e-6
    assert squares[:, ~np.isin(groups, ["interactions", "intercept"])].sum(axis=1).max() <= 0.75 * (1 - 0.25**2) + 1e-6


def test_the_seed_is_the_plans_and_decides() -> None:
    first, again, other = (Encoder(schema(trees=10, depth=3, seed=seed)) for seed in (1, 1, 2))
    assert first.names == again.names
    assert first.names != other.names


def test_a_column_that_is_left_out_is_in_no_leaf() -> None:
    names = Encoder(schema(trees=30, depth=3, leave_out=("age",))).names
    assert not any("age" in name for name in names if name.startswith("interactions"))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="depth 5"):
        Encoder(schema(depth=5))
    with pytest.raises(ValueError, match="there is no column 'ages'"):
        schema(leave_out=("ages",))


def test_without_interactions_a_schema_is_what_it_was() -> None:
    assert "interactions" not in canonical_json(schema())
    assert schema().fingerprint() != schema(trees=10).fingerprint()
