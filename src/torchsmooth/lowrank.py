"""LowRankLinear and LowRankConv2d: a layer whose weight is a product of two, kept as two ordinary layers.

The children ``down`` (from the input to ``rank`` channels) and ``up`` (on to the output, with the bias) are plain
``nn.Linear`` / ``nn.Conv2d``, so quantisers, FLOP counters and exporters see what they know. ``weight`` multiplies the
factors out, for callers that read it (``nn.TransformerEncoderLayer`` in eval mode, Swin's attention).

In the pivoted form one of the two is smaller by rank × rank, and a third child puts together what the pivots and the
others make: ``merge`` the output channels, ``split`` the input channels. Under the spatial schemes, where pivots are no
whole channels, ``up`` itself is such a module instead of a plain one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ._checks import check_choice, check_values
from ._geometry import HasGeometry, geometry_of, spelled_out
from ._lowrank_layer import TwoFactorLayer, check_rank, check_source, inherit, merged, uninitialised
from ._matricise import SCHEMES, Form, Scheme, distinct_schemes, matricise
from ._pivoted_modules import ChannelMerge, ChannelSplit, PivotedConv2d

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._geometry import PaddingMode

__all__ = ["LowRankConv2d", "LowRankLinear"]


class LowRankLinear(TwoFactorLayer):
    r"""A linear layer with a weight of rank r: ``up(down(x))``, :math:`W = W_{up} W_{down}`.

    In the pivoted form ``down`` computes r of the outputs themselves, ``up`` the others from them, and ``merge`` puts
    them in order: :math:`W = P \begin{bmatrix} I \\ W_{up} \end{bmatrix} W_{down}`.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        rank: 1 … min(in_features, out_features), in the pivoted form one less.
        bias: whether there is a bias.
        device: device of the parameters.
        dtype: floating dtype of the parameters.
        form: ``"factored"``, of rank · (in_features + out_features) parameters, or ``"pivoted"``, of rank² fewer.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``; ``down.weight`` ``(rank, in_features)``, ``up.weight``
        ``(out_features, rank)``, ``up.bias`` ``(out_features,)``. In the pivoted form, ``up.weight``
        ``(out_features - rank, rank)``, ``merge.bias`` ``(out_features,)`` and the int32 buffer ``merge.order``
        ``(out_features,)``.

    Raises:
        TypeError: if the rank is not an integer.
        ValueError: if it is out of range.

    Example:
        >>> import torch, torchsmooth
        >>> layer = torchsmooth.LowRankLinear.from_linear(torch.nn.Linear(20, 10), rank=4)
        >>> layer(torch.zeros(2, 20)).shape, layer.weight.shape
        (torch.Size([2, 10]), torch.Size([10, 20]))

    Source: Eckart and Young, 1936; pivoted: Zhao et al., "Pivoting Factorization", 2025.
    """

    down: nn.Linear
    up: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,  # noqa: FBT001, FBT002 - as in nn.Linear
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        form: Form = "factored",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.matricisation = matricise((out_features, in_features), "channel")
        self.rank = rank = check_rank(rank, self.matricisation, form, "the full rank")
        self.form = form
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        if form == "factored":
            self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        else:
            self.up = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
            self.merge = ChannelMerge(1, rank, out_features, dim=-1, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, form: Form = "factored") -> LowRankLinear:
        """Factor a linear layer by truncated SVD; the layer itself is not changed.

        Args:
            linear: weight ``(out_features, in_features)`` in float64, float32, bfloat16 or float16.
            rank: 1 … min(in_features, out_features), at which the layer is reproduced to rounding; less than that in
                the pivoted form.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer on the same device, with the same dtype, mode, ``requires_grad`` and a copy of the bias.

        Raises:
            TypeError: if it is not a Linear, or of another dtype.
            ValueError: if the rank is out of range, the form unknown, or the weight not a plain, finite parameter.
        """
        layer = cls.like(linear, rank, form)
        check_values(linear.weight, type(linear).__name__)
        layer.truncate_(linear.weight)
        return layer

    @classmethod
    def like(cls, linear: nn.Linear, rank: int, form: Form = "factored") -> LowRankLinear:
        """Make a layer to take the place of ``linear``, with factors that are still to be filled in.

        Args:
            linear: the layer to replace.
            rank: 1 … min(in_features, out_features), in the pivoted form one less.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer with uninitialised factors; device, dtype, mode, ``requires_grad`` and bias as in ``linear``.

        Raises:
            TypeError: if it is not a Linear, or of another dtype.
            ValueError: if the rank is out of range, or the form unknown.
        """
        weight = check_source(linear, nn.Linear, "For convolutions use LowRankConv2d.from_conv2d.", cls.shape_of)
        layer = uninitialised(
            cls, linear.in_features, linear.out_features, rank,
            bias=False, device=weight.device, dtype=weight.dtype, form=form,
        )  # fmt: skip
        return inherit(layer, linear, weight)

    @staticmethod
    def shape_of(linear: nn.Linear) -> tuple[int, ...]:
        """Return the shape that the weight of a dense layer has by its attributes."""
        return linear.out_features, linear.in_features

    def to_linear(self) -> nn.Linear:
        """Merge the factors into an ``nn.Linear``; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device and ``requires_grad`` kept.
        """
        return merged(self, nn.Linear, self.in_features, self.out_features)

    def to_dense(self) -> nn.Linear:
        """Do what :meth:`to_linear` does, under the name that all low-rank layers share."""
        return self.to_linear()

    def extra_repr(self) -> str:
        """Show the sizes, as ``nn.Linear`` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}{self._form_repr()}"
        )


class LowRankConv2d(TwoFactorLayer, HasGeometry):
    """A convolution with a weight of rank r (in each group), in one of the schemes of the matricisation.

    ``channel``: a full kernel to ``rank`` channels, then 1×1. ``input``: 1×1, then the full kernel. ``spatial``: kh×1,
    then 1×kw. ``spatial_transposed``: 1×kw, then kh×1. Stride, padding (also ``"same"`` and every ``padding_mode``) and
    dilation go with the kernel axis they belong to. Schemes that coincide for a kernel (all, for 1×1) go by the first
    of their names.

    In the pivoted form r rows of each group's matrix are kept as they are, and the others are combinations of them:
    ``channel``: ``down`` computes r of the output channels themselves, ``up`` the others from them, and ``merge`` puts
    them in order. ``input``: ``split`` takes r of the input channels out, and ``down`` makes of the others what is
    added to them. ``spatial``, ``spatial_transposed``: ``up`` puts its weight together when it is called.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: a number or a pair.
        rank: 1 … the full rank of the scheme's matrix, for each group; in the pivoted form one less.
        scheme: ``"channel"``, ``"input"``, ``"spatial"`` or ``"spatial_transposed"``.
        stride: a number or a pair.
        padding: a number, a pair, ``"same"`` or ``"valid"``.
        dilation: a number or a pair.
        groups: number of groups.
        bias: whether there is a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: device of the parameters.
        dtype: floating dtype of the parameters.
        form: ``"factored"``, of rank · (rows + columns) parameters for each group's matrix, or ``"pivoted"``, of rank²
            fewer.

    Shape:
        Input and output as of ``nn.Conv2d``; ``down.weight`` has ``groups · rank`` output channels, ``up.weight``
        ``rank`` input channels in each of the groups. In the pivoted form there is an int32 buffer as well
        (``merge.order``, ``split.order`` or ``up.order``), and ``merge`` has the bias where there is one. ``up.weight``
        has ``groups · rank`` output channels fewer, or under ``input``, ``down.weight`` has ``rank`` input channels
        fewer; under the spatial schemes ``up.weight`` is a matrix, ``(groups · (rows - rank), rank)``.

    Raises:
        TypeError: if the rank is not an integer.
        ValueError: if it is out of range, or the scheme or the form is unknown.

    Example:
        >>> import torch, torchsmooth
        >>> conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        >>> layer = torchsmooth.LowRankConv2d.from_conv2d(conv, rank=4, scheme="spatial")
        >>> layer.down.kernel_size, layer.up.kernel_size
        ((3, 1), (1, 3))

    Source: channel: Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection",
    2016; spatial: Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", 2014;
    pivoted, for linear layers: Zhao et al., "Pivoting Factorization", 2025.
    """

    down: nn.Conv2d
    up: nn.Conv2d | PivotedConv2d

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
            in_channels, out_channels, kernel_size,
            stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip
        self._take_geometry_(dense)
        check_choice(scheme, "scheme", SCHEMES)
        self.scheme = distinct_schemes(self.kernel_size)[scheme]
        self.matricisation = matricise(dense.weight.shape, self.scheme, groups)
        whole = f"the full rank of scheme {scheme!r} in each group"
        self.rank = rank = check_rank(rank, self.matricisation, form, whole)
        self.form = form
        options: dict[str, Any] = {"device": device, "dtype": dtype}

        def part(channels: tuple[int, int], axes: tuple[int, ...], **options: Any) -> nn.Conv2d:
            def on_axes(pair: tuple[int, ...], otherwise: int) -> Any:
                return tuple(size if axis in axes else otherwise for axis, size in enumerate(pair))

            return nn.Conv2d(
                *channels,
                on_axes(self.kernel_size, 1),
                on_axes(self.stride, 1),
                self.padding if isinstance(self.padding, str) else on_axes(self.padding, 0),
                on_axes(self.dilation, 1),
                groups,
                padding_mode=padding_mode,
                **options,
            )

        layout, middle = self.matricisation, groups * rank
        pivots = layout.order_child if form == "pivoted" else "none"
        down_in = in_channels - (middle if pivots == "split" else 0)
        up_out = out_channels - (middle if pivots == "merge" else 0)
        if pivots == "split":
            self.split = ChannelSplit(groups, rank, layout.in_channels, device)
        self.down = part((down_in, middle), layout.down_axes, bias=False, **options)
        if pivots == "up":
            plain = part((middle, up_out), layout.up_axes, bias=False, device="meta")
            self.up = PivotedConv2d(plain, bias=bias, **options)
        else:
            self.up = part((middle, up_out), layout.up_axes, bias=bias and pivots != "merge", **options)
        if pivots == "merge":
            self.merge = ChannelMerge(groups, rank, layout.out_channels, dim=-3, bias=bias, **options)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, rank: int, scheme: Scheme = "channel", form: Form = "factored"
    ) -> LowRankConv2d:
        """Factor a convolution by truncated SVD, each group on its own; the layer itself is not changed.

        Args:
            conv: weight ``(out, in / groups, kh, kw)`` in float64, float32, bfloat16 or float16.
            rank: 1 … full rank of the scheme's matrix, at which the layer is reproduced to rounding; less than that in
                the pivoted form.
            scheme: ``"channel"``, ``"input"``, ``"spatial"`` or ``"spatial_transposed"``.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer on the same device, with the same dtype, memory format, mode, ``requires_grad`` and a copy of the
            bias.

        Raises:
            TypeError: if it is not a Conv2d, or of another dtype.
            ValueError: if the rank is out of range, scheme or form unknown, or the weight no plain, finite parameter.
        """
        layer = cls.like(conv, rank, scheme, form)
        check_values(conv.weight, type(conv).__name__)
        layer.truncate_(conv.weight)
        return layer

    @classmethod
    def like(cls, conv: nn.Conv2d, rank: int, scheme: Scheme = "channel", form: Form = "factored") -> LowRankConv2d:
        """Make a layer to take the place of ``conv``, with factors that are still to be filled in.

        Args:
            conv: the layer to replace.
            rank: 1 … full rank of the scheme's matrix, in the pivoted form one less.
            scheme: ``"channel"``, ``"input"``, ``"spatial"`` or ``"spatial_transposed"``.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer with uninitialised factors; device, dtype, mode, ``requires_grad`` and bias as in ``conv``.

        Raises:
            TypeError: if it is not a Conv2d, or of another dtype.
            ValueError: if the rank is out of range, or scheme or form unknown.
        """
        weight = check_source(conv, nn.Conv2d, "For linear layers use LowRankLinear.from_linear.", cls.shape_of)
        layer = uninitialised(
            cls, conv.in_channels, conv.out_channels, conv.kernel_size, rank, scheme=scheme, **geometry_of(conv),
            bias=False, device=weight.device, dtype=weight.dtype, form=form,
        )  # fmt: skip
        return inherit(layer, conv, weight)

    @staticmethod
    def shape_of(conv: nn.Conv2d) -> tuple[int, ...]:
        """Return the shape that the weight of a dense layer has by its attributes."""
        return conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size

    def to_conv2d(self) -> nn.Conv2d:
        """Merge the factors into an ``nn.Conv2d``; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device, memory format and ``requires_grad``
            kept.
        """
        sizes = (self.in_channels, self.out_channels, self.kernel_size)
        return merged(self, nn.Conv2d, *sizes, **geometry_of(self))

    def to_dense(self) -> nn.Conv2d:
        """Do what :meth:`to_conv2d` does, under the name that all low-rank layers share."""
        return self.to_conv2d()

    def extra_repr(self) -> str:
        """Show the sizes, as ``nn.Conv2d`` does."""
        text = self._geometry_repr()
        return f"{text}, rank={self.rank}, scheme={self.scheme}, bias={self.bias is not None}{self._form_repr()}"
