"""Robust aggregators: known answers, the order of replies, and what liars can and cannot do to a round."""

import math
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metarisk_common.plan import OuterLoop
from server import aggregators
from server.admission import norm_bound
from server.aggregators import LARGEST, update_norm
from server.journal import read_journal
from server.robust import Aggregator, aggregator_for, bounded, cut_of, mean, median, norm_bounded_mean, trimmed_mean
from server.rounds import JOURNAL, run_rounds

WIDTH = 3
ROUNDING = 2.0**-61
CHOICES: dict[str, dict[str, Any]] = {
    "mean": {},
    "median": {"weighting": "equal"},
    "trimmed_mean": {"weighting": "equal", "trim": 0.2},
    "norm_bounded_mean": {"weighting": "equal", "max_update_norm": 0.75},
}
numbers = st.one_of(
    st.floats(-1e3, 1e3, width=32),
    st.floats(-(2.0**-20), 2.0**-20, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, 1e9, -1e9]),
)
rows = st.lists(numbers, min_size=WIDTH, max_size=WIDTH)
dtypes = st.sampled_from(["float32", "float64"])


def chosen(name: str) -> Aggregator[Any]:
    return aggregator_for(OuterLoop.model_validate({"aggregator": name, **CHOICES[name]}))


def folded(aggregator: Aggregator[Any], updates: Sequence[Any], dtype: str = "float64") -> Any:
    state = aggregator.init({"a": np.zeros(WIDTH, dtype)})
    for update in updates:
        state = aggregator.add(state, {"a": np.asarray(update, dtype)}, 1)
    return state


def aggregate(aggregator: Aggregator[Any], updates: Sequence[Any], dtype: str = "float64") -> np.ndarray:
    found: np.ndarray = aggregator.result(folded(aggregator, updates, dtype))["a"]
    assert found.dtype == np.float64
    return found


# Known answers.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_median_of_odd_and_even_numbers(dtype: str) -> None:
    three = [[5.0, -1.0, 0.0], [1.0, -2.0, 100.0], [3.0, 7.0, -100.0]]
    assert aggregate(median(), three, dtype).tolist() == [3.0, -1.0, 0.0]
    assert aggregate(median(), [*three, [4.0, -1.5, 1.0]], dtype).tolist() == [3.5, -1.25, 0.5]
    assert aggregate(median(), three[:1], dtype).tolist() == three[0]
    # Between two neighbours of single precision there is a number of double precision.
    assert aggregate(median(), [[1.0] * 3, [1.0 + 2.0**-23] * 3], dtype).tolist() == [1.0 + 2.0**-24] * 3


def test_the_trimmed_mean_cuts_a_share_at_each_end() -> None:
    ten = [[float(value), float(-value), 1.0] for value in (9, 0, 1000, 3, 4, 5, -1000, 6, 7, 8)]
    assert aggregate(trimmed_mean(0.1), ten).tolist() == [42 / 8, -42 / 8, 1.0]
    assert aggregate(trimmed_mean(0.2), ten).tolist() == [33 / 6, -33 / 6, 1.0]
    # Just below a half the middle two are left: the median.
    assert aggregate(trimmed_mean(0.49), ten).tolist() == aggregate(median(), ten).tolist()


@pytest.mark.parametrize(
    ("trim", "count", "cut"), [(0.1, 9, 0), (0.1, 10, 1), (0.1, 29, 2), (0.29, 100, 29), (0.3, 10, 3), (0.0, 50, 0)]
)
def test_the_cut_is_the_share_rounded_down_as_people_compute_it(trim: float, count: int, cut: int) -> None:
    assert cut_of(trim, count) == cut


@given(trim=st.floats(0, 0.5, exclude_max=True), count=st.integers(1, 10_000))
def test_something_is_always_left(trim: float, count: int) -> None:
    assert 2 * cut_of(trim, count) < count


def test_the_bound_scales_the_large_and_leaves_the_small() -> None:
    updates = [[3.0, 4.0, 0.0], [0.0, 0.0, 0.5], [0.0, -20.0, 0.0]]
    assert aggregate(norm_bounded_mean(1.0), updates) == pytest.approx([0.2, (0.8 - 1.0) / 3, 0.5 / 3], rel=1e-15)
    # Its weight is no part of an update's norm.
    state = folded(norm_bounded_mean(1.0), [])
    for update, weight in zip(updates, (1, 2, 1), strict=True):
        state = norm_bounded_mean(1.0).add(state, {"a": np.array(update)}, weight)
    found = norm_bounded_mean(1.0).result(state)["a"]
    assert found == pytest.approx([0.15, -0.05, 0.25], rel=1e-15)


def test_the_norm_is_that_of_all_arrays_together() -> None:
    update = {"w": np.array([[3.0, 0.0]]), "b": np.array([4.0])}
    found = bounded(update, 1.0)
    assert {name: value.tolist() for name, value in found.items()} == {"w": [[0.6000000000000001, 0.0]], "b": [0.8]}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("shape", [(), (2, 3), (0,)])
def test_every_shape_is_kept(name: str, shape: tuple[int, ...]) -> None:
    aggregator, like = chosen(name), {"b": np.zeros(shape, np.float32), "a": np.zeros(2, np.float32)}
    state = aggregator.init(like)
    for value in (0.25, 0.5):
        state = aggregator.add(state, {key: np.full_like(array, value) for key, array in like.items()}, 1)
    found = aggregator.result(state)
    assert [(key, value.shape) for key, value in found.items()] == [("b", shape), ("a", (2,))]
    assert all(np.all(value > 0.2) for value in found.values())


# The order of replies.


@pytest.mark.parametrize("name", CHOICES)
@given(updates=st.lists(rows, min_size=1, max_size=9), dtype=dtypes, data=st.data())
def test_the_order_does_not_matter_to_the_bit(
    name: str, updates: list[list[float]], dtype: str, data: st.DataObject
) -> None:
    turned = data.draw(st.permutations(updates))
    aggregator = chosen(name)
    assert aggregate(aggregator, updates, dtype).tobytes() == aggregate(aggregator, turned, dtype).tobytes()


@given(values=st.lists(numbers, min_size=12, max_size=12), bound=st.floats(0.01, 10))
def test_nor_does_the_order_of_names_nor_the_layout_in_memory(values: list[float], bound: float) -> None:
    """A report that is sent again after a crash may come with its arrays in another order."""
    w, b, c = (np.array(part, np.float32) for part in (values[:9], values[9:11], values[11:]))
    w = w.reshape(3, 3)
    one, other = {"w": w, "b": b, "c": c}, {"b": b, "c": c, "w": np.asfortranarray(w)}
    assert update_norm(one) == update_norm(other)
    assert all(bounded(one, bound)[name].tobytes() == bounded(other, bound)[name].tobytes() for name in one)
    far = {"a": np.array([1e8]), "b": np.ones(1), "c": np.ones(1)}
    assert len({update_norm({name: far[name] for name in names}) for names in permutations(far)}) == 1


# What liars can do.


@given(
    honest=st.lists(rows, min_size=1, max_size=8),
    lies=st.lists(rows, max_size=7),
    dtype=dtypes,
    data=st.data(),
)
def test_fewer_than_half_cannot_move_the_median_out_of_the_honest_range(
    honest: list[list[float]], lies: list[list[float]], dtype: str, data: st.DataObject
) -> None:
    lies = lies[: len(honest) - 1]
    found = aggregate(median(), data.draw(st.permutations([*honest, *lies])), dtype)
    low, high = np.min(np.asarray(honest, dtype), axis=0), np.max(np.asarray(honest, dtype), axis=0)
    assert np.all((low <= found) & (found <= high))


@given(
    updates=st.lists(rows, min_size=2, max_size=12), trim=st.floats(0.05, 0.49), dtype=dtypes, data=st.data()
)  # fmt: skip
def test_as_many_as_are_cut_cannot_move_the_trimmed_mean_out_of_the_honest_range(
    updates: list[list[float]], trim: float, dtype: str, data: st.DataObject
) -> None:
    liars = data.draw(st.integers(0, cut_of(trim, len(updates))))
    honest = np.asarray(updates[liars:], dtype)
    found = aggregate(trimmed_mean(trim), data.draw(st.permutations(updates)), dtype)
    slack = ROUNDING + np.abs(honest).max(axis=0) * 1e-15
    assert np.all((honest.min(axis=0) - slack <= found) & (found <= honest.max(axis=0) + slack))


def test_one_liar_more_can() -> None:
    """The promises are no weaker than they need be: at the limit they hold, one beyond it they do not."""
    lie, truth = [1e6] * WIDTH, [0.0] * WIDTH
    assert aggregate(median(), [*[truth] * 3, *[lie] * 2]).tolist() == truth
    assert aggregate(median(), [*[truth] * 2, *[lie] * 3]).tolist() == lie
    assert aggregate(trimmed_mean(0.2), [*[truth] * 8, *[lie] * 2]).tolist() == truth
    assert aggregate(trimmed_mean(0.2), [*[truth] * 7, *[lie] * 3]).max() > 1e5
    assert aggregate(mean(), [*[truth] * 9, lie]).max() > 1e4


@given(updates=st.lists(rows, min_size=1, max_size=8), bound=st.floats(1e-3, 100), dtype=dtypes)
def test_the_norm_bound_holds_whoever_lies(updates: list[list[float]], bound: float, dtype: str) -> None:
    assert update_norm({"a": aggregate(norm_bounded_mean(bound), updates, dtype)}) <= bound * (1 + 1e-12)
    for update in updates:
        array = np.asarray(update, dtype)
        found = bounded({"a": array}, bound)
        assert update_norm(found) <= bound * (1 + 1e-12)
        if update_norm({"a": array}) <= bound:
            assert found["a"].tobytes() == array.tobytes()
        else:
            assert update_norm(found) >= bound * (1 - 1e-12)
            assert found["a"] / bound == pytest.approx(array / update_norm({"a": array}), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("other", [trimmed_mean(0.0), trimmed_mean(0.1), norm_bounded_mean(1e12)])
@given(updates=st.lists(rows, min_size=1, max_size=9), dtype=dtypes)
def test_where_nothing_is_cut_it_is_the_mean_to_the_bit(
    other: Aggregator[Any], updates: list[list[float]], dtype: str
) -> None:
    # A negative nought among the updates is a nought in the exact sum already.
    assert aggregate(other, updates, dtype).tobytes() == aggregate(mean(), updates, dtype).tobytes()


# Memory, and what is refused.


def size_of(state: Any) -> int:
    """Bytes of every array of a state, however it holds them."""
    if isinstance(state, np.ndarray):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(size_of, state.values()))
    if isinstance(state, tuple):
        return sum(map(size_of, state))
    return sum(map(size_of, vars(state).values())) if hasattr(state, "__dict__") else 0


@pytest.mark.parametrize("name", CHOICES)
def test_only_what_says_that_it_buffers_grows_with_the_updates(name: str) -> None:
    aggregator = chosen(name)
    few, many = (folded(aggregator, [[0.1, 0.2, 0.3]] * count, "float32") for count in (2, 200))
    assert (few.count, many.count) == (2, 200)
    assert size_of(few) > 0
    assert size_of(many) == size_of(few) * (100 if aggregator.buffers else 1)
    assert aggregator.buffers == (name in {"median", "trimmed_mean"})


@pytest.mark.parametrize("name", CHOICES)
def test_a_state_is_not_changed_by_what_comes_after(name: str) -> None:
    aggregator = chosen(name)
    update = np.array([0.1, 0.2, 0.3])
    state = aggregator.add(aggregator.init({"a": update}), {"a": update}, 1)
    before = aggregator.result(state)["a"].tobytes()
    update[:] = 9.0
    aggregator.add(state, {"a": update}, 1)
    assert aggregator.result(state)["a"].tobytes() == before


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), LARGEST, -1e300])
def test_what_cannot_be_added_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match="not finite or too large"):
        folded(chosen(name), [[0.0, value, 0.0]])


@pytest.mark.parametrize("name", CHOICES)
def test_nothing_has_no_result(name: str) -> None:
    aggregator = chosen(name)
    with pytest.raises(ValueError, match="no update was added"):
        aggregator.result(aggregator.init({"a": np.zeros(WIDTH)}))


@pytest.mark.parametrize("aggregator", [median(), trimmed_mean(0.1)])
def test_no_bank_counts_more_than_once(aggregator: Aggregator[Any]) -> None:
    with pytest.raises(ValueError, match="weight must be 1"):
        aggregator.add(aggregator.init({"a": np.zeros(WIDTH)}), {"a": np.zeros(WIDTH)}, 2)


def test_the_plan_chooses() -> None:
    # Of 5: the largest norms are 1, 2, 3, 4 and 50 along one axis.
    updates = [[value, 0.0, 0.0] for value in (1.0, 2.0, 3.0, 4.0, 50.0)]
    found = {name: float(aggregate(chosen(name), updates)[0]) for name in CHOICES}
    assert found == {"mean": 12.0, "median": 3.0, "trimmed_mean": 3.0, "norm_bounded_mean": 0.75}
    # One named `mean` is the streaming mean by weight.
    weighted = aggregator_for(OuterLoop())
    assert (weighted.add, weighted.buffers) == (aggregators.add, False)


# Whole rounds: a bank that sends the largest update that admission lets through, always in one direction.

CLIP = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "sample_rate": 1.0}
SHARE_OF_WHAT_IS_ADMITTED = 0.98
SURE = math.sqrt(1 / 5)


@pytest.fixture
def lied_to(federation: Any, tmp_path: Path) -> Callable[..., tuple[np.ndarray, list[dict[str, Any]]]]:
    """Twenty rounds of banks that nearly agree on an optimum of norm 0.5, of which bank 7 may lie."""

    def call(aggregator: str, *, lies: bool, **outer: Any) -> tuple[np.ndarray, list[dict[str, Any]]]:
        settings = {"rounds": 20, "optimizer": "sgd", "aggregator": aggregator, **outer}
        fed = federation(mechanism=CLIP, outer=settings)
        random = np.random.default_rng(7)
        make = type(fed.tasks[0])
        for number, task in enumerate(fed.tasks):
            fed.tasks[number] = make(task.a, 0.5 * SURE + 0.01 * random.normal(size=5), 10)
        if lies:
            # So flat and far a task that its gradient is the same everywhere: the update is what it pleases.
            bound = SHARE_OF_WHAT_IS_ADMITTED * norm_bound(fed.plan, 10, 5)
            push = SURE * np.array([1.0, -1.0, 1.0, -1.0, 1.0]) * bound / (fed.plan.inner.local_steps * 0.1)
            fed.tasks[7] = make(1e-9 * np.eye(5), 1e9 * push, 10)
        folder = tmp_path / f"{aggregator}-{lies}"
        end = run_rounds(fed.start(), fed.plan, fed.grid(range(8 if lies else 7)), folder)
        return end.meta_params["theta"], read_journal(folder / JOURNAL)

    return call


def away(theta: np.ndarray) -> float:
    return float(np.linalg.norm(theta - 0.5 * SURE))


def test_a_lying_bank_moves_the_mean_but_neither_median_nor_trimmed_mean(lied_to: Any) -> None:
    honest, _ = lied_to("mean", lies=False)
    moved, told = lied_to("mean", lies=True)
    assert away(honest) < 0.02
    assert away(moved) > 0.4, "as far off as if nothing had been learned"
    assert not {"aggregator", "bounded", "cut_at_each_end"} & told[-1].keys()
    for name, more in (("median", {}), ("trimmed_mean", {"trim": 0.2})):
        theta, records = lied_to(name, lies=True, **more)
        assert away(theta) < 0.02, name
        # No verdict saved it: the lie was admitted in every round.
        assert all("Bank 7" in record["admitted"] for record in records)
        assert all(record["aggregator"] == name for record in records)
        assert [record.get("cut_at_each_end") for record in records] == [1 if more else None] * 20


def test_a_share_too_small_to_cut_a_bank_protects_nobody_and_the_journal_says_so(lied_to: Any) -> None:
    theta, records = lied_to("trimmed_mean", lies=True, trim=0.1)
    assert away(theta) > 0.4
    assert {record["cut_at_each_end"] for record in records} == {0}


def test_a_norm_bound_limits_what_a_lie_can_do_and_the_journal_names_the_liar(lied_to: Any) -> None:
    theta, records = lied_to("norm_bounded_mean", lies=True, max_update_norm=0.05)
    assert away(theta) < 0.05
    assert all("Bank 7" in record["bounded"] for record in records)
    assert records[-1]["bounded"] == ["Bank 7"]
    for record in records:
        assert record["aggregate_norm"] <= 0.05 * (1 + 1e-12)
        assert record["bounded"] == [name for name, norm in record["update_norms"].items() if norm > 0.05]


def test_the_journal_has_the_norm_of_every_admitted_bank(lied_to: Any) -> None:
    _, records = lied_to("median", lies=True)
    for record in records:
        norms = record["update_norms"]
        assert [*norms] == record["admitted"]
        assert np.mean([*norms.values()]) == pytest.approx(record["mean_update_norm"], rel=1e-12)
        assert norms["Bank 7"] == pytest.approx(0.98, rel=1e-3)
    assert all(norm < 0.05 for name, norm in records[-1]["update_norms"].items() if name != "Bank 7")
