"""Privacy events, and the one number that follows from them: epsilon at a fixed delta.

Claimed: for every data source, everything released under `events` is together (epsilon, delta)-differentially private
with zero-out adjacency (Kairouz et al. 2021, DP-FTRL): neighbours agree in all records but one, which in one of them
contributes nothing; the declared size of a data set is therefore public. Events are recorded, never epsilons: epsilons
of rounds do not add.

Of record is the privacy loss distribution (PLD): the hockey-stick divergence of one step in closed form (Balle et al.
2018, Theorem 2, of the Gaussian of Balle and Wang 2018), put on a grid pessimistically ("connect the dots", Doroshenko
et al. 2022, Algorithm 1), composed and read off by Google's dp-accounting. Full-batch steps alone need no grid. Renyi
accounting (Mironov et al. 2019), looser and independent of it, is the ceiling: an epsilon above it is an error and is
never reported. Every rounding is upwards: what is reported is never below the truth, and above it by 0.005%; by up to
0.1% where records are drawn more rarely than one in ten thousand.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, log_ndtr, logsumexp, ndtri

from .errors import IntegrityError

Groups = tuple[tuple[float, float, int], ...]
"""(noise multiplier, sample rate, steps), each pair of the first two once, sorted: what epsilon depends on."""

MECHANISMS = ("poisson_gaussian", "gaussian_histograms")
"""Names that an event may bear; both are Gaussian releases, so that only noise, rate and count enter epsilon."""

_ORDERS = np.array([*range(2, 65), 80, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096], dtype=np.float64)
_CEILING_RELATIVE, _CEILING_ABSOLUTE = 1e-3, 1e-4  # What the grid of the PLD may add to an exact epsilon.
# Beyond these Renyi's ceiling is reported: exp(-loss) leaves the range of a float, the distribution fills the memory,
# the Fourier transform's rounding is seen.
_MOST_EPSILON, _MOST_WORK, _LEAST_DELTA = 500.0, 1e10, 1e-12
_GRID, _MOST_POINTS, _MOST_STEPS, _LEAST_INTERVAL = 4e-4, 50_000, 10**7, 1e-7
_CUT = 1e-6  # Share of delta that the cut tails of the loss distributions may cost.
_COARSE = 4.0


@dataclass(frozen=True, order=True)
class PrivacyEvent:
    """`steps` releases of a bounded sum over records, each with its own Gaussian noise.

    `poisson_gaussian`: a sum of clipped vectors over the records that a Poisson sample drew; `sample_rate` is the
    probability of a record to be in a step. `gaussian_histograms`: a bank's score histograms, over all its records, so
    that `sample_rate` is 1. `noise_multiplier` is the standard deviation of the noise over the most that one record
    can move the sum (L2 norm). `segment` names the disjoint part of the records that was read; empty: all of them.
    """

    mechanism: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    segment: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot have happened; the ValueError names the argument."""
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism must be one of {', '.join(map(repr, MECHANISMS))}")
        if not (_is_number(self.noise_multiplier) and 0 <= self.noise_multiplier < math.inf):
            raise ValueError("noise_multiplier must be a finite number of at least 0")
        if not (_is_number(self.sample_rate) and 0 < self.sample_rate <= 1):
            raise ValueError("sample_rate must be above 0 and at most 1")
        if self.mechanism == "gaussian_histograms" and self.sample_rate != 1:
            raise ValueError("sample_rate must be 1 for 'gaussian_histograms': every record is counted")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError("steps must be a whole number of at least 1")
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


def estimate(events: Iterable[PrivacyEvent], delta: float, *, about: float) -> float:
    """Give an epsilon near `about` from a grid four times coarser: up to 0.001 of it too much, but fast.

    For searches that end with `epsilon` itself. Far from `about` it is rougher.

    Raises:
        ValueError: delta is not strictly between 0 and 1.

    """
    _check_delta(delta)
    return max(
        (_upper(groups, delta, _ceiling(groups, delta), about, _COARSE) for groups in _by_segment(events)), default=0.0
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_delta(delta: float) -> None:
    if not (_is_number(delta) and 0 < delta < 1):
        raise ValueError("delta must lie strictly between 0 and 1")


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
    ceiling = _ceiling(groups, delta)
    found = _upper(groups, delta, ceiling)
    if not found <= ceiling * (1 + _CEILING_RELATIVE) + _CEILING_ABSOLUTE:
        raise IntegrityError(
            f"the accountants disagree: PLD finds epsilon {found:.6g} at delta {delta:g}, above the Renyi ceiling of "
            f"{ceiling:.6g}; nothing may be released, check the installed dp-accounting and scipy"
        )
    return found


def _upper(groups: Groups, delta: float, ceiling: float, about: float | None = None, coarseness: float = 1.0) -> float:
    """Give an upper bound of epsilon, tight wherever a loss distribution or the closed form can serve."""
    if any(noise_multiplier == 0 for noise_multiplier, _, _ in groups):
        return math.inf
    # Sampling never costs more: hockey-stick divergence is convex, and dominance outlives composition.
    all_records = _gaussian_epsilon(_gaussian_mu(groups), delta)
    if all(sample_rate == 1 for _, sample_rate, _ in groups):
        return all_records
    if delta < _LEAST_DELTA or not 0 < ceiling * sum(steps for _, _, steps in groups) <= _MOST_WORK:
        return min(all_records, ceiling)
    # The grid is laid for the loss there is; of few or rare steps the ceiling may be far above it.
    found = _pld_epsilon(groups, delta, ceiling, _COARSE) if about is None else about
    if found > 0:
        found = _pld_epsilon(groups, delta, found, coarseness)
    return min(all_records, found if found <= _MOST_EPSILON else ceiling)


# Full-batch steps: T Gaussian steps of multiplier s are one of s / sqrt(T), and its epsilon has a closed form.


def _gaussian_mu(groups: Iterable[tuple[float, float, int]]) -> float:
    """Give mu = 1 / s of the one Gaussian step that equals all the steps on all records (Dong et al. 2019, Cor. 2)."""
    return math.sqrt(math.fsum(steps / s / s for s, _, steps in groups))


def _gaussian_delta(epsilon: Any, mu: float) -> Any:  # noqa: ANN401 - a number or an array, and so is what it gives
    """Give delta(epsilon) of a Gaussian step (Balle and Wang 2018, Theorem 8), stable in the tails."""
    log_a = log_ndtr(mu / 2 - epsilon / mu)
    log_b = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return -np.exp(log_a) * np.expm1(np.minimum(log_b - log_a, 0.0))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Give the least epsilon of a Gaussian step by bisection, from above."""
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))
    if high == 0:  # So much noise that mu is lost in rounding.
        return low
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


def _pld_epsilon(groups: Groups, delta: float, expected: float, coarseness: float) -> float:
    """Give epsilon from the composed privacy loss distribution, rounded pessimistically to a grid.

    Rounding to a grid of interval h adds a variance of about h^2 / 6 a step to that of the whole loss, mu^2, and
    so about 0.11 steps h^2 / mu^2 to epsilon (measured, relative): here 4.4e-5, whatever the steps, so that epsilon
    rises with them. `expected` is about the epsilon to be found.
    """
    sampled = [group for group in groups if group[1] < 1]
    steps = min(sum(count for _, _, count in sampled) + 1, _MOST_STEPS)
    tail = _CUT * delta / steps
    quantile = max(1.0, -float(ndtri(delta)))
    mu = math.sqrt(quantile * quantile + 2 * expected) - quantile
    reach = max(_range(s, rate, tail)[1] for s, rate, _ in sampled)
    interval = coarseness * max(mu * math.sqrt(_GRID / steps), reach / _MOST_POINTS, _LEAST_INTERVAL)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # In the library, where losses are huge.
        parts = [_pld(s, rate, interval, tail).self_compose(count, _CUT * delta) for s, rate, count in sampled]
        if (full := _gaussian_mu(group for group in groups if group[1] == 1)) > 0:
            parts.append(_pld(1 / full, 1.0, interval, tail))
        total = parts[0]
        for part in parts[1:]:
            total = total.compose(part, _CUT * delta)
        return float(total.get_epsilon_for_delta(delta))


def _pld(noise_multiplier: float, sample_rate: float, interval: float, tail: float) -> Any:  # noqa: ANN401 - dp-accounting has no types
    """Give dp-accounting's object for one step: the loss of a record's presence, and that of its absence."""
    # Imported late: a second, and 70 MB, that full-batch runs do without.
    from dp_accounting.pld import pld_pmf  # noqa: PLC0415
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution  # noqa: PLC0415

    losses = _losses(noise_multiplier, sample_rate, interval, tail)
    return PrivacyLossDistribution(*(pld_pmf.DensePLDPmf(interval, *loss, True) for loss in losses))  # noqa: FBT003


def _log_rest(sample_rate: float) -> float:
    return math.log1p(-sample_rate) if sample_rate < 1 else -math.inf


def _range(noise_multiplier: float, sample_rate: float, tail: float) -> tuple[float, float]:
    """Give the least and the largest loss of one step beyond which the divergence is at most `tail`."""
    furthest = _gaussian_epsilon(1 / noise_multiplier, min(tail / sample_rate, 0.5))
    rest, drawn = _log_rest(sample_rate), math.log(sample_rate)
    return float(np.logaddexp(rest, drawn - furthest)), float(np.logaddexp(rest, drawn + furthest))


Loss = tuple[int, NDArray[np.float64], float]
"""The first grid point, in intervals, the probabilities from there on, and that of an infinite loss."""


def _losses(noise_multiplier: float, sample_rate: float, interval: float, tail: float) -> tuple[Loss, Loss]:
    """Give one step's loss on the grid: of (1 - q) N(0) + q N(1) against N(0), and of N(0) against the mixture.

    dp-accounting's own `from_gaussian_mechanism` gives the same masses, but takes 30 times as long, and where q is
    small its differences of divergences near 1 leave rounding errors that many steps add up. The losses beyond the
    grid have a divergence of at most `tail`; they count as infinite.
    """
    mu, q = 1 / noise_multiplier, sample_rate
    log_rest = _log_rest(q)
    low, high = _range(noise_multiplier, sample_rate, tail)
    lower = math.floor(low / interval)
    upper = max(math.ceil(high / interval), lower + 1)
    grid = np.arange(lower, upper + 1) * interval
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # The loss of the full-batch step at the same outcome: exp(grid) = 1 - q + q exp(loss). None below log(1 - q).
        share = -np.expm1(log_rest - grid)
        loss = np.where(np.abs(grid) < q / 4, np.log1p(np.expm1(grid) / q), grid - math.log(q) + np.log(share))
        present = np.where(share > 0, q * _gaussian_delta(loss, mu), -np.expm1(grid))
        absent = np.where(share > 0, share * _gaussian_delta(-loss, mu), 0.0)
    mirrored = absent[::-1], (np.exp(np.minimum(-grid, _MOST_EPSILON)) * present)[::-1]
    return (
        (lower, *_connect_the_dots(lower, interval, present, np.exp(np.minimum(grid, _MOST_EPSILON)) * absent)),
        (-upper, *_connect_the_dots(-upper, interval, *mirrored)),
    )


def _connect_the_dots(
    lower: int, interval: float, deltas: NDArray[np.float64], rests: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Give the masses on the grid whose hockey-stick divergences at its points are `deltas` (Doroshenko et al. 2022).

    `rests` = deltas - 1 + exp(loss) has the same differences, and is small where deltas are near 1: below a loss of 0.
    """
    up = math.expm1(interval)
    below, above = ((steps := np.diff(values), np.diff(steps) / up - steps[:-1])[1] for values in (rests, deltas))
    masses = np.empty_like(deltas)
    masses[1:-1] = np.where(np.arange(lower + 1, lower + len(deltas) - 1) <= 0, below, above)
    masses[0] = (rests[1] - rests[0]) / up - rests[0]
    masses[-1] = (deltas[-1] - deltas[-2]) / math.expm1(-interval)
    return np.maximum(masses, 0.0), float(deltas[-1])
