"""Transposed convolutions in two: a layer whose weight is a product of two, kept as two ordinary layers.

Of the children ``down`` (from the input to ``rank`` channels) and ``up`` (on to the output, with the bias) one is a
plain transposed convolution with the whole kernel, the other a plain convolution of kernel size 1. The pivoted form is
that of ``torchsmooth.LowRankConv2d``. There are no spatial schemes and no Tucker form for these layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._lowrank_transposed import LowRankTransposedConvolution

if TYPE_CHECKING:
    from torch import nn

    from ._matricise import Form, Scheme

__all__ = ["LowRankConvTranspose1d", "LowRankConvTranspose2d", "LowRankConvTranspose3d"]


class LowRankConvTranspose1d(LowRankTransposedConvolution):
    """A transposed convolution over one kernel axis with a weight of rank r (in each group).

    ``channel``: the full transposed kernel to ``rank`` channels, then a convolution of size 1. ``input``: a
    convolution of size 1 to ``rank`` channels, then the full transposed kernel. Stride, padding, output padding and
    dilation go with the kernel. For a kernel of size 1 the two are the same, and go by ``channel``. The pivoted
    form is that of :class:`LowRankConv2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: a number or a tuple of one.
        rank: 1 … the full rank of the scheme's matrix, for each group; in the pivoted form one less.
        scheme: ``"channel"`` or ``"input"``.
        stride: a number or a tuple of one.
        padding: a number or a tuple of one.
        output_padding: a number or a tuple of one: what is added to the size of the output at one end.
        dilation: a number or a tuple of one.
        groups: number of groups.
        bias: whether there is a bias.
        padding_mode: ``"zeros"``, the only one that transposed convolutions have.
        device: device of the parameters.
        dtype: floating dtype of the parameters.
        form: ``"factored"``, of rank · (rows + columns) parameters for each group's matrix, or ``"pivoted"``, of rank²
            fewer.

    Shape:
        Input and output as of ``nn.ConvTranspose1d``, also with ``output_size``. With g groups, under ``channel``:
        ``down.weight`` ``(in, rank, k)`` and ``up.weight`` ``(out, rank, 1)``; under ``input``:
        ``down.weight`` ``(g · rank, in / g, 1)`` and ``up.weight`` ``(g · rank, out / g, k)``. In the
        pivoted form there is an int32 buffer as well (``merge.order`` or ``split.order``), and under ``channel``,
        ``merge`` has the bias.

    Raises:
        TypeError: if the rank is not an integer.
        ValueError: if it is out of range, the scheme or the form is unknown, or the padding is a name.

    Example:
        >>> import torch, torchsmooth
        >>> conv = torch.nn.ConvTranspose1d(16, 8, 4, stride=2, padding=1)
        >>> layer = torchsmooth.LowRankConvTranspose1d.from_conv_transpose1d(conv, rank=4)
        >>> layer(torch.zeros(2, 16, 20)).shape, layer.down.weight.shape
        (torch.Size([2, 8, 40]), torch.Size([16, 4, 4]))

    Source: Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection", 2016, for
    ordinary convolutions; pivoted, for linear layers: Zhao et al., "Pivoting Factorization", 2025.
    """

    kernel_axes: ClassVar[int] = 1
    down: nn.ConvTranspose1d | nn.Conv1d
    up: nn.ConvTranspose1d | nn.Conv1d

    @classmethod
    def from_conv_transpose1d(
        cls, conv: nn.ConvTranspose1d, rank: int, scheme: Scheme = "channel", form: Form = "factored"
    ) -> LowRankConvTranspose1d:
        """Factor a transposed convolution by truncated SVD, each group on its own; the layer itself is not changed.

        Args:
            conv: weight ``(in, out / groups, k)`` in float64, float32, bfloat16 or float16.
            rank: 1 … full rank of the scheme's matrix, at which the layer is reproduced to rounding; less than that in
                the pivoted form.
            scheme: ``"channel"`` or ``"input"``.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer on the same device, with the same dtype, memory format, mode, ``requires_grad`` and a copy of the
            bias.

        Raises:
            TypeError: if it is not a ConvTranspose1d, or of another dtype.
            ValueError: if the rank is out of range, scheme or form unknown, or the weight no plain, finite parameter.
        """
        return cls._from_dense(conv, rank, scheme, form)

    def to_conv_transpose1d(self) -> nn.ConvTranspose1d:
        """Merge the factors into an ``nn.ConvTranspose1d``; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device, memory format and ``requires_grad``
            kept.
        """
        dense: nn.ConvTranspose1d = self.to_dense()
        return dense


class LowRankConvTranspose2d(LowRankTransposedConvolution):
    """A transposed convolution over two kernel axes with a weight of rank r (in each group).

    ``channel``: the full transposed kernel to ``rank`` channels, then a convolution of size 1×1. ``input``: a
    convolution of size 1×1 to ``rank`` channels, then the full transposed kernel. Stride, padding, output padding and
    dilation go with the kernel. For a kernel of size 1×1 the two are the same, and go by ``channel``. The pivoted
    form is that of :class:`LowRankConv2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: a number or a pair.
        rank: 1 … the full rank of the scheme's matrix, for each group; in the pivoted form one less.
        scheme: ``"channel"`` or ``"input"``.
        stride: a number or a pair.
        padding: a number or a pair.
        output_padding: a number or a pair: what is added to the size of the output at one end.
        dilation: a number or a pair.
        groups: number of groups.
        bias: whether there is a bias.
        padding_mode: ``"zeros"``, the only one that transposed convolutions have.
        device: device of the parameters.
        dtype: floating dtype of the parameters.
        form: ``"factored"``, of rank · (rows + columns) parameters for each group's matrix, or ``"pivoted"``, of rank²
            fewer.

    Shape:
        Input and output as of ``nn.ConvTranspose2d``, also with ``output_size``. With g groups, under ``channel``:
        ``down.weight`` ``(in, rank, kh, kw)`` and ``up.weight`` ``(out, rank, 1, 1)``; under ``input``:
        ``down.weight`` ``(g · rank, in / g, 1, 1)`` and ``up.weight`` ``(g · rank, out / g, kh, kw)``. In the
        pivoted form there is an int32 buffer as well (``merge.order`` or ``split.order``), and under ``channel``,
        ``merge`` has the bias.

    Raises:
        TypeError: if the rank is not an integer.
        ValueError: if it is out of range, the scheme or the form is unknown, or the padding is a name.

    Example:
        >>> import torch, torchsmooth
        >>> conv = torch.nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        >>> layer = torchsmooth.LowRankConvTranspose2d.from_conv_transpose2d(conv, rank=4, scheme="input")
        >>> layer(torch.zeros(2, 16, 5, 7)).shape, layer.down.weight.shape
        (torch.Size([2, 8, 10, 14]), torch.Size([4, 16, 1, 1]))

    Source: Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection", 2016, for
    ordinary convolutions; pivoted, for linear layers: Zhao et al., "Pivoting Factorization", 2025.
    """

    kernel_axes: ClassVar[int] = 2
    down: nn.ConvTranspose2d | nn.Conv2d
    up: nn.ConvTranspose2d | nn.Conv2d

    @classmethod
    def from_conv_transpose2d(
        cls, conv: nn.ConvTranspose2d, rank: int, scheme: Scheme = "channel", form: Form = "factored"
    ) -> LowRankConvTranspose2d:
        """Factor a transposed convolution by truncated SVD, each group on its own; the layer itself is not changed.

        Args:
            conv: weight ``(in, out / groups, kh, kw)`` in float64, float32, bfloat16 or float16.
            rank: 1 … full rank of the scheme's matrix, at which the layer is reproduced to rounding; less than that in
                the pivoted form.
            scheme: ``"channel"`` or ``"input"``.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer on the same device, with the same dtype, memory format, mode, ``requires_grad`` and a copy of the
            bias.

        Raises:
            TypeError: if it is not a ConvTranspose2d, or of another dtype.
            ValueError: if the rank is out of range, scheme or form unknown, or the weight no plain, finite parameter.
        """
        return cls._from_dense(conv, rank, scheme, form)

    def to_conv_transpose2d(self) -> nn.ConvTranspose2d:
        """Merge the factors into an ``nn.ConvTranspose2d``; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device, memory format and ``requires_grad``
            kept.
        """
        dense: nn.ConvTranspose2d = self.to_dense()
        return dense


class LowRankConvTranspose3d(LowRankTransposedConvolution):
    """A transposed convolution over three kernel axes with a weight of rank r (in each group).

    ``channel``: the full transposed kernel to ``rank`` channels, then a convolution of size 1×1×1. ``input``: a
    convolution of size 1×1×1 to ``rank`` channels, then the full transposed kernel. Stride, padding, output padding and
    dilation go with the kernel. For a kernel of size 1×1×1 the two are the same, and go by ``channel``. The pivoted
    form is that of :class:`LowRankConv2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: a number or a triple.
        rank: 1 … the full rank of the scheme's matrix, for each group; in the pivoted form one less.
        scheme: ``"channel"`` or ``"input"``.
        stride: a number or a triple.
        padding: a number or a triple.
        output_padding: a number or a triple: what is added to the size of the output at one end.
        dilation: a number or a triple.
        groups: number of groups.
        bias: whether there is a bias.
        padding_mode: ``"zeros"``, the only one that transposed convolutions have.
        device: device of the parameters.
        dtype: floating dtype of the parameters.
        form: ``"factored"``, of rank · (rows + columns) parameters for each group's matrix, or ``"pivoted"``, of rank²
            fewer.

    Shape:
        Input and output as of ``nn.ConvTranspose3d``, also with ``output_size``. With g groups, under ``channel``:
        ``down.weight`` ``(in, rank, kd, kh, kw)`` and ``up.weight`` ``(out, rank, 1, 1, 1)``; under ``input``:
        ``down.weight`` ``(g · rank, in / g, 1, 1, 1)`` and ``up.weight`` ``(g · rank, out / g, kd, kh, kw)``. In the
        pivoted form there is an int32 buffer as well (``merge.order`` or ``split.order``), and under ``channel``,
        ``merge`` has the bias.

    Raises:
        TypeError: if the rank is not an integer.
        ValueError: if it is out of range, the scheme or the form is unknown, or the padding is a name.

    Example:
        >>> import torch, torchsmooth
        >>> conv = torch.nn.ConvTranspose3d(16, 8, 4, stride=2, padding=1)
        >>> layer = torchsmooth.LowRankConvTranspose3d.from_conv_transpose3d(conv, rank=4)
        >>> layer(torch.zeros(2, 16, 2, 3, 4)).shape, layer.down.weight.shape
        (torch.Size([2, 8, 4, 6, 8]), torch.Size([16, 4, 4, 4, 4]))

    Source: Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection", 2016, for
    ordinary convolutions; pivoted, for linear layers: Zhao et al., "Pivoting Factorization", 2025.
    """

    kernel_axes: ClassVar[int] = 3
    down: nn.ConvTranspose3d | nn.Conv3d
    up: nn.ConvTranspose3d | nn.Conv3d

    @classmethod
    def from_conv_transpose3d(
        cls, conv: nn.ConvTranspose3d, rank: int, scheme: Scheme = "channel", form: Form = "factored"
    ) -> LowRankConvTranspose3d:
        """Factor a transposed convolution by truncated SVD, each group on its own; the layer itself is not changed.

        Args:
            conv: weight ``(in, out / groups, kd, kh, kw)`` in float64, float32, bfloat16 or float16.
            rank: 1 … full rank of the scheme's matrix, at which the layer is reproduced to rounding; less than that in
                the pivoted form.
            scheme: ``"channel"`` or ``"input"``.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer on the same device, with the same dtype, memory format, mode, ``requires_grad`` and a copy of the
            bias.

        Raises:
            TypeError: if it is not a ConvTranspose3d, or of another dtype.
            ValueError: if the rank is out of range, scheme or form unknown, or the weight no plain, finite parameter.
        """
        return cls._from_dense(conv, rank, scheme, form)

    def to_conv_transpose3d(self) -> nn.ConvTranspose3d:
        """Merge the factors into an ``nn.ConvTranspose3d``; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device, memory format and ``requires_grad``
            kept.
        """
        dense: nn.ConvTranspose3d = self.to_dense()
        return dense
