"""What a low-rank layer in the pivoted form has beside ``down`` and ``up``: the modules that know the pivots.

Which of them it has is a matter of its matricisation (``Matricisation.order_child``). Each has a buffer ``order``, so
that a state dict holds all that is needed.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ._pivoting import listed, why_no_order, with_identity


class Ordered(nn.Module):
    """A module that knows which of the rows (or columns) of each group are the pivots.

    Args:
        groups: number of groups.
        rank: number of pivots in each.
        rows: rows (or columns) of each matrix.
        device: device of the order.

    Attributes:
        order: int32, ``(groups · rows,)``. With all rows listed, the pivots of every group first: the list itself, or
            the place of each row in it, whichever ``forward`` gathers by.
    """

    order: Tensor
    places: ClassVar[bool] = True

    def __init__(self, groups: int, rank: int, rows: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.groups, self.rank, self.rows = groups, rank, rows
        self.register_buffer("order", torch.empty(groups * rows, dtype=torch.int32, device=device))
        self.reset_order_()

    def reset_order_(self) -> None:
        """Make the first rows of each group the pivots."""
        rows = torch.arange(self.rows, device=self.order.device).repeat(self.groups, 1)
        self.set_pivots_(rows[:, : self.rank], rows[:, self.rank :])

    def set_pivots_(self, pivots: Tensor, others: Tensor) -> None:
        """Store the pivots ``(groups, rank)`` and the other rows ``(groups, rows - rank)``."""
        order = listed(pivots, others)
        self.order.copy_(order.argsort() if self.places else order)

    def order_places(self) -> Tensor:
        """Return the place of each row in the list, whichever of the two ``order`` is."""
        return self.order if self.places else self.order.argsort()

    def reset_parameters(self) -> None:
        """Make the order one again, as layers of torch do with buffers; after ``to_empty`` it holds anything."""
        self.reset_order_()

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.rows}, rank={self.rank}, groups={self.groups}"

    def why_not(self, order: object) -> str:
        """Say why a value cannot be the order of this module; empty if it can."""
        return why_no_order(order, self.groups, self.rank, self.rows, places=self.places)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch would take any integers, and gather wrong rows by them, or memory beyond the tensor.
        key = f"{prefix}order"
        problem = self.why_not(state_dict[key]) if key in state_dict else ""
        if problem:
            errors: list[str] = args[-1]
            errors.append(f"{key!r} is no order of pivots: {problem}.")
            state_dict[key] = self.order  # the dictionary is torch's own copy
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.fx.wrap  # a symbolic trace cannot decide by strides, and would make constants of slices of a buffer
def take_channels(tensor: Tensor, order: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Gather the channels ``order[start:stop]``.

    Those that lie side by side in memory (channels_last) do so afterwards; ``index_select`` alone would lose that.

    Args:
        tensor: channels along ``dim``.
        order: integers.
        dim: -1 for a linear layer, -3 for a convolution with two kernel axes.
        start: first of them to take.
        stop: first of them not to take.

    Returns:
        A tensor like the first, with ``stop - start`` channels.
    """
    channels = order[start:stop]
    if dim != -1 and (tensor.stride(dim) != 1 or tensor.stride(-1) == 1):
        return tensor.index_select(dim, channels)
    end = tensor.dim() - 1
    place = end + 1 + dim  # from the front, as the older ONNX exporter writes negative ones that nothing reads
    last = tensor.movedim(place, end)
    taken = last.reshape(-1, last.shape[-1]).index_select(1, channels)  # with two axes it is fastest by far
    return taken.reshape(*last.shape[:-1], stop - start).movedim(end, place)


@torch.fx.wrap  # a symbolic trace does not know whether a tensor is nested
def end_to_end(tensor: Tensor) -> Tensor:
    """Put the samples of a nested tensor one after another; leave any other tensor as it is."""
    if not tensor.is_nested:
        return tensor
    return tensor.values() if tensor.layout is torch.jagged else torch.cat(tensor.unbind())


@torch.fx.wrap
def nested_like(tensor: Tensor, like: Any) -> Tensor:
    """Undo :func:`end_to_end`: cut a tensor into samples as long as those of ``like``, if that is nested."""
    if not like.is_nested:
        return tensor
    if like.layout is torch.jagged:  # by the same offsets, or the two could not be added
        jagged: Tensor = torch.nested.nested_tensor_from_jagged(
            tensor, like.offsets(), like.lengths(), like._ragged_idx
        )
        return jagged
    return torch.nested.as_nested_tensor(list(torch.split(tensor, [len(one) for one in like.unbind()])))


def _add_(values: Tensor, bias: Tensor) -> Tensor:
    """Add a bias to what nobody else has seen yet; under a transform of torch.func it may have an axis of its own."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return values + bias
    return values.add_(bias)


class ChannelMerge(Ordered):
    """Puts the output channels that ``down`` computes among those of ``up``, and adds the bias.

    Args:
        groups: number of groups.
        rank: number of pivots in each.
        channels: output channels of each group.
        dim: the axis of the channels: -1 for a linear layer, -3 for a convolution with two kernel axes.
        bias: whether there is one.
        device: device of order and bias.
        dtype: floating dtype of the bias.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        groups: int,
        rank: int,
        channels: int,
        *,
        dim: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, rank, channels, device)
        self.dim = dim
        empty = torch.empty(groups * channels, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias as ``nn.Linear`` and ``nn.Conv2d`` do for as many inputs as there are pivots."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(self.rank), 1 / math.sqrt(self.rank))

    def forward(self, pivots: Tensor, others: Tensor) -> Tensor:
        """Merge ``groups · rank`` and ``groups · (channels - rank)`` channels."""
        both = torch.cat([end_to_end(pivots), end_to_end(others)], self.dim)
        merged = take_channels(both, self.order, self.dim, 0, self.groups * self.rows)
        if self.bias is not None:
            bias = self.bias.to(merged.dtype)  # under autocast the sum would come out in the dtype of the bias
            merged = _add_(merged, bias.reshape(-1, *[1] * (-1 - self.dim)))
        return nested_like(merged, pivots)


class ChannelSplit(Ordered):
    """Takes the input channels that are the pivots out of the others.

    Args:
        groups: number of groups.
        rank: number of pivots in each.
        channels: input channels of each group.
        device: device of the order.
        dim: the axis of the channels: -3 for a convolution with two kernel axes.
    """

    places = False

    def __init__(
        self, groups: int, rank: int, channels: int, device: torch.device | str | None = None, *, dim: int = -3
    ) -> None:
        super().__init__(groups, rank, channels, device)
        self.dim = dim

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # noqa: A002 - the name that torch's layers use
        """Return ``groups · rank`` pivots and ``groups · (channels - rank)`` others."""
        pivots, channels, dim = self.groups * self.rank, self.groups * self.rows, self.dim
        return take_channels(input, self.order, dim, 0, pivots), take_channels(input, self.order, dim, pivots, channels)


class PivotedConv2d(Ordered):
    """A convolution of which some rows of the matrix of the weight, the pivots, are rows of the identity.

    Args:
        plain: an ordinary convolution with the same geometry; only that is read.
        bias: whether there is one.
        device: device of the parameters.
        dtype: floating dtype of the parameters.

    Attributes:
        weight: the other rows, ``(groups · (rows - rank), rank)``; rows are pairs of an output channel and a position
            in the kernel.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        plain: nn.Conv2d,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        rank = plain.in_channels // plain.groups
        rows = plain.out_channels // plain.groups * math.prod(plain.kernel_size)
        super().__init__(plain.groups, rank, rows, device)
        self.in_channels, self.out_channels = plain.in_channels, plain.out_channels
        self.kernel_size, self.stride, self.dilation = plain.kernel_size, plain.stride, plain.dilation
        self.padding, self.padding_mode = plain.padding, plain.padding_mode
        self._around = tuple(plain._reversed_padding_repeated_twice)
        self.weight = nn.Parameter(torch.empty(self.groups * (rows - rank), rank, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``nn.Conv2d`` does."""
        super().reset_parameters()
        bound = 1 / math.sqrt(self.rank * math.prod(self.kernel_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """Convolve with the weight, put together from the identity and the other rows."""
        rows = with_identity(self.weight, self.order, self.groups, self.rank)
        # As it stands it is laid out channels_last, and would make the output so whatever the input is.
        weight = rows.reshape(self.out_channels, *self.kernel_size, self.rank).permute(0, 3, 1, 2).contiguous()
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._around, self.padding_mode), (0, 0)  # noqa: A001
        return F.conv2d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Show the sizes, as ``nn.Conv2d`` does."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
