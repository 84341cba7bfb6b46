"""The closed form against unmodified Opacus, one task at a time and many at once; and which models it takes."""

import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from client import closed_form
from client.dpsgd import private_gradient, private_gradients
from client.rng import SecureRandom
from metarisk_common.models import build, record_losses
from metarisk_common.params import Params, l2_norm, sub
from metarisk_common.plan import Mechanism, ModelSpec
from metarisk_common.tasks import Task

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ACTIVATIONS = {
    repr(module): module
    for module in (
        nn.Identity(), nn.Tanh(), nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.GELU("tanh"), nn.Sigmoid(),
        nn.Softplus(2.0), nn.LeakyReLU(0.2), nn.ELU(), nn.SELU(), nn.CELU(), nn.SiLU(), nn.Mish(), nn.Softsign(),
        nn.Tanhshrink(), nn.LogSigmoid(), nn.Hardtanh(), nn.Hardswish(), nn.Hardsigmoid(), nn.Softshrink(),
        nn.Hardshrink(), nn.ReLU6(), nn.Threshold(0.1, 0.2),
    )
}  # fmt: skip


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Of every output, so that wide heads count too."""
    return functional.softplus(outputs * (1 - 2 * y[:, None])).sum(1)


def network(widths: Sequence[int], biases: Sequence[bool], activation: nn.Module) -> nn.Sequential:
    layers: list[nn.Module] = []
    for (before, after), bias in zip(pairwise(widths), biases, strict=True):
        layers += [nn.Linear(before, after, bias=bias), activation]
    return nn.Sequential(*layers[:-1]).double()


def params_of(model: nn.Module, seed: int, scale: float = 0.7) -> Params:
    random = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(random.normal(0, scale, tuple(value.shape))).to(value.dtype)
        for name, value in model.named_parameters()
    }


def task_of(rows: int, width: int, seed: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Task:
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.normal(0, scale, (rows, width))).to(dtype)
    return Task("bank", "", x, torch.from_numpy(random.integers(0, 2, rows)).to(dtype))


def mechanism(clip: float | None = 0.7, noise: float = 0.0, rate: float = 1.0) -> Mechanism:
    return Mechanism(sample_rate=rate, max_grad_norm=clip, noise_multiplier=noise)


def unmodified_opacus(model: nn.Module, params: Params, task: Task, clip: float, std: float, seed: int) -> Params:
    """Opacus' own hooks and its own clipping; only the noise is drawn as ours."""
    from opacus import GradSampleModule  # noqa: PLC0415 - slow
    from opacus.optimizers import DPOptimizer  # noqa: PLC0415

    module = GradSampleModule(model, loss_reduction="sum")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(params[name])
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=10,
    )  # fmt: skip
    torch.autograd.backward(loss(module(task.x.clone().requires_grad_()), task.y).sum())
    optimizer.pre_step()
    rng = SecureRandom.seeded(seed)
    released = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        released[name] = parameter.grad + torch.from_numpy(rng.normal(tuple(parameter.shape), std)) / 10
    return released


def relative(found: Params, expected: Params) -> float:
    return l2_norm(sub(found, expected)) / max(l2_norm(expected), 1e-300)


@settings(max_examples=40)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    biases=st.lists(st.booleans(), min_size=4, max_size=4),
    activation=st.sampled_from([name for name in ACTIVATIONS if "inplace" not in name]),  # Opacus refuses these.
    rows=st.integers(1, 17),
    clip=st.sampled_from([1e-3, 0.3, 1.0, 40.0]),
    noise=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_it_is_what_unmodified_opacus_gives(
    widths: list[int], biases: list[bool], activation: str, rows: int, clip: float, noise: float, seed: int
) -> None:
    model = network(widths, biases[: len(widths) - 1], ACTIVATIONS[activation])
    params, task = params_of(model, seed), task_of(rows, widths[0], seed)
    found = private_gradient(
        model, loss, mechanism=mechanism(clip, noise), expected_batch_size=10.0, rng=SecureRandom.seeded(seed),
        engine="closed-form",
    )(params, task)  # fmt: skip
    expected = unmodified_opacus(model, params, task, clip, clip * noise, seed)
    assert list(found) == list(expected)
    if l2_norm(expected) > 1e-9:
        assert relative(found, expected) < 1e-9


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_every_activation_has_its_own_derivative(activation: nn.Module) -> None:
    model = network([4, 6, 5, 2], [True, False, True], activation)
    params, task = params_of(model, 1), task_of(30, 4, 1)
    found = private_gradient(
        model, loss, mechanism=mechanism(None), expected_batch_size=1.0, rng=SecureRandom.seeded(0),
        engine="closed-form",
    )(params, task)  # fmt: skip
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    total = loss(torch.func.functional_call(model, leaves, (task.x,)), task.y).sum()
    expected = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert relative(found, expected) < 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-4)])
@pytest.mark.parametrize("spec", [ModelSpec(), ModelSpec(kind="mlp", hidden=(6, 3))], ids=["scorecard", "mlp"])
def test_both_engines_give_the_house_models_the_same_gradient_and_noise(
    spec: ModelSpec, dtype: str, tolerance: float, device: str
) -> None:
    model = build(spec, 5, dtype).to(device)
    params = {name: value.to(device) for name, value in params_of(model, 2).items()}
    task = task_of(40, 5, 2, dtype=next(model.parameters()).dtype)
    there = Task("bank", "", task.x.to(device), task.y.to(device))
    closed, opacus = (
        private_gradient(
            model, record_losses, mechanism=mechanism(0.2, 1.5, 0.5), expected_batch_size=20.0,
            rng=SecureRandom.seeded(3), engine=engine,
        )(params, there)
        for engine in ("closed-form", "opacus")
    )  # fmt: skip
    assert {value.device.type for value in closed.values()} == {device}
    assert {value.dtype for value in closed.values()} == {task.x.dtype}
    assert relative(closed, opacus) < tolerance


def stacked(params: Sequence[Params]) -> Params:
    return {name: torch.stack([each[name] for each in params]) for name in params[0]}


@settings(max_examples=30)
@given(
    rows=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    units=st.lists(st.sampled_from([0, 1, 3]), min_size=5, max_size=5),
    clip=st.sampled_from([None, 0.4]),
    poison=st.sampled_from([0.0, np.nan, np.inf]),
    noise=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_tasks_in_one_go_are_tasks_one_by_one(
    rows: list[int], units: list[int], clip: float | None, poison: float, noise: float, seed: int
) -> None:
    """Whatever their sizes, padding shows nowhere, not even beside a record that is not finite."""
    model = network([3, 4, 2], [True, True], nn.Tanh())
    tasks, params = [], [params_of(model, seed + index) for index in range(len(rows))]
    for index, (count, most) in enumerate(zip(rows, units, strict=False)):
        task = task_of(count, 3, seed + index)
        unit = torch.arange(count) // most if most else None
        if count and clip is not None and poison:
            task.x[index % count, 1] = poison
        tasks.append(Task("bank", str(index), task.x, task.y, unit))
    public: dict[str, Any] = {"mechanism": mechanism(clip, noise if clip else 0.0)}
    sizes = [2.0 + index for index in range(len(rows))]
    for engine in ("auto", "opacus"):
        grads_fn = private_gradients(
            model, loss, expected_batch_size=sizes, rng=SecureRandom.seeded(seed), engine=engine, **public
        )
        rng = SecureRandom.seeded(seed)
        each = [
            private_gradient(model, loss, expected_batch_size=size, rng=rng, **public)(own, task)
            for size, own, task in zip(sizes, params, tasks, strict=True)
        ]
        expected, found = stacked(each), grads_fn(stacked(params), tasks)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


def test_tasks_are_drawn_and_noised_apart_from_each_other() -> None:
    model = network([3, 2], [True], nn.Tanh())
    params, task = params_of(model, 1), task_of(50, 3, 1)
    grads_fn = private_gradients(
        model, loss, mechanism=mechanism(0.4, 0.01, 0.5), expected_batch_size=25.0, rng=SecureRandom.seeded(1)
    )
    found = grads_fn(stacked([params] * 4), [task] * 4)
    flat = torch.cat([value.flatten(1) for value in found.values()], dim=1)
    assert len({tuple(row) for row in flat.tolist()}) == 4
    with pytest.raises(ValueError, match="one for each of 4 tasks"):
        private_gradients(
            model, loss, mechanism=mechanism(), expected_batch_size=[1.0, 2.0], rng=SecureRandom.seeded(1)
        )(stacked([params] * 4), [task] * 4)


@settings(max_examples=25)
@given(rows=st.integers(2, 9), seed=st.integers(0, 2**31), scale=st.sampled_from([1.0, 30.0]))
def test_a_clip_layer_by_layer_would_be_caught(rows: int, seed: int, scale: float) -> None:
    """The sensitivity property, of all layers together, and what it says of C granted to every layer."""
    model = network([3, 4, 4, 1], [True] * 3, nn.Tanh())
    params, task = params_of(model, seed), task_of(rows, 3, seed, scale=scale)
    fewer = Task("bank", "", task.x[1:], task.y[1:])
    assert moved(model, params, task, fewer, 1e-4) <= 1e-4 * (1 + 1e-9)
    original = closed_form._clipped

    def layer_by_layer(inputs: list[Tensor], deltas: list[Tensor], biases: Tensor, *public: Any) -> Any:
        each = [original([i], [d], b[None], *public) for i, d, b in zip(inputs, deltas, biases, strict=True)]
        return [i[0] for i, _ in each], [d[0] for _, d in each]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_form, "_clipped", layer_by_layer)
        assert moved(model, params, task, fewer, 1e-4) > 1e-4 * 1.01


@pytest.mark.parametrize("delta", [1e-18, 1e-20, 1e-22, 1e-24, 1e-30])
def test_no_gradient_hides_behind_squares_that_vanish_in_float32(delta: float) -> None:
    """Its delta squared is below what float32 holds, its input is huge, and their product is neither."""
    model = nn.Linear(3, 4, bias=False)
    task = Task("bank", "", torch.full((1, 3), 1e18), torch.tensor([delta]))
    grad_fn = private_gradient(
        model, lambda outputs, y: outputs.sum(1) * y, mechanism=mechanism(1e-5), expected_batch_size=1.0,
        rng=SecureRandom.seeded(0), engine="closed-form",
    )  # fmt: skip
    assert l2_norm(grad_fn(params_of(model, 1), task)) <= 1e-5 * (1 + 1e-6)


def moved(model: nn.Module, params: Params, task: Task, neighbour: Task, clip: float) -> float:
    grad_fn = private_gradient(
        model, loss, mechanism=mechanism(clip), expected_batch_size=1.0, rng=SecureRandom.seeded(0),
        engine="closed-form",
    )  # fmt: skip
    return l2_norm(sub(grad_fn(params, task), grad_fn(params, neighbour)))


def test_neither_torchs_nor_numpys_generator_is_ever_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = network([3, 4, 1], [True, True], nn.Tanh()), nn.Sequential(nn.Flatten(), nn.Linear(3, 1).double())
    rng = SecureRandom.from_system()
    ways = [
        private_gradient(m, loss, mechanism=mechanism(0.4, 1.0, 0.5), expected_batch_size=4.0, rng=rng, engine=engine)
        for m in (model, other)
        for engine in ("auto", "opacus")
    ]
    params, task = [params_of(model, 1)] * 2 + [params_of(other, 1)] * 2, task_of(8, 3, 1)
    state, numpy_state = torch.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002 - the one to watch

    def drawn(*_: object, **__: object) -> None:
        pytest.fail("drawn from a generator that is not cryptographic")

    for name in ("rand", "randn", "rand_like", "randn_like", "randint", "randperm", "normal", "bernoulli", "poisson"):
        monkeypatch.setattr(torch, name, drawn)
    for name in ("normal_", "uniform_", "bernoulli_", "exponential_", "random_"):
        monkeypatch.setattr(Tensor, name, drawn)
    for name in ("random", "rand", "randn", "normal", "binomial", "poisson", "shuffle", "choice", "default_rng"):
        monkeypatch.setattr(np.random, name, drawn)
    for grad_fn, own in zip(ways, params, strict=True):
        assert all(bool(value.isfinite().all()) for value in grad_fn(own, task).values())
    assert torch.equal(state, torch.get_rng_state())
    assert repr(np.random.get_state()) == numpy_state  # noqa: NPY002


def test_opacus_is_loaded_only_by_whoever_uses_it(environment: dict[str, str]) -> None:
    program = """
import sys, torch
from client.dpsgd import plain_gradient, private_gradient, private_gradients
from client.rng import SecureRandom
from metarisk_common.models import build, record_losses
from metarisk_common.plan import Mechanism, ModelSpec
from metarisk_common.tasks import Task
model = build(ModelSpec(kind="mlp", hidden=(3,)), 2)
params = {name: value.detach() for name, value in model.named_parameters()}
task = Task("bank", "", torch.ones(4, 2), torch.ones(4), torch.tensor([0, 0, 1, 2]))
for engine in ("auto", "opacus"):
    grad_fn = private_gradient(model, record_losses, mechanism=Mechanism(noise_multiplier=1.0),
                               expected_batch_size=4.0, rng=SecureRandom.from_system(), engine=engine)
    grad_fn(params, task)
    print("opacus" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["False", "True"]
