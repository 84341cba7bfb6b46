"""Which models have private gradients in closed form: linear layers and element-wise activations, proved by tracing.

The model's own `forward` runs once on a stand-in for its inputs, which passes linear layers and known activations,
writes them down, and refuses everything else. What comes out is all that the forward does to its inputs: no name or
class is trusted, and whatever is not understood goes to the engine that takes any model.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Layer:
    """A linear layer, by the names of its parameters."""

    weight: str
    bias: str | None


Stage = Layer | Callable[[Tensor], Tensor]
"""A layer, or what is done to its output, entry by entry; last may come `squeeze(-1)`."""

# Each gives an entry of its result from the same entry of its one tensor, and from nothing else.
_ELEMENTWISE: Final = frozenset(
    {
        torch.relu, torch.sigmoid, torch.tanh, functional.celu, functional.elu, functional.gelu, functional.hardshrink,
        functional.hardsigmoid, functional.hardswish, functional.hardtanh, functional.leaky_relu,
        functional.logsigmoid, functional.mish, functional.relu, functional.relu6, functional.selu, functional.sigmoid,
        functional.silu, functional.softplus, functional.softshrink, functional.softsign, functional.tanh,
        functional.tanhshrink, functional.threshold,
    }
)  # fmt: skip

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


class _Trace:
    """Stands for a batch of activations, and knows by which stages it came about."""

    def __init__(self, stages: tuple[Any, ...] = (), *, squeezed: bool = False) -> None:
        self.stages = stages
        self.squeezed = squeezed

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Tensor],
        _types: object,
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        value, others, options = arguments[0], arguments[1:], options or {}
        if isinstance(value, cls) and function is functional.linear and not value.squeezed:
            layer = _Linear(*others, **options)
            if layer.weight.dim() == 2 and (layer.bias is None or layer.bias.dim() == 1):  # noqa: PLR2004 - a matrix
                return cls((*value.stages, layer))
        numbers = all(isinstance(other, int | float | str) for other in [*others, *options.values()])
        if isinstance(value, cls) and function in _ELEMENTWISE and numbers:
            kept = {name: option for name, option in options.items() if name != "inplace"}
            return value.then(lambda before: function(before, *others, **kept))
        raise TypeError("neither a linear layer nor an element-wise activation")

    def __bool__(self) -> bool:
        raise TypeError("a forward that looks at its inputs")

    def __eq__(self, other: object) -> bool:
        raise TypeError("a forward that looks at its inputs")

    __hash__ = None  # type: ignore[assignment]  # as of whatever has no equality

    def then(self, stage: Callable[[Tensor], Tensor]) -> Self:
        return type(self)((*self.stages, stage), squeezed=self.squeezed)

    def squeeze(self, dim: int) -> Self:
        if dim != -1 or self.squeezed:
            raise TypeError("only the outputs' own dimension can be squeezed, once")
        return type(self)((*self.stages, _squeeze), squeezed=True)

    def relu(self) -> Self:
        return self.then(torch.relu)

    def sigmoid(self) -> Self:
        return self.then(torch.sigmoid)

    def tanh(self) -> Self:
        return self.then(torch.tanh)


def stages_of(model: torch.nn.Module) -> Sequence[Stage] | None:
    """Give what a model does to its inputs, (rows, features), stage by stage; None if that is not proved.

    Proved means: its forward, in training mode, is a chain of linear layers, element-wise activations and at most one
    closing `squeeze(-1)`; all its parameters belong to these layers, each to one of them, and none is frozen; they
    are all float32 or all float64; no module has a hook. Dropout, normalisation, convolutions, embeddings, shared or
    skipped layers and anything that looks at its inputs are not.
    """
    if any(getattr(module, hooks) for module in model.modules() for hooks in _HOOKS):
        return None
    traced = model if all(module.training for module in model.modules()) else deepcopy(model).train()
    parameters = list(traced.named_parameters(remove_duplicate=False))
    if {value.dtype for _, value in parameters} not in ({torch.float32}, {torch.float64}):
        return None
    try:
        found = traced(_Trace())
    except Exception:  # noqa: BLE001 - a foreign forward may raise anything over an input that is no tensor
        return None
    if not isinstance(found, _Trace):
        return None
    name_of = {id(value): name for name, value in parameters if value.requires_grad}
    used = [id(tensor) for stage in found.stages if isinstance(stage, _Linear) for tensor in stage.tensors]
    # Every parameter once: none is shared, frozen or left out, and no layer's weights come from something else.
    if len(name_of) != len(parameters) or sorted(used) != sorted(name_of):
        return None
    return [
        Layer(name_of[id(stage.weight)], None if stage.bias is None else name_of[id(stage.bias)])
        if isinstance(stage, _Linear)
        else stage
        for stage in found.stages
    ]


def _squeeze(value: Tensor) -> Tensor:
    return value.squeeze(-1)
