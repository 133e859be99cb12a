"""What the low-rank layers share: two children, the matrix that their product stands for, and the way in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ._checks import FLOAT_DTYPES, describe
from ._linalg import working_copy

if TYPE_CHECKING:
    from ._matricise import Matricisation

_Layer = TypeVar("_Layer", bound="LowRankLayer")
_Module = TypeVar("_Module", bound=nn.Module)


class LowRankLayer(nn.Module):
    """What all low-rank layers share: two children, and the matrix that their product stands for."""

    down: nn.Module
    up: nn.Module
    rank: int
    matricisation: Matricisation

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """Apply ``down``, then ``up``."""
        output: Tensor = self.up(self.down(input))
        return output

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer: the factors multiplied out, in their dtype. Read-only, never kept."""
        weight: Tensor = multiply_out(self).to(self._factor("up").dtype)
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, which ``up`` owns."""
        bias: nn.Parameter | None = self.up.bias  # type: ignore[assignment]
        return bias

    def _factor(self, child: str) -> Tensor:
        weight: Tensor = getattr(self, child).weight
        return weight

    def _set_weights(self, up: Tensor, down: Tensor, memory_format: torch.memory_format) -> None:
        """Cast the float64 factors once, into the parameters that the children already have."""
        up_weight, down_weight = self.matricisation.to_layer_weights(up, down)
        with torch.no_grad():
            for child, value in (("up", up_weight), ("down", down_weight)):
                own = self._factor(child)
                cast = value.to(own).contiguous(memory_format=memory_format)
                getattr(self, child).weight = nn.Parameter(cast, requires_grad=own.requires_grad)


def multiply_out(layer: LowRankLayer) -> Tensor:
    """Return the weight that a low-rank layer stands for, in float32 or better."""
    up, down = layer._factor("up"), layer._factor("down")
    wide = torch.promote_types(up.dtype, torch.float32)
    with torch.autocast(up.device.type, enabled=False):
        factors = layer.matricisation.to_factors(up.to(wide), down.to(wide))
        return layer.matricisation.to_weight(factors[0] @ factors[1])


def check_source(module: nn.Module, expected: type[nn.Module], advice: str) -> nn.Parameter:
    """Return the weight of a layer that is about to be factored, or say why it cannot be."""
    name = type(module).__name__
    if not isinstance(module, expected):
        raise TypeError(f"expected a torch.nn.{expected.__name__}, got {describe(module)}. {advice}")
    weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter) or nn.parameter.is_lazy(weight):
        raise ValueError(
            f"the weight of this {name} is not a plain parameter (lazy, pruned or parametrized): run a batch, or call "
            "torch.nn.utils.prune.remove / parametrize.remove_parametrizations first."
        )
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"the weight of this {name} is of {weight.dtype}; expected float64, 32, 16 or bfloat16.")
    return weight


def memory_format_of(weight: Tensor) -> torch.memory_format:
    """Tell whether a weight is laid out channels_last."""
    last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)  # noqa: PLR2004
    # A weight with a 1×1 kernel or one input channel is both: the ordinary strides are the safe reading.
    return torch.channels_last if last and not weight.is_contiguous() else torch.contiguous_format


def inherit(layer: _Layer, dense: nn.Module, weight: nn.Parameter) -> _Layer:
    """Take over mode, ``requires_grad`` and a copy of the bias from the dense layer."""
    layer.train(dense.training)
    for child in ("down", "up"):
        layer._factor(child).requires_grad_(weight.requires_grad)
    bias = dense._parameters.get("bias")
    if bias is not None:
        copied = bias.detach().clone().to(weight.device)
        layer.up.register_parameter("bias", nn.Parameter(copied, requires_grad=bias.requires_grad))
    return layer


def uninitialised(cls: type[_Module], *args: Any, **kwargs: Any) -> _Module:
    """Build a module without drawing random numbers for parameters that are replaced at once."""
    layer: _Module = skip_init(cls, *args, **kwargs)  # type: ignore[no-untyped-call]
    return layer


def merged(layer: LowRankLayer, cls: type[_Module], *args: Any, **kwargs: Any) -> _Module:
    """Build the dense layer of type ``cls`` that a low-rank layer stands for."""
    own = layer._factor("up")
    dense: Any = uninitialised(cls, *args, **kwargs, bias=False, device=own.device, dtype=own.dtype)
    bias = layer.bias
    with torch.no_grad():
        up, down = (working_copy(factor) for factor in (own, layer._factor("down")))
        factors = layer.matricisation.to_factors(up, down)
        weight = layer.matricisation.to_weight(factors[0] @ factors[1]).to(own)
        last = any(memory_format_of(layer._factor(child)) is torch.channels_last for child in ("up", "down"))
        weight = weight.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        dense.weight = nn.Parameter(weight, requires_grad=own.requires_grad)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    merged: _Module = dense.train(layer.training)
    return merged
