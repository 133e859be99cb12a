"""The memory format of a model's weights, changed and changed back without touching a parameter's identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ._lowrank_layer import memory_format_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

_PLANAR = 4  # axes of the weight of a convolution over height and width


class Placed(NamedTuple):
    """A parameter, and its values in one memory format."""

    parameter: Tensor
    values: Tensor

    def put_(self) -> None:
        """Give the parameter these values, which are the same numbers in another place."""
        self.parameter.data = self.values


def as_they_are(model: nn.Module) -> list[Placed]:
    """Return what brings the convolution weights of a model back to where they are now."""
    return [Placed(one, one.data) for one in model.parameters() if one.dim() == _PLANAR]


def channels_last(placed: Sequence[Placed]) -> list[Placed]:
    """Return the same weights in channels_last; those that are so already as they are."""
    return [Placed(one, values.contiguous(memory_format=torch.channels_last)) for one, values in placed]


def are_channels_last(placed: Sequence[Placed]) -> bool:
    """Say whether some of the weights are in channels_last, and in no other format."""
    return any(memory_format_of(one.values) == torch.channels_last for one in placed)


def differ(placed: Sequence[Placed], others: Sequence[Placed]) -> bool:
    """Say whether any weight lies in memory otherwise."""
    pairs = zip(placed, others, strict=True)
    return any(one.values.stride() != other.values.stride() for one, other in pairs)


def put_(placed: Sequence[Placed]) -> None:
    """Give all parameters their values."""
    for one in placed:
        one.put_()
