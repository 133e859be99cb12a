"""What the convolutions in two share, whatever the number of their kernel axes, transposed or not."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, TypeVar

from ._checks import check_choice, check_values
from ._geometry import CONVOLUTIONS, TRANSPOSED, HasGeometry, geometry_of, spelled_out
from ._lowrank_layer import TwoFactorLayer, inherit, merged, uninitialised
from ._matricise import SCHEMES, distinct_schemes, matricise
from ._pivoted_modules import ChannelMerge, ChannelSplit, PivotedConv2d
from ._source_layer import check_rank, check_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from ._geometry import Convolution, PaddingMode, Transposed
    from ._matricise import Form, Scheme

_Layer = TypeVar("_Layer", bound="ConvolutionInTwo")


class ConvolutionInTwo(TwoFactorLayer, HasGeometry):
    """A convolution, transposed or not, with a weight of rank r in each group."""

    scheme: Scheme

    def _begin_(self, dense: Convolution | Transposed, rank: int, scheme: Scheme, form: Form) -> None:
        """Take the geometry of a dense layer, and the shape of its weight, with the other arguments checked."""
        self._take_geometry_(dense)
        planar = self.kernel_axes == 2 and not self.transposed  # noqa: PLR2004 - height and width
        check_choice(scheme, "scheme", SCHEMES if planar else SCHEMES[:2])
        self.scheme = distinct_schemes(self.kernel_size, transposed=self.transposed)[scheme]
        self.matricisation = matricise(dense.weight.shape, self.scheme, self.groups, transposed=self.transposed)
        self.rank = check_rank(rank, self.matricisation, form, f"the full rank of scheme {scheme!r} in each group")
        self.form = form

    @classmethod
    def _from_dense(cls: type[_Layer], conv: Any, rank: int, scheme: Scheme, form: Form) -> _Layer:  # noqa: PYI019
        """Factor a convolution by truncated SVD, each group on its own."""
        layer = cls.like(conv, rank, scheme, form)
        check_values(conv.weight, conv)
        layer.truncate_(conv.weight)
        return layer

    @classmethod
    def like(  # noqa: PYI019 - Python 3.10 has no typing.Self
        cls: type[_Layer], conv: Any, rank: int, scheme: Scheme = "channel", form: Form = "factored"
    ) -> _Layer:
        """Make a layer to take the place of ``conv``, with factors that are still to be filled in.

        Args:
            conv: the layer to replace, of as many kernel axes.
            rank: 1 … full rank of the scheme's matrix, in the pivoted form one less.
            scheme: ``"channel"`` or ``"input"``; ``nn.Conv2d`` also has ``"spatial"`` and ``"spatial_transposed"``.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer with uninitialised factors; device, dtype, mode, ``requires_grad`` and bias as in ``conv``.

        Raises:
            TypeError: if it is not such a convolution, or of another dtype.
            ValueError: if the rank is out of range, or scheme or form unknown.
        """
        weight = check_source(conv, cls._dense_class(), cls.shape_of)
        layer = uninitialised(
            cls, conv.in_channels, conv.out_channels, conv.kernel_size, rank, scheme=scheme, **geometry_of(conv),
            bias=False, device=weight.device, dtype=weight.dtype, form=form,
        )  # fmt: skip
        return inherit(layer, conv, weight)

    @staticmethod
    @abstractmethod
    def shape_of(conv: Any) -> tuple[int, ...]:
        """Return the shape that the weight of a dense layer has by its attributes."""

    def to_dense(self) -> Any:
        """Merge the factors into the convolution of torch; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device, memory format and ``requires_grad``
            kept.
        """
        sizes = (self.in_channels, self.out_channels, self.kernel_size)
        return merged(self, self._dense_class(), *sizes, **geometry_of(self))

    def extra_repr(self) -> str:
        """Show the sizes, as ``nn.Conv2d`` does."""
        text = self._geometry_repr()
        return f"{text}, rank={self.rank}, scheme={self.scheme}, bias={self.bias is not None}{self._form_repr()}"

    @classmethod
    def _dense_class(cls) -> type[Convolution | Transposed]:
        return TRANSPOSED[cls.kernel_axes] if cls.transposed else CONVOLUTIONS[cls.kernel_axes]


class LowRankConvolution(ConvolutionInTwo):
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
        self._begin_(dense, rank, scheme, form)
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

        layout, middle, dim = self.matricisation, groups * self.rank, -1 - self.kernel_axes
        pivots = layout.order_child if form == "pivoted" else "none"
        down_in = in_channels - (middle if pivots == "split" else 0)
        up_out = out_channels - (middle if pivots == "merge" else 0)
        if pivots == "split":
            self.split = ChannelSplit(groups, self.rank, layout.in_channels, device, dim=dim)
        self.down = part((down_in, middle), layout.down_axes, bias=False, **options)
        if pivots == "up":
            plain = part((middle, up_out), layout.up_axes, bias=False, device="meta")
            self.up = PivotedConv2d(plain, bias=bias, **options)
        else:
            self.up = part((middle, up_out), layout.up_axes, bias=bias and pivots != "merge", **options)
        if pivots == "merge":
            self.merge = ChannelMerge(groups, self.rank, layout.out_channels, dim=dim, bias=bias, **options)

    @staticmethod
    def shape_of(conv: Any) -> tuple[int, ...]:
        """Return the shape that the weight of a dense layer has by its attributes."""
        return conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size
