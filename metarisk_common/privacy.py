"""Privacy events, and the one number that follows from them: epsilon at a fixed delta.

Events are recorded, never epsilons: epsilons of rounds do not add. Adjacency is zero-out (Kairouz et al. 2021,
DP-FTRL): neighbours agree in all records but one, which in one of them contributes nothing; the declared size of a
data set is therefore public. Of record is the privacy loss distribution (PLD) of Google's dp-accounting. Renyi
accounting, looser and independent of it, is the ceiling: an epsilon above it is an error and is never reported.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, log_ndtr, logsumexp

from .errors import IntegrityError

Groups = tuple[tuple[float, float, int], ...]
"""(noise multiplier, sample rate, steps), each pair of the first two once, sorted: what epsilon depends on."""

_ORDERS = np.array([*range(2, 65), 80, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096], dtype=np.float64)
_PLD_LIMIT = 200.0  # Above it the ceiling is reported: a loss distribution that wide would fill the memory.
_CEILING_RELATIVE, _CEILING_ABSOLUTE = 1e-3, 1e-4  # What the grid of the PLD may add to an exact epsilon.
_TIGHT = 0.999


@dataclass(frozen=True, order=True)
class PrivacyEvent:
    """`steps` releases of a clipped sum over Poisson-sampled records, each with its own Gaussian noise.

    `noise_multiplier` is the standard deviation of the noise over the clip norm, `sample_rate` the probability of a
    record to be in a step. `segment` names the disjoint part of the records that was read; empty: all of them.
    """

    mechanism: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    segment: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot have happened; the ValueError names the argument."""
        if self.mechanism != "poisson_gaussian":
            raise ValueError("mechanism must be 'poisson_gaussian'")
        if not (_is_number(self.noise_multiplier) and 0 <= self.noise_multiplier < math.inf):
            raise ValueError("noise_multiplier must be a finite number of at least 0")
        _check_schedule(self.sample_rate, self.steps)
        if not isinstance(self.segment, str):
            raise ValueError("segment must be text")  # noqa: TRY004 - one class of error for every bad argument


def epsilon(events: Iterable[PrivacyEvent], delta: float) -> float:
    """Give the epsilon of everything in `events` together, at this delta, under zero-out adjacency.

    Events on different segments compose in parallel: the result is the largest over the segments, each together
    with the events on all records. That holds only where a record's segment is a public rule on that record alone.
    The events' parameters must not depend on what was released; which of them take place, and when they stop, may.

    Returns infinity if any event has no noise, 0 without events.

    Raises:
        ValueError: delta is not strictly between 0 and 1.
        IntegrityError: the accountants contradict each other; nothing should be released.

    """
    _check_delta(delta)
    return max((_epsilon(groups, delta) for groups in _by_segment(events)), default=0.0)


def within(events: Iterable[PrivacyEvent], delta: float, limit: float) -> bool:
    """Tell whether `epsilon(events, delta) <= limit`, without the slow accountant where the ceiling already says so.

    Raises:
        ValueError: delta is not strictly between 0 and 1.
        IntegrityError: the accountants contradict each other.

    """
    _check_delta(delta)
    return all(_ceiling(groups, delta) <= limit or _epsilon(groups, delta) <= limit for groups in _by_segment(events))


def noise_multiplier_for(epsilon: float, delta: float, *, sample_rate: float, steps: int) -> float:
    """Give the least noise multiplier, to five digits and rounded up, whose `steps` steps stay within epsilon.

    What it spends lies between 0.999 and 1 times the target.

    Raises:
        ValueError: naming the argument that is out of its range.

    """
    if not (_is_number(epsilon) and 0 < epsilon < math.inf):
        raise ValueError("epsilon must be a finite number above 0")
    _check_delta(delta)
    _check_schedule(sample_rate, steps)
    return _calibrate(float(epsilon), float(delta), float(sample_rate), steps)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_delta(delta: float) -> None:
    if not (_is_number(delta) and 0 < delta < 1):
        raise ValueError("delta must lie strictly between 0 and 1")


def _check_schedule(sample_rate: float, steps: int) -> None:
    if not (_is_number(sample_rate) and 0 < sample_rate <= 1):
        raise ValueError("sample_rate must be above 0 and at most 1")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError("steps must be a whole number of at least 1")


def _by_segment(events: Iterable[PrivacyEvent]) -> set[Groups]:
    """Merge the events that each segment's records have seen; the events on all records are in every part."""
    merged: dict[str, dict[tuple[float, float], int]] = {}
    for event in events:
        steps = merged.setdefault(event.segment, {})
        key = (float(event.noise_multiplier), float(event.sample_rate))
        steps[key] = steps.get(key, 0) + event.steps
    everywhere = merged.pop("", {})
    parts = [everywhere] if everywhere else []
    parts += [
        {key: steps.get(key, 0) + everywhere.get(key, 0) for key in steps | everywhere} for steps in merged.values()
    ]
    return {tuple((*key, count) for key, count in sorted(part.items())) for part in parts}


@lru_cache(maxsize=4096)
def _epsilon(groups: Groups, delta: float) -> float:
    if any(noise_multiplier == 0 for noise_multiplier, _, _ in groups):
        return math.inf
    ceiling = _ceiling(groups, delta)
    if all(sample_rate == 1 for _, sample_rate, _ in groups):
        found = _gaussian_epsilon(_gaussian_mu(groups), delta)
    elif 0 < ceiling <= _PLD_LIMIT:
        found = _pld_epsilon(groups, delta, ceiling)
    else:
        return ceiling
    if not found <= ceiling * (1 + _CEILING_RELATIVE) + _CEILING_ABSOLUTE:
        raise IntegrityError(
            f"the accountants disagree: PLD finds epsilon {found:.6g} at delta {delta:g}, above the Renyi ceiling of "
            f"{ceiling:.6g}; nothing may be released, check the installed dp-accounting and scipy"
        )
    return found


# Full-batch steps: T Gaussian steps of multiplier s are one of s / sqrt(T), and its epsilon has a closed form.


def _gaussian_mu(groups: Groups) -> float:
    """Give mu = 1 / s of the one Gaussian step that equals all the full-batch steps (Dong et al. 2019, Cor. 2)."""
    return math.sqrt(math.fsum(steps / s / s for s, sample_rate, steps in groups if sample_rate == 1))


def _gaussian_delta(epsilon: float, mu: float) -> float:
    """Give delta(epsilon) of a Gaussian step (Balle and Wang 2018, Theorem 8), stable in the tails."""
    log_a = float(log_ndtr(mu / 2 - epsilon / mu))
    log_b = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return -math.exp(log_a) * math.expm1(min(log_b - log_a, 0.0))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Give the least epsilon of a Gaussian step by bisection, from above."""
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))
    if _gaussian_delta(low, mu) <= delta or not math.isfinite(high):
        return low if math.isfinite(high) else math.inf
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if _gaussian_delta(middle, mu) <= delta else (middle, high)
    return high


# Renyi differential privacy: the ceiling.


@lru_cache(maxsize=256)
def _renyi(noise_multiplier: float, sample_rate: float) -> NDArray[np.float64]:
    """Give one step's Renyi divergence at each of `_ORDERS` (Mironov et al. 2019, section 3.3, whole orders)."""
    if sample_rate == 1:
        return _ORDERS / 2 / noise_multiplier / noise_multiplier
    divergences = []
    for order in _ORDERS:
        i = np.arange(order + 1)
        log_binomial = gammaln(order + 1) - gammaln(i + 1) - gammaln(order - i + 1)
        log_mixture = i * math.log(sample_rate) + (order - i) * math.log1p(-sample_rate)
        log_moment = (i * i - i) / 2 / noise_multiplier / noise_multiplier
        divergences.append(float(logsumexp(log_binomial + log_mixture + log_moment)) / (order - 1))
    return np.maximum(divergences, 0.0)


@lru_cache(maxsize=4096)
def _ceiling(groups: Groups, delta: float) -> float:
    """Give epsilon from Renyi divergences (Balle et al. 2020, Theorem 21): never below the true one."""
    if any(noise_multiplier == 0 for noise_multiplier, _, _ in groups):
        return math.inf
    with np.errstate(over="ignore"):
        total = sum(steps * _renyi(s, sample_rate) for s, sample_rate, steps in groups)
        bounds = total + np.log1p(-1 / _ORDERS) - np.log(delta * _ORDERS) / (_ORDERS - 1)
    return max(0.0, float(np.min(bounds)))


# The privacy loss distribution: of record wherever records are sampled.


def _pld_epsilon(groups: Groups, delta: float, ceiling: float, coarseness: float = 1.0) -> float:
    """Give epsilon from the composed privacy loss distribution, rounded pessimistically to a grid.

    The grid adds about steps times the interval squared, held here below 1e-4 of epsilon. Powers of two, so that
    the single step's distribution is found in the cache when steps are added.
    """
    steps = sum(steps for _, sample_rate, steps in groups if sample_rate < 1)
    wanted = coarseness * math.sqrt(1e-4 * ceiling / steps)
    interval = 2.0 ** math.floor(math.log2(min(max(wanted, 1e-6), 1e-2)))
    parts = [_pld(s, rate, interval).self_compose(count) for s, rate, count in groups if rate < 1]
    mu = _gaussian_mu(groups)
    if mu > 0:
        parts.append(_pld(1 / mu, 1.0, interval))
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    return float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=16)
def _pld(noise_multiplier: float, sample_rate: float, interval: float) -> Any:  # noqa: ANN401 - dp-accounting has no types
    # Imported late: a second, and 70 MB, that full-batch runs do without.
    from dp_accounting import NeighboringRelation  # noqa: PLC0415
    from dp_accounting.pld import privacy_loss_distribution  # noqa: PLC0415

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        sampling_prob=sample_rate,
        value_discretization_interval=interval,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )


# Calibration.


@lru_cache(maxsize=256)
def _calibrate(target: float, delta: float, sample_rate: float, steps: int) -> float:
    # The coarse grid's answer is close but not exact: a few secant steps on the accountant of record end it.
    sigma, slope = _least(target, delta, sample_rate, steps), 1.2
    safe, last = math.inf, (math.nan, math.nan)
    for digits in (5, 5, 5, 5, 6, 7, 8):
        rounded = _round_up(sigma, digits)
        spent = _epsilon(((rounded, sample_rate, steps),), delta)
        if spent <= target:
            safe = min(safe, rounded)
        if _TIGHT * target <= spent <= target or spent == 0:
            break
        if rounded != last[0]:
            measured = math.log(last[1] / spent) / math.log(rounded / last[0])
            slope = measured if measured > 1 else slope
        last = (rounded, spent)
        sigma = rounded * (spent / (0.9996 * target)) ** (1 / slope)
    while not math.isfinite(safe):
        sigma *= 1.001
        safe = sigma if _epsilon(((sigma, sample_rate, steps),), delta) <= target else safe
    return safe


def _least(target: float, delta: float, sample_rate: float, steps: int) -> float:
    """Solve for the noise multiplier: exactly for full-batch steps, on a coarse grid (an upper bound) otherwise."""
    from scipy.optimize import brentq  # noqa: PLC0415 - imported late: a tenth of a second

    # Few steps leave the limit theorem behind, so the guess is only where the bracket starts.
    top = math.sqrt(2 * target) + 1
    mu = float(brentq(lambda m: _gaussian_delta(target, m) - delta, 1e-12, top, xtol=1e-14, rtol=1e-12))
    if sample_rate == 1:
        return math.sqrt(steps) / mu

    def excess(log_sigma: float) -> float:
        groups = ((math.exp(log_sigma), sample_rate, steps),)
        ceiling = _ceiling(groups, delta)
        if not 0 < ceiling <= _PLD_LIMIT:
            return ceiling - target
        return _pld_epsilon(groups, delta, ceiling, coarseness=4.0) - target

    low = high = -0.5 * math.log(math.log1p((mu / sample_rate) ** 2 / steps))
    while excess(high) > 0:
        low, high = high, high + 0.1
    while low == high or excess(low) <= 0:
        low, high = low - 0.1, min(high, low + 0.1)
    return math.exp(float(brentq(excess, low, high, xtol=1e-5)))


def _round_up(value: float, digits: int) -> float:
    places = digits - 1 - math.floor(math.log10(value))
    return float(Decimal(value).quantize(Decimal(1).scaleb(-places), rounding=ROUND_CEILING))
