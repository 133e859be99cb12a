"""Squared differences of a weight along its channels, and their gradient in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._matricise import channel_view

if TYPE_CHECKING:
    from torch import Tensor

_CHANNEL_AXES = (1, 2)  # of a channel view


def squared_differences(weight: Tensor, order: int, groups: int, *, transposed: bool) -> Tensor:
    """Sum over both channel axes of the squared differences of an order."""
    view = channel_view(weight, groups, transposed=transposed)
    along_out, along_in = (torch.diff(view, n=order, dim=axis) for axis in _CHANNEL_AXES)
    return along_out.square().sum() + along_in.square().sum()


@torch.no_grad()
def squared_differences_gradient(weight: Tensor, order: int, groups: int) -> Tensor:
    """The gradient of :func:`squared_differences`: twice the adjoint of the differences, on the differences.

    The adjoint of a difference is a difference of opposite sign, on the sequence with zeros around it. Both channel
    axes are treated alike, so it does not matter which one holds the outputs.
    """
    view = channel_view(weight, groups)
    gradient = torch.zeros_like(view)
    factor = 2.0 if order % 2 == 0 else -2.0
    for axis in _CHANNEL_AXES:
        size = view.shape[axis]
        if size <= order:
            continue
        shape = list(view.shape)
        shape[axis] = size + order
        padded = view.new_zeros(shape)
        torch.diff(view, n=order, dim=axis, out=padded.narrow(axis, order, size - order))
        gradient.add_(torch.diff(padded, n=order, dim=axis), alpha=factor)
    return gradient.reshape(weight.shape)
