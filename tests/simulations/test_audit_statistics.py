"""What the audit concludes from scores, on scores whose truth is known."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, norm

from metarisk_common.privacy import PrivacyEvent, epsilon
from simulations.audit_statistics import (
    CONFIDENCE,
    Claim,
    Scores,
    epsilon_bound,
    judge,
    least_misses,
    upper_bound,
)

NOISE = 1.5576
CLAIM = Claim(epsilon=4.0, delta=1e-5, noise_multiplier=NOISE, sample_rate=0.25, steps=20)
ROUNDS, LOCAL = 5, 4


def simulated(
    seed: int = 0,
    *,
    marks: int = 4000,
    banks: int = 1,
    noise: float = NOISE,
    moved: float = 1.0,
    rate: float = 0.25,
    probes: int = 50,
    same: bool = False,
) -> Scores:
    """Scores of a mechanism: canaries of strength 0.9 that move a release by `moved` clip norms at `rate`."""
    random = np.random.default_rng(seed)
    copies = np.where(np.arange(marks + probes) < marks, random.random((banks, marks + probes)) < 0.5, 40)
    shape = (banks, ROUNDS, marks + probes)
    drawn = random.binomial(LOCAL * copies[:, None, :], rate, shape)
    fresh = random.normal(0, math.sqrt(LOCAL) * noise, shape)
    values = 0.9 * moved * drawn + (fresh[:, :1] if same else fresh)
    orientation = np.where(np.arange(marks + probes) % 2, 1.0, -1.0)
    return Scores(values, copies.astype(np.int64), np.full(marks + probes, 0.9), orientation)


def test_an_upper_bound_is_exact() -> None:
    assert upper_bound(0, 100) == pytest.approx(1 - (1 - CONFIDENCE) ** (1 / 100))
    assert binom.cdf(17, 60, upper_bound(17, 60)) == pytest.approx(1 - CONFIDENCE)
    assert upper_bound(60, 60) == 1.0
    assert upper_bound(17, 60, 0.999) > upper_bound(17, 60)


@pytest.mark.parametrize("noise", [2.0, 8.0])
@pytest.mark.parametrize("a", [0.003, 0.1, 0.45])
def test_the_trade_off_of_full_batches_is_the_gaussian_one(a: float, noise: float) -> None:
    claim = replace(CLAIM, sample_rate=1.0, steps=4)
    exact = float(norm.cdf(norm.isf(a) - 2 / noise))
    found = least_misses(a, noise, claim, smallest=0.01)
    assert exact - 0.01 < found <= exact + 1e-9


def test_the_trade_off_is_a_bound_on_the_best_attack_on_sampled_steps() -> None:
    # One canary's score is a test of its own: it may err no less than f says.
    times = np.arange(21)
    weights = binom.pmf(times, 20, 0.25)
    for threshold in (-5.0, 0.0, 2.5, 8.0, 15.0):
        spread = math.sqrt(20) * NOISE
        a, b = float(norm.sf(threshold, 0, spread)), float(norm.cdf(threshold, times, spread) @ weights)
        assert b >= least_misses(a, NOISE, CLAIM, smallest=b) > 0


def test_less_noise_allows_fewer_errors() -> None:
    found = [least_misses(0.3, noise, CLAIM, smallest=0.01) for noise in (0.5, 1.0, NOISE, 4.0, 20.0)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("noise", [0.7, NOISE, 5.0])
def test_the_bound_is_the_epsilon_of_the_noise_that_the_errors_come_from(noise: float) -> None:
    a = 0.2
    b = least_misses(a, noise, CLAIM, smallest=0.01)
    truth = epsilon([PrivacyEvent("poisson_gaussian", noise, 0.25, 20)], 1e-5)
    assert epsilon_bound(a, b, CLAIM) == pytest.approx(truth, rel=0.01)


def test_guessing_bounds_nothing() -> None:
    assert epsilon_bound(0.4, 0.6, CLAIM) == 0.0
    assert epsilon_bound(1.0, 0.01, CLAIM) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_a_sound_mechanism_passes(seed: int) -> None:
    findings = judge(simulated(seed), CLAIM)
    assert findings.verdict == "PASS"
    assert findings.figures.misses_upper >= findings.figures.misses_allowed
    assert 1.5 < findings.figures.bound < 4.0
    assert findings.figures.planted + findings.figures.left_out == 4000
    assert findings.figures.threshold == pytest.approx(20 * 0.25 * 0.9 / 2)


def test_several_banks_are_one_audit() -> None:
    findings = judge(simulated(banks=3, marks=1000), CLAIM)
    assert findings.verdict == "PASS"
    assert findings.figures.planted + findings.figures.left_out == 3000


@pytest.mark.parametrize(
    ("flaw", "said"),
    [
        ({"noise": NOISE / 2}, "the noise has 0.50 times"),
        ({"moved": 2.0}, "a record moves a release "),
        ({"rate": 1.0}, "a record moves a release "),
        ({"same": True}, "the noise of different releases is correlated (1.0"),
    ],
)
def test_a_flaw_is_named(flaw: dict[str, Any], said: str) -> None:
    findings = judge(simulated(**flaw), CLAIM)
    assert findings.verdict == "FALSIFIED"
    assert any(reason.startswith(said) for reason in findings.reasons), findings.reasons


def test_noise_shared_by_columns_is_named() -> None:
    scores = simulated(marks=400)
    shared = np.random.default_rng(3).normal(0, 2 * NOISE, (1, ROUNDS, 1)) * scores.orientation
    findings = judge(replace(scores, values=0.8 * scores.values + 0.6 * shared), CLAIM)
    assert findings.verdict == "FALSIFIED"
    assert any("within a release" in reason for reason in findings.reasons)


def test_noise_shared_by_banks_is_named() -> None:
    one = simulated(marks=1000)
    both = Scores(np.repeat(one.values, 2, axis=0), np.repeat(one.copies, 2, axis=0), one.strength, one.orientation)
    findings = judge(both, CLAIM)
    assert findings.verdict == "FALSIFIED"
    # Each of the ten releases is like one of the nine others.
    assert findings.figures.between_rounds is not None
    assert findings.figures.between_rounds.value == pytest.approx(1 / 9, abs=0.03)


def test_more_noise_than_claimed_refutes_nothing() -> None:
    findings = judge(simulated(noise=2 * NOISE), CLAIM)
    assert findings.verdict == "PASS"
    assert findings.figures.noise.value == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("flaw", [{"moved": 0.5}, {"moved": 0.0}])
def test_canaries_that_do_not_sing_are_no_test(flaw: dict[str, Any]) -> None:
    findings = judge(simulated(**flaw), CLAIM)
    assert findings.verdict == "INCONCLUSIVE"
    assert "less than 0.9" in findings.reasons[0]


def test_probes_do_not_speak_for_canaries() -> None:
    scores, weak = simulated(), simulated(moved=0.5)
    values = np.where(scores.copies[:, None, :] == 40, scores.values, weak.values)
    findings = judge(replace(scores, values=values), CLAIM)
    assert findings.figures.shift.value > 0.9
    assert findings.verdict == "INCONCLUSIVE"


def test_a_bound_above_the_claim_by_chance_refutes_nothing_and_passes_nothing() -> None:
    """Scores of the right mean and spread, by which a small sample errs a little too seldom."""
    claim = replace(CLAIM, epsilon=1.0, noise_multiplier=4.4918)
    spread, moved = math.sqrt(20) * 4.4918, 20 * 0.25
    low, high = spread * math.sqrt(3 / 7), spread * math.sqrt(7 / 3)
    outside = np.resize([-low] * 7 + [high] * 3, 200)
    values = np.concatenate([outside, moved - outside])[None, None]
    signs = np.resize([1.0] * 10 + [-1.0] * 10, 400)
    copies = np.repeat([0, 1], 200)[None]
    findings = judge(Scores(values, copies, np.ones(400), signs), claim)
    assert findings.figures.bound > 1.0
    assert findings.verdict == "INCONCLUSIVE"
    assert "--thorough" in findings.reasons[0]
    many = Scores(np.tile(values, 50), np.tile(copies, 50), np.ones(20_000), np.tile(signs, 50))
    assert judge(many, claim).verdict == "FALSIFIED"


def test_a_single_release_has_no_correlation_with_another() -> None:
    scores = simulated(marks=500)
    one = replace(scores, values=scores.values[:, :1])
    assert judge(one, replace(CLAIM, steps=LOCAL)).figures.between_rounds is None


def test_one_side_of_the_coin_is_no_audit() -> None:
    scores = simulated(marks=100)
    with pytest.raises(ValueError, match="both sides"):
        judge(replace(scores, copies=np.zeros_like(scores.copies)), CLAIM)
