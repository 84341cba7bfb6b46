"""The private gradient against a naive loop over records, and against whoever would tell two neighbours apart."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from client.dpsgd import plain_gradient, private_gradient
from client.mechanism import RecordLoss
from client.rng import SecureRandom
from metarisk_common.algorithms import GradFn
from metarisk_common.params import Params, l2_norm, sub
from metarisk_common.plan import Mechanism

Build = Callable[..., GradFn]
FEATURES = 6
CLIP = 0.3


@dataclass(frozen=True)
class Records:
    x: Tensor
    y: Tensor
    unit: Tensor | None = None


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], y, reduction="none")


def scorecard(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Linear(FEATURES, 1, bias=False, dtype=dtype)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


MODELS = pytest.mark.parametrize("build", [scorecard, mlp])


def params_of(model: nn.Module, seed: int = 0) -> Params:
    random = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(random.normal(0, 0.5, tuple(value.shape))).to(value.dtype)
        for name, value in model.named_parameters()
    }


def records(rows: int, seed: int = 1, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Records:
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.normal(0, scale, (rows, FEATURES))).to(dtype)
    return Records(x, torch.from_numpy(random.integers(0, 2, rows)).to(dtype))


@pytest.fixture(scope="session", params=["closed-form", "opacus"])
def engine(request: pytest.FixtureRequest) -> Build:
    def build(
        model: nn.Module,
        *,
        noise: float = 0.0,
        clip: float | None = CLIP,
        rate: float = 1.0,
        expected: float = 10.0,
        seed: int | None = None,
        of: RecordLoss = loss,
    ) -> GradFn:
        rng = SecureRandom.from_system() if seed is None else SecureRandom.seeded(seed)
        mechanism = Mechanism(sample_rate=rate, max_grad_norm=clip, noise_multiplier=noise)
        return private_gradient(
            model, of, mechanism=mechanism, expected_batch_size=expected, rng=rng, engine=request.param
        )

    return build


def naive(model: nn.Module, params: Params, task: Records, *, clip: float, expected: float) -> Params:
    """The definition, record by record."""
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    for row in range(len(task.x)):
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        outputs = torch.func.functional_call(model, leaves, (task.x[row : row + 1],))
        gradients = torch.autograd.grad(loss(outputs, task.y[row : row + 1]).sum(), list(leaves.values()))
        norm = sum(float((gradient**2).sum()) for gradient in gradients) ** 0.5
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient * min(1.0, clip / norm) / expected
    return total


def assert_close(found: Params, expected: Params, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def flat(params: Params) -> np.ndarray:
    return np.concatenate([value.numpy().ravel() for value in params.values()])


@MODELS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 1e-5)])
def test_without_noise_it_is_the_naive_loop_over_records(
    engine: Build, build: Callable[[torch.dtype], nn.Module], dtype: torch.dtype, tolerance: float
) -> None:
    model = build(dtype)
    params, task = params_of(model), records(40, dtype=dtype)
    grad_fn = engine(model, expected=25.0)
    expected = naive(model, params, task, clip=CLIP, expected=25.0)
    for _ in range(2):  # The engine is built once and must carry nothing over.
        found = grad_fn(params, task)
        assert_close(found, expected, tolerance)
        assert {value.dtype for value in found.values()} == {dtype}


@MODELS
@pytest.mark.parametrize("clip", [None, 1e9])
def test_without_privacy_the_private_engine_is_the_plain_one(
    engine: Build, build: Callable[[], nn.Module], clip: float | None
) -> None:
    model = build()
    params, task = params_of(model), records(30)
    assert_close(engine(model, clip=clip, expected=30.0)(params, task), plain_gradient(model, loss)(params, task), 1e-6)


def test_the_plain_gradient_is_that_of_the_mean_loss() -> None:
    model = mlp()
    params, task = params_of(model), records(30)
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    loss(torch.func.functional_call(model, leaves, (task.x,)), task.y).mean().backward()  # type: ignore[no-untyped-call]
    assert_close(plain_gradient(model, loss)(params, task), {name: leaf.grad for name, leaf in leaves.items()}, 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 12),
    scale=st.sampled_from([1e-3, 1.0, 100.0, 1e8]),
    clip=st.sampled_from([1e-4, 0.7, 50.0]),
    expected=st.sampled_from([0.5, 12.0]),
)
@MODELS
def test_no_record_moves_the_sum_by_more_than_the_clip_norm(
    engine: Build, build: Callable[[], nn.Module], seed: int, rows: int, scale: float, clip: float, expected: float
) -> None:
    model = build()
    params, task = params_of(model, seed), records(rows, seed, scale)
    grad_fn = engine(model, clip=clip, expected=expected)
    kept = torch.arange(rows) != seed % rows
    with_it, without_it = grad_fn(params, task), grad_fn(params, Records(task.x[kept], task.y[kept]))
    assert l2_norm(sub(with_it, without_it)) <= clip / expected * (1 + 1e-9)


@MODELS
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e200])
def test_a_record_that_is_not_finite_counts_as_zero(
    engine: Build, build: Callable[[], nn.Module], poison: float
) -> None:
    model = build()
    params, task = params_of(model), records(8)
    x = task.x.clone()
    x[3, 2] = poison
    kept = torch.arange(8) != 3
    grad_fn = engine(model)
    found = grad_fn(params, replace(task, x=x))
    expected = grad_fn(params, Records(task.x[kept], task.y[kept]))
    if poison == 1e200:  # Finite, if only just: it may count, up to the clip norm.
        assert l2_norm(sub(found, expected)) <= CLIP / 10 * (1 + 1e-9)
    else:
        assert_close(found, expected, 1e-12)


def test_a_label_that_is_not_a_number_counts_as_zero(engine: Build) -> None:
    model = scorecard()
    params, task = params_of(model), records(3)
    y = task.y.clone()
    y[:] = np.nan
    assert not flat(engine(model)(params, replace(task, y=y))).any()


@pytest.mark.parametrize(("rate", "rows"), [(1e-12, 50), (1.0, 0), (0.5, 0)])
@MODELS
def test_an_empty_batch_is_noised_like_any_other(
    engine: Build, build: Callable[[], nn.Module], rate: float, rows: int
) -> None:
    model = build()
    params, task = params_of(model), records(rows)
    grad_fn = engine(model, noise=3.0, rate=rate, expected=5.0, seed=1)
    values = np.concatenate([flat(grad_fn(params, task)) for _ in range(400)])
    assert stats.kstest(values, stats.norm(0, 3.0 * CLIP / 5.0).cdf).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_has_the_promised_standard_deviation_and_is_fresh(engine: Build, dtype: torch.dtype) -> None:
    model = mlp(dtype)
    params, task = params_of(model), records(20, dtype=dtype)
    quiet = flat(engine(model, expected=20.0)(params, task))
    grad_fn = engine(model, noise=2.0, expected=20.0, seed=2)
    noise = np.array([flat(grad_fn(params, task)) for _ in range(300)]) - quiet
    std = 2.0 * CLIP / 20.0
    assert stats.kstest(noise.ravel(), stats.norm(0, std).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise.ravel(), stats.norm(0, wrong * std).cdf).pvalue < 1e-9
    assert abs(np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]) < 5 / noise.size**0.5


def test_neither_noise_nor_scale_depends_on_how_many_records_there_are(engine: Build) -> None:
    model = scorecard()
    params = params_of(model)
    released = []
    for rows in (256, 257):
        task = records(rows)
        quiet = flat(engine(model, expected=64.0)(params, task))
        released.append(flat(engine(model, noise=1.0, expected=64.0, seed=3)(params, task)) - quiet)
    np.testing.assert_allclose(released[0], released[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [CLIP, None])
def test_records_are_drawn_at_the_sample_rate_and_divided_by_the_public_size(engine: Build, clip: float | None) -> None:
    model = scorecard()
    params, task = params_of(model), records(40, scale=0.1)
    grad_fn = engine(model, clip=clip, rate=0.25, expected=10.0, seed=4)
    found = np.array([flat(grad_fn(params, task)) for _ in range(1500)])
    full = flat(engine(model, clip=clip, expected=40.0)(params, task))
    # E[sum over the batch / (q n)] is the full mean; dividing by the true batch size would shrink the spread.
    assert np.abs(found.mean(0) - full).max() < 5 * found.std(0).max() / 1500**0.5
    each = np.array(
        [flat(engine(model, clip=clip, expected=1.0)(params, Records(task.x[[i]], task.y[[i]]))) for i in range(40)]
    )
    assert found.var(0) == pytest.approx(0.25 * 0.75 * (each**2).sum(0) / 100, rel=0.2)


def test_torch_seeds_do_not_steer_the_noise(engine: Build) -> None:
    model = scorecard()
    params, task = params_of(model), records(5)
    grad_fn = engine(model, noise=1.0)
    released = []
    for _ in range(2):
        torch.manual_seed(0)
        released.append(flat(grad_fn(params, task)))
    assert not np.array_equal(released[0], released[1])


@MODELS
def test_the_callers_model_parameters_and_records_are_left_alone(engine: Build, build: Callable[[], nn.Module]) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    params, task = params_of(model), records(5)
    kept, x = {name: value.clone() for name, value in params.items()}, task.x.clone()
    first, second = engine(model, noise=1.0), engine(model, noise=1.0)
    result = first(params, task)
    snapshot = {name: value.clone() for name, value in result.items()}
    first(params, task)
    second(params, task)
    assert_close(result, snapshot, 0)
    assert_close(params, kept, 0)
    assert_close(dict(model.state_dict()), before, 0)
    assert torch.equal(task.x, x)
    assert not task.x.requires_grad
    assert all(value.grad is None for value in model.parameters())
    assert not any(value.requires_grad for value in result.values())


def test_no_per_record_gradient_survives_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []
    from opacus import grad_sample  # noqa: PLC0415 - slow, and only this test needs it

    class Seen(grad_sample.GradSampleModule):  # type: ignore[misc]  # Opacus has no types
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            built.append(self)

    class BrokenRandom(SecureRandom):
        def _keystream(self, count: int) -> bytes:
            raise OSError(f"no randomness left for {count} bytes")

    monkeypatch.setattr(grad_sample, "GradSampleModule", Seen)
    model = scorecard()
    mechanism = Mechanism(sample_rate=1.0, max_grad_norm=CLIP, noise_multiplier=1.0)
    rng = BrokenRandom.seeded(0)
    grad_fn = private_gradient(model, loss, mechanism=mechanism, expected_batch_size=5.0, rng=rng, engine="opacus")
    with pytest.raises(OSError, match="no randomness"):
        grad_fn(params_of(model), records(5))
    for parameter in built[0].parameters():
        assert parameter.grad is None
        assert parameter.grad_sample is None  # type: ignore[attr-defined]
        assert parameter.summed_grad is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("expected", [0.0, -1.0, np.inf, np.nan])
def test_the_divisor_must_be_a_public_positive_number(engine: Build, expected: float) -> None:
    with pytest.raises(ValueError, match="expected_batch_size"):
        engine(scorecard(), expected=expected)


@pytest.mark.parametrize("clip", [CLIP, None])
def test_foreign_parameters_are_refused(engine: Build, clip: float | None) -> None:
    model = scorecard()
    with pytest.raises(ValueError, match="params must hold"):
        engine(model, clip=clip)({**params_of(model), "other": torch.zeros(1)}, records(3))


def test_a_loss_over_the_whole_batch_is_refused(engine: Build) -> None:
    model = scorecard()
    grad_fn = engine(model, noise=1.0, of=lambda outputs, y: loss(outputs, y).mean())
    with pytest.raises(ValueError, match="one value a record"):
        grad_fn(params_of(model), records(3))
