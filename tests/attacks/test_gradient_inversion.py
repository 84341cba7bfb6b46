"""Reading a record out of a gradient: x = dW / db. Exact on a plain gradient, hopeless on a released one.

At a first layer with a bias, one record's gradients are dW = delta x^T and db = delta, so any row of dW over its entry
of db is the record itself (Phong et al. 2017, "Privacy-Preserving Deep Learning: Revisited and Enhanced").
"""

import numpy as np
import pytest
import torch
from scipy import stats

from client.dpsgd import plain_gradient, private_gradient
from client.rng import SecureRandom
from metarisk_common.models import build, record_losses
from metarisk_common.params import Params
from metarisk_common.plan import Mechanism, ModelSpec
from metarisk_common.tasks import Task

WIDTH = 20
TRIALS = 400
DEMO_NOISE_MULTIPLIER = 13.9
"""Of the built-in scenario at its epsilon, where every record is in every batch: sample rate 1."""


def bank_of_one(random: np.random.Generator) -> Task:
    """One record, unlike any other: the attacker's best case."""
    x = torch.from_numpy(random.normal(size=(1, WIDTH)))
    return Task("bank", "", x, torch.from_numpy(random.integers(0, 2, 1).astype(float)))


MODEL = build(ModelSpec(kind="mlp", hidden=(8,)), WIDTH, "float64")
PARAMS: Params = {
    name: torch.from_numpy(np.random.default_rng(0).normal(0, 0.5, tuple(value.shape)))
    for name, value in MODEL.named_parameters()
}


def inverted(gradient: Params) -> np.ndarray:
    """The record, from all rows of dW together: the least-squares solution of dW = db x^T."""
    weight, bias = gradient["body.0.weight"].numpy(), gradient["body.0.bias"].numpy()
    found: np.ndarray = bias @ weight / (bias @ bias)
    return found


def correlations(noise_multiplier: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(trials,) of what was read out with the record that was in the batch, and with one that never was."""
    random = np.random.default_rng(seed)
    own, strange = [], []
    grad_fn = private_gradient(
        MODEL,
        record_losses,
        mechanism=Mechanism(sample_rate=1.0, max_grad_norm=0.7, noise_multiplier=noise_multiplier),
        expected_batch_size=1.0,
        rng=SecureRandom.seeded(seed, "inversion"),
    )
    for _ in range(TRIALS):
        task, stranger = bank_of_one(random), bank_of_one(random)
        found = inverted(grad_fn(PARAMS, task))
        own.append(np.corrcoef(found, task.x[0])[0, 1])
        strange.append(np.corrcoef(found, stranger.x[0])[0, 1])
    return np.array(own), np.array(strange)


def test_a_plain_gradient_gives_the_record_away() -> None:
    random = np.random.default_rng(1)
    gradient = plain_gradient(MODEL, record_losses)
    for _ in range(20):
        task = bank_of_one(random)
        np.testing.assert_allclose(inverted(gradient(PARAMS, task)), task.x[0], rtol=1e-9, atol=1e-12)


def test_clipping_alone_protects_nobody() -> None:
    own, _ = correlations(0.0, 2)
    assert own.min() > 1 - 1e-9


def test_the_attack_still_works_where_the_noise_is_too_small() -> None:
    """The control: it is the noise that the attack below fails on, and not its own weakness."""
    own, strange = correlations(0.02, 3)
    assert own.mean() > 0.8
    assert abs(strange.mean()) < 5 / (WIDTH * TRIALS) ** 0.5


@pytest.mark.parametrize("seed", [4, 5])
def test_from_a_release_the_record_is_read_no_better_than_a_strangers(seed: int) -> None:
    own, strange = correlations(DEMO_NOISE_MULTIPLIER, seed)
    chance = 5 / ((WIDTH - 1) * TRIALS) ** 0.5
    assert abs(own.mean()) < chance
    assert abs(strange.mean()) < chance
    assert stats.ks_2samp(own, strange).pvalue > 1e-3
