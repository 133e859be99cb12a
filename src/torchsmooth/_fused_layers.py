"""Low-rank layers run by the fused operators, for :func:`torchsmooth.tune_`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .fused import low_rank_conv2d, low_rank_linear, why_unavailable
from .lowrank import LowRankLinear
from .lowrank_conv import LowRankConv2d


class FusedExecution(nn.Module):
    """Runs a layer by one operator, from its own factors.

    Args:
        layer: one for which :func:`why_not_fused` has nothing to say.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple it is no child, which would be a circle

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """Apply the operator."""
        (layer,) = self._layer
        factors = layer.down.weight, layer.up.weight, layer.bias
        if isinstance(layer, LowRankLinear):
            return low_rank_linear(input, *factors)
        return low_rank_conv2d(input, *factors, layer.stride, layer.padding, layer.dilation)


def why_not_fused(layer: Any) -> str:
    """Say why a layer cannot be run by a fused operator, or would not be by its kernel; empty if it would."""
    if not isinstance(layer, (LowRankLinear, LowRankConv2d)):
        return f"there is no fused operator for a {type(layer).__name__}"
    if layer.form != "factored":
        return "the fused operators take the factored form"
    if isinstance(layer, LowRankConv2d):
        if layer.scheme != "channel" or layer.groups != 1:
            return "the fused convolution is that of scheme 'channel' without groups"
        if layer.padding_mode != "zeros":
            return f"the fused convolution pads with zeros, not by {layer.padding_mode!r}"
    return why_unavailable(layer.down.weight.device) or ""
