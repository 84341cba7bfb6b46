"""Shrinking private means toward the shared one: the closed form that MR-MTL's prox strength has (Liu et al. 2022).

K banks hold n records each around their own mean w_k ~ N(0, t2). Each releases its mean once, with Gaussian noise. With
s2 the variance of one release, the prox estimate of strength L around the banks' average errs by
MSE(L) = (1 - 1/K) (s2 + L^2 t2) / (1 + L)^2 + s2 / K, least at L* = s2 / t2.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from metarisk_common.adaptation import adapt

Array = npt.NDArray[Any]

BANKS, RECORDS, DEVIATION, SPREAD, CLIP = 20, 200, 0.3, 0.08, 1.0
NOISE_MULTIPLIER = 13.2855  # one Gaussian release at epsilon 0.25, delta 1e-5
SIMULATIONS = 5000

T2 = SPREAD**2
S2 = (DEVIATION**2 + NOISE_MULTIPLIER**2 / RECORDS) / RECORDS


def expected_error(strength: float) -> float:
    return (1 - 1 / BANKS) * (S2 + strength**2 * T2) / (1 + strength) ** 2 + S2 / BANKS


@pytest.fixture(scope="module")
def releases() -> tuple[Array, Array]:
    """Draw the banks' means and what they release, both (simulations, banks)."""
    generator = np.random.default_rng(20)
    means = generator.normal(0, SPREAD, (SIMULATIONS, BANKS))
    width = np.sqrt(3) * DEVIATION
    total = sum(np.clip(means + generator.uniform(-width, width, means.shape), -CLIP, CLIP) for _ in range(RECORDS))
    return means, (total + generator.normal(0, NOISE_MULTIPLIER * CLIP, means.shape)) / RECORDS


def adapted(released: Array, strength: float) -> Array:
    shared = np.broadcast_to(released.mean(axis=1, keepdims=True), released.shape)
    outputs = adapt(
        lambda params, _: params["w"].reshape(-1),
        {"w": torch.tensor(np.array(shared))},
        torch.zeros(released.size, 0),
        torch.tensor(released.reshape(-1)),
        strength=strength,
        loss=lambda outputs, y: 0.5 * (outputs - y).square(),
    )
    return outputs["w"].numpy()


def test_the_figures_of_the_closed_form() -> None:
    assert pytest.approx(0.0048626, abs=1e-7) == S2
    assert pytest.approx(0.7598, abs=1e-4) == S2 / T2
    assert expected_error(0.0) == pytest.approx(0.004863, abs=1e-6)
    assert expected_error(S2 / T2) == pytest.approx(0.002868, abs=1e-6)
    assert expected_error(1e9) == pytest.approx(0.006323, abs=1e-6)


@pytest.mark.parametrize("strength", [1e-6, 0.25, S2 / T2, 3.0, 1e4])
def test_adaptation_errs_as_the_closed_form_says(releases: tuple[Array, Array], strength: float) -> None:
    means, released = releases
    error = np.square(adapted(released, strength) - means).mean(axis=1)
    deviation = error.std(ddof=1) / np.sqrt(SIMULATIONS)
    assert abs(error.mean() - expected_error(strength)) < 4 * deviation
    assert deviation < 0.02 * expected_error(strength)


def test_the_best_strength_is_the_ratio_of_variances(releases: tuple[Array, Array]) -> None:
    means, released = releases
    errors = {
        factor: np.square(adapted(released, factor * S2 / T2) - means).mean() for factor in (0.25, 0.6, 1.0, 1.6, 4.0)
    }
    assert min(errors, key=errors.__getitem__) == 1.0
