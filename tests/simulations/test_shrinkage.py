"""DP and shrinkage with an answer in closed form: calibrated noise, the bank's own mechanism, MR-MTL's prox.

K banks hold n records each around a mean of their own, w_k ~ N(0, t2), and release the clipped sum once, noised. With
s2 the variance of one release, prox of strength L around the banks' mean errs by
MSE(L) = (1 - 1/K) (s2 + L^2 t2) / (1 + L)^2 + s2 / K, least at L* = s2 / t2 (Liu et al. 2022, section 5).
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from client.mechanism import clip_factors, noised
from client.rng import SecureRandom
from metarisk_common.algorithms import prox
from metarisk_common.calibration import noise_multiplier_for
from metarisk_common.params import Params

BANKS, RECORDS, DEVIATION, SPREAD, CLIP = 20, 200, 0.3, 0.08, 1.0
SIMULATIONS, AT_A_TIME = 20_000, 500
Z = noise_multiplier_for(0.25, 1e-5, sample_rate=1.0, steps=1)
T2 = SPREAD**2
S2 = (DEVIATION**2 + Z**2 / RECORDS) / RECORDS
BEST = S2 / T2


@dataclass(frozen=True)
class OneStep:
    """The one step that reaches the minimum of `1/2 (w - release)^2 + L/2 (w - mean)^2` from anywhere."""

    prox_strength: float
    local_steps: int = 1

    @property
    def learning_rate(self) -> float:
        return 1 / (1 + self.prox_strength)


def expected_error(strength: float) -> float:
    return (1 - 1 / BANKS) * (S2 + strength**2 * T2) / (1 + strength) ** 2 + S2 / BANKS


@pytest.fixture(scope="module")
def world() -> tuple[Tensor, Tensor]:
    """Draw the banks' means, and what they release: both (simulations, banks)."""
    generator = torch.Generator().manual_seed(2022)
    random = SecureRandom.seeded(2022)
    width = 2 * 3**0.5 * DEVIATION
    means = SPREAD * torch.randn(SIMULATIONS, BANKS, generator=generator, dtype=torch.float64)
    released = []
    for some in means.reshape(-1, AT_A_TIME, BANKS):
        shifts = torch.rand(*some.shape, RECORDS, generator=generator, dtype=torch.float32) - 0.5
        gradients = -(some[..., None] + width * shifts)  # of 1/2 (w - record)^2 at w = 0
        total = (gradients * clip_factors(gradients.square(), CLIP)).sum(-1)
        released.append(-noised(total, Z * CLIP, random) / RECORDS)
    return means, torch.cat(released)


def error(world: tuple[Tensor, Tensor], strength: float) -> float:
    means, released = world
    shared = {"w": released.mean(1, keepdim=True).expand_as(released)}

    def gradient(params: Params, _: object) -> Params:
        return {"w": params["w"] - released}

    estimate = shared["w"] + prox(shared, [released], gradient, OneStep(strength))["w"]
    return float((estimate - means).square().mean())


def test_the_calibrated_noise_and_the_closed_forms_figures() -> None:
    assert pytest.approx(13.2855, abs=1e-3) == Z
    assert pytest.approx(0.0048626, abs=1e-6) == S2
    assert pytest.approx(0.7598, abs=1e-4) == BEST
    assert expected_error(0.0) == pytest.approx(0.004863, abs=1e-6)
    assert expected_error(BEST) == pytest.approx(0.002868, abs=1e-6)
    assert expected_error(1e9) == pytest.approx(0.006323, abs=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.25, BEST, 3.0, 1e6])
def test_banks_err_as_the_closed_form_says(world: tuple[Tensor, Tensor], strength: float) -> None:
    assert error(world, strength) == pytest.approx(expected_error(strength), rel=0.003)


def test_shrinking_beats_both_the_bank_by_itself_and_the_shared_mean(world: tuple[Tensor, Tensor]) -> None:
    errors = {factor: error(world, factor * BEST) for factor in np.array([0, 0.5, 0.8, 1, 1.25, 2, 1e6])}
    assert min(errors, key=errors.__getitem__) == 1
    assert errors[1] < 0.6 * errors[0]
