"""What the convolutions in two share, whatever the number of their kernel axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._checks import check_choice, check_values
from ._geometry import CONVOLUTIONS, HasGeometry, geometry_of, spelled_out
from ._lowrank_layer import TwoFactorLayer, check_rank, check_source, inherit, merged, uninitialised
from ._matricise import SCHEMES, distinct_schemes, matricise
from ._pivoted_modules import ChannelMerge, ChannelSplit, PivotedConv2d

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn
    from typing_extensions import Self

    from ._geometry import PaddingMode
    from ._matricise import Form, Scheme


class LowRankConvolution(TwoFactorLayer, HasGeometry):
    """A convolution with a weight of rank r in each group; its subclasses say how many axes the kernel has."""

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
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        form: Form = "factored",
    ) -> None:
        super().__init__()
        dense = spelled_out(
            self.kernel_axes, in_channels, out_channels, kernel_size,
            stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip
        self._take_geometry_(dense)
        check_choice(scheme, "scheme", SCHEMES if self.kernel_axes == 2 else SCHEMES[:2])  # noqa: PLR2004 - height, width
        self.scheme = distinct_schemes(self.kernel_size)[scheme]
        self.matricisation = matricise(dense.weight.shape, self.scheme, groups)
        whole = f"the full rank of scheme {scheme!r} in each group"
        self.rank = rank = check_rank(rank, self.matricisation, form, whole)
        self.form = form
        options: dict[str, Any] = {"device": device, "dtype": dtype}

        def part(channels: tuple[int, int], axes: tuple[int, ...], **options: Any) -> Any:
            def on_axes(sizes: tuple[int, ...], otherwise: int) -> Any:
                return tuple(size if axis in axes else otherwise for axis, size in enumerate(sizes))

            return CONVOLUTIONS[self.kernel_axes](
                *channels,
                on_axes(self.kernel_size, 1),
                on_axes(self.stride, 1),
                self.padding if isinstance(self.padding, str) else on_axes(self.padding, 0),
                on_axes(self.dilation, 1),
                groups,
                padding_mode=padding_mode,
                **options,
            )

        layout, middle, dim = self.matricisation, groups * rank, -1 - self.kernel_axes
        pivots = layout.order_child if form == "pivoted" else "none"
        down_in = in_channels - (middle if pivots == "split" else 0)
        up_out = out_channels - (middle if pivots == "merge" else 0)
        if pivots == "split":
            self.split = ChannelSplit(groups, rank, layout.in_channels, device, dim=dim)
        self.down = part((down_in, middle), layout.down_axes, bias=False, **options)
        if pivots == "up":
            plain = part((middle, up_out), layout.up_axes, bias=False, device="meta")
            self.up = PivotedConv2d(plain, bias=bias, **options)
        else:
            self.up = part((middle, up_out), layout.up_axes, bias=bias and pivots != "merge", **options)
        if pivots == "merge":
            self.merge = ChannelMerge(groups, rank, layout.out_channels, dim=dim, bias=bias, **options)

    @classmethod
    def _from_dense(cls, conv: Any, rank: int, scheme: Scheme, form: Form) -> Self:
        """Factor a convolution by truncated SVD, each group on its own."""
        layer = cls.like(conv, rank, scheme, form)
        check_values(conv.weight, type(conv).__name__)
        layer.truncate_(conv.weight)
        return layer

    @classmethod
    def like(cls, conv: Any, rank: int, scheme: Scheme = "channel", form: Form = "factored") -> Self:
        """Make a layer to take the place of ``conv``, with factors that are still to be filled in.

        Args:
            conv: the layer to replace, of as many kernel axes.
            rank: 1 … full rank of the scheme's matrix, in the pivoted form one less.
            scheme: ``"channel"`` or ``"input"``; with two kernel axes also ``"spatial"`` or ``"spatial_transposed"``.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer with uninitialised factors; device, dtype, mode, ``requires_grad`` and bias as in ``conv``.

        Raises:
            TypeError: if it is not such a convolution, or of another dtype.
            ValueError: if the rank is out of range, or scheme or form unknown.
        """
        weight = check_source(conv, CONVOLUTIONS[cls.kernel_axes], cls.shape_of)
        layer = uninitialised(
            cls, conv.in_channels, conv.out_channels, conv.kernel_size, rank, scheme=scheme, **geometry_of(conv),
            bias=False, device=weight.device, dtype=weight.dtype, form=form,
        )  # fmt: skip
        return inherit(layer, conv, weight)

    @staticmethod
    def shape_of(conv: Any) -> tuple[int, ...]:
        """Return the shape that the weight of a dense layer has by its attributes."""
        return conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size

    def to_dense(self) -> Any:
        """Merge the factors into the convolution of torch; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device, memory format and ``requires_grad``
            kept.
        """
        sizes = (self.in_channels, self.out_channels, self.kernel_size)
        return merged(self, CONVOLUTIONS[self.kernel_axes], *sizes, **geometry_of(self))

    def extra_repr(self) -> str:
        """Show the sizes, as ``nn.Conv2d`` does."""
        text = self._geometry_repr()
        return f"{text}, rank={self.rank}, scheme={self.scheme}, bias={self.bias is not None}{self._form_repr()}"
