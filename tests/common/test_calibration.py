"""Noise and steps for a budget: what is promised holds by the accountant of record, and nothing better does."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarisk_common.calibration import affordable_steps, noise_multiplier_for
from metarisk_common.privacy import PrivacyEvent, epsilon

DELTA = 1e-5


def event(noise_multiplier: float, sample_rate: float, steps: int, segment: str = "") -> PrivacyEvent:
    return PrivacyEvent("poisson_gaussian", noise_multiplier, sample_rate, steps, segment)


SPENT = (
    event(20.0, 0.1, 300),
    event(9.0, 1.0, 2, "home"),
    event(30.0, 1.0, 5, "car"),
    PrivacyEvent("gaussian_histograms", 15.0, 1.0, 2),
)
"""Epsilon 0.88 on the records of homes, less on all others."""


@pytest.mark.parametrize(("mu", "target"), [(1.666, 8), (0.7191, 3), (0.2681, 1)])
def test_full_batch_noise_is_exact_gaussian_composition(mu: float, target: float) -> None:
    assert noise_multiplier_for(target, DELTA, sample_rate=1.0, steps=100) == pytest.approx(10 / mu, rel=3e-4)


@pytest.mark.parametrize("target", [0.1, 1.0, 8.0, 30.0])
@pytest.mark.parametrize(("sample_rate", "steps"), [(1.0, 1), (1.0, 100), (0.25, 400), (0.05, 10)])
def test_noise_meets_the_target_from_below(target: float, sample_rate: float, steps: int) -> None:
    found = noise_multiplier_for(target, DELTA, sample_rate=sample_rate, steps=steps)
    assert 0.999 * target <= epsilon([event(found, sample_rate, steps)], DELTA) <= target
    assert found == float(f"{found:.5g}")


@settings(max_examples=8, deadline=None)
@given(
    target=st.floats(0.05, 50),
    delta=st.sampled_from([1e-3, 1e-5, 1e-7]),
    sample_rate=st.sampled_from([0.01, 0.1, 0.4, 0.95, 1.0]),
    steps=st.integers(1, 3000),
)
def test_noise_for_any_budget(target: float, delta: float, sample_rate: float, steps: int) -> None:
    found = noise_multiplier_for(target, delta, sample_rate=sample_rate, steps=steps)
    assert 0.999 * target <= epsilon([event(found, sample_rate, steps)], delta) <= target


@pytest.mark.parametrize("target", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("steps", [1, 100, 20_000])
def test_noise_for_rare_sampling(target: float, steps: int) -> None:
    # Where Renyi's ceiling is far above, a search must not stop at it.
    found = noise_multiplier_for(target, DELTA, sample_rate=0.001, steps=steps)
    assert 0.999 * target <= epsilon([event(found, 0.001, steps)], DELTA) <= target


@pytest.mark.parametrize(("sample_rate", "steps"), [(0.1, 200), (1.0, 20), (0.01, 5000)])
@pytest.mark.parametrize("target", [0.95, 3.0])
def test_noise_leaves_room_for_what_else_is_spent(target: float, sample_rate: float, steps: int) -> None:
    found = noise_multiplier_for(target, DELTA, sample_rate=sample_rate, steps=steps, others=iter(SPENT))
    assert 0.999 * target <= epsilon([*SPENT, event(found, sample_rate, steps)], DELTA) <= target
    assert epsilon([*SPENT, event(found * 0.99, sample_rate, steps)], DELTA) > target
    assert found > noise_multiplier_for(target, DELTA, sample_rate=sample_rate, steps=steps)


def test_noise_needs_something_left() -> None:
    others = [event(5.0, 1.0, 10)]
    spent = epsilon(others, DELTA)
    for target in (spent, spent / 2):
        with pytest.raises(ValueError, match=r"^others spend epsilon 2\.59.* nothing is left"):
            noise_multiplier_for(target, DELTA, sample_rate=1.0, steps=1, others=others)
    found = noise_multiplier_for(spent * 1.001, DELTA, sample_rate=1.0, steps=1, others=others)
    assert spent < epsilon([*others, event(found, 1.0, 1)], DELTA) <= spent * 1.001


# The steps that a record's budget allows, by PRV: its epsilon is 0.01 above ours.
@pytest.mark.parametrize(
    ("sample_rate", "noise_multiplier", "steps"),
    [(0.05, 4.0, (420, 3144, 17088)), (0.25, 8.0, (69, 515, 2800)), (1.0, 8.0, (4, 32, 177))],
)
def test_known_numbers_of_steps(sample_rate: float, noise_multiplier: float, steps: Sequence[int]) -> None:
    for target, known in zip((1.0, 3.0, 8.0), steps, strict=True):
        found = affordable_steps(target, DELTA, noise_multiplier=noise_multiplier, sample_rate=sample_rate)
        assert known <= found <= math.ceil(known * 1.02)


@pytest.mark.parametrize("target", [0.5, 4.0])
@pytest.mark.parametrize(
    ("noise_multiplier", "sample_rate"), [(1.0, 0.01), (0.6, 0.001), (4.0, 0.3), (12.0, 1.0), (0.9, 0.9)]
)
@pytest.mark.parametrize("spent", [(), SPENT[:1]], ids=["fresh", "spent"])
def test_so_many_steps_fit_and_one_more_does_not(
    target: float, noise_multiplier: float, sample_rate: float, spent: tuple[PrivacyEvent, ...]
) -> None:
    found = affordable_steps(
        target, DELTA, noise_multiplier=noise_multiplier, sample_rate=sample_rate, spent=iter(spent)
    )
    if found:
        assert epsilon([*spent, event(noise_multiplier, sample_rate, found)], DELTA) <= target
    assert epsilon([*spent, event(noise_multiplier, sample_rate, found + 1)], DELTA) > target


def test_steps_count_the_segment_that_has_spent_most() -> None:
    def found(spent: Sequence[PrivacyEvent]) -> int:
        return affordable_steps(2.0, DELTA, noise_multiplier=12.0, sample_rate=1.0, spent=spent)

    assert found(SPENT) == found([*SPENT[:2], SPENT[3]])
    assert found(SPENT) < found([*SPENT[:1], *SPENT[2:]])


def test_steps_come_in_multiples_up_to_a_limit() -> None:
    steps = affordable_steps(3.0, DELTA, noise_multiplier=8.0, sample_rate=1.0)
    for multiple in (1, 5, 20, steps, steps + 1):
        found = affordable_steps(3.0, DELTA, noise_multiplier=8.0, sample_rate=1.0, multiple=multiple)
        assert found == steps // multiple * multiple
    for limit in (0, 1, 7, steps - 1, steps, steps + 1):
        found = affordable_steps(3.0, DELTA, noise_multiplier=8.0, sample_rate=1.0, limit=limit)
        assert found == min(limit, steps)
    assert affordable_steps(3.0, DELTA, noise_multiplier=1e9, sample_rate=0.5, limit=1000) == 1000


@pytest.mark.parametrize(
    ("noise_multiplier", "spent"),
    [(0.0, ()), (1e-200, ()), (0.01, ()), (8.0, (event(5.0, 1.0, 10),)), (8.0, (event(0.0, 1.0, 1),))],
)
def test_nothing_may_be_affordable(noise_multiplier: float, spent: tuple[PrivacyEvent, ...]) -> None:
    for sample_rate in (0.5, 1.0):
        assert (
            affordable_steps(2.0, DELTA, noise_multiplier=noise_multiplier, sample_rate=sample_rate, spent=spent) == 0
        )


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan, True, "3"])
def test_a_budget_must_be_a_number(target: float) -> None:
    with pytest.raises(ValueError, match=r"^epsilon must"):
        noise_multiplier_for(target, DELTA, sample_rate=1.0, steps=1)
    with pytest.raises(ValueError, match=r"^epsilon must"):
        affordable_steps(target, DELTA, noise_multiplier=1.0, sample_rate=1.0)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_delta_must_be_a_probability(delta: float) -> None:
    with pytest.raises(ValueError, match=r"^delta must"):
        noise_multiplier_for(1.0, delta, sample_rate=1.0, steps=1)
    with pytest.raises(ValueError, match=r"^delta must"):
        affordable_steps(1.0, delta, noise_multiplier=1.0, sample_rate=1.0)


@pytest.mark.parametrize(
    ("argument", "values"),
    [("sample_rate", {"sample_rate": 0.0}), ("sample_rate", {"sample_rate": 1.5}), ("steps", {"steps": 0})],
)
def test_noise_needs_a_schedule(argument: str, values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must"):
        noise_multiplier_for(1.0, DELTA, **{"sample_rate": 1.0, "steps": 1, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("sample_rate", {"sample_rate": 0.0}),
        ("noise_multiplier", {"noise_multiplier": -1.0}),
        ("multiple", {"multiple": 0}),
    ],
)
def test_steps_need_a_mechanism(argument: str, values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must"):
        affordable_steps(1.0, DELTA, **{"sample_rate": 1.0, "noise_multiplier": 1.0, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("noise_multiplier", [1e9, 1e200, 1e300])
def test_with_noise_beyond_all_measure_the_limit_is_what_can_be_afforded(noise_multiplier: float) -> None:
    for sample_rate in (1.0, 0.5):
        found = affordable_steps(3.0, 1e-5, noise_multiplier=noise_multiplier, sample_rate=sample_rate, limit=1000)
        assert found == 1000
