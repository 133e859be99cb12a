"""Layers and parametrizations of users, for random models, each with one difficulty."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchsmooth import register_layer


class Packed(nn.Module):
    """Weight, bias and a mode that is its child's, in one tensor: a registered layer, all of whose parts are views."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.linspace(-1, 1, outputs * (inputs + 1)).sin().reshape(inputs + 1, outputs))
        self.dropout = nn.Dropout(0.5)


class PackedLinear(nn.Module):
    """A packed layer as a linear one."""

    def __init__(self, linear: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.linear, self.dropout = linear, dropout


def _unpacked(layer: Packed) -> nn.Module:
    rows, outputs = layer.packed.shape
    if not layer.packed.numel():
        raise ValueError("it is empty")
    linear = nn.Linear(1, 1)  # torch warns of layers that are made without entries; this one draws random numbers
    linear.in_features, linear.out_features = rows - 1, outputs
    linear.weight = nn.Parameter(layer.packed[1:].T)
    linear.bias = nn.Parameter(layer.packed[0])
    return linear if rows % 2 else PackedLinear(linear, layer.dropout)


def _packed(made: Any) -> Packed:
    linear = made.linear if isinstance(made, PackedLinear) else made
    layer = Packed(linear.in_features, linear.out_features)
    packed = torch.cat([linear.bias.detach()[None], linear.weight.detach().T])
    layer.packed = nn.Parameter(packed, requires_grad=linear.weight.requires_grad)
    return layer


register_layer(Packed, _unpacked, _packed)


class Doubled(nn.Module):
    """A parametrization with a module inside that could be compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(2, 2, device="meta").to_empty(device="cpu")
        for value in self.inner.parameters():
            nn.init.ones_(value)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


class Repeated(nn.Module):
    """A parametrization that makes much of few parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.expand(self.rows, *weight.shape[1:])

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        self.rows = len(weight)
        return weight[:1].clone()


class Failing(nn.Module):
    """A parametrization that works while it is put on, and never after."""

    failing = False

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.failing:
            raise RuntimeError("not implemented for this dtype")
        return weight


class SubclassedLinear(nn.Linear):
    """May do anything with its weight."""
