"""What the choices of one layer cost: in parameters, in multiply-accumulates, or in nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ._matricise import Form, Matricisation, Scheme


class Prices(Protocol):
    """The prices of one layer."""

    @property
    def dense(self) -> int:
        """What the layer costs as it is."""

    def table(self, scheme: Scheme, layout: Matricisation, form: Form) -> tuple[Tensor, Tensor]:
        """Return the ranks of a scheme and form that have a price, ascending, and their prices: both int64."""


def _ranks(layout: Matricisation, form: Form) -> Tensor:
    return torch.arange(1, layout.largest_rank(form) + 1, device="cpu")  # whatever the default device is


@dataclass(frozen=True)
class ParameterPrices:
    """Entries of the weight, or of the factors.

    Attributes:
        dense: entries of the weight.
    """

    dense: int

    def table(self, scheme: Scheme, layout: Matricisation, form: Form) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return all ranks and their parameters."""
        ranks = _ranks(layout, form)
        return ranks, layout.parameters(ranks, form)


class Positions(NamedTuple):
    """How many outputs of each channel a layer computes for some inputs, and what a layer in its place could.

    Attributes:
        inputs: batch × height and width of the input.
        tall: batch × height of the output × width of the input.
        wide: batch × height of the input × width of the output.
        outputs: batch × height and width of the output.
    """

    inputs: int = 0
    tall: int = 0
    wide: int = 0
    outputs: int = 0

    def of_down(self, layout: Matricisation) -> int:
        """How many of each channel ``down`` computes: it has the stride of the kernel axes that it has."""
        if len(layout.kernel) != 2:  # noqa: PLR2004 - a linear layer
            return self.outputs
        by_axes = {(): self.inputs, (0,): self.tall, (1,): self.wide, (0, 1): self.outputs}
        return by_axes[layout.down_axes]


@dataclass(frozen=True)
class MacPrices:
    """Multiply-accumulates for the inputs that were given.

    Attributes:
        positions: what the layer was seen to compute, all calls together.
        entries: entries of the weight.
    """

    positions: Positions
    entries: int

    @property
    def dense(self) -> int:
        """Each entry of the weight is used once for each output position."""
        return self.positions.outputs * self.entries

    def table(self, scheme: Scheme, layout: Matricisation, form: Form) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return all ranks and their multiply-accumulates.

        The pivoted form saves rank × rank of them where the pivots are whole channels; elsewhere ``up`` puts its weight
        together and uses all of it.
        """
        ranks = _ranks(layout, form)
        child = layout.order_child if form == "pivoted" else ""
        columns = layout.columns - ranks if child == "split" else layout.columns
        rows = layout.rows - ranks if child == "merge" else layout.rows
        work = self.positions.of_down(layout) * columns + self.positions.outputs * rows
        return ranks, layout.groups * ranks * work


@dataclass(frozen=True)
class TimePrices:
    """Measured times.

    Attributes:
        dense: nanoseconds that the layer takes as it is, all calls together.
        times: for each scheme and form that was tried, nanoseconds by rank.
    """

    dense: int
    times: Mapping[tuple[Scheme, Form], Mapping[int, int]]

    def table(self, scheme: Scheme, layout: Matricisation, form: Form) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return the ranks that were tried and their times."""
        times = sorted(self.times.get((scheme, form), {}).items())
        ranks, costs = torch.tensor(times, dtype=torch.int64, device="cpu").reshape(-1, 2).unbind(1)
        return ranks, costs
