"""The shapes of a convolution in three: what :class:`Matricisation` is for a layer in two, with a pair of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from ._checks import check_count, describe
from ._matricise import AMPLIFIED, nearly_proportional, suited_multiple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ._matricise import Form

Pair = tuple[int, int]
Rank = int | Pair

# Ranks to choose from on each side of a large layer: all small ones, then in about equal proportions.
_SIDE, _SMALL = 64, 32


class Layout(Protocol):
    """What planning has to know of the shapes of a low-rank layer; a rank is a number or a pair."""

    @property
    def groups(self) -> int:
        """Number of groups."""

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel axes."""

    @property
    def down_axes(self) -> tuple[int, ...]:
        """The kernel axes that ``down`` has."""

    @property
    def full_rank(self) -> Any:
        """The rank from which on nothing is lost."""

    @property
    def dense_parameters(self) -> int:
        """Entries of the weight itself."""

    def largest_rank(self, form: Form) -> Any:
        """The largest rank of a form."""

    def parameters(self, rank: Any, form: Form) -> Any:
        """Entries of the factors at a rank, or at each of a tensor of ranks."""

    def ranks(self, form: Form, multiple: int = 1) -> Tensor:
        """The ranks to choose from, ``(n,)`` or ``(n, 2)`` int64."""

    def work(self, ranks: Tensor, form: Form) -> tuple[Tensor, Tensor]:
        """Multiply-accumulates for each position that ``down`` computes, and for each position of the output."""

    def product(self, ranks: Tensor) -> Tensor:
        """Multiply-accumulates of multiplying the factors out, in either form."""

    def amplification(self, form: Form) -> Tensor:
        """What the form multiplies the squared error of rounding with, for every rank."""

    def checked(self, rank: object, name: str, scheme: str, form: Form) -> Any:
        """Return a rank if the form can have it."""

    def few(self, form: Form, multiple: int, count: int) -> list[Any]:
        """Choose about so many ranks over the whole range, of those at which the layer is smaller than dense."""


@dataclass(frozen=True)
class TuckerLayout:
    """Tucker-2 of one shape of weight.

    Attributes:
        groups: number of tensors, one a group.
        out_channels: output channels of one group.
        in_channels: input channels of one group.
        kernel: sizes of the kernel axes.
    """

    groups: int
    out_channels: int
    in_channels: int
    kernel: tuple[int, ...]

    down_axes: ClassVar[tuple[int, ...]] = ()

    @classmethod
    def of(cls, shape: Sequence[int], groups: int = 1) -> TuckerLayout | None:
        """Return that of a weight ``(out, in / groups, kh, kw)``; None where there are no three layers in it."""
        out_channels, in_channels, *kernel = shape
        layout = cls(groups, out_channels // groups, in_channels, tuple(kernel))
        usable = len(kernel) == 2 and layout.positions > 1  # noqa: PLR2004 - height and width
        return layout if usable and min(layout.out_channels, in_channels) > 1 else None

    @property
    def positions(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    @property
    def full_rank(self) -> Pair:
        """The ranks from which on nothing is lost."""
        inputs, outputs = self.in_channels, self.out_channels
        return min(inputs, outputs * self.positions), min(outputs, inputs * self.positions)

    @property
    def dense_parameters(self) -> int:
        """Entries of the weight itself."""
        return self.groups * self.out_channels * self.in_channels * self.positions

    def largest_rank(self, form: Form) -> Pair:
        """The largest ranks of a form; in the pivoted one both factors are less than square."""
        if form == "factored":
            return self.full_rank
        return min(self.full_rank[0], self.in_channels - 1), min(self.full_rank[1], self.out_channels - 1)

    def parameters(self, rank: Any, form: Form) -> Any:
        """Entries of the factors at a pair of ranks, or at each of a tensor of pairs ``(n, 2)``."""
        r_in, r_out = _sides(rank)
        saved = r_in * r_in + r_out * r_out if form == "pivoted" else 0 * r_in
        outside = r_in * self.in_channels + r_out * self.out_channels - saved
        return self.groups * (outside + self.positions * r_in * r_out)

    def work(self, ranks: Tensor, form: Form) -> tuple[Tensor, Tensor]:
        """Multiply-accumulates for each position of the input, and for each position of the output."""
        r_in, r_out = _sides(ranks)
        inputs = self.in_channels - (r_in if form == "pivoted" else 0)
        outputs = self.out_channels - (r_out if form == "pivoted" else 0)
        return self.groups * r_in * inputs, self.groups * r_out * (self.positions * r_in + outputs)

    def product(self, ranks: Tensor) -> Tensor:
        """Multiply-accumulates of multiplying the factors out in either form, in the order of ``tucker_product``."""
        r_in, r_out = _sides(ranks)
        costs: Tensor = self.groups * r_out * self.in_channels * self.positions * (r_in + self.out_channels)
        return costs

    def ranks(self, form: Form, multiple: int = 1) -> Tensor:
        """The pairs to choose from, ``(n, 2)`` int64: at most 64 ranks on each side, all multiples of a number.

        Pairs in which one rank is more than the other can use are left out.
        """
        r_in, r_out = (
            torch.tensor(_few(most, step), dtype=torch.int64, device="cpu")
            for most, step in zip(self.largest_rank(form), self.steps(multiple), strict=True)
        )
        pairs = torch.cartesian_prod(r_in, r_out).reshape(-1, 2)
        first, second = pairs.unbind(1)
        return pairs[(first <= self.positions * second) & (second <= self.positions * first)]

    def steps(self, multiple: int) -> Pair:
        """What each of the two ranks is a multiple of: a number, or the one that suits."""
        full_in, full_out = self.full_rank
        return multiple or suited_multiple(full_in), multiple or suited_multiple(full_out)

    def inner_ranks(self) -> list[int]:
        """Some ranks on the input side, ascending: all, up to 64."""
        return _few(self.full_rank[0], 1)

    def amplification(self, form: Form) -> Tensor:
        """What the form multiplies the squared error of rounding with, for every pair of ranks."""
        r_in, r_out = (torch.arange(full + 1, dtype=torch.float64, device="cpu") for full in self.full_rank)
        if form == "factored":
            return torch.ones(len(r_in), len(r_out), dtype=torch.float64, device="cpu")
        inner = r_in * (self.in_channels - r_in) / self.in_channels
        outer = r_out * (self.out_channels - r_out) / self.out_channels
        return 1 + AMPLIFIED * (inner[:, None] + outer)

    def few(self, form: Form, multiple: int, count: int) -> list[Pair]:
        """Choose about so many pairs over the whole range, of those at which the layer is smaller than dense."""
        pairs = self.ranks(form, multiple)
        smaller = pairs[self.parameters(pairs, form) < self.dense_parameters]
        sides = [nearly_proportional(sorted(set(one.tolist())), round(count**0.5)) for one in smaller.unbind(1)]
        return [(a, b) for a, b in smaller.tolist() if a in sides[0] and b in sides[1]]

    def to_tensors(self, weight: Tensor) -> Tensor:
        """Reshape a weight ``(out, in / groups, *kernel)`` to ``(groups, out, in, positions)``."""
        return weight.reshape(self.groups, self.out_channels, self.in_channels, self.positions)

    def to_weight(self, tensors: Tensor) -> Tensor:
        """Undo :meth:`to_tensors`."""
        return tensors.reshape(self.groups * self.out_channels, self.in_channels, *self.kernel)

    def layer_shapes(self, rank: Pair, form: Form) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the weights of ``up``, ``core`` and ``down`` at a pair of ranks."""
        r_in, r_out = rank
        inputs = self.in_channels - (r_in if form == "pivoted" else 0)
        outputs = self.out_channels - (r_out if form == "pivoted" else 0)
        groups = self.groups
        return (
            (groups * outputs, r_out, 1, 1),
            (groups * r_out, r_in, *self.kernel),
            (groups * r_in, inputs, 1, 1),
        )

    def checked(self, rank: object, name: str, scheme: str, form: Form) -> Pair:
        """Return a pair of ranks, or one number for both, as a pair if the form can have it."""
        if isinstance(rank, (tuple, list)):
            if len(rank) != 2:  # noqa: PLR2004 - input and output
                raise ValueError(f"{name} must be a pair (r_in, r_out) in scheme {scheme!r}, got {describe(rank)}.")
            first, second = rank
        else:
            first = second = rank
        most = self.largest_rank(form)
        in_why, out_why = (
            f"the full rank of scheme {scheme!r} on that side"
            if largest == full
            else "one less than the channels on that side, at which form 'pivoted' has nothing to leave out"
            for largest, full in zip(most, self.full_rank, strict=True)
        )
        return (
            check_count(first, f"{name} (r_in)", most[0], in_why),
            check_count(second, f"{name} (r_out)", most[1], out_why),
        )


def as_rank(entry: Any) -> Rank:
    """Read an entry of ``tensor.tolist()`` as a rank."""
    return entry if isinstance(entry, int) else (entry[0], entry[1])


def no_more(rank: Rank, most: Rank) -> bool:
    """Tell whether a rank, or each of a pair, is at most another."""
    ours, theirs = ((one,) if isinstance(one, int) else one for one in (rank, most))
    return all(one <= largest for one, largest in zip(ours, theirs, strict=True))


def _sides(rank: Any) -> tuple[Any, Any]:
    first, second = rank.unbind(-1) if isinstance(rank, torch.Tensor) else rank
    return first, second


def _few(most: int, multiple: int) -> list[int]:
    """Choose at most 64 multiples of a number: the small ones, then in about equal proportions up to the end."""
    all_of_them = list(range(multiple, most + 1, multiple))
    if len(all_of_them) <= _SIDE:
        return all_of_them
    steps = _SIDE - _SMALL
    ratio = (len(all_of_them) / _SMALL) ** (1 / steps)
    places = {round(_SMALL * ratio**step) for step in range(1, steps + 1)}
    return all_of_them[:_SMALL] + [all_of_them[place - 1] for place in sorted(places) if place > _SMALL]
