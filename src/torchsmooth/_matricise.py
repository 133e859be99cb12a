r"""Matricisations: the reshapings of a weight into a matrix whose truncated SVD becomes two layers.

Every scheme is one choice: which kernel axes stay with the input channels, in the first of the two layers
(``down``), while the others go with the output channels, to the second (``up``). With the weight of one group
seen as ``(out, in, *kernel)``:

=======================  ==================  ==================  ==============================
scheme                   rows                columns             the two convolutions
=======================  ==================  ==================  ==============================
``channel``              out                 in · kh · kw        kh × kw, then 1 × 1
``input``                out · kh · kw       in                  1 × 1, then kh × kw
``spatial``              out · kw            in · kh             kh × 1, then 1 × kw
``spatial_transposed``   out · kh            in · kw             1 × kw, then kh × 1
=======================  ==================  ==================  ==============================

A linear layer has no kernel axes, so its weight is the matrix. Groups are a batch of matrices: each is factored
on its own, since a grouped weight flattened as one matrix mixes channels that never meet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ._checks import check_choice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Scheme = Literal["channel", "input", "spatial", "spatial_transposed"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


def channel_view(weight: Tensor, groups: int = 1, *, transposed: bool = False) -> Tensor:
    """See a weight as ``(groups, out, in, *kernel)``, channels counted per group.

    Args:
        weight: ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` if ``transposed``.
        groups: number of groups.
        transposed: whether the weight is laid out like that of a transposed convolution.
    """
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return grouped.transpose(1, 2) if transposed else grouped


@dataclass(frozen=True)
class Matricisation:
    """One scheme applied to one shape of weight, and the way back.

    Attributes:
        groups: number of matrices, one a group.
        out_channels: output channels of one group.
        in_channels: input channels of one group.
        kernel: sizes of the kernel axes, empty for a linear layer.
        down_axes: the kernel axes that stay with the input channels.
    """

    groups: int
    out_channels: int
    in_channels: int
    kernel: tuple[int, ...]
    down_axes: tuple[int, ...]

    @property
    def up_axes(self) -> tuple[int, ...]:
        """The kernel axes that go with the output channels."""
        return tuple(axis for axis in range(len(self.kernel)) if axis not in self.down_axes)

    @property
    def rows(self) -> int:
        """Rows of each matrix."""
        return self.out_channels * math.prod([self.kernel[axis] for axis in self.up_axes])

    @property
    def columns(self) -> int:
        """Columns of each matrix."""
        return self.in_channels * math.prod([self.kernel[axis] for axis in self.down_axes])

    @property
    def full_rank(self) -> int:
        """The rank from which on nothing is lost."""
        return min(self.rows, self.columns)

    @property
    def dense_parameters(self) -> int:
        """Entries of the weight itself."""
        return self.groups * self.rows * self.columns

    @property
    def triple_parameters(self) -> int:
        """Entries of the factors for each unit of rank."""
        return self.groups * (self.rows + self.columns)

    def to_matrices(self, weight: Tensor) -> Tensor:
        """Reshape a weight ``(out, in / groups, *kernel)`` to ``(groups, rows, columns)``."""
        grouped = weight.reshape(self.groups, self.out_channels, self.in_channels, *self.kernel)
        return grouped.permute(
            0, 1, *(3 + axis for axis in self.up_axes), 2, *(3 + axis for axis in self.down_axes)
        ).reshape(self.groups, self.rows, self.columns)

    def to_weight(self, matrices: Tensor) -> Tensor:
        """Undo :meth:`to_matrices`."""
        up_sizes = [self.kernel[axis] for axis in self.up_axes]
        down_sizes = [self.kernel[axis] for axis in self.down_axes]
        split = matrices.reshape(self.groups, self.out_channels, *up_sizes, self.in_channels, *down_sizes)
        place = {axis: 2 + i for i, axis in enumerate(self.up_axes)}
        place |= {axis: 3 + len(up_sizes) + i for i, axis in enumerate(self.down_axes)}
        order = (0, 1, 2 + len(up_sizes), *(place[axis] for axis in range(len(self.kernel))))
        shape = (self.groups * self.out_channels, self.in_channels, *self.kernel)
        return split.permute(order).reshape(shape)

    def to_layer_weights(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Turn factors ``(groups, rows, rank)``, ``(groups, rank, columns)`` into weights of ``up`` and ``down``."""
        rank = up.shape[-1]
        up_sizes = [self.kernel[axis] for axis in self.up_axes]
        split = up.reshape(self.groups, self.out_channels, *up_sizes, rank)
        up_shape, down_shape = self.layer_shapes(rank)
        return split.movedim(-1, 2).reshape(up_shape), down.reshape(down_shape)

    def layer_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the weights of ``up`` and ``down`` at a rank."""
        up = (self.groups * self.out_channels, rank, *self._kernel_of(self.up_axes))
        return up, (self.groups * rank, self.in_channels, *self._kernel_of(self.down_axes))

    def to_factors(self, up_weight: Tensor, down_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Undo :meth:`to_layer_weights`."""
        rank = up_weight.shape[1]
        up_sizes = [self.kernel[axis] for axis in self.up_axes]
        split = up_weight.reshape(self.groups, self.out_channels, rank, *up_sizes)
        up = split.movedim(2, -1).reshape(self.groups, self.rows, rank)
        return up, down_weight.reshape(self.groups, rank, self.columns)

    def _kernel_of(self, axes: Sequence[int]) -> list[int]:
        return [size if axis in axes else 1 for axis, size in enumerate(self.kernel)]


def down_axes_of(scheme: str, kernel_axes: int) -> tuple[int, ...]:
    """Return the kernel axes that a scheme leaves with the input channels."""
    check_choice(scheme, "scheme", SCHEMES)
    if scheme == "channel":
        return tuple(range(kernel_axes))
    if scheme == "input":
        return ()
    if kernel_axes != 2:  # noqa: PLR2004 - height and width
        raise ValueError(
            f"scheme {scheme!r} splits the height from the width of a kernel, but this weight has "
            f"{kernel_axes} kernel axes: use 'channel' or 'input'."
        )
    return (0,) if scheme == "spatial" else (1,)


def matricise(shape: Sequence[int], scheme: str, groups: int = 1) -> Matricisation:
    """Return the matricisation of a weight of ``shape`` ``(out, in / groups, *kernel)``."""
    out_channels, in_channels, *kernel = shape
    return Matricisation(groups, out_channels // groups, in_channels, tuple(kernel), down_axes_of(scheme, len(kernel)))


def distinct_schemes(kernel: Sequence[int]) -> dict[Scheme, Scheme]:
    """Map every scheme for a kernel to the first scheme that is the same reshaping.

    Kernel axes of size one make schemes coincide: for a 1×1 kernel all four are ``channel``. Each matricisation
    goes by one name, so that the shapes of the two factors always tell which one they came from.
    """
    names: dict[tuple[int, ...], Scheme] = {}
    first: dict[Scheme, Scheme] = {}
    for scheme in SCHEMES if len(kernel) == 2 else SCHEMES[:2]:  # noqa: PLR2004 - height and width
        split = tuple(axis for axis in down_axes_of(scheme, len(kernel)) if kernel[axis] > 1)
        first[scheme] = names.setdefault(split, scheme)
    return first
