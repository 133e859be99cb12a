"""Convolutions in two: a layer whose weight is a product of two, kept as two ordinary convolutions.

The children ``down`` (from the input to ``rank`` channels) and ``up`` (on to the output, with the bias) are plain
layers of torch, so quantisers, FLOP counters and exporters see what they know.

In the pivoted form one of the two is smaller by rank × rank, and a third child puts together what the pivots and the
others make: ``merge`` the output channels, ``split`` the input channels. Under the spatial schemes, where pivots are no
whole channels, ``up`` itself is such a module instead of a plain one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._lowrank_conv import LowRankConvolution

if TYPE_CHECKING:
    from torch import nn

    from ._matricise import Form, Scheme
    from ._pivoted_modules import PivotedConv2d

__all__ = ["LowRankConv1d", "LowRankConv2d", "LowRankConv3d"]


class LowRankConv1d(LowRankConvolution):
    """A convolution over one kernel axis with a weight of rank r (in each group).

    ``channel``: a full kernel to ``rank`` channels, then one of size 1. ``input``: the other way round. Stride,
    padding (also ``"same"`` and every ``padding_mode``) and dilation go with the kernel. For a kernel of size 1
    the two are the same, and go by ``channel``. The pivoted form is that of :class:`LowRankConv2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: a number or a tuple of one.
        rank: 1 … the full rank of the scheme's matrix, for each group; in the pivoted form one less.
        scheme: ``"channel"`` or ``"input"``.
        stride: a number or a tuple of one.
        padding: a number or a tuple of one, ``"same"`` or ``"valid"``.
        dilation: a number or a tuple of one.
        groups: number of groups.
        bias: whether there is a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: device of the parameters.
        dtype: floating dtype of the parameters.
        form: ``"factored"``, of rank · (rows + columns) parameters for each group's matrix, or ``"pivoted"``, of rank²
            fewer.

    Shape:
        Input and output as of ``nn.Conv1d``; ``down.weight`` has ``groups · rank`` output channels, ``up.weight``
        ``rank`` input channels in each of the groups. In the pivoted form there is an int32 buffer as well
        (``merge.order`` or ``split.order``), and under ``channel``, ``merge`` has the bias.

    Raises:
        TypeError: if the rank is not an integer.
        ValueError: if it is out of range, or the scheme or the form is unknown.

    Example:
        >>> import torch, torchsmooth
        >>> conv = torch.nn.Conv1d(8, 16, 5, padding=2)
        >>> layer = torchsmooth.LowRankConv1d.from_conv1d(conv, rank=4)
        >>> layer(torch.zeros(2, 8, 20)).shape, layer.down.weight.shape
        (torch.Size([2, 16, 20]), torch.Size([4, 8, 5]))

    Source: Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection", 2016, for
    two kernel axes; pivoted, for linear layers: Zhao et al., "Pivoting Factorization", 2025.
    """

    kernel_axes: ClassVar[int] = 1
    down: nn.Conv1d
    up: nn.Conv1d

    @classmethod
    def from_conv1d(
        cls, conv: nn.Conv1d, rank: int, scheme: Scheme = "channel", form: Form = "factored"
    ) -> LowRankConv1d:
        """Factor a convolution by truncated SVD, each group on its own; the layer itself is not changed.

        Args:
            conv: weight ``(out, in / groups, k)`` in float64, float32, bfloat16 or float16.
            rank: 1 … full rank of the scheme's matrix, at which the layer is reproduced to rounding; less than that in
                the pivoted form.
            scheme: ``"channel"`` or ``"input"``.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer on the same device, with the same dtype, memory format, mode, ``requires_grad`` and a copy of the
            bias.

        Raises:
            TypeError: if it is not a Conv1d, or of another dtype.
            ValueError: if the rank is out of range, scheme or form unknown, or the weight no plain, finite parameter.
        """
        return cls._from_dense(conv, rank, scheme, form)

    def to_conv1d(self) -> nn.Conv1d:
        """Merge the factors into an ``nn.Conv1d``; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device, memory format and ``requires_grad``
            kept.
        """
        dense: nn.Conv1d = self.to_dense()
        return dense


class LowRankConv2d(LowRankConvolution):
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

    kernel_axes: ClassVar[int] = 2
    down: nn.Conv2d
    up: nn.Conv2d | PivotedConv2d

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
        return cls._from_dense(conv, rank, scheme, form)

    def to_conv2d(self) -> nn.Conv2d:
        """Merge the factors into an ``nn.Conv2d``; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device, memory format and ``requires_grad``
            kept.
        """
        dense: nn.Conv2d = self.to_dense()
        return dense


class LowRankConv3d(LowRankConvolution):
    """A convolution over three kernel axes with a weight of rank r (in each group).

    ``channel``: a full kernel to ``rank`` channels, then one of size 1×1×1. ``input``: the other way round. Stride,
    padding (also ``"same"`` and every ``padding_mode``) and dilation go with the kernel. For a kernel of size 1×1×1
    the two are the same, and go by ``channel``. The pivoted form is that of :class:`LowRankConv2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: a number or a triple.
        rank: 1 … the full rank of the scheme's matrix, for each group; in the pivoted form one less.
        scheme: ``"channel"`` or ``"input"``.
        stride: a number or a triple.
        padding: a number or a triple, ``"same"`` or ``"valid"``.
        dilation: a number or a triple.
        groups: number of groups.
        bias: whether there is a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: device of the parameters.
        dtype: floating dtype of the parameters.
        form: ``"factored"``, of rank · (rows + columns) parameters for each group's matrix, or ``"pivoted"``, of rank²
            fewer.

    Shape:
        Input and output as of ``nn.Conv3d``; ``down.weight`` has ``groups · rank`` output channels, ``up.weight``
        ``rank`` input channels in each of the groups. In the pivoted form there is an int32 buffer as well
        (``merge.order`` or ``split.order``), and under ``channel``, ``merge`` has the bias.

    Raises:
        TypeError: if the rank is not an integer.
        ValueError: if it is out of range, or the scheme or the form is unknown.

    Example:
        >>> import torch, torchsmooth
        >>> conv = torch.nn.Conv3d(8, 16, 3, padding=1)
        >>> layer = torchsmooth.LowRankConv3d.from_conv3d(conv, rank=4, scheme="input")
        >>> layer(torch.zeros(2, 8, 5, 6, 7)).shape, layer.down.weight.shape
        (torch.Size([2, 16, 5, 6, 7]), torch.Size([4, 8, 1, 1, 1]))

    Source: Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection", 2016, for
    two kernel axes; pivoted, for linear layers: Zhao et al., "Pivoting Factorization", 2025.
    """

    kernel_axes: ClassVar[int] = 3
    down: nn.Conv3d
    up: nn.Conv3d

    @classmethod
    def from_conv3d(
        cls, conv: nn.Conv3d, rank: int, scheme: Scheme = "channel", form: Form = "factored"
    ) -> LowRankConv3d:
        """Factor a convolution by truncated SVD, each group on its own; the layer itself is not changed.

        Args:
            conv: weight ``(out, in / groups, kd, kh, kw)`` in float64, float32, bfloat16 or float16.
            rank: 1 … full rank of the scheme's matrix, at which the layer is reproduced to rounding; less than that in
                the pivoted form.
            scheme: ``"channel"`` or ``"input"``.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer on the same device, with the same dtype, memory format, mode, ``requires_grad`` and a copy of the
            bias.

        Raises:
            TypeError: if it is not a Conv3d, or of another dtype.
            ValueError: if the rank is out of range, scheme or form unknown, or the weight no plain, finite parameter.
        """
        return cls._from_dense(conv, rank, scheme, form)

    def to_conv3d(self) -> nn.Conv3d:
        """Merge the factors into an ``nn.Conv3d``; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device, memory format and ``requires_grad``
            kept.
        """
        dense: nn.Conv3d = self.to_dense()
        return dense
