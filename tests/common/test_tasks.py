"""Tasks are disjoint and complete; few-shot draws are nested, judged on one query, fair and repeatable."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metarisk_common.errors import DataError
from metarisk_common.tasks import WHOLE_INSTITUTION, FewShotDraw, few_shot_draw, tasks_of

PUBLIC = ("farming", "retail", "trade")
SEGMENTS = st.lists(st.sampled_from([*PUBLIC, "unlisted", ""]), min_size=1, max_size=40)


@settings(max_examples=50, deadline=None)
@given(segments=SEGMENTS)
def test_tasks_are_the_public_list_whatever_segments_occur(segments: list[str]) -> None:
    x = np.arange(len(segments), dtype=np.float32)[:, None]
    y = np.arange(len(segments), dtype=np.float32)
    tasks = tasks_of("bank", x, y, np.array(segments), PUBLIC)

    # How many tasks there are, and their order, may not depend on private records.
    assert [task.segment for task in tasks] == list(PUBLIC)
    placed = sorted(int(value) for task in tasks for value in task.y)
    assert placed == [row for row, segment in enumerate(segments) if segment in PUBLIC]
    for task in tasks:
        assert task.institution == "bank"
        assert np.array_equal(task.x[:, 0], task.y)
        assert all(segments[int(row)] == task.segment for row in task.y)


def test_one_task_for_the_whole_institution_needs_no_segments() -> None:
    x, y = np.zeros((3, 2), dtype=np.float32), np.zeros(3, dtype=np.float32)
    (task,) = tasks_of("bank", x, y, None, (WHOLE_INSTITUTION,))
    assert task.segment == WHOLE_INSTITUTION
    assert task.x is x
    assert task.y is y


def test_tensors_are_cut_as_arrays_are() -> None:
    x, y = torch.arange(8.0).reshape(4, 2), torch.tensor([0.0, 1.0, 0.0, 1.0])
    first, second = tasks_of("bank", x, y, np.array(["b", "a", "b", "a"]), ("a", "b"))
    assert torch.equal(first.x, x[[1, 3]])
    assert torch.equal(second.y, y[[0, 2]])


def test_tasks_by_segment_without_segments_are_refused() -> None:
    with pytest.raises(DataError, match=r"North Bank.*segment column"):
        tasks_of("North Bank", np.zeros((1, 1)), np.zeros(1), None, ("retail",))


@st.composite
def drawable(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    """Labels, k_min, k_max and a seed for which a draw is possible."""
    k_min = draw(st.integers(2, 8))
    k_max = k_min + draw(st.integers(0, 20))
    rows = k_max + 2 + draw(st.integers(0, 40))
    positives = draw(st.integers(2, rows - 2))
    y = np.zeros(rows, dtype=np.float32)
    y[draw(st.permutations(range(rows)))[:positives]] = 1
    return y, k_min, k_max, draw(st.integers(0, 99))


@settings(max_examples=50, deadline=None)
@given(case=drawable())
def test_draws_hold_both_classes_and_every_record_once(case: tuple[np.ndarray, int, int, int]) -> None:
    y, k_min, k_max, seed = case
    draw = few_shot_draw(y, k_min=k_min, k_max=k_max, seed_parts=("test", seed), where="bank")

    assert len(draw.support) == k_max
    assert np.array_equal(np.sort(np.concatenate([draw.support, draw.query])), np.arange(len(y)))
    assert set(y[draw.support[:k_min]]) == {0.0, 1.0}
    assert set(y[draw.query]) == {0.0, 1.0}
    again = few_shot_draw(y, k_min=k_min, k_max=k_max, seed_parts=("test", seed), where="bank")
    assert np.array_equal(draw.support, again.support)
    assert np.array_equal(draw.query, again.query)


def test_every_part_of_the_seed_counts_and_parts_do_not_run_together() -> None:
    y = np.tile([0.0, 1.0], 500)

    def draw(*parts: str | int) -> bytes:
        return few_shot_draw(y, k_min=10, k_max=200, seed_parts=parts, where="bank").support.tobytes()

    seeds: list[tuple[str | int, ...]] = [("a", 1), ("a", 2), ("b", 1), ("a1",), ("a", "1"), (1, "a"), ()]
    assert len({draw(*parts) for parts in seeds}) == len(seeds)


def test_the_order_is_uniform_among_those_that_fit() -> None:
    # Five records, two positive; supports of 2 to 3. Compare with shuffling until it fits, by counting all orders.
    y = np.array([1.0, 1.0, 0.0, 0.0, 0.0])

    def fits(order: tuple[int, ...]) -> bool:
        return len(set(y[list(order[:2])])) == 2 and len(set(y[list(order[3:])])) == 2

    expected = {order: 0 for order in permutations(range(5)) if fits(order)}
    draws = 100 * len(expected)
    for seed in range(draws):
        draw = few_shot_draw(y, k_min=2, k_max=3, seed_parts=(seed,), where="bank")
        expected[(*draw.support.tolist(), *draw.query.tolist())] += 1
    chi_square = sum((count - 100) ** 2 / 100 for count in expected.values())
    freedom = len(expected) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_two_positives_among_many_are_still_found() -> None:
    y = np.zeros(50_000)
    y[[17, 49_000]] = 1
    draw = few_shot_draw(y, k_min=10, k_max=200, seed_parts=(0,), where="bank")
    assert y[draw.support[:10]].sum() == 1
    assert y[draw.query].sum() == 1


@pytest.mark.parametrize(
    "y",
    [
        pytest.param(np.tile([0.0, 1.0], 5), id="too few rows"),
        pytest.param(np.zeros(100), id="one class"),
        pytest.param(np.ones(100), id="the other class"),
        pytest.param(np.eye(100)[0], id="a single positive"),
        pytest.param(np.zeros(0), id="no rows"),
    ],
)
def test_an_impossible_draw_names_the_institution(y: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"North Bank: .*2 to 9") as caught:
        few_shot_draw(y, k_min=2, k_max=9, seed_parts=(0,), where="North Bank")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("k_min", "k_max"), [(1, 10), (10, 5)])
def test_supports_that_cannot_be_meant_are_refused(k_min: int, k_max: int) -> None:
    with pytest.raises(ValueError, match="k_min"):
        few_shot_draw(np.tile([0.0, 1.0], 50), k_min=k_min, k_max=k_max, seed_parts=(0,), where="bank")


def test_draws_do_not_depend_on_label_type() -> None:
    y = np.tile([0, 1, 1], 20)

    def draw(labels: np.ndarray) -> FewShotDraw:
        return few_shot_draw(labels, k_min=4, k_max=8, seed_parts=("same",), where="bank")

    assert np.array_equal(draw(y).support, draw(y.astype(np.float32)).support)
    assert np.array_equal(draw(y).support, draw(y.astype(bool)).support)
