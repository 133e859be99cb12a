"""What the choices of one layer cost: in parameters, in multiply-accumulates, or in nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ._matricise import Form, LayerScheme
    from ._tucker_layout import Layout, Rank


# At which positions a layer uses each entry of its weight: those of its output, as most do; those of its input, as
# transposed convolutions do; or at none, as it looks rows up.
Work = Literal["outputs", "inputs", "lookups"]


class Prices(Protocol):
    """The prices of one layer."""

    @property
    def dense(self) -> int:
        """What the layer costs as it is."""

    def table(self, scheme: LayerScheme, layout: Layout, form: Form, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Return the ranks of a scheme and form to choose from, multiples of a number or suited, and their prices."""

    def cost(self, scheme: LayerScheme, layout: Layout, form: Form, rank: Rank) -> int | None:
        """Return the price of one rank, among those to choose from or not; None if it has none."""


@dataclass(frozen=True)
class ParameterPrices:
    """Entries of the weight, or of the factors.

    Attributes:
        dense: entries of the weight.
    """

    dense: int

    def table(self, scheme: LayerScheme, layout: Layout, form: Form, multiple: int = 1) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return all ranks to choose from and their parameters."""
        ranks = layout.ranks(form, multiple)
        return ranks, layout.parameters(ranks, form)

    def cost(self, scheme: LayerScheme, layout: Layout, form: Form, rank: Rank) -> int | None:  # noqa: ARG002
        """Return the parameters at a rank."""
        return int(layout.parameters(rank, form))


class Positions(NamedTuple):
    """How many outputs of each channel a layer computes for some inputs, and what a layer in its place could.

    Attributes:
        inputs: batch × all positions of the input.
        tall: with two kernel axes, batch × height of the output × width of the input.
        wide: with two kernel axes, batch × height of the input × width of the output.
        outputs: batch × all positions of the output.
    """

    inputs: int = 0
    tall: int = 0
    wide: int = 0
    outputs: int = 0

    def of_down(self, layout: Layout) -> int:
        """How many of each channel ``down`` computes: it has the stride of the kernel axes that it has."""
        if len(layout.kernel) != 2:  # noqa: PLR2004 - height and width
            return self.outputs if layout.down_axes or not layout.kernel else self.inputs
        by_axes = {(): self.inputs, (0,): self.tall, (1,): self.wide, (0, 1): self.outputs}
        return by_axes[layout.down_axes]


@dataclass(frozen=True)
class MacPrices:
    """Multiply-accumulates for the inputs that were given.

    Attributes:
        positions: what the layer was seen to compute, all calls together.
        entries: entries of the weight.
        work: at which positions the layer uses each of them.
        reads: how often the model asks for the weight itself: factors are multiplied out each time.
    """

    positions: Positions
    entries: int
    work: Work = "outputs"
    reads: int = 0

    @property
    def dense(self) -> int:
        """Each entry of the weight is used once for each of these positions."""
        times = {"outputs": self.positions.outputs, "inputs": self.positions.inputs, "lookups": 0}
        return times[self.work] * self.entries

    def table(self, scheme: LayerScheme, layout: Layout, form: Form, multiple: int = 1) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return all ranks to choose from and their multiply-accumulates."""
        ranks = layout.ranks(form, multiple)
        return ranks, self._costs(layout, form, ranks)

    def cost(self, scheme: LayerScheme, layout: Layout, form: Form, rank: Rank) -> int | None:  # noqa: ARG002
        """Return the multiply-accumulates at a rank."""
        return int(self._costs(layout, form, torch.tensor([rank], device="cpu")))

    def _costs(self, layout: Layout, form: Form, ranks: Tensor) -> Tensor:
        down, up = layout.work(ranks, form)
        inputs, outputs = self.positions.inputs, self.positions.outputs
        multiplied_out = self.reads * layout.product(ranks)
        if self.work == "lookups":
            return multiplied_out + outputs * up
        if self.work == "inputs":  # the kernel goes with one of the two, which makes the output larger
            return multiplied_out + inputs * down + (outputs if layout.down_axes else inputs) * up
        return multiplied_out + self.positions.of_down(layout) * down + outputs * up


@dataclass(frozen=True)
class TimePrices:
    """Measured times.

    Attributes:
        dense: nanoseconds that the layer takes as it is, all calls together.
        times: for each scheme and form that was tried, nanoseconds by rank.
    """

    dense: int
    times: Mapping[tuple[LayerScheme, Form], Mapping[Rank, int]]

    def table(self, scheme: LayerScheme, layout: Layout, form: Form, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Return the ranks that were tried and their times."""
        times = sorted(self.times.get((scheme, form), {}).items())
        ranks = torch.tensor([rank for rank, _ in times], dtype=torch.int64, device="cpu")
        if isinstance(layout.full_rank, tuple):
            ranks = ranks.reshape(-1, 2)  # also where there are none
        costs = torch.tensor([cost for _, cost in times], dtype=torch.int64, device="cpu")
        fitting = ranks % (multiple or 1) == 0  # what suits was looked at when they were chosen to be tried
        wanted = fitting if fitting.dim() == 1 else fitting.all(1)
        return ranks[wanted], costs[wanted]

    def cost(self, scheme: LayerScheme, layout: Layout, form: Form, rank: Rank) -> int | None:  # noqa: ARG002
        """Return the time of a rank, if it was tried."""
        return self.times.get((scheme, form), {}).get(rank)
