"""Our epsilon against all three accountants at hand, on a grid: Opacus' RDP and PRV, and Google's PLD by its events.

All three take part in every case: none is known to fail on this grid, and none is left out. Dropped is only what no
one would run: an epsilon above 50. 10,000 steps are looked at with the smallest rate alone, since PRV is slow where
many steps lose much. The rate 0.7 stands where 0.5 would be: Opacus integrates the mean of PRV's loss across its end
at log(1 - q), and takes ten times as long at 0.5.
"""

import functools
import itertools
import math
from typing import Any

import pytest

from metarisk_common.privacy import PrivacyEvent, epsilon

RATES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.7, 0.9, 1.0)
NOISES = (0.6, 0.8, 1.0, 2.0, 4.0, 8.0, 16.0)
STEPS = (1, 10, 100, 1000)
DELTAS = (1e-5, 1e-6)
COMPARED = {0.001: 35, 0.01: 28, 0.05: 28, 0.1: 27, 0.25: 25, 0.7: 21, 0.9: 20, 1.0: 20}
"""How many cases of each rate have an epsilon of at most 50."""

MOST_EPSILON = 50.0
PRV_ERROR = 0.01
"""PRV reports the upper end of an interval of this half-width, its default."""

Case = tuple[float, float, int, float]


def cases(rate: float) -> list[Case]:
    """(sample rate, noise multiplier, steps, delta), with either delta by turns."""
    steps = (*STEPS, 10_000) if rate <= 0.001 else STEPS
    deltas = itertools.cycle(DELTAS)
    return [(rate, noise, count, next(deltas)) for count in steps for noise in NOISES]


def ours(rate: float, noise: float, steps: int, delta: float) -> float:
    return epsilon([PrivacyEvent("poisson_gaussian", noise, rate, steps)], delta)


@functools.cache
def one_step(rate: float, noise: float) -> Any:
    from opacus.accountants import RDPAccountant  # noqa: PLC0415 - slow, as all of Opacus
    from opacus.accountants.analysis import rdp  # noqa: PLC0415

    return rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=RDPAccountant.DEFAULT_ALPHAS)


def opacus_rdp(rate: float, noise: float, steps: int, delta: float) -> float:
    from opacus.accountants import RDPAccountant  # noqa: PLC0415
    from opacus.accountants.analysis import rdp  # noqa: PLC0415

    divergences = steps * one_step(rate, noise)
    return float(rdp.get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=divergences, delta=delta)[0])


def opacus_prv(rate: float, noise: float, steps: int, delta: float) -> float:
    from opacus.accountants import PRVAccountant  # noqa: PLC0415

    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps)]
    return float(accountant.get_epsilon(delta, eps_error=PRV_ERROR))


def google_pld(rate: float, noise: float, steps: int, delta: float, *, about: float) -> float:
    """Google's accountant, told of a composed event; `about` the epsilon expected, for the grid alone."""
    from dp_accounting import (  # noqa: PLC0415
        GaussianDpEvent,
        NeighboringRelation,
        PoissonSampledDpEvent,
        SelfComposedDpEvent,
    )
    from dp_accounting.pld import PLDAccountant  # noqa: PLC0415

    # A hundredth of the loss's standard deviation, which is a quarter of ours; no more points than time allows.
    spread = math.sqrt(16 + 2 * about) - 4
    interval = max(spread / 100 / math.sqrt(steps), 1e-4 / noise / noise)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=interval)
    accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps))
    return float(accountant.get_epsilon(delta))


def test_the_grid_has_two_hundred_cases() -> None:
    assert set(COMPARED) == set(RATES)
    assert sum(COMPARED.values()) >= 200


# Opacus warns where its best order is its largest or its smallest: its bound is loose there, and still a bound.
@pytest.mark.filterwarnings("ignore:Optimal order is the (smallest|largest) alpha")
# At rate 1, PRV's formulas take the logarithm of 1 - q.
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")
@pytest.mark.parametrize("rate", RATES)
def test_all_accountants_agree(rate: float) -> None:
    compared, wrong = 0, []
    for case in cases(rate):
        found = ours(*case)
        if found > MOST_EPSILON:
            continue
        compared += 1
        rdp, prv, pld = opacus_rdp(*case), opacus_prv(*case), google_pld(*case, about=found)
        if found > rdp + 1e-3:
            wrong.append(f"{case}: {found:.5f}, above the RDP ceiling of {rdp:.5f}")
        if abs(prv - found) > 0.02:
            wrong.append(f"{case}: {found:.5f}, PRV {prv:.5f}")
        if abs(prv - PRV_ERROR - found) > 3e-3:
            wrong.append(f"{case}: {found:.5f}, PRV without its margin {prv - PRV_ERROR:.5f}")
        if abs(pld - found) > max(1e-3, 1e-4 * found):
            wrong.append(f"{case}: {found:.5f}, Google's PLD {pld:.5f}")
    assert wrong == []
    assert compared == COMPARED[rate]
