"""Privacy units of several records: their summed gradient is clipped as one, in both engines, whatever it is."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from client.dpsgd import private_gradient
from client.rng import SecureRandom
from metarisk_common.algorithms import GradFn
from metarisk_common.params import Params, l2_norm, sub
from metarisk_common.plan import Mechanism
from metarisk_common.tasks import Task

Build = Callable[..., GradFn]
WIDTH = 4


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], y, reduction="none")


def squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs[:, 0] - y).square()


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 1, bias=False)).to(dtype)


def params_of(model: nn.Module, seed: int = 0) -> Params:
    random = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(random.normal(0, 0.6, tuple(value.shape))).to(value.dtype)
        for name, value in model.named_parameters()
    }


def task_of(unit: list[int], seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Task:
    """Records of the units, renumbered from 0 in the order they appear."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(unit))}
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.normal(0, scale, (len(unit), WIDTH))).to(dtype)
    y = torch.from_numpy(random.integers(0, 2, len(unit))).to(dtype)
    return Task("bank", "", x, y, torch.tensor([numbers[name] for name in unit], dtype=torch.int64))


def units_of(task: Task) -> Tensor:
    assert isinstance(task.unit, Tensor)
    return task.unit


def without(task: Task, unit: int) -> Task:
    """The neighbour in which one unit does not exist."""
    kept = units_of(task) != unit
    rest = units_of(task)[kept]
    return Task("bank", "", task.x[kept], task.y[kept], torch.where(rest > unit, rest - 1, rest))


@pytest.fixture(scope="session", params=["closed-form", "opacus"])
def engine(request: pytest.FixtureRequest) -> Build:
    def build(
        model: nn.Module,
        *,
        clip: float | None = 0.3,
        noise: float = 0.0,
        rate: float = 1.0,
        expected: float = 1.0,
        of: Callable[[Tensor, Tensor], Tensor] = loss,
    ) -> GradFn:
        mechanism = Mechanism(sample_rate=rate, max_grad_norm=clip, noise_multiplier=noise)
        return private_gradient(
            model, of, mechanism=mechanism, expected_batch_size=expected, rng=SecureRandom.seeded(1),
            engine=request.param,
        )  # fmt: skip

    return build


def naive(model: nn.Module, params: Params, task: Task, clip: float) -> Params:
    """The definition: each unit's gradient is that of the sum of its records' losses."""
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    for unit in range(int(units_of(task).max()) + 1):
        own = units_of(task) == unit
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        outputs = torch.func.functional_call(model, leaves, (task.x[own],))
        gradient = torch.autograd.grad(loss(outputs, task.y[own]).sum(), list(leaves.values()))
        norm = sum(float(value.square().sum()) for value in gradient) ** 0.5
        for name, value in zip(total, gradient, strict=True):
            total[name] += value * min(1.0, clip / (norm + 1e-6))
    return total


UNITS = st.lists(st.integers(0, 6), min_size=1, max_size=16)


@settings(max_examples=50)
@given(unit=UNITS, seed=st.integers(0, 2**31), clip=st.sampled_from([1e-3, 0.3, 2.0, 100.0]))
def test_it_is_the_naive_sum_over_units(engine: Build, unit: list[int], seed: int, clip: float) -> None:
    model = network()
    params, task = params_of(model, seed), task_of(unit, seed)
    found, expected = engine(model, clip=clip)(params, task), naive(model, params, task, clip)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)


@settings(max_examples=50)
@given(
    unit=UNITS, seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1.0, 1e4]), clip=st.sampled_from([1e-3, 0.7])
)
def test_no_unit_moves_the_sum_by_more_than_the_clip_norm(
    engine: Build, unit: list[int], seed: int, scale: float, clip: float
) -> None:
    model = network()
    params, task = params_of(model, seed), task_of(unit, seed, scale)
    grad_fn = engine(model, clip=clip)
    gone = seed % (int(units_of(task).max()) + 1)
    assert l2_norm(sub(grad_fn(params, task), grad_fn(params, without(task, gone)))) <= clip * (1 + 1e-9)


def test_the_property_would_catch_a_clip_by_record(engine: Build) -> None:
    """Clipped one by one, a unit of four moves the sum by more: units must really be told apart."""
    model = network()
    params, task = params_of(model), task_of([0, 0, 0, 0])
    task.x[:], task.y[:] = task.x[0].clone(), task.y[0].clone()
    by_record = Task("bank", "", task.x, task.y)
    grad_fn = engine(model, clip=1e-2)
    assert l2_norm(grad_fn(params, task)) <= 1e-2
    assert l2_norm(grad_fn(params, by_record)) == pytest.approx(4e-2, rel=1e-3)


def test_units_of_one_record_are_records(engine: Build) -> None:
    model = network()
    params, task = params_of(model), task_of(list(range(12)))
    found, expected = (engine(model)(params, of) for of in (task, Task("bank", "", task.x, task.y)))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


def test_the_order_of_records_is_of_no_account(engine: Build) -> None:
    model = network()
    params, task = params_of(model), task_of([0, 1, 1, 2, 2, 2, 3])
    order = torch.tensor([5, 0, 3, 6, 1, 4, 2])
    mixed = Task("bank", "", task.x[order], task.y[order], units_of(task)[order].numpy())
    found, expected = (engine(model)(params, of) for of in (mixed, task))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "y"])
def test_a_record_that_is_not_finite_counts_as_zero_and_its_unit_keeps_the_rest(
    engine: Build, where: str, poison: float
) -> None:
    model = network()
    params, task = params_of(model), task_of([0, 0, 1, 1, 2])
    kept = torch.tensor([True, True, False, True, True])
    expected = engine(model)(params, Task("bank", "", task.x[kept], task.y[kept], units_of(task)[kept]))
    if where == "x":
        task.x[2, 1] = poison
    else:
        task.y[2] = poison
    found = engine(model)(params, task)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


def test_a_unit_whose_sum_is_not_finite_counts_as_zero(engine: Build) -> None:
    """Each record's gradient is a number still, and so is every other unit's."""
    model = nn.Linear(WIDTH, 1, bias=False).double()
    params, task = params_of(model), task_of([0, 0, 1])
    task.x[:2], task.y[:] = 0.0, 1.0
    task.x[:2, 1] = 1.5e308
    grad_fn = engine(model, of=lambda outputs, y: outputs[:, 0] * y)
    found, expected = grad_fn(params, task), grad_fn(params, without(task, 0))
    assert l2_norm(expected) == pytest.approx(0.3, rel=1e-4)
    torch.testing.assert_close(found["weight"], expected["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6, 1e8])
def test_records_that_cancel_cannot_hide_behind_rounding(engine: Build, scale: float, dtype: torch.dtype) -> None:
    """Two huge and almost opposite records of one customer: what rounding leaves of them is still clipped."""
    model = nn.Linear(WIDTH, 1, dtype=dtype)
    params = params_of(model)
    for seed in range(20):
        task = task_of([0, 0], seed, dtype=dtype)
        task.x[1] = task.x[0]
        logit = nn.functional.linear(task.x[0], params["weight"], params["bias"])
        # Labels that make the two gradients opposite, up to rounding and a little.
        task.y[0], task.y[1] = logit.item() - scale, logit.item() + scale * (1 + 1e-6)
        moved = l2_norm(engine(model, clip=0.1, of=squared_error)(params, task))
        assert moved <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize(("rate", "unit"), [(1.0, []), (0.5, []), (1e-12, [0, 0, 1])])
def test_an_empty_batch_is_noised_like_any_other(engine: Build, rate: float, unit: list[int]) -> None:
    model = network()
    params, task = params_of(model), task_of(unit)
    grad_fn = engine(model, noise=2.0, rate=rate, expected=5.0)
    values = np.concatenate([value.numpy().ravel() for _ in range(60) for value in grad_fn(params, task).values()])
    assert stats.kstest(values, stats.norm(0, 2.0 * 0.3 / 5.0).cdf).pvalue > 1e-3


def test_sampling_is_by_unit(engine: Build) -> None:
    """Every release of one unit's clipped gradient is all of it or nothing."""
    model = network()
    params, task = params_of(model), task_of([0, 0, 0])
    whole = l2_norm(engine(model)(params, task))
    grad_fn = engine(model, rate=0.5)
    norms = [l2_norm(grad_fn(params, task)) for _ in range(200)]
    came = [norm for norm in norms if norm > 0]
    assert came == pytest.approx([whole] * len(came), rel=1e-9)
    assert 60 < len(came) < 140


def test_without_a_clip_units_only_matter_for_sampling(engine: Build) -> None:
    model = network()
    params, task = params_of(model), task_of([0, 0, 1])
    found, expected = (engine(model, clip=None)(params, of) for of in (task, Task("bank", "", task.x, task.y)))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
