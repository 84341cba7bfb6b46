"""The losses are those of fits without the record, and the choice keeps its promise."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from metarisk_common.adaptation import map_logistic
from metarisk_common.selection import Candidate, choose, leave_one_out_losses

Array = npt.NDArray[Any]


def records(seed: int, rows: int, width: int) -> tuple[Array, Array, Array]:
    """Rows of norm 1 whose outcomes follow a logistic model, and a start near it."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    truth = 2 * generator.normal(size=width)
    y = (generator.random(rows) < expit(x @ truth)).astype(np.float64)
    return truth + generator.normal(size=width), x, y


def losses_of_refits(start: Array, x: Array, y: Array, tau2: Array) -> Array:
    found = []
    for row in range(len(y)):
        rest = np.arange(len(y)) != row
        weights = map_logistic(start, x[rest], y[rest], tau2=tau2)
        found.append(np.logaddexp(0, (1 - 2 * y[row]) * (x[row] @ weights)))
    return np.array(found)


def candidates(start: Array, x: Array, *tau2: float, charges: tuple[float, ...] = ()) -> list[Candidate]:
    return [
        Candidate(f"{number}", "head", None, x, start, np.full(start.shape, value), charge)
        for number, (value, charge) in enumerate(zip(tau2, charges or (0.0,) * len(tau2), strict=True))
    ]


@pytest.mark.parametrize(("rows", "width"), [(20, 40), (40, 12), (120, 30)])
@pytest.mark.parametrize("tau2", [0.05, 0.3, 1.0])
def test_one_fit_tells_what_all_refits_would(rows: int, width: int, tau2: float) -> None:
    start, x, y = records(rows, rows, width)
    variances = np.full(width, tau2)
    adapted = map_logistic(start, x, y, tau2=variances)
    found = leave_one_out_losses(adapted, x, y, variances)
    refits = losses_of_refits(start, x, y, variances)
    shown = np.logaddexp(0, (1 - 2 * y) * (x @ adapted))
    optimism = refits.mean() - shown.mean()
    assert optimism > 0
    # What is left of the flattery is a small share of it, and no record is far off.
    assert abs(found.mean() - refits.mean()) < 0.05 * optimism
    assert np.abs(found - refits).max() < 0.05


def test_both_sides_give_the_same_losses() -> None:
    start, x, y = records(3, 25, 26)
    tau2 = np.full(26, 0.5)
    adapted = map_logistic(start, x, y, tau2=tau2)
    few = leave_one_out_losses(adapted, x, y, tau2)
    # Two inputs that say nothing change nothing but the side that is inverted.
    fewer_columns = leave_one_out_losses(adapted[:24], x[:, :24], y, tau2[:24])
    padded = leave_one_out_losses(
        np.append(adapted[:24], [0, 0, 0]), np.hstack([x[:, :24], np.zeros((25, 3))]), y, np.full(27, 0.5)
    )
    assert padded == pytest.approx(fewer_columns, abs=1e-12)
    assert few.shape == (25,)


def test_what_does_not_move_is_judged_as_it_is() -> None:
    start, x, y = records(4, 30, 5)
    found = leave_one_out_losses(start, x, y, np.zeros(5))
    assert found == pytest.approx(np.logaddexp(0, (1 - 2 * y) * (x @ start)), abs=1e-15)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 60), st.lists(st.floats(0, 5), min_size=4, max_size=4))
def test_the_choice_keeps_its_promise(seed: int, rows: int, charges: list[float]) -> None:
    start, x, y = records(seed, rows, 8)
    offered = candidates(start, x, 0.3, 0.0, 1.0, 10.0, charges=tuple(charges))
    found = choose(offered, y)
    assert found.losses.keys() == {one.label for one in offered}
    total = {one.label: rows * found.losses[one.label] for one in offered}
    for other in offered:
        gap = total[found.candidate.label] - total[other.label]
        assert gap <= other.charge - found.candidate.charge + 1e-9
    assert found.weights == pytest.approx(map_logistic(start, x, y, tau2=found.candidate.tau2))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 50))
def test_the_order_of_the_records_does_not_decide(seed: int, rows: int) -> None:
    start, x, y = records(seed, rows, 8)
    order = np.random.default_rng(seed).permutation(rows)
    charges = (0.0, 1.0, 2.0)
    one = choose(candidates(start, x, 0.3, 0.0, 3.0, charges=charges), y)
    other = choose(candidates(start, x[order], 0.3, 0.0, 3.0, charges=charges), y[order])
    assert one.candidate.label == other.candidate.label
    assert one.losses == pytest.approx(other.losses)


def test_a_tie_goes_to_the_earlier_candidate_and_a_charge_breaks_it() -> None:
    start, x, y = records(5, 20, 4)
    assert choose(candidates(start, x, 0.5, 0.5), y).candidate.label == "0"
    assert choose(candidates(start, x, 0.5, 0.5, charges=(1e-6, 0.0)), y).candidate.label == "1"


def test_a_standard_error_can_be_asked_for_besides() -> None:
    start, x, y = records(6, 40, 6)
    start = start - 3 * start  # wrong in every sign, so that moving far pays
    narrow, wide = candidates(start, x, 0.01, 10.0)
    assert choose([narrow, wide], y).candidate is wide
    sure = Candidate("sure", "head", None, x, start, wide.tau2, errors=100.0)
    assert choose([narrow, sure], y).candidate is narrow
    # One label says nothing of how sure a difference is.
    single = Candidate("single", "head", None, x[:1], start, wide.tau2, errors=0.1)
    assert choose([candidates(start, x[:1], 0.01)[0], single], y[:1]).candidate.label == "0"


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(ValueError, match="no way to adapt"):
        choose([], np.zeros(3))
