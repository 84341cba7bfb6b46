"""The streaming mean: exact, whatever the order; and what it refuses to add."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import aggregators
from server.aggregators import LARGEST, MOST, MeanState

WIDTH = 3
weights = st.integers(1, 1_000_000)
values = st.one_of(
    st.floats(-1e3, 1e3),
    st.floats(-1e-6, 1e-6),
    st.floats(-4e6, 4e6),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, 5e-324, -1e-300, 1e-17, -1e-17]),
)
items = st.lists(st.tuples(st.lists(values, min_size=WIDTH, max_size=WIDTH), weights), min_size=1, max_size=12)
Items = list[tuple[list[float], int]]


def folded(updates: Sequence[tuple[Any, int]], dtype: str = "float64") -> MeanState:
    state = aggregators.init({"a": np.zeros(WIDTH)})
    for update, weight in updates:
        state = aggregators.add(state, {"a": np.asarray(update, dtype)}, weight)
    return state


def exact(updates: Items) -> list[Fraction]:
    total = sum(weight for _, weight in updates)
    return [sum((Fraction(update[i]) * weight for update, weight in updates), Fraction()) / total for i in range(WIDTH)]


@given(updates=items, data=st.data())
def test_the_order_does_not_matter_to_the_bit(updates: Items, data: st.DataObject) -> None:
    turned = data.draw(st.permutations(updates))
    a, b = aggregators.result(folded(updates))["a"], aggregators.result(folded(turned))["a"]
    assert a.tobytes() == b.tobytes()


@given(updates=items)
def test_it_is_the_weighted_mean(updates: Items) -> None:
    found = aggregators.result(folded(updates))["a"]
    assert found.dtype == np.float64
    total = sum(weight for _, weight in updates)
    largest = max(abs(number) * weight for numbers, weight in updates for number in numbers)
    for value, fraction in zip(found.tolist(), exact(updates), strict=True):
        # Relative to the mean, or where terms cancel, to a hundredth of the largest of them.
        scale = max(abs(float(fraction)), largest / total / 100, 1e-6)
        assert float(abs(Fraction(value) - fraction)) <= 1e-12 * scale


@given(updates=st.lists(st.lists(st.floats(-1, 1), min_size=WIDTH, max_size=WIDTH), min_size=1, max_size=20))
def test_with_equal_weights_it_errs_by_less_than_a_rounding(updates: list[list[float]]) -> None:
    found = aggregators.result(folded([(update, 1) for update in updates]))["a"]
    expected = exact([(update, 1) for update in updates])
    for value, fraction in zip(found.tolist(), expected, strict=True):
        assert abs(Fraction(value) - fraction) <= Fraction(2) ** -62 + abs(fraction) * Fraction(2) ** -51


@given(updates=items)
def test_opposites_cancel_exactly(updates: Items) -> None:
    both = [*updates, *(([-value for value in update], weight) for update, weight in updates)]
    assert aggregators.result(folded(both))["a"].tolist() == [0.0] * WIDTH


def test_small_sums_of_either_sign_keep_their_digits() -> None:
    for value in (1e-10, -1e-10, 3e-16, -3e-16):
        assert aggregators.result(folded([([value] * WIDTH, 1)]))["a"] == pytest.approx([value] * WIDTH, rel=1e-3)
    assert aggregators.result(folded([([-1e-3] * WIDTH, 1)]))["a"] == pytest.approx([-1e-3] * WIDTH, rel=1e-15)


def test_many_of_the_largest_terms_do_not_overflow() -> None:
    largest = np.nextafter(LARGEST, 0)
    for sign in (1.0, -1.0):
        state = folded([([sign * largest] * WIDTH, 1)] * 5)
        assert aggregators.result(state)["a"] == pytest.approx([sign * largest] * WIDTH, rel=1e-15)
    bound = int(LARGEST) * (MOST + 1)
    assert bound < 2**63


def test_single_numbers_and_single_precision() -> None:
    state = aggregators.init({"a": np.zeros((), np.float32)})
    state = aggregators.add(state, {"a": np.array(0.5, np.float32)}, 3)
    state = aggregators.add(state, {"a": np.array(-0.25, np.float32)}, 1)
    found = aggregators.result(state)["a"]
    assert found.shape == ()
    assert float(found) == 0.3125
    assert (state.weight, state.count) == (4, 2)


def test_a_sum_already_handed_out_does_not_change() -> None:
    state = folded([([1.0, 2.0, 3.0], 1)])
    aggregators.add(state, {"a": np.ones(WIDTH)}, 1)
    assert aggregators.result(state)["a"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), LARGEST, -LARGEST, 1e300])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_what_cannot_be_added_is_refused(value: float, dtype: str) -> None:
    with pytest.raises(ValueError, match="not finite or too large"):
        folded([([0.0, value, 0.0], 1)], dtype)


def test_the_weight_counts_towards_the_limit() -> None:
    folded([([LARGEST / 2000] * WIDTH, 1000)])
    with pytest.raises(ValueError, match="not finite or too large"):
        folded([([LARGEST / 1000] * WIDTH, 1000)])


@pytest.mark.parametrize("weight", [0, -1])
def test_a_weight_is_positive(weight: int) -> None:
    with pytest.raises(ValueError, match="weight must be a positive integer"):
        folded([([0.0] * WIDTH, weight)])


def test_a_sum_has_room_for_so_many() -> None:
    empty = aggregators.init({"a": np.zeros(WIDTH)})
    full = MeanState(empty.whole, empty.parts, MOST, MOST)
    with pytest.raises(ValueError, match="at most"):
        aggregators.add(full, {"a": np.zeros(WIDTH)}, 1)


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no update was added"):
        aggregators.result(aggregators.init({"a": np.zeros(WIDTH)}))
