"""The models and where they start: the server's shapes are the bank's, and the first model says the base rate."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from metarisk_common.initialisation import initial_params, param_shapes
from metarisk_common.models import DTYPES, build, forward, head_names, record_losses, to_arrays, to_tensors
from metarisk_common.plan import Plan

MODELS: list[dict[str, Any]] = [
    {"kind": "scorecard"},
    {"kind": "mlp", "hidden": [4]},
    {"kind": "mlp", "hidden": [8, 3]},
    {"kind": "mlp", "hidden": [1, 1, 1]},
]
EACH_MODEL = pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model['kind']}{model.get('hidden', '')}")
EACH_DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])


def plan(model: dict[str, Any], dtype: str = "float32") -> Plan:
    column = {"kind": "numeric", "name": "amount", "lower": 0, "upper": 1}
    return Plan.model_validate(
        {
            "name": "test",
            "data": {"label": {"name": "default"}, "institution": "bank", "columns": [column]},
            "model": model,
            "mechanism": {"noise_multiplier": 1.0},
            "dtype": dtype,
        }
    )


def rows(width: int, intercept: float, dtype: str) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(5, width))).to(DTYPES[dtype])
    x[:, -1] = intercept
    return x


@EACH_MODEL
@EACH_DTYPE
@pytest.mark.parametrize("width", [1, 2, 17])
def test_the_servers_shapes_are_the_modules(model: dict[str, Any], dtype: str, width: int) -> None:
    chosen = plan(model, dtype)
    module = build(chosen.model, width, dtype)
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert list(param_shapes(chosen.model, width).items()) == list(expected.items())
    params = initial_params(chosen, width)
    assert {name: value.shape for name, value in params.items()} == expected
    assert {value.dtype for value in params.values()} == {np.dtype(dtype)}
    assert {value.dtype for value in module.state_dict().values()} == {DTYPES[dtype]}
    assert set(head_names(chosen.model)) <= expected.keys()


@EACH_MODEL
@pytest.mark.parametrize("base_rate", [0.01, 0.18, 0.5, 0.9])
def test_the_first_model_says_the_base_rate(model: dict[str, Any], base_rate: float) -> None:
    chosen = plan({**model, "base_rate": base_rate}, "float64")
    width, intercept = 6, chosen.data.encoding.intercept
    module = build(chosen.model, width, "float64")
    logits = forward(module, to_tensors(initial_params(chosen, width)), rows(width, intercept, "float64"))
    assert torch.sigmoid(logits).tolist() == pytest.approx([base_rate] * 5, rel=1e-12)


@EACH_MODEL
def test_every_party_starts_at_the_same_point(model: dict[str, Any]) -> None:
    a, b = initial_params(plan(model), 9), initial_params(plan(model), 9)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    c = initial_params(plan({**model, "init_seed": 1}), 9)
    hidden = [name for name in a if name.startswith("body.") and name.endswith(".weight")]
    assert all(np.array_equal(a[name], c[name]) == (name not in hidden) for name in a)


def test_hidden_layers_start_as_they_always_did() -> None:
    """Known numbers: a run that is resumed after an update of NumPy must not start anywhere else."""
    weights = initial_params(plan({"kind": "mlp", "hidden": [2]}, "float64"), 2)["body.0.weight"]
    bound = math.sqrt(6 / 4)
    uniform = np.array([[0.6369616873214543, 0.2697867137638703], [0.04097352393619469, 0.016527635528529094]])
    assert weights == pytest.approx(bound * (2 * uniform - 1), rel=1e-14)


def test_hidden_layers_spread_as_glorot_says() -> None:
    weights = initial_params(plan({"kind": "mlp", "hidden": [200]}, "float64"), 300)["body.0.weight"]
    bound = math.sqrt(6 / 500)
    assert 0.999 * bound < np.abs(weights).max() <= bound
    assert weights.var() == pytest.approx(2 / 500, rel=0.02)


def test_the_scorecards_logit_is_the_sum_of_its_points() -> None:
    chosen = plan({"kind": "scorecard"}, "float64")
    x = rows(4, 0.25, "float64")
    points = np.array([[0.5, -1.0, 2.0, 3.0]])
    logits = forward(build(chosen.model, 4, "float64"), to_tensors({"points.weight": points}), x)
    assert logits.tolist() == pytest.approx((x.numpy() * points).sum(1).tolist(), rel=1e-14)


def test_an_mlp_is_tanh_layers_and_a_linear_head() -> None:
    chosen = plan({"kind": "mlp", "hidden": [3, 2]}, "float64")
    random = np.random.default_rng(8)
    params = {name: random.normal(size=shape) for name, shape in param_shapes(chosen.model, 4).items()}
    x = rows(4, 0.25, "float64")
    hidden = np.tanh(x.numpy() @ params["body.0.weight"].T + params["body.0.bias"])
    hidden = np.tanh(hidden @ params["body.1.weight"].T + params["body.1.bias"])
    expected = (hidden @ params["head.weight"].T + params["head.bias"])[:, 0]
    assert forward(build(chosen.model, 4, "float64"), to_tensors(params), x).tolist() == pytest.approx(
        expected.tolist()
    )


def test_the_loss_is_the_negative_log_likelihood_of_each_record() -> None:
    logits = torch.tensor([-2.0, 0.0, 3.0, 800.0], dtype=torch.float64)
    y = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    expected = [math.log1p(math.exp(-2.0)), math.log(2), math.log1p(math.exp(-3.0)), 800.0]
    assert record_losses(logits, y).tolist() == pytest.approx(expected, rel=1e-12)


@EACH_MODEL
def test_one_record_gives_one_logit_and_no_record_none(model: dict[str, Any]) -> None:
    chosen = plan(model)
    module, params = build(chosen.model, 3), to_tensors(initial_params(chosen, 3))
    for count in (0, 1, 2):
        assert forward(module, params, torch.zeros(count, 3)).shape == (count,)


def test_tensors_are_copies() -> None:
    """What arrived in a message stays as it arrived, whatever training does."""
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    tensors = to_tensors({"a": array})
    tensors["a"] += 1
    assert array.tolist() == [0, 0, 0]
    back = to_arrays({"a": tensors["a"].requires_grad_()})
    assert back["a"].tolist() == [1, 1, 1]
    assert back["a"].dtype == np.float32


@EACH_MODEL
def test_a_forward_pass_does_not_touch_the_module(model: dict[str, Any]) -> None:
    chosen = plan(model)
    module = build(chosen.model, 3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    forward(module, to_tensors(initial_params(chosen, 3)), torch.zeros(2, 3))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
