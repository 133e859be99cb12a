"""Layers of the package ``transformers`` that are written otherwise than torch's, told to the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

import torchsmooth

if TYPE_CHECKING:
    from types import ModuleType


def register_layers(transformers: ModuleType) -> None:
    """Register the linear layers of GPT-2 and of Falcon; to do so again changes nothing."""
    falcon_linear = transformers.models.falcon.modeling_falcon.FalconLinear
    torchsmooth.register_layer(transformers.pytorch_utils.Conv1D, transposed, transposed_back)
    torchsmooth.register_layer(falcon_linear, as_linear, lambda linear: falcon_back(falcon_linear, linear))


def transposed(layer: Any) -> nn.Linear:
    """Write a ``Conv1D``, whose weight is ``(in, out)``, as a linear layer over the same memory."""
    inputs, outputs = layer.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.T, requires_grad=layer.weight.requires_grad), layer.bias
    return linear


def transposed_back(linear: nn.Linear) -> Any:
    """Write a linear layer as a ``Conv1D``."""
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 - the package may be missing

    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.T.contiguous(), requires_grad=linear.weight.requires_grad)
    layer.bias = linear.bias
    return layer


def as_linear(layer: Any) -> nn.Linear:
    """Write a subclass of ``nn.Linear`` that computes the same as a plain one, with the very same parameters."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear


def falcon_back(kind: type[nn.Linear], linear: nn.Linear) -> nn.Linear:
    """Write a plain linear layer as one of a subclass."""
    layer = kind(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer
