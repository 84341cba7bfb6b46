"""The three acts of a private step: who is drawn, how far a unit can move the sum, and what the noise is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from client.mechanism import Batch, clip_factors, noised, poisson_batch
from client.rng import SecureRandom
from metarisk_common.tasks import Task

ROWS = 24
RATE = 0.3
DRAWS = 3000
UNIT = torch.arange(ROWS) % 9
"""Nine units of two or three records, none of which stand together."""


def task(unit: object = None, rows: int = ROWS) -> Task:
    """Every input and label names its row."""
    row = torch.arange(rows, dtype=torch.float64)
    return Task("bank", "", row[:, None], row, unit)


def drawn_units(of: Task, rate: float, rng: SecureRandom) -> np.ndarray:
    """Which units came, told from the batch's records alone; the batch is checked on the way."""
    batch = poisson_batch(of, rate, rng)
    assert torch.equal(batch.x[:, 0], batch.y)
    rows = batch.y.long()
    assert len(set(rows.tolist())) == len(rows)
    came = rows if of.unit is None else torch.as_tensor(of.unit)[rows]
    assert batch.units == len(set(came.tolist()))
    if of.unit is None:
        assert batch.unit is None
    else:
        assert batch.unit is not None
        # All of a unit's records came with it, and got one number of their own.
        assert set(rows.tolist()) == set(torch.isin(torch.as_tensor(of.unit), came).nonzero()[:, 0].tolist())
        assert len({*zip(came.tolist(), batch.unit.tolist(), strict=True)}) == batch.units
        assert set(batch.unit.tolist()) == set(range(batch.units))
    present = np.zeros(len(of.x) if of.unit is None else int(torch.as_tensor(of.unit).max()) + 1)
    present[came.numpy()] = 1
    return present


@pytest.mark.parametrize("unit", [None, UNIT, UNIT.numpy()], ids=["records", "units", "units in NumPy"])
def test_each_unit_comes_by_a_coin_of_its_own(unit: Tensor | None) -> None:
    rng = SecureRandom.seeded(1, "coins")
    present = np.array([drawn_units(task(unit), RATE, rng) for _ in range(DRAWS)])
    units = present.shape[1]
    assert units == (ROWS if unit is None else 9)
    spread = np.sqrt(RATE * (1 - RATE) / DRAWS)
    assert np.abs(present.mean(0) - RATE).max() < 4.5 * spread
    # Neither in pairs: the covariance of any two is zero. A shuffled batch of fixed size has -q(1-q)/(n-1).
    pairs = np.cov(present.T)[np.triu_indices(units, 1)]
    assert np.abs(pairs).max() < 4.5 * RATE * (1 - RATE) / np.sqrt(DRAWS)
    assert abs(pairs.mean()) < 4.5 * RATE * (1 - RATE) / np.sqrt(DRAWS * len(pairs))
    # Nor over time: what came in one step says nothing about the next.
    assert abs(np.corrcoef(present[1:].ravel(), present[:-1].ravel())[0, 1]) < 4.5 / np.sqrt(present.size)


@pytest.mark.parametrize("rate", [0.05, RATE, 0.6, 0.97])
@pytest.mark.parametrize("unit", [None, UNIT], ids=["records", "units"])
def test_the_batch_size_is_binomial(unit: Tensor | None, rate: float) -> None:
    rng = SecureRandom.seeded(2, "sizes")
    sizes = [poisson_batch(task(unit), rate, rng).units for _ in range(DRAWS)]
    units = ROWS if unit is None else 9
    expected = DRAWS * stats.binom(units, rate).pmf(np.arange(units + 1))
    found = np.bincount(sizes, minlength=units + 1)
    common = expected > 5
    rest = [found[~common].sum()], [expected[~common].sum()]
    observed, hoped = np.append(found[common], rest[0]), np.append(expected[common], rest[1])
    assert stats.chisquare(observed, hoped).pvalue > 1e-3


@pytest.mark.parametrize("unit", [None, UNIT], ids=["records", "units"])
def test_at_rate_one_everybody_comes_and_no_coin_is_thrown(unit: Tensor | None) -> None:
    rng = SecureRandom.seeded(3)
    batch = poisson_batch(task(unit), 1.0, rng)
    assert batch.y.tolist() == list(range(ROWS))
    assert batch.units == (ROWS if unit is None else 9)
    assert (batch.unit is None) == (unit is None)
    assert np.array_equal(rng.normal(4, 1.0), SecureRandom.seeded(3).normal(4, 1.0))


@pytest.mark.parametrize(("rows", "rate"), [(0, 0.5), (0, 1.0), (ROWS, 1e-12)])
@pytest.mark.parametrize("by_unit", [False, True])
def test_a_batch_may_be_empty(rows: int, rate: float, *, by_unit: bool) -> None:
    unit = torch.arange(rows) % 9 if by_unit else None
    batch = poisson_batch(task(unit, rows), rate, SecureRandom.seeded(4))
    assert isinstance(batch, Batch)
    assert (batch.x.shape, batch.y.shape, batch.units) == ((0, 1), (0,), 0)


def test_a_units_coin_does_not_depend_on_who_else_is_there() -> None:
    """The neighbour without the last unit sees the others drawn just the same."""
    for seed in range(50):
        fewer = task(UNIT[UNIT < 8])
        with_it = drawn_units(task(UNIT), RATE, SecureRandom.seeded(seed))
        assert np.array_equal(with_it[:8], drawn_units(fewer, RATE, SecureRandom.seeded(seed)))


NORMS = st.one_of(st.floats(0, 1e300), st.sampled_from([np.inf, np.nan, 1e-320, 1e-12, 1.0, 1e18]))


@given(norms=st.lists(NORMS, min_size=1, max_size=9), clip=st.floats(1e-6, 1e6))
def test_a_clipped_norm_is_at_most_the_clip(norms: list[float], clip: float) -> None:
    squared = torch.tensor(norms, dtype=torch.float64).square()
    factors = clip_factors(squared, clip)
    assert factors.shape == squared.shape
    assert bool(((factors >= 0) & (factors <= 1)).all())
    clipped = factors * squared.sqrt()
    assert bool((clipped[factors > 0] <= clip * (1 + 4e-16)).all())
    assert bool((clipped[squared < 1e16] <= clip).all())
    assert not factors[~squared.isfinite()].any()


@given(norm=st.floats(1e-3, 1e12), clip=st.floats(1e-3, 1e3))
def test_the_factor_is_that_of_opacus(norm: float, clip: float) -> None:
    squared = torch.tensor([norm], dtype=torch.float64).square()
    assert float(clip_factors(squared, clip)) == pytest.approx(min(1.0, clip / (norm + 1e-6)), rel=1e-12)


def test_a_gradient_under_the_clip_is_left_as_it_is() -> None:
    squared = torch.tensor([0.0, 0.25, 0.999], dtype=torch.float64).square()
    assert clip_factors(squared, 1.0).tolist() == [1.0, 1.0, 1.0]
    assert clip_factors(torch.zeros(0), 1.0).shape == (0,)


@pytest.mark.parametrize("clip", [1e-4, 0.7, 1e3])
def test_no_factor_is_so_small_that_float32_would_round_it_up(clip: float) -> None:
    norms = torch.logspace(30, 47, 5000, dtype=torch.float64) * clip
    rounded = clip_factors(norms.square(), clip).float().double()
    assert float((rounded * norms).max()) <= clip * (1 + 1e-6)
    assert bool((rounded[norms < 1e36 * clip] > 0).all())


def test_the_callers_norms_are_left_alone() -> None:
    squared = torch.tensor([4.0, np.nan])
    kept = squared.clone()
    clip_factors(squared, 1.0)
    assert torch.equal(squared.nan_to_num(7.0), kept.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_is_normal_with_the_promised_deviation(dtype: torch.dtype) -> None:
    total = torch.linspace(-5, 5, 6000, dtype=dtype)
    found = noised(total, 2.0, SecureRandom.seeded(5))
    assert found.dtype == dtype
    noise = (found - total).numpy()
    assert stats.kstest(noise, stats.norm(0, 2.0).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise, stats.norm(0, 2.0 * wrong).cdf).pvalue < 1e-9


def test_no_noise_is_used_twice_and_the_sum_is_left_alone() -> None:
    rng, total = SecureRandom.from_system(), torch.zeros(2000, dtype=torch.float64)
    first, second = noised(total, 1.0, rng), noised(total, 1.0, rng)
    assert not total.any()
    assert len({*first.tolist(), *second.tolist()}) == 4000
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 2000**0.5


def test_tensors_noised_one_by_one_or_joined_get_the_same_noise() -> None:
    rng = SecureRandom.seeded(6)
    apart = torch.cat([noised(torch.zeros(3, 4), 1.0, rng).flatten(), noised(torch.zeros(5), 1.0, rng)])
    assert torch.equal(apart, noised(torch.zeros(17), 1.0, SecureRandom.seeded(6)))


def test_the_rounding_of_a_noised_sum_does_not_show_the_sum() -> None:
    """Added in float32, noise of a coarse grid would leave the sum's own low bits in the result."""
    total = torch.full((4000,), 2.0**-24)  # One low bit, far below what float32 holds beside noise of size 1.
    found = noised(total, 1.0, SecureRandom.seeded(7))
    once = (total.double() + torch.from_numpy(SecureRandom.seeded(7).normal(4000, 1.0))).float()
    assert torch.equal(found, once)


def test_without_noise_the_sum_is_released_as_it_is() -> None:
    total = torch.linspace(0, 1, 7)
    assert torch.equal(noised(total, 0.0, SecureRandom.from_system()), total)
