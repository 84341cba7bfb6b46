"""What planted canaries tell of a privacy claim: error rates against the claimed trade-off, and three calibrations.

All figures come from scores alone. The score of a canary is the released update along its own gradient, in clip
norms, so that under the claim a canary that is out scores N(0, T s^2) over T steps, and one that is in has
Binomial(T, q) times its strength added to that. A test that tells the two apart errs at least as often as the
claimed trade-off function f allows (Dong, Roth and Su 2019, section 2); whoever errs less has refuted the claim.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import beta, chi2, norm

from metarisk_common.privacy import PrivacyEvent, epsilon

Floats = NDArray[np.float64]
Verdict = Literal["PASS", "FALSIFIED", "INCONCLUSIVE"]

CONFIDENCE = 0.95
"""Of the upper bound of each of the two error rates, from which the bound on epsilon follows."""

CHANCE = 1e-6
"""Only what a correct engine shows less often than this refutes a claim; of its audits, each must come out right."""

LEAST_SHIFT = 0.9
"""Canaries that move a release by less than this share of what the plan says are no test of anything."""

_INTERVAL = 4e-3  # of the loss distribution's grid; rounding is upwards, so f is never overstated
_POINTS = 64
_WIDEST = 1e-3  # of the interval, relative, that the search for a noise multiplier ends with
_STRIDE = 0.4  # of the search's first steps, in the logarithm
_FAR = 3.0  # standard errors


@dataclass(frozen=True)
class Claim:
    """What the ledger will say of the run: `steps` steps of a Poisson-sampled Gaussian, and the epsilon they cost."""

    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int


@dataclass(frozen=True)
class Scores:
    """What every canary scored in every release.

    Attributes:
        values: (banks, rounds, marks) float64; in clip norms, one release each.
        copies: (banks, marks) int: records that bear the mark: 0 is out, 1 is in, more is a probe, which is always in.
        strength: (marks,) the share of a canary's clipped gradient that its score sees, at most 1.
        orientation: (marks,) +1 or -1, the direction of the canary's gradient in the released columns.

    """

    values: Floats
    copies: NDArray[np.int64]
    strength: Floats
    orientation: Floats

    @cached_property
    def totals(self) -> Floats:
        """(banks, marks): summed over rounds."""
        totals: Floats = self.values.sum(axis=1)
        return totals

    def of(self, copies: int) -> Floats:
        """Totals of the marks with so many copies, in one row."""
        chosen: Floats = self.totals[self.copies == copies]
        return chosen


@dataclass(frozen=True)
class Measured:
    """An estimate beside what the claim expects, and how likely a correct engine is to be as far off by chance."""

    value: float
    expected: float
    error: float
    chance: float


@dataclass(frozen=True)
class Figures:
    """What was measured.

    Attributes:
        planted: canaries that were in; and `left_out` those that were not.
        threshold: the score above which the attacker says "in"; fixed before any score is seen.
        false_alarms: share of canaries that are out and were called in; `_upper` the end of its interval.
        misses: share of canaries that are in and were called out.
        misses_allowed: the least share of misses that the claim leaves at so many false alarms.
        bound: the least epsilon that the two upper ends are compatible with.
        noise: standard deviation of a release's noise, as a share of the plan's.
        shift: how far one record moves a release, as a share of what the plan says; from canaries and probes together.
        between_rounds: mean correlation of the noise of two releases; None for a single release.
        between_columns: the same of two columns in one release.

    """

    planted: int
    left_out: int
    threshold: float
    false_alarms: float
    false_alarms_upper: float
    misses: float
    misses_upper: float
    misses_allowed: float
    bound: float
    noise: Measured
    shift: Measured
    shift_canaries: Measured
    shift_probes: Measured | None
    between_rounds: Measured | None
    between_columns: Measured


@dataclass(frozen=True)
class Findings:
    """The verdict, the reasons that decided it, the claim and the figures."""

    verdict: Verdict
    reasons: tuple[str, ...]
    claim: Claim
    figures: Figures


def judge(scores: Scores, claim: Claim) -> Findings:
    """Hold scores against the claim.

    Raises:
        ValueError: no canary is in, or none is out.

    """
    inside, outside = scores.of(1), scores.of(0)
    if not (len(inside) and len(outside)):
        raise ValueError("an audit needs canaries on both sides of the coin")
    threshold = claim.steps * claim.sample_rate * float(scores.strength.mean()) / 2
    alarms, missed = int((outside > threshold).sum()), int((inside <= threshold).sum())

    def rates(confidence: float) -> tuple[float, float]:
        return upper_bound(alarms, len(outside), confidence), upper_bound(missed, len(inside), confidence)

    a, b = rates(CONFIDENCE)
    shift_canaries, shift_probes = _shifts(scores, claim)
    figures = Figures(
        planted=len(inside),
        left_out=len(outside),
        threshold=threshold,
        false_alarms=alarms / len(outside),
        false_alarms_upper=a,
        misses=missed / len(inside),
        misses_upper=b,
        misses_allowed=least_misses(a, claim.noise_multiplier, claim, smallest=b),
        bound=epsilon_bound(a, b, claim),
        noise=_noise(scores, claim),
        shift=_pooled(shift_canaries, shift_probes),
        shift_canaries=shift_canaries,
        shift_probes=shift_probes,
        between_rounds=_between_rounds(scores),
        between_columns=_between_columns(scores),
    )
    a, b = rates(1 - CHANCE / 2)
    told_apart = b < least_misses(a, claim.noise_multiplier, claim, smallest=b)
    if refuting := _refuting(figures, told_apart=told_apart):
        return Findings("FALSIFIED", refuting, claim, figures)
    if doubts := _doubts(figures, claim):
        return Findings("INCONCLUSIVE", doubts, claim, figures)
    return Findings("PASS", ("nothing that was released contradicts the claim",), claim, figures)


def upper_bound(count: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """Give the upper end of a rate's one-sided interval (Clopper and Pearson 1934)."""
    return 1.0 if count >= trials else float(beta.ppf(confidence, count + 1, trials - count))


def least_misses(false_alarms: float, noise_multiplier: float, claim: Claim, *, smallest: float) -> float:
    """Give f: the least rate of misses that the claim's steps, with this noise, leave a test with these false alarms.

    f(a) = max over e of max(0, 1 - d(e) - exp(e) a, exp(-e) (1 - d(e) - a)), with d(e) the larger delta of the two
    directions (a record added, a record zeroed out), which makes f hold whichever of the two is called the null
    hypothesis. Every e gives a valid bound; those looked at suffice to tell f from anything at `smallest` or above.
    """
    return max(0.0, _trade_off(false_alarms, noise_multiplier, claim, smallest))


def epsilon_bound(false_alarms: float, misses: float, claim: Claim) -> float:
    """Give the least epsilon that error rates as low as these are compatible with, at the claim's delta.

    That of the largest noise multiplier under which the claim's steps allow them; 0 where any noise does.
    """

    def excess(log_noise: float) -> float:
        return _trade_off(false_alarms, math.exp(log_noise), claim, misses) - misses

    if false_alarms + misses >= 1:
        return 0.0
    low = high = math.log(claim.noise_multiplier)
    while excess(high) <= 0:
        low, high = high, high + _STRIDE
    while low == high or excess(low) > 0:
        low, high = low - _STRIDE, low
    noise_multiplier = math.exp(float(brentq(excess, low, high, xtol=_WIDEST / 2)) + _WIDEST / 2)
    event = PrivacyEvent("poisson_gaussian", noise_multiplier, claim.sample_rate, claim.steps)
    return epsilon([event], claim.delta)


def _trade_off(false_alarms: float, noise_multiplier: float, claim: Claim, smallest: float) -> float:
    e = np.linspace(0.0, math.log(1 / min(false_alarms, smallest, 0.5)), _POINTS)
    d = np.asarray(_loss(noise_multiplier, claim).get_delta_for_epsilon(e))
    either = np.maximum(1 - d - np.exp(e) * false_alarms, np.exp(-e) * (1 - d - false_alarms))
    return float(either.max())


def _loss(noise_multiplier: float, claim: Claim) -> Any:  # noqa: ANN401 - dp-accounting has no types
    from dp_accounting import NeighboringRelation  # noqa: PLC0415 - imported late: it takes a second
    from dp_accounting.pld import privacy_loss_distribution  # noqa: PLC0415

    step = privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        sampling_prob=claim.sample_rate,
        # The less noise, the wider the distribution: this keeps its points as few.
        value_discretization_interval=_INTERVAL / min(noise_multiplier, 1.0) ** 2,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )
    return step.self_compose(claim.steps)


def _noise(scores: Scores, claim: Claim) -> Measured:
    """Standard deviation of one release's noise over the claimed one, from the canaries that are out."""
    rounds = scores.values.shape[1]
    expected = math.sqrt(claim.steps / rounds) * claim.noise_multiplier
    values = scores.values.transpose(1, 0, 2)[:, scores.copies == 0] / expected
    squares = float(np.square(values).sum())
    ratio = math.sqrt(squares / values.size)
    # Only less noise than the claim's would refute it.
    return Measured(ratio, 1.0, 1 / math.sqrt(2 * values.size), float(chi2.cdf(squares, values.size)))


def _shifts(scores: Scores, claim: Claim) -> tuple[Measured, Measured | None]:
    """Mean score of what is in less that of what is out, over the plan's; of canaries and of probes."""
    outside = scores.of(0)
    level, noise = float(outside.mean()), claim.steps * claim.noise_multiplier**2
    found = []
    for copies in sorted(set(scores.copies.ravel().tolist()) - {0}):
        values = scores.of(copies)
        marks = np.broadcast_to(scores.strength, scores.copies.shape)[scores.copies == copies]
        unit = claim.steps * claim.sample_rate * copies * float(marks.mean())
        spread = claim.steps * claim.sample_rate * (1 - claim.sample_rate) * copies * float(np.square(marks).mean())
        error = math.sqrt((spread + noise) / len(values) + noise / len(outside)) / unit
        shift = (float(values.mean()) - level) / unit
        found.append(Measured(shift, 1.0, error, float(norm.sf((shift - 1) / error))))
    return found[0], (found[1] if len(found) > 1 else None)


def _pooled(canaries: Measured, probes: Measured | None) -> Measured:
    """Give the mean of both shifts, each weighted by its precision."""
    if probes is None:
        return canaries
    weights = np.array([canaries.error**-2, probes.error**-2])
    value = float(weights @ [canaries.value, probes.value] / weights.sum())
    error = float(weights.sum() ** -0.5)
    return Measured(value, 1.0, error, float(norm.sf((value - 1) / error)))


def _between_rounds(scores: Scores) -> Measured | None:
    """Mean correlation of the noise of any two releases, over canaries that are out in both; None for one release."""
    banks, rounds, marks = scores.values.shape
    if banks * rounds == 1:
        return None
    out = np.repeat(scores.copies == 0, rounds, axis=0)
    values = np.where(out, scores.values.reshape(banks * rounds, marks), 0.0)
    upper = np.triu_indices(banks * rounds, 1)
    products = (values @ values.T)[upper].sum()
    pairs = (out.astype(float) @ out.T.astype(float))[upper].sum()
    correlation = float(products / pairs / (np.square(values).sum() / out.sum()))
    error = float(pairs**-0.5)
    return Measured(correlation, 0.0, error, _two_sided(correlation / error))


def _between_columns(scores: Scores) -> Measured:
    """Mean correlation of any two columns' noise within a release: what noise drawn once for many columns shows."""
    out = scores.copies == 0
    total, pairs, statistic = 0.0, 0.0, 0.0
    for bank, which in enumerate(out):
        values = (scores.values[bank] * scores.orientation)[:, which]
        values = values / math.sqrt(float(np.square(values).mean()))
        sums, count = np.square(values.sum(axis=1)), int(which.sum())
        total += float(sums.sum() - np.square(values).sum())
        pairs += len(sums) * count * (count - 1.0)
        statistic += float(sums.sum()) / count
    releases = scores.values.shape[0] * scores.values.shape[1]
    error = math.sqrt(2 * releases) / pairs * float(out.sum(axis=1).mean())
    return Measured(total / pairs, 0.0, error, float(chi2.sf(statistic, releases)))


def _two_sided(z: float) -> float:
    return float(2 * norm.sf(abs(z)))


def _refuting(figures: Figures, *, told_apart: bool) -> tuple[str, ...]:
    """Name everything that refutes the claim beyond chance."""
    found = []
    if told_apart:
        found.append(
            f"canaries were told apart better than the claim allows: with at most {figures.false_alarms_upper:.1%} "
            f"false alarms at most {figures.misses_upper:.1%} were missed, where at least "
            f"{figures.misses_allowed:.1%} should have been"
        )
    if figures.noise.chance < CHANCE:
        found.append(f"the noise has {figures.noise.value:.2f} times the standard deviation that the plan says")
    shifts = (figures.shift, figures.shift_canaries, figures.shift_probes)
    far = [shift.value for shift in shifts if shift is not None and shift.chance < CHANCE]
    if far:
        found.append(f"a record moves a release {max(far):.2f} times as far as the plan allows")
    if figures.between_rounds is not None and figures.between_rounds.chance < CHANCE:
        found.append(f"the noise of different releases is correlated ({figures.between_rounds.value:.2f})")
    if figures.between_columns.chance < CHANCE:
        found.append(f"the noise within a release is correlated ({figures.between_columns.value:.2f})")
    return tuple(found)


def _doubts(figures: Figures, claim: Claim) -> tuple[str, ...]:
    """Name everything that keeps a run which refutes nothing from being a test."""
    found = []
    canaries = figures.shift_canaries
    if min(figures.shift.value, canaries.value + _FAR * canaries.error) < LEAST_SHIFT:
        shift = min(figures.shift.value, canaries.value)
        found.append(
            f"the records planted moved the releases by only {shift:.2f} of what the plan says, and with less than "
            f"{LEAST_SHIFT} the attack is not the one that was meant"
        )
    if figures.misses_upper < figures.misses_allowed:
        found.append(
            f"the bound of {figures.bound:.2f} is above the claim of {claim.epsilon:g}, but not beyond chance: "
            "repeat the audit with --thorough"
        )
    return tuple(found)
