"""Layers whose weights are laid out once as the kernels of oneDNN want them, which otherwise happens at each call.

With a large weight and a small batch that takes longer than the product itself. The operators are those that
``torch.compile`` puts into what it freezes.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ._execution import nobody_watches
from ._geometry import each, zeros_around

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PLANAR = 4  # axes of images

# By what share of its norm a result may differ where a kernel sums in another order.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Geometry(NamedTuple):
    """Of a convolution, as the operator takes it."""

    padding: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int


class _Step(NamedTuple):
    """A convolution, or a linear layer, which has no geometry; with its weight laid out for inputs of a shape."""

    packed: Tensor
    bias: Tensor | None
    geometry: Geometry | None
    shape: tuple[int, ...]

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, geometry: Geometry | None, shape: Sequence[int]) -> _Step:
        """Lay a weight out."""
        if geometry is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), torch.Size(shape[:-1]).numel())
        else:
            packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry, list(shape))
        return _Step(packed, bias, geometry, tuple(shape))

    def plain(self) -> _Step:
        """Return the same step with an ordinary weight, the same numbers: what is packed cannot be copied or saved."""
        return self._replace(packed=self.packed.to_dense())

    def call(self) -> Callable[[Tensor], Tensor]:
        """Return what applies it to an input."""
        packed, bias = self.packed, self.bias
        if self.geometry is None:
            linear = torch.ops.mkldnn._linear_pointwise.default
            return lambda values: linear(values, packed, bias, "none", [], "")
        convolution = torch.ops.mkldnn._convolution_pointwise.default
        padding, stride, dilation, groups = self.geometry
        return lambda values: convolution(values, packed, bias, padding, stride, dilation, groups, "none", [], "")

    def traced(self) -> Callable[[Tensor], Tensor]:
        """Return what applies it by operators that can be traced, with a copy of the weight."""
        weight = self.packed.to_dense()
        if self.geometry is None:
            return partial(nn.functional.linear, weight=weight, bias=self.bias)
        return partial(torch.conv2d, weight=weight, bias=self.bias, **self.geometry._asdict())


class PackedExecution(nn.Module):
    """Runs convolutions and linear layers one after the other, with their weights packed.

    Args:
        layers: those for which :func:`why_not_packed` has nothing to say.
        example: an input of the first of them, of the shape that the weights are laid out for. Others are computed,
            too.

    Raises:
        RuntimeError: if this processor has no such kernels, or they do not compute what the layers do.
    """

    def __init__(self, layers: Sequence[Any], example: Tensor) -> None:
        super().__init__()
        steps, values = [], example
        for layer in layers:
            bias = None if layer.bias is None else layer.bias.detach()
            steps.append(_Step.of(layer.weight.detach(), bias, _geometry_of(layer), values.shape))
            values = layer(values)
        self._dtype, self._dim = example.dtype, _PLANAR if isinstance(layers[0], nn.Conv2d) else None
        self._calls: list[Callable[[Tensor], Tensor]] = []
        self._take_(steps)
        difference = torch.linalg.vector_norm((self(example) - values).float())
        if not difference <= _TOLERANCES[example.dtype] * torch.linalg.vector_norm(values.float()):
            raise RuntimeError("the packed weights do not compute what the layers do")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """Apply the layers."""
        for call in self._calls:
            input = call(input)  # noqa: A001
        return input

    @property
    def has_kernels(self) -> bool:
        """Whether it can be run: it may have been loaded by a torch, or on a processor, without such kernels."""
        return bool(self._calls)

    def suits(self, input: Tensor) -> bool:  # noqa: A002 - as above
        """Say whether the operators give for an input what the layers would: they have no gradients, for one."""
        return (
            type(input) is Tensor
            and input.is_cpu
            and not input.is_nested
            and input.dtype is self._dtype
            and (self._dim is None or input.dim() == self._dim)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and forward_ad._current_level < 0
            # Whoever looks at operators, to count or to trace them, wants to see those that everybody knows.
            and nobody_watches()
        )

    def traced(self) -> Callable[[Tensor], Tensor] | None:
        """Return what computes the same by operators that can be traced; None where that is several layers."""
        return self._steps[0].traced() if len(self._steps) == 1 else None

    def _take_(self, steps: list[_Step]) -> None:
        self._steps = steps
        self._calls = [step.call() for step in steps]

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self) | {"_steps": [step.plain() for step in self._steps] if self._calls else self._steps}
        del state["_calls"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._calls = []
        with suppress(AttributeError, RuntimeError):
            self._take_([_Step.of(one.packed, one.bias, one.geometry, one.shape) for one in self._steps])


def why_not_packed(layers: Sequence[nn.Module], example: object) -> str:
    """Say why layers cannot be run with packed weights; empty if that can be tried."""
    if not isinstance(example, Tensor) or not example.is_cpu or example.dtype not in _TOLERANCES or example.is_nested:
        return "weights are packed on the CPU, for ordinary tensors in float32, bfloat16 or float16"
    onednn: Any = torch.backends.mkldnn
    if not onednn.is_available() or not onednn.enabled:
        return "this torch runs without oneDNN"
    for layer in layers:
        if type(layer) not in (nn.Conv2d, nn.Linear) or type(layer.weight) is not nn.Parameter:
            return f"a {type(layer).__name__} is no plain Conv2d or Linear"
        if type(layer) is nn.Conv2d and (example.dim() != _PLANAR or _geometry_of(layer) is None):
            return "convolutions that are packed take batches, and pad with zeros, as many on either side"
    return ""


def _geometry_of(layer: nn.Module) -> Geometry | None:
    """Return the geometry of a convolution; None for a linear layer, and where the operator knows no such padding."""
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
        return None
    around = zeros_around(layer)
    if any(before != after for before, after in around):
        return None
    axes = len(layer.kernel_size)
    padding, stride, dilation = [before for before, _ in around], each(layer.stride, axes), each(layer.dilation, axes)
    return Geometry(padding, list(stride), list(dilation), layer.groups)
