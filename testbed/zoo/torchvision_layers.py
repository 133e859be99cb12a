"""Layers of torchvision that are subclasses of torch's and compute the same, told to the library."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

import torchsmooth

if TYPE_CHECKING:
    from types import ModuleType

_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


def register_layers(torchvision: ModuleType) -> None:
    """Register the convolutions of the video ResNets; to do so again changes nothing."""
    resnet = torchvision.models.video.resnet
    for kind in (resnet.Conv3DSimple, resnet.Conv3DNoTemporal):
        torchsmooth.register_layer(kind, as_convolution, partial(of_kind, kind))


def as_convolution(layer: Any) -> nn.Conv3d:
    """Write a convolution of a subclass as a plain one with the very same parameters."""
    geometry = {name: getattr(layer, name) for name in _GEOMETRY}
    plain = nn.Conv3d(layer.in_channels, layer.out_channels, layer.kernel_size, **geometry, bias=False, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


def of_kind(kind: type[nn.Conv3d], plain: nn.Conv3d) -> nn.Conv3d:
    """Write a plain convolution as one of a subclass."""
    layer: Any = kind(1, 1)
    for name in ("in_channels", "out_channels", "kernel_size", *_GEOMETRY, "_reversed_padding_repeated_twice"):
        setattr(layer, name, getattr(plain, name))
    layer.weight, layer.bias = plain.weight, plain.bias
    return layer
