"""How much noise a budget needs, and how many steps it affords: searches on the accountant of record.

Both search with `privacy.estimate` and end with `privacy.epsilon`: what they promise is what a ledger will find.
They use the central limit of composition (Bu et al. 2020, Corollary 5.4): many Poisson-sampled steps are about one
Gaussian step of mu^2 = steps q^2 (exp(1 / s^2) - 1), and the mu^2 of events add. So mu^2, read off an epsilon, is
about proportional to the steps, and to exp(1 / s^2) - 1: few evaluations are needed. Nothing rests on it but speed.
"""

import math
from collections.abc import Callable, Iterable
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache

from scipy.special import ndtri

from . import privacy
from .privacy import PrivacyEvent

_AIM, _TIGHT = 0.9995, 0.999
_CLOSE, _TRIES = 3e-3, 30
_LEAST_SHARE = 1e-4
_LEAST_SLOPE, _MOST_SLOPE = 0.1, 10.0
_JUMP = 8.0
_MOST_NOISE, _MOST_EXPONENT = 1e12, 600.0


def noise_multiplier_for(
    epsilon: float, delta: float, *, sample_rate: float, steps: int, others: Iterable[PrivacyEvent] = ()
) -> float:
    """Give the least noise multiplier whose `steps` steps, together with `others`, stay within epsilon.

    Rounded up to five digits, to more only where five are too coarse. What is spent together lies between 0.999 and 1
    times epsilon, wherever epsilon is at most 300.

    Raises:
        ValueError: naming the argument that is out of its range, or `others`, that leave nothing of epsilon.
        IntegrityError: the accountants contradict each other.

    """
    PrivacyEvent("poisson_gaussian", 1.0, sample_rate, steps)  # Refuses what cannot be.
    _check_budget(epsilon)
    return _calibrate(epsilon, delta, float(sample_rate), steps, tuple(others))


@lru_cache(maxsize=256)
def _calibrate(target: float, delta: float, sample_rate: float, steps: int, others: tuple[PrivacyEvent, ...]) -> float:
    spent = privacy.epsilon(others, delta)
    if spent >= target:
        raise ValueError(f"others spend epsilon {spent:.6g} of {target:.6g}: nothing is left")

    def events(noise_multiplier: float) -> list[PrivacyEvent]:
        return [*others, PrivacyEvent("poisson_gaussian", noise_multiplier, sample_rate, steps)]

    def roughly(x: float) -> Point:
        return x, _mu_squared(privacy.estimate(events(_noise(x, sample_rate)), delta, about=target), delta) - base

    base = _mu_squared(privacy.estimate(others, delta, about=target), delta)
    all_of_it = _mu_squared(target, delta)
    wanted = max(all_of_it - base, all_of_it * _LEAST_SHARE)
    x, slope = _solve(roughly, wanted / steps / sample_rate**2, wanted)
    base = _mu_squared(spent, delta)
    wanted, last, least, noise = all_of_it - base, (0.0, 0.0), math.inf, math.inf
    for digits in (5, 5, 5, 5, 6, 7, 8):
        noise = _round_up(_noise(x, sample_rate), digits)
        total = privacy.epsilon(events(noise), delta)
        least = min(least, noise) if total <= target else least
        point = (_growth(noise, sample_rate), _mu_squared(total, delta) - base)
        if _TIGHT * wanted <= point[1] <= wanted and total <= target:
            break
        slope, last = _slope(slope, last, point), point
        x = _next(point, _AIM * wanted, slope)
    while not math.isfinite(least):
        noise = _round_up(noise * (1 + _LEAST_SHARE), 8)
        if noise > _MOST_NOISE:
            raise ValueError(f"others spend epsilon {spent:.6g} of {target:.6g}: too little is left")
        least = noise if privacy.epsilon(events(noise), delta) <= target else least
    return least


def affordable_steps(
    epsilon: float,
    delta: float,
    *,
    noise_multiplier: float,
    sample_rate: float,
    spent: Iterable[PrivacyEvent] = (),
    limit: int = 10_000_000,
    multiple: int = 1,
) -> int:
    """Give the most further steps that stay within epsilon, together with what is `spent`.

    That many fit by the accountant of record, and `multiple` more do not; or `limit` was reached. Only multiples of
    `multiple` are considered: the local steps of a round, where rounds are what can be bought.

    Raises:
        ValueError: naming the argument that is out of its range.
        IntegrityError: the accountants contradict each other.

    """
    spent = tuple(spent)
    PrivacyEvent("poisson_gaussian", noise_multiplier, sample_rate, 1)  # Refuses what cannot be.
    if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
        raise ValueError("multiple must be a whole number of at least 1")
    _check_budget(epsilon)
    base, all_of_it = _mu_squared(privacy.epsilon(spent, delta), delta), _mu_squared(epsilon, delta)
    wanted, most = all_of_it - base, limit // multiple
    if wanted < 0 or noise_multiplier == 0 or most < 1:
        return 0

    def events(count: int) -> list[PrivacyEvent]:
        return [*spent, PrivacyEvent("poisson_gaussian", noise_multiplier, sample_rate, count * multiple)]

    def roughly(x: float) -> Point:
        count = min(max(round(x), 1), most)
        return count, _mu_squared(privacy.estimate(events(count), delta, about=epsilon), delta) - base

    growth = sample_rate**2 * _growth(noise_multiplier, sample_rate) * multiple
    first = wanted / growth if growth > wanted / most else float(most)
    x, slope = _solve(roughly, first, wanted)
    count, fits, fails, last = int(x), 0, most + 1, (0.0, 0.0)
    while fails - fits > 1:
        total = privacy.epsilon(events(count), delta)
        fits, fails = (count, fails) if total <= epsilon else (fits, count)
        point = (float(count), _mu_squared(total, delta) - base)
        slope, last = _slope(slope, last, point), point
        count = min(max(math.floor(min(_next(point, wanted, slope), most)), fits + 1), fails - 1)
    return fits * multiple


def _check_budget(epsilon: float) -> None:
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < math.inf:
        raise ValueError("epsilon must be a finite number above 0")


def _mu_squared(spent: float, delta: float) -> float:
    """Give about the mu^2 of the Gaussian step that has this epsilon: its mean loss plus a quantile is `spent`."""
    quantile = max(1.0, -float(ndtri(delta)))
    return (2 * spent / (math.sqrt(quantile**2 + 2 * spent) + quantile)) ** 2 if math.isfinite(spent) else math.inf


def _growth(noise_multiplier: float, sample_rate: float) -> float:
    """Give what mu^2 of many steps is in proportion to, over q^2: exp(1 / s^2) - 1, or 1 / s^2 without sampling."""
    inverse = 1 / noise_multiplier / noise_multiplier
    return inverse if sample_rate == 1 else math.expm1(min(inverse, _MOST_EXPONENT))


def _noise(growth: float, sample_rate: float) -> float:
    return 1 / math.sqrt(growth if sample_rate == 1 else math.log1p(growth))


Point = tuple[float, float]


def _slope(slope: float, last: Point, point: Point) -> float:
    """Give the slope between two points in logarithms, or the one before where they do not tell."""
    if min(*last, *point) <= 0 or last[0] == point[0] or math.inf in (last[1], point[1]):
        return slope
    found = math.log(point[1] / last[1]) / math.log(point[0] / last[0])
    return found if _LEAST_SLOPE < found < _MOST_SLOPE else slope


def _next(point: Point, wanted: float, slope: float) -> float:
    """Give where the line through the point, in logarithms, meets what is wanted; at most a jump away."""
    x, y = point
    ratio = _JUMP if y <= 0 else max(wanted / y, 0.0) ** (1 / slope)
    return x * min(max(ratio, 1 / _JUMP), _JUMP)


def _solve(evaluate: Callable[[float], Point], x: float, wanted: float) -> tuple[float, float]:
    """Give about where a rising function meets what is wanted, by secants in logarithms within a bracket.

    `evaluate` may move x to where it can be evaluated; the search ends when it is moved to where it has been.

    Returns:
        x, and the slope there.

    """
    low, high, slope, last = 0.0, math.inf, 1.0, (0.0, 0.0)
    for _ in range(_TRIES):
        point = evaluate(x)
        if point[0] == last[0]:
            break
        slope, last = _slope(slope, last, point), point
        x = _next(point, wanted, slope)
        if abs(point[1] - wanted) <= _CLOSE * abs(wanted):
            return x, slope
        low, high = (max(low, point[0]), high) if point[1] < wanted else (low, min(high, point[0]))
        if not low < x < high:
            x = math.sqrt(low * high) if low > 0 else high / 2
    return last[0], slope


def _round_up(value: float, digits: int) -> float:
    places = digits - 1 - math.floor(math.log10(value))
    return float(Decimal(value).quantize(Decimal(1).scaleb(-places), rounding=ROUND_CEILING))
