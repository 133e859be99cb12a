"""What the transposed convolutions in two share, whatever the number of their kernel axes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ._checks import describe
from ._execution import active
from ._geometry import CONVOLUTIONS, TRANSPOSED, geometry_of, spelled_out
from ._lowrank_conv import ConvolutionInTwo
from ._pivoted_modules import ChannelMerge, ChannelSplit

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor, nn

    from ._geometry import PaddingMode
    from ._matricise import Form, Scheme


class LowRankTransposedConvolution(ConvolutionInTwo):
    """A transposed convolution with a weight of rank r in each group; its subclasses say how many axes there are."""

    transposed: ClassVar[bool] = True
    down: nn.Module
    up: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        rank: int,
        *,
        scheme: Scheme = "channel",
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        form: Form = "factored",
    ) -> None:
        super().__init__()
        given: Any = padding
        if isinstance(given, str):  # torch would take it apart into letters
            raise ValueError(
                f"padding of a transposed convolution must be a number or one for each axis, got {describe(padding)}: "
                "only ordinary convolutions have padding by name."
            )
        dense = spelled_out(
            self.kernel_axes, in_channels, out_channels, kernel_size, transposed=True, stride=stride, padding=padding,
            output_padding=output_padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip
        self._begin_(dense, rank, scheme, form)
        layout, middle, dim = self.matricisation, groups * self.rank, -1 - self.kernel_axes
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        large: Any = TRANSPOSED[self.kernel_axes]
        small: Any = CONVOLUTIONS[self.kernel_axes]
        whole = partial(large, kernel_size=self.kernel_size, **geometry_of(self), **options)
        point = partial(small, kernel_size=1, groups=groups, **options)
        first, second = (whole, point) if layout.inputs_first == "down" else (point, whole)
        pivots = layout.order_child if form == "pivoted" else "none"
        if pivots == "split":
            self.split = ChannelSplit(groups, self.rank, layout.in_channels, device, dim=dim)
        self.down = first(in_channels - (middle if pivots == "split" else 0), middle, bias=False)
        others = out_channels - (middle if pivots == "merge" else 0)
        self.up = second(middle, others, bias=bias and pivots != "merge")
        if pivots == "merge":
            self.merge = ChannelMerge(groups, self.rank, layout.out_channels, dim=dim, bias=bias, **options)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002 - as torch has it
        """Apply ``down``, then ``up``; the one with the kernel makes an output of the size that is asked for.

        Args:
            input: as of the dense layer.
            output_size: the spatial sizes of the output, as of the dense layer; None for the smallest possible plus
                ``output_padding``.

        Returns:
            What the dense layer with the weight ``self.weight`` returns, to rounding.
        """
        if output_size is None:  # also where a factor is now of another class, which may not know of sizes
            return super().forward(input)
        output: Tensor
        derived = active(self, input)
        if derived is not None:
            output = derived(input, output_size)
        elif "split" in self._modules:
            pivots, others = self.split(input)
            output = self.up(pivots + self.down(others), output_size)
        elif self.matricisation.inputs_first == "up":
            output = self.up(self.down(input), output_size)
        else:
            pivots = self.down(input, output_size)
            output = self.up(pivots)
            if "merge" in self._modules:
                output = self.merge(pivots, output)
        return output

    @staticmethod
    def shape_of(conv: Any) -> tuple[int, ...]:
        """Return the shape that the weight of a dense layer has by its attributes."""
        return conv.in_channels, conv.out_channels // conv.groups, *conv.kernel_size
