"""The accountants against known answers, against each other and against their limits."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarisk_common import privacy
from metarisk_common.errors import IntegrityError
from metarisk_common.privacy import PrivacyEvent, epsilon, estimate, within

DELTA = 1e-5

# (noise multiplier, sample rate, steps), epsilon by Google's PLD on its default grid, by Opacus' RDP, at DELTA.
KNOWN = [
    ((1.0, 0.01, 1000), 1.828, 2.101),
    ((2.0, 0.05, 1000), 3.700, 4.024),
    ((4.0, 0.25, 400), 5.864, 6.340),
    ((0.7, 0.1, 50), 10.706, 12.26),
    ((5.0, 1.0, 10), 2.594, 2.814),
]
CASES = [case for case, _, _ in KNOWN]


def event(noise_multiplier: float, sample_rate: float, steps: int, segment: str = "") -> PrivacyEvent:
    return PrivacyEvent("poisson_gaussian", noise_multiplier, sample_rate, steps, segment)


@pytest.mark.parametrize(("case", "pld", "rdp"), KNOWN)
def test_epsilon_of_known_events(case: tuple[float, float, int], pld: float, rdp: float) -> None:
    found = epsilon([event(*case)], DELTA)
    assert found == pytest.approx(pld, abs=1e-3)
    assert found < rdp


@pytest.mark.filterwarnings("ignore:Optimal order is the smallest alpha")
@pytest.mark.parametrize("case", CASES)
def test_the_ceiling_is_opacus_rdp_at_whole_orders(case: tuple[float, float, int]) -> None:
    from opacus.accountants.analysis import rdp  # noqa: PLC0415 - slow, and only this test needs it

    noise_multiplier, sample_rate, steps = case
    orders = [int(order) for order in privacy._ORDERS]
    divergences = rdp.compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=steps, orders=orders)
    theirs, _ = rdp.get_privacy_spent(orders=orders, rdp=divergences, delta=DELTA)
    assert privacy._ceiling((case,), DELTA) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("case", CASES[1:3])
def test_opacus_prv_agrees_within_two_hundredths(case: tuple[float, float, int]) -> None:
    from opacus.accountants import PRVAccountant  # noqa: PLC0415 - slow, and only this test needs it

    noise_multiplier, sample_rate, steps = case
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    assert abs(accountant.get_epsilon(DELTA) - epsilon([event(*case)], DELTA)) <= 0.02


@pytest.mark.parametrize("mu", [1e-4, 0.01, 0.2681, 0.7191, 1.666, 5.0, 40.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-10])
def test_full_batch_epsilon_is_that_of_the_gaussian_mechanism(mu: float, delta: float) -> None:
    from dp_accounting import get_epsilon_gaussian  # noqa: PLC0415 - slow, and only this test needs it

    assert epsilon([event(1 / mu, 1.0, 1)], delta) == pytest.approx(get_epsilon_gaussian(1 / mu, delta), abs=1e-6)


def test_full_batch_steps_compose_as_one_gaussian_step() -> None:
    assert epsilon([event(5.0, 1.0, 10)], DELTA) == pytest.approx(epsilon([event(5 / 10**0.5, 1.0, 1)], DELTA))


def test_the_order_and_cutting_of_events_change_nothing() -> None:
    whole = epsilon([event(2.0, 0.05, 90), event(5.0, 1.0, 10)], DELTA)
    cut = [event(2.0, 0.05, 30), event(5.0, 1.0, 1)] * 2 + [event(2.0, 0.05, 30), event(5.0, 1.0, 8)]
    assert epsilon(cut, DELTA) == whole
    assert epsilon(iter(cut[::-1]), DELTA) == whole


def test_full_batch_and_sampled_steps_compose() -> None:
    sampled, full = event(4.0, 0.25, 400), event(10.0, 1.0, 5)
    both = epsilon([sampled, full], DELTA)
    assert max(epsilon([sampled], DELTA), epsilon([full], DELTA)) < both
    assert both < epsilon([sampled], DELTA / 2) + epsilon([full], DELTA / 2)


def test_disjoint_segments_compose_in_parallel() -> None:
    five = [event(2.0, 0.1, 5, f"segment {index}") for index in range(5) for _ in range(20)]
    assert epsilon(five, DELTA) == pytest.approx(2.35, abs=0.02)
    assert epsilon([event(2.0, 0.1, 500)], DELTA) == pytest.approx(5.57, abs=0.02)


def test_the_worst_segment_counts_with_what_all_records_have_seen() -> None:
    little, much, all_of_it = event(9.0, 1.0, 1, "a"), event(9.0, 1.0, 7, "b"), event(9.0, 1.0, 2)
    assert epsilon([little, much, all_of_it], DELTA) == pytest.approx(epsilon([event(9.0, 1.0, 9)], DELTA))


def test_segments_carry_the_events_on_all_records_of_another_kind() -> None:
    part, all_of_it = event(9.0, 1.0, 3, "a"), event(5.0, 1.0, 2)
    alone = epsilon([event(9.0, 1.0, 3), all_of_it], DELTA)
    assert epsilon([part, all_of_it], DELTA) == pytest.approx(alone)


def test_limits() -> None:
    assert epsilon([], DELTA) == 0
    assert epsilon([event(0.0, 0.5, 1)], DELTA) == math.inf
    assert epsilon([event(0.0, 0.5, 1, "a"), event(9.0, 1.0, 1)], DELTA) == math.inf
    assert epsilon([event(1e9, 1.0, 1)], DELTA) == 0
    assert epsilon([event(1e200, 1.0, 1)], DELTA) == epsilon([event(1e300, 0.5, 9)], DELTA) == 0
    assert epsilon([event(1e-200, 1.0, 1)], DELTA) == math.inf
    # So little noise that the loss distribution would not fit the memory: the ceiling stands in for it.
    assert 1e3 < epsilon([event(0.01, 0.5, 10**6)], DELTA) < math.inf


@pytest.mark.parametrize("limit", [3.5, 3.8, 4.2])
def test_within_is_epsilon_at_most_the_limit(limit: float) -> None:
    assert within([event(2.0, 0.05, 1000)], DELTA, limit) == (limit > 3.7)


def test_within_holds_for_each_segment() -> None:
    events = [event(9.0, 1.0, 1, "a"), event(9.0, 1.0, 50, "b")]
    limit = epsilon(events, DELTA)
    assert within(events, DELTA, limit)
    assert not within(events, DELTA, limit * 0.999)
    assert within([event(0.0, 1.0, 1)], DELTA, math.inf)


def test_score_histograms_are_charged_as_a_full_batch_step() -> None:
    histograms = PrivacyEvent("gaussian_histograms", 15.0, 1.0, 2)
    assert epsilon([histograms], DELTA) == epsilon([event(15.0, 1.0, 2)], DELTA)
    # Merged by noise and rate, whatever the mechanism.
    assert epsilon([histograms, event(15.0, 1.0, 3)], DELTA) == epsilon([event(15.0, 1.0, 5)], DELTA)
    sampled = [event(4.0, 0.25, 400)]
    assert epsilon([*sampled, histograms], DELTA) == epsilon([*sampled, event(15.0, 1.0, 2)], DELTA)


@pytest.mark.parametrize("case", [(0.6, 0.001, 1e-3), (1.0, 0.5, 1e-3), (4.0, 0.05, 1e-4), (0.8, 0.9, 1e-2)])
def test_one_step_is_that_of_dp_accounting(case: tuple[float, float, float]) -> None:
    from dp_accounting import NeighboringRelation  # noqa: PLC0415 - slow, and only this test needs it
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism  # noqa: PLC0415

    noise_multiplier, sample_rate, interval = case
    ours = privacy._pld(noise_multiplier, sample_rate, interval, 1e-16)
    theirs = from_gaussian_mechanism(
        noise_multiplier,
        sampling_prob=sample_rate,
        value_discretization_interval=interval,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )
    for side in ("_pmf_remove", "_pmf_add"):
        mine, library = getattr(ours, side), getattr(theirs, side)
        assert mine._probs.sum() + mine._infinity_mass == pytest.approx(1, abs=1e-12)
        start = mine._lower_loss - library._lower_loss
        # Theirs carries rounding of the order of 1e-16 / interval.
        np.testing.assert_allclose(mine._probs[1:-1], library._probs[start:][1 : mine.size - 1], atol=1e-15 / interval)
    for loss in np.linspace(-3, 6, 10):
        assert ours.get_delta_for_epsilon(loss) == pytest.approx(
            theirs.get_delta_for_epsilon(loss), rel=1e-6, abs=1e-10
        )


@pytest.mark.parametrize(
    "case", [(0.6, 0.001, 20_000), (1.0, 0.001, 10), (2.0, 0.05, 1000), (1.0, 0.5, 10), (16.0, 0.25, 3)]
)
def test_a_finer_grid_changes_less_than_promised_and_only_lowers(
    case: tuple[float, float, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = epsilon([event(*case)], DELTA)
    rough = estimate([event(*case)], DELTA, about=found)
    monkeypatch.setattr(privacy, "_GRID", privacy._GRID / 16)
    monkeypatch.setattr(privacy, "_MOST_POINTS", privacy._MOST_POINTS * 4)
    privacy._epsilon.cache_clear()
    finer = epsilon([event(*case)], DELTA)
    privacy._epsilon.cache_clear()
    assert finer <= found <= finer * (1 + 5e-5) + 1e-6
    assert found <= rough <= found * (1 + 2e-3) + 1e-5


@settings(max_examples=15, deadline=None)
@given(
    noise_multiplier=st.floats(0.5, 30),
    sample_rate=st.sampled_from([0.002, 0.03, 0.3, 0.9]),
    steps=st.integers(1, 1000),
    more=st.floats(1.05, 3),
    others=st.lists(st.tuples(st.floats(1, 30), st.sampled_from([0.1, 1.0]), st.integers(1, 50)), max_size=2),
)
def test_epsilon_rises_with_steps_rate_and_company_and_falls_with_noise(
    noise_multiplier: float, sample_rate: float, steps: int, more: float, others: list[tuple[float, float, int]]
) -> None:
    company = [event(*other) for other in others]

    def found(noise: float, rate: float, count: int) -> float:
        return epsilon([*company, event(noise, rate, count)], DELTA)

    before = found(noise_multiplier, sample_rate, steps)
    slack = 1e-5 * before + 1e-6  # Two grids may differ by as much.
    assert epsilon(company, DELTA) <= before + slack
    assert epsilon([event(noise_multiplier, sample_rate, steps)], DELTA) <= before + slack
    assert before <= found(noise_multiplier, sample_rate, math.ceil(steps * more)) + slack
    assert before <= found(noise_multiplier, min(sample_rate * more, 1.0), steps) + slack
    assert found(noise_multiplier * more, sample_rate, steps) <= before + slack


@pytest.mark.parametrize(
    ("noise_multiplier", "sample_rate", "steps"),
    [(4.0, 0.25, range(1, 40)), (1.0, 0.01, range(1000, 1025)), (0.8, 0.001, range(1, 200, 19))],
)
def test_epsilon_never_falls_from_step_to_step(noise_multiplier: float, sample_rate: float, steps: range) -> None:
    # What a ledger shows must not: the grid's share of it is the same for every number of steps.
    found = [epsilon([event(noise_multiplier, sample_rate, count)], DELTA) for count in steps]
    assert all(before < after for before, after in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("noise_multiplier", "steps"), [(0.6, 1000), (0.6, 100), (0.3, 20), (2.0, 10_000), (0.05, 1), (0.01, 10**6)]
)
def test_epsilon_rises_up_to_full_batches_where_it_is_large(noise_multiplier: float, steps: int) -> None:
    found = [epsilon([event(noise_multiplier, rate, steps)], DELTA) for rate in (0.3, 0.5, 0.7, 0.9, 0.99, 1.0)]
    assert found[-1] > 50
    assert all(low <= high * (1 + 1e-4) for low, high in itertools.pairwise(found))


def test_a_tiny_delta_is_left_to_the_ceiling() -> None:
    case = (2.0, 0.05, 1000)
    assert epsilon([event(*case)], 1e-15) == privacy._ceiling((case,), 1e-15)


def test_rare_steps_are_not_left_to_the_ceiling() -> None:
    # Renyi's divergence of order 2 is in the hundreds; PRV, unlike it, agrees.
    assert privacy._ceiling(((0.2468, 0.0001, 20_000),), DELTA) > 200
    assert epsilon([event(0.2468, 0.0001, 20_000)], DELTA) == pytest.approx(30, abs=0.1)


@settings(max_examples=60, deadline=None)
@given(
    noise_multiplier=st.floats(0.3, 500),
    steps=st.integers(1, 10_000),
    more=st.integers(1, 1000),
    delta=st.sampled_from([1e-3, 1e-5, 1e-9]),
)
def test_full_batch_epsilon_rises_with_every_step_and_stays_below_the_ceiling(
    noise_multiplier: float, steps: int, more: int, delta: float
) -> None:
    before, after = (epsilon([event(noise_multiplier, 1.0, count)], delta) for count in (steps, steps + more))
    assert before <= after
    assert after <= privacy._ceiling(((noise_multiplier, 1.0, steps + more),), delta)


@pytest.mark.parametrize("noise_multiplier", [1.0, 2.0, 30.0])
@pytest.mark.parametrize("sample_rate", [0.001, 0.3, 0.9])
@pytest.mark.parametrize("steps", [1, 100])
def test_sampled_epsilon_lies_between_its_limits(noise_multiplier: float, sample_rate: float, steps: int) -> None:
    found = epsilon([event(noise_multiplier, sample_rate, steps)], DELTA)
    # Sampling never costs more than full batches, and sampling nobody costs nothing.
    assert 0 <= found <= epsilon([event(noise_multiplier, 1.0, steps)], DELTA)
    assert found <= privacy._ceiling(((noise_multiplier, sample_rate, steps),), DELTA) + 1e-4


def test_accountants_that_disagree_fail_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "_ceiling", lambda *_: 1.0)
    with pytest.raises(IntegrityError, match="accountants disagree"):
        epsilon([event(1.234, 1.0, 77)], DELTA)


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("mechanism", ("laplace", 1.0, 0.5, 1)),
        ("sample_rate", ("gaussian_histograms", 1.0, 0.5, 1)),
        ("noise_multiplier", ("poisson_gaussian", -1.0, 0.5, 1)),
        ("noise_multiplier", ("poisson_gaussian", math.nan, 0.5, 1)),
        ("noise_multiplier", ("poisson_gaussian", math.inf, 0.5, 1)),
        ("sample_rate", ("poisson_gaussian", 1.0, 0.0, 1)),
        ("sample_rate", ("poisson_gaussian", 1.0, 1.1, 1)),
        ("sample_rate", ("poisson_gaussian", 1.0, math.nan, 1)),
        ("steps", ("poisson_gaussian", 1.0, 0.5, 0)),
        ("steps", ("poisson_gaussian", 1.0, 0.5, True)),
        ("steps", ("poisson_gaussian", 1.0, 0.5, 1.5)),
        ("segment", ("poisson_gaussian", 1.0, 0.5, 1, None)),
    ],
)
def test_an_event_that_cannot_be_names_its_argument(argument: str, values: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must"):
        PrivacyEvent(*values)  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_must_be_a_probability(delta: float) -> None:
    for call in (lambda: epsilon([], delta), lambda: within([], delta, 1.0), lambda: estimate([], delta, about=1.0)):
        with pytest.raises(ValueError, match="delta"):
            call()


def test_accounting_says_nothing_and_full_batches_import_no_accountant() -> None:
    script = (
        "import sys; from metarisk_common.privacy import PrivacyEvent as E, epsilon\n"
        "epsilon([E('poisson_gaussian', 5.0, 1.0, 10)], 1e-5); assert 'dp_accounting' not in sys.modules\n"
        "epsilon([E('poisson_gaussian', 0.7, 0.1, 50)], 1e-5); assert 'dp_accounting' in sys.modules\n"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
