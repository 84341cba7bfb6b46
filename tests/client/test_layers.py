"""Which models the closed form takes: all that are linear layers and activations, and not one that is anything else."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from client.dpsgd import private_gradient, private_gradients
from client.layers import Layer, stages_of
from client.rng import SecureRandom
from metarisk_common.models import build, record_losses
from metarisk_common.plan import Mechanism, ModelSpec
from metarisk_common.tasks import Task


class Forward(nn.Module):
    """Two layers, and whatever a forward does with them."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)
        self.forward = forward.__get__(self)


def hooked(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 1))
    getattr(model[0], f"register_{kind}_hook")(lambda *_: None)
    return model


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    next(model.parameters()).requires_grad = False
    return model


def normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 1)))


TAKEN: dict[str, nn.Module] = {
    "scorecard": build(ModelSpec(), 3),
    "mlp": build(ModelSpec(kind="mlp", hidden=(4, 2)), 3),
    "one layer": nn.Linear(3, 2, bias=False),
    "nested": nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Identity()), nn.Linear(3, 1)),
    "two layers in a row": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)),
    "activation first and last": nn.Sequential(nn.Tanh(), nn.Linear(3, 1), nn.Sigmoid()),
    "of functions": Forward(lambda self, x: functional.gelu(self.second(functional.relu(self.first(x)))).squeeze(-1)),
    "of methods": Forward(lambda self, x: self.second(self.first(x).tanh().relu().sigmoid()).squeeze(dim=-1)),
    "in place": nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 1)),
    "one record's outputs": nn.Sequential(nn.Linear(3, 3), nn.Softplus(beta=3.0), nn.Linear(3, 2)).eval(),
}
REFUSED: dict[str, nn.Module] = {
    "dropout": nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1)),
    "dropout in eval mode": nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1)).eval(),
    "random slopes": nn.Sequential(nn.Linear(3, 3), nn.RReLU(), nn.Linear(3, 1)),
    "batch normalisation": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)),
    "layer normalisation": nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1)),
    "softmax": nn.Sequential(nn.Linear(3, 3), nn.Softmax(dim=0), nn.Linear(3, 1)),
    "learned slopes": nn.Sequential(nn.Linear(3, 3), nn.PReLU(), nn.Linear(3, 1)),
    "convolution": nn.Sequential(nn.Conv1d(1, 1, 3)),
    "embedding": nn.Embedding(3, 2),
    "flattening": nn.Sequential(nn.Flatten(), nn.Linear(3, 1)),
    "no layer": nn.Sequential(nn.Tanh()),
    "shared layer": shared(),
    "tied weights": tied(),
    "frozen layer": frozen(),
    "weights of weights": normed(),
    "half precision": nn.Linear(3, 1, dtype=torch.bfloat16),
    "two precisions": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1, dtype=torch.float64)),
    "left out": Forward(lambda self, x: self.first(x)),
    "computed and thrown away": Forward(lambda self, x: (self.second(self.first(x)), self.first(x))[1]),
    "skip": Forward(lambda self, x: self.second(self.first(x) + x)),
    "mean over records": Forward(lambda self, x: self.second(self.first(x) - x.mean(0))),
    "records joined": Forward(lambda self, x: self.second(self.first(torch.cumsum(x, 0)))),
    "looks at its input": Forward(lambda self, x: self.second(self.first(x)) if len(x) > 2 else self.second(x)),
    "tests its input": Forward(lambda self, x: self.second(self.first(x if x.sum() > 0 else -x))),
    "is anything there": Forward(lambda self, x: self.second(self.first(x) if x else x)),
    "compares its input": Forward(lambda self, x: self.second(x if x == 0 else self.first(x))),
    "noise": Forward(lambda self, x: self.second(torch.tanh(self.first(x)) * torch.rand(3))),
    "scaled": Forward(lambda self, x: self.second(2 * self.first(x))),
    "squeezed within": Forward(lambda self, x: self.second(self.first(x).squeeze(-1))),
    "squeezed rows": Forward(lambda self, x: self.second(self.first(x)).squeeze(0)),
    "squeezed twice": Forward(lambda self, x: self.second(self.first(x)).squeeze(-1).squeeze(-1)),
    "squeezed everywhere": Forward(lambda self, x: self.second(self.first(x)).squeeze()),
    "two outputs": Forward(lambda self, x: (self.second(self.first(x)), x)),
    "foreign weights": Forward(lambda self, x: functional.linear(self.second(self.first(x)), torch.ones(1, 1))),
    "weights from inputs": Forward(lambda self, x: functional.linear(self.first.weight, x, self.second(x))),
    "not a forward": Forward(lambda _self, _x: "nothing"),
    "forward hook": hooked("forward"),
    "forward pre-hook": hooked("forward_pre"),
    "backward hook": hooked("full_backward"),
    "backward pre-hook": hooked("full_backward_pre"),
}


@pytest.mark.parametrize("model", TAKEN.values(), ids=TAKEN.keys())
def test_linear_layers_and_activations_are_taken_and_computed_as_the_forward_does(model: nn.Module) -> None:
    stages = stages_of(model)
    assert stages is not None
    layers = [stage for stage in stages if isinstance(stage, Layer)]
    assert {name for layer in layers for name in (layer.weight, layer.bias)} - {None} == set(
        dict(model.named_parameters())
    )
    x = torch.linspace(-1, 1, 12).view(4, 3)
    value, weights = x.clone(), dict(model.named_parameters())
    for stage in stages:
        if isinstance(stage, Layer):
            value = functional.linear(value, weights[stage.weight], weights[stage.bias] if stage.bias else None)
        else:
            value = stage(value)
    torch.testing.assert_close(value, model(x))


@pytest.mark.parametrize("model", REFUSED.values(), ids=REFUSED.keys())
def test_whatever_is_not_proved_is_left_to_opacus(model: nn.Module) -> None:
    assert stages_of(model) is None
    public: dict[str, Any] = {
        "mechanism": Mechanism(noise_multiplier=1.0), "expected_batch_size": 1.0, "rng": SecureRandom.seeded(0),
    }  # fmt: skip
    for build_gradient in (private_gradient, private_gradients):
        with pytest.raises(ValueError, match="closed form takes linear layers"):
            build_gradient(model, record_losses, engine="closed-form", **public)


def test_a_model_that_is_left_to_opacus_has_the_right_gradient() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 2 * self.layer(x)
            return out.squeeze(-1)

    model = Scaled()
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    task = Task("bank", "", torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3), torch.ones(4).double())
    public: dict[str, Any] = {
        "mechanism": Mechanism(noise_multiplier=0.0, max_grad_norm=1e6),
        "expected_batch_size": 4.0,
    }
    found = private_gradient(model, record_losses, rng=SecureRandom.seeded(0), **public)(params, task)
    record_losses(model(task.x), task.y).mean().backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad)


def test_proving_leaves_the_model_as_it_was_and_says_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stages_of(model) is not None
        assert stages_of(REFUSED["mean over records"]) is None
    assert not any(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
