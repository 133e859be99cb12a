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

The weight of a transposed layer has its inputs first, ``(in, out / groups, *kernel)``: that of a transposed
convolution, and the table of an embedding, whose inputs are the rows to choose from. The matrices are the same; one of
the two layers is such a layer again, the other an ordinary one. There are no spatial schemes for these.

A product of rank r is stored in one of two forms. ``factored`` keeps both factors whole, r(m + n) numbers. ``pivoted``
picks r rows, the pivots, and keeps them as they are: the other m - r rows are combinations of them, so that one factor
is smaller by r × r, r(m + n - r) numbers in all. Under ``input`` the pivots are columns: input channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import torch
from torch import Tensor

from ._checks import check_choice, check_count

if TYPE_CHECKING:
    from collections.abc import Sequence

Scheme = Literal["channel", "input", "spatial", "spatial_transposed"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
LayerScheme = Literal[Scheme, "tucker"]  # what a convolution can become: one of these, or three layers
LAYER_SCHEMES: tuple[LayerScheme, ...] = (*SCHEMES, "tucker")
Form = Literal["factored", "pivoted"]
FORMS: tuple[Form, ...] = get_args(Form)

_Ranks = TypeVar("_Ranks", int, Tensor)

# What each unit of rank × (rows - rank) / rows adds to the squared error of rounding in the pivoted form, relative to
# the factored one: 0.015 to 0.02 were measured on random and decaying spectra of up to 1,536 rows.
AMPLIFIED = 0.02


def channel_view(weight: Tensor, groups: int = 1, *, transposed: bool = False) -> Tensor:
    """See a weight as ``(groups, out, in, *kernel)``, channels counted per group.

    Args:
        weight: ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` if ``transposed``.
        groups: number of groups.
        transposed: whether the weight is laid out like that of a transposed convolution.
    """
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return grouped.transpose(1, 2) if transposed else grouped


def exchanged(weight: Tensor, groups: int = 1) -> Tensor:
    """Exchange the two channel axes of a weight within each group: outputs first to inputs first, and back."""
    return channel_view(weight, groups, transposed=True).reshape(_exchanged_shape(weight.shape, groups))


def _exchanged_shape(shape: Sequence[int], groups: int) -> tuple[int, ...]:
    first, second, *kernel = shape
    return groups * second, first // groups, *kernel


def suited_multiple(full_rank: int) -> int:
    """Return the multiple that ranks are best of, for speed: of what hardware computes at once, as far as it is fine.

    Vector units take 16 numbers of float32 at a time, tensor cores tiles of 8 or 16. Four ranks or more
    are left to choose from: finer ones cost a little less error, and take the time of the next block.
    """
    return next((one for one in (16, 8, 4) if 4 * one <= full_rank), 1)


@dataclass(frozen=True)
class Matricisation:
    """One scheme applied to one shape of weight, and the way back.

    Attributes:
        groups: number of matrices, one a group.
        out_channels: output channels of one group.
        in_channels: input channels of one group.
        kernel: sizes of the kernel axes, empty for a linear layer.
        down_axes: the kernel axes that stay with the input channels.
        transposed: whether the weight has its inputs first, ``(in, out / groups, *kernel)``.
    """

    groups: int
    out_channels: int
    in_channels: int
    kernel: tuple[int, ...]
    down_axes: tuple[int, ...]
    transposed: bool = False

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

    def largest_rank(self, form: Form) -> int:
        """The largest rank of a form; with all rows as pivots, the pivoted one would be the dense weight itself."""
        return self.full_rank - 1 if form == "pivoted" else self.full_rank

    def parameters(self, rank: _Ranks, form: Form) -> _Ranks:
        """Entries of the factors at a rank, or at each of a tensor of ranks."""
        saved = rank if form == "pivoted" else 0 * rank
        return self.groups * rank * (self.rows + self.columns - saved)

    def ranks(self, form: Form, multiple: int = 1) -> Tensor:
        """The ranks to choose from, ascending, ``(n,)`` int64: all multiples of a number, or of the one that suits."""
        step = multiple or suited_multiple(self.full_rank)
        return step * torch.arange(1, self.largest_rank(form) // step + 1, device="cpu")

    def work(self, ranks: Tensor, form: Form) -> tuple[Tensor, Tensor]:
        """Multiply-accumulates for each position that ``down`` computes, and for each position of the output.

        The pivoted form saves rank × rank of them where the pivots are whole channels; elsewhere ``up`` puts its weight
        together and uses all of it.
        """
        child = self.order_child if form == "pivoted" else ""
        columns = self.columns - ranks if child == "split" else self.columns
        rows = self.rows - ranks if child == "merge" else self.rows
        return self.groups * ranks * columns, self.groups * ranks * rows

    def product(self, ranks: Tensor) -> Tensor:
        """Multiply-accumulates of multiplying the factors out, in either form."""
        return self.groups * ranks * (self.rows * self.columns)

    def amplification(self, form: Form) -> Tensor:
        """What the form multiplies the squared error of rounding with, for every rank.

        In the factored form that error was measured to be a little under the unit roundoff, and independent of the
        truncation. In the pivoted form the rounding of the rows that are kept reaches the others too.
        """
        ranks = torch.arange(self.full_rank + 1, dtype=torch.float64, device="cpu")
        if form == "factored":
            return torch.ones_like(ranks)
        rows = self.columns if self.pivots_columns else self.rows
        return 1 + AMPLIFIED * ranks * (rows - ranks) / rows

    def checked(self, rank: object, name: str, scheme: str, form: Form) -> int:
        """Return a rank as an int if the form can have it."""
        why = f"the full rank of scheme {scheme!r}; keep_dense() leaves the layer whole"
        if form == "pivoted":
            if self.full_rank == 1:
                raise ValueError(f"{name} has no pivoted form: its full rank is 1.")
            why = f"one less than the full rank of scheme {scheme!r}, at which form 'pivoted' is the weight itself"
        return check_count(rank, name, self.largest_rank(form), why)

    def few(self, form: Form, multiple: int, count: int) -> list[int]:
        """Choose so many ranks over the whole range, of those at which the layer is smaller than dense."""
        ranks = self.ranks(form, multiple)
        return nearly_proportional(ranks[self.parameters(ranks, form) < self.dense_parameters].tolist(), count)

    @property
    def order_child(self) -> Literal["merge", "split", "up"]:
        """The child of a pivoted layer that says which of the rows or columns are the pivots.

        Where rows are output channels, ``merge`` puts those that ``down`` computes among the others; where columns are
        input channels, ``split`` takes the pivots out. Rows that are neither are put together inside ``up``.
        """
        if self.rows == self.out_channels:
            return "merge"
        return "split" if self.columns == self.in_channels else "up"

    @property
    def pivots_columns(self) -> bool:
        """Whether the pivots are columns; rows otherwise."""
        return self.order_child == "split"

    @property
    def inputs_first(self) -> Literal["down", "up", "neither"]:
        """The layer whose own weight has its inputs first: of a transposed layer in two, the one with the kernel."""
        if not self.transposed:
            return "neither"
        return "up" if self.kernel and not self.down_axes else "down"

    def to_matrices(self, weight: Tensor) -> Tensor:
        """Reshape a weight to ``(groups, rows, columns)``."""
        if self.transposed:
            grouped = channel_view(weight, self.groups, transposed=True)
        else:
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
        weight = split.permute(order).reshape(shape)
        return exchanged(weight, self.groups) if self.transposed else weight

    def to_layer_weights(self, up: Tensor, down: Tensor, form: Form = "factored") -> tuple[Tensor, Tensor]:
        """Turn stored factors into weights of ``up`` and ``down``.

        Args:
            up: ``(groups, rows, rank)``, or ``(groups, rows - rank, rank)`` where the pivots are rows.
            down: ``(groups, rank, columns)``, or ``(groups, rank, columns - rank)`` where the pivots are columns.
            form: which of the two.
        """
        rank = up.shape[-1]
        up_shape, down_shape = self._outputs_first_shapes(rank, form)
        if form == "factored" or self.pivots_columns:
            up_sizes = [self.kernel[axis] for axis in self.up_axes]
            up = up.reshape(self.groups, self.out_channels, *up_sizes, rank).movedim(-1, 2)
        return self._exchanged_child(up.reshape(up_shape), down.reshape(down_shape))

    def layer_shapes(self, rank: int, form: Form = "factored") -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the weights of ``up`` and ``down`` at a rank."""
        up, down = self._outputs_first_shapes(rank, form)
        return (
            _exchanged_shape(up, self.groups) if self.inputs_first == "up" else up,
            _exchanged_shape(down, self.groups) if self.inputs_first == "down" else down,
        )

    def rank_of(self, up_shape: Sequence[int]) -> int:
        """Read the rank off the shape of the weight of ``up``, whatever else it is; 0 if it has not even two axes."""
        if len(up_shape) < 2:  # noqa: PLR2004 - two channel axes
            return 0
        return up_shape[0] // self.groups if self.inputs_first == "up" else up_shape[1]

    def _outputs_first_shapes(self, rank: int, form: Form) -> tuple[tuple[int, ...], tuple[int, ...]]:
        up_kernel, down_kernel = self._kernel_of(self.up_axes), self._kernel_of(self.down_axes)
        outputs, inputs = self.out_channels, self.in_channels
        if form == "pivoted":
            if self.order_child == "up":  # free rows, of which only some kernel positions belong to an output channel
                return (self.groups * (self.rows - rank), rank), (self.groups * rank, inputs, *down_kernel)
            outputs, inputs = (outputs, inputs - rank) if self.pivots_columns else (outputs - rank, inputs)
        return (self.groups * outputs, rank, *up_kernel), (self.groups * rank, inputs, *down_kernel)

    def to_factors(self, up_weight: Tensor, down_weight: Tensor, form: Form = "factored") -> tuple[Tensor, Tensor]:
        """Undo :meth:`to_layer_weights`."""
        up_weight, down_weight = self._exchanged_child(up_weight, down_weight)
        rank = up_weight.shape[1]
        if form == "factored" or self.pivots_columns:
            up_sizes = [self.kernel[axis] for axis in self.up_axes]
            up_weight = up_weight.reshape(self.groups, self.out_channels, rank, *up_sizes).movedim(2, -1)
        return up_weight.reshape(self.groups, -1, rank), down_weight.reshape(self.groups, rank, -1)

    def _exchanged_child(self, up_weight: Tensor, down_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Lay the weight that has its inputs first out as if it had its outputs first, or back."""
        if self.inputs_first == "up":
            up_weight = exchanged(up_weight, self.groups)
        elif self.inputs_first == "down":
            down_weight = exchanged(down_weight, self.groups)
        return up_weight, down_weight

    def _kernel_of(self, axes: Sequence[int]) -> list[int]:
        return [size if axis in axes else 1 for axis, size in enumerate(self.kernel)]


def nearly_proportional(ranks: Sequence[int], count: int) -> list[int]:
    """Choose a few of some ascending ranks, from the first to the last, in about equal proportions."""
    if len(ranks) <= count:
        return list(ranks)
    ratio = ranks[-1] / ranks[0]
    wanted = [ranks[0] * ratio ** (step / (count - 1)) for step in range(count)]
    return sorted({min(ranks, key=lambda rank, near=one: abs(rank - near)) for one in wanted})  # type: ignore[misc]


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


def scheme_for(scheme: Scheme, axes: int) -> Scheme:
    """Return the scheme that a weight of so many axes has when ``scheme`` is asked for: spatial ones need a plane."""
    planar = axes == 4  # noqa: PLR2004 - two channel axes, two kernel axes
    return scheme if planar or scheme not in SCHEMES[2:] else "channel"


def matricise(shape: Sequence[int], scheme: str, groups: int = 1, *, transposed: bool = False) -> Matricisation:
    """Return the matricisation of a weight.

    Args:
        shape: ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` if ``transposed``.
        scheme: one that its kernel has.
        groups: number of groups.
        transposed: whether the weight has its inputs first.
    """
    out_channels, in_channels, *kernel = _exchanged_shape(shape, groups) if transposed else shape
    axes = down_axes_of(scheme, len(kernel))
    return Matricisation(groups, out_channels // groups, in_channels, tuple(kernel), axes, transposed)


def distinct_schemes(kernel: Sequence[int], *, transposed: bool = False) -> dict[Scheme, Scheme]:
    """Map every scheme for a kernel, or that of a transposed layer, to the first scheme that is the same reshaping.

    Kernel axes of size one make schemes coincide: for a 1×1 kernel all four are ``channel``. Each matricisation
    goes by one name, so that the shapes of the two factors always tell which one they came from.
    """
    names: dict[tuple[int, ...], Scheme] = {}
    first: dict[Scheme, Scheme] = {}
    planar = len(kernel) == 2 and not transposed  # noqa: PLR2004 - height and width
    for scheme in SCHEMES if planar else SCHEMES[:2]:
        split = tuple(axis for axis in down_axes_of(scheme, len(kernel)) if kernel[axis] > 1)
        first[scheme] = names.setdefault(split, scheme)
    return first
