"""Bugs that privacy engines have had, planted one at a time in the real one: the audit or the sensitivity sees each.

Noise and coins are seeded here, so that a test gives the same verdict today and tomorrow. The audit itself never
seeds noise; what it decides depends on no seed beyond chance.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import client.bank
import client.closed_form
import client.mechanism
from client.dpsgd import private_gradient
from client.rng import SecureRandom
from metarisk_common.models import build, record_losses
from metarisk_common.plan import Mechanism, ModelSpec
from metarisk_common.tasks import Task
from simulations.audit import Audit, Request, audit
from simulations.audit_statistics import CHANCE, Measured

MECHANISM = client.mechanism
real_noised, real_poisson_batch = MECHANISM.noised, MECHANISM.poisson_batch


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        client.bank, "noise_source", lambda bank, order: SecureRandom.seeded(1, bank.config.name, order.round)
    )


@pytest.fixture
def attack(tmp_path: Path) -> Callable[..., Audit]:
    return lambda **options: audit(Request(tmp_path / "audit", seed=1, **options))


def beyond_chance(figure: Measured | None) -> bool:
    return figure is not None and figure.chance < CHANCE


# The bugs. Each takes out one act of the proof, at the place where both engines call it.


def noise_halved(total: Tensor, std: float, rng: SecureRandom) -> Tensor:
    return real_noised(total, std / 2, rng)


def noise_by_root_two(total: Tensor, std: float, rng: SecureRandom) -> Tensor:
    return real_noised(total, std / math.sqrt(2), rng)


def one_number_for_all_columns(total: Tensor, std: float, rng: SecureRandom) -> Tensor:
    return total + torch.from_numpy(rng.normal(1, std)).to(total.dtype)


def no_clipping(squared_norms: Tensor, max_grad_norm: float) -> Tensor:
    return torch.ones_like(squared_norms)


def one_factor_for_the_batch(squared_norms: Tensor, max_grad_norm: float) -> Tensor:
    return torch.full_like(squared_norms, min(1.0, max_grad_norm / float(squared_norms.sqrt().mean() + 1e-9)))


def counted_twice(task: Any, sample_rate: float, rng: SecureRandom) -> Any:
    batch = real_poisson_batch(task, sample_rate, rng)
    return replace(batch, x=batch.x.repeat(2, 1), y=batch.y.repeat(2), units=2 * batch.units)


def full_batch(task: Any, sample_rate: float, rng: SecureRandom) -> Any:
    return real_poisson_batch(task, 1.0, rng)


def hardly_a_batch(task: Any, sample_rate: float, rng: SecureRandom) -> Any:
    return real_poisson_batch(task, sample_rate / 2, rng)


BATCH = 0.25 * 6500  # the divisor of the bank of 4000 canaries: rate times declared size


def mean_clipped(total: Tensor, std: float, rng: SecureRandom) -> Tensor:
    """What the batch's mean gradient clipped to C, instead of each record's, comes to.

    Canaries' gradients point everywhere, so their mean is short and the clip never binds: as good as none.
    """
    clip = 0.05
    return real_noised(total * min(1.0, clip * BATCH / float(total.norm())), std, rng)


CLAIMS = (1.0, 4.0, 8.0)


def row(name: str, epsilon: float, found: Audit) -> None:
    """Print a line of the table in docs/privacy.md, which pytest shows with -rP."""
    figures = found.findings.figures
    told = {"bound": figures.bound, "noise": figures.noise.value, "shift": figures.shift_canaries.value}
    text = ", ".join(f"{key} {value:.2f}" for key, value in told.items())
    print(f"{name}: claim {epsilon:g}, {text}, {found.findings.verdict}")  # noqa: T201 - for whoever asks for it


@pytest.mark.parametrize("epsilon", CLAIMS)
@pytest.mark.parametrize(
    ("name", "bugs", "shift", "also"),
    [
        ("noise halved", {"noised": noise_halved}, (0.8, 1.2), "noise"),
        ("noise by root two", {"noised": noise_by_root_two}, (0.8, 1.2), "noise"),
        ("no clipping", {"clip_factors": no_clipping}, (15.0, 25.0), "shift"),
        ("batch's mean clipped", {"clip_factors": no_clipping, "noised": mean_clipped}, (10.0, 25.0), "shift"),
        ("batch clipped by one factor", {"clip_factors": one_factor_for_the_batch}, (1.5, 3.0), "shift_canaries"),
        ("canary counted twice", {"poisson_batch": counted_twice}, (1.8, 2.2), "shift"),
        ("full batch sold as Poisson", {"poisson_batch": full_batch}, (3.8, 4.2), "shift"),
    ],
)
def test_a_bug_that_leaks_is_caught_by_the_bound_and_by_its_figure(
    name: str,
    bugs: dict[str, Any],
    shift: tuple[float, float],
    also: str,
    epsilon: float,
    attack: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for act, bug in bugs.items():
        monkeypatch.setattr(MECHANISM, act, bug)
    found = attack(epsilon=epsilon)
    row(name, epsilon, found)
    findings = found.findings
    assert findings.verdict == "FALSIFIED"
    # A little too little noise under much noise shows in its deviation, not in what one attack can prove.
    assert findings.figures.bound > epsilon or (name == "noise by root two" and epsilon == 1)
    canaries = findings.figures.shift_canaries
    assert shift[0] - 3 * canaries.error < canaries.value < shift[1] + 3 * canaries.error
    assert beyond_chance(getattr(findings.figures, also))


@pytest.mark.parametrize("epsilon", CLAIMS)
def test_noise_that_is_the_same_each_round_is_caught_by_its_correlation(
    epsilon: float, attack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.bank, "noise_source", lambda *_: SecureRandom.seeded(1))
    found = attack(epsilon=epsilon)
    row("noise reused each round", epsilon, found)
    findings = found.findings
    assert findings.verdict == "FALSIFIED"
    assert findings.figures.between_rounds.value > 0.95
    # No other figure sees it: the noise of each release is what it should be, only not new.
    assert not beyond_chance(findings.figures.noise)


def test_noise_that_is_the_same_in_all_columns_is_caught_by_its_correlation(
    attack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MECHANISM, "noised", one_number_for_all_columns)
    findings = attack(canaries=1000).findings
    assert findings.verdict == "FALSIFIED"
    assert findings.figures.between_columns.value > 0.5


def test_canaries_that_are_not_trained_on_are_no_test(attack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MECHANISM, "poisson_batch", hardly_a_batch)
    findings = attack(canaries=1000).findings
    assert findings.verdict == "INCONCLUSIVE"
    assert findings.figures.shift.value == pytest.approx(0.5, abs=0.05)


def test_an_mlp_whose_noise_is_halved_is_caught_too(attack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MECHANISM, "noised", noise_halved)
    assert attack(canaries=1000, model="mlp").findings.verdict == "FALSIFIED"


@pytest.mark.parametrize("epsilon", CLAIMS)
def test_the_engine_as_it_is_keeps_its_claim(epsilon: float, attack: Any) -> None:
    found = attack(epsilon=epsilon)
    row("as it is", epsilon, found)
    findings = found.findings
    assert findings.verdict == "PASS"
    assert 0 < findings.figures.bound <= epsilon
    assert findings.figures.noise.value == pytest.approx(1, abs=0.04)
    assert findings.figures.shift.value == pytest.approx(1, abs=0.1)


def test_the_mlp_as_it_is_keeps_its_claim(attack: Any) -> None:
    findings = attack(model="mlp", canaries=1000).findings
    assert findings.verdict == "PASS"
    assert findings.figures.bound <= findings.claim.epsilon


# What one record can move: the property that the proof rests on, for gradients of every shape.


def clipped_layer_by_layer(
    inputs: list[Tensor], deltas: list[Tensor], _biases: Tensor, _stack: Any, max_grad_norm: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Mis-calibrated: each layer has the whole norm to itself, so a record moves the sum by C times root of layers."""
    clipped = [
        delta * MECHANISM.clip_factors(delta.square().sum(-1) * (value.square().sum(-1) + 1), max_grad_norm)[..., None]
        for value, delta in zip(inputs, deltas, strict=True)
    ]
    return inputs, clipped


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], phases=[Phase.generate])
@given(data=st.data())
def check_sensitivity(data: st.DataObject) -> None:
    """Zeroing out one record moves the sum of clipped gradients by at most C."""
    hidden = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    width, rows = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    clip = data.draw(st.sampled_from([0.01, 0.3, 2.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    scale = data.draw(st.sampled_from([0.1, 1.0, 20.0]))
    model = build(ModelSpec(kind="mlp", hidden=hidden), width, "float64")
    params = {
        name: scale * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in model.named_parameters()
    }
    x = scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    y = (torch.rand(rows, generator=generator) < 0.5).double()
    grad_fn = private_gradient(
        model, record_losses,
        mechanism=Mechanism(sample_rate=1.0, max_grad_norm=clip, noise_multiplier=0.0),
        expected_batch_size=1.0, rng=SecureRandom.seeded(1),
    )  # fmt: skip
    whole = grad_fn(params, Task("bank", "", x, y))
    without = grad_fn(params, Task("bank", "", x[1:], y[1:]))
    moved = math.sqrt(sum(float((whole[name] - without[name]).square().sum()) for name in whole))
    assert moved <= clip * (1 + 1e-6)


def test_one_record_moves_the_sum_by_no_more_than_the_clip() -> None:
    check_sensitivity()


def test_a_clip_of_each_layer_by_itself_is_caught_by_the_sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.closed_form, "_clipped", clipped_layer_by_layer)
    with pytest.raises(AssertionError):
        check_sensitivity()


@pytest.mark.parametrize("bug", [no_clipping, one_factor_for_the_batch], ids=["no clipping", "one factor"])
def test_a_clip_that_is_none_is_caught_by_the_sensitivity(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MECHANISM, "clip_factors", bug)
    with pytest.raises(AssertionError):
        check_sensitivity()


def test_a_clip_of_each_layer_by_itself_is_what_an_audit_cannot_see(
    attack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nearly all of a canary's gradient lies in one layer, whose own clip holds: the page says so.
    monkeypatch.setattr(client.closed_form, "_clipped", clipped_layer_by_layer)
    assert attack(model="mlp", canaries=1000).findings.verdict == "PASS"
