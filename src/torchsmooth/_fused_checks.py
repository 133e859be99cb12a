"""What the fused operators can be given: shapes, dtypes and devices that belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._table import format_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_LAYERS = "call the two layers one after the other instead"


def check_linear(input: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:  # noqa: A002 - the name in torch
    """Refuse what is no low-rank linear layer with an input for it."""
    if down.dim() != 2 or up.dim() != 2 or not input.dim():  # noqa: PLR2004
        raise ValueError(
            "low_rank_linear takes an input (*, in), down (rank, in) and up (out, rank), got "
            f"{_shapes(input, down, up)}."
        )
    if input.shape[-1] != down.shape[1]:
        raise ValueError(f"the last axis of the input must have {down.shape[1]} entries, as down has columns, got "
                         f"an input {format_shape(input.shape)}.")  # fmt: skip
    _check_middle(down, up, bias)
    _check_alike(input, down, up, bias)


def check_conv2d(
    input: Tensor,  # noqa: A002 - the name in torch
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Refuse what is no low-rank convolution with an input for it; return height and width of the output."""
    if not input.dim() == down.dim() == up.dim() == 4:  # noqa: PLR2004
        raise ValueError(
            "low_rank_conv2d takes an input (batch, in, height, width), down (rank, in, height, width) and up (out, "
            f"rank, 1, 1), got {_shapes(input, down, up)}."
        )
    if tuple(up.shape[2:]) != (1, 1):
        raise ValueError(
            f"up must have a kernel of 1×1, as in scheme 'channel', got {format_shape(up.shape)}. Other schemes are "
            f"not fused: {_LAYERS}."
        )
    if input.shape[1] != down.shape[1]:
        raise ValueError(
            f"the input must have {down.shape[1]} channels, as down has, got {format_shape(input.shape)}. Grouped "
            f"convolutions are not fused: {_LAYERS}."
        )
    _check_middle(down, up, bias)
    _check_alike(input, down, up, bias)
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2 or any(value < least for value in values):  # noqa: PLR2004
            raise ValueError(f"{name} must be two integers of at least {least}, got {tuple(values)}.")
    height, width = (
        (have + 2 * more - apart * (kernel - 1) - 1) // step + 1
        for have, kernel, step, more, apart in zip(
            input.shape[2:], down.shape[2:], stride, padding, dilation, strict=True
        )
    )
    if height < 1 or width < 1:
        raise ValueError(
            f"the kernel {format_shape(down.shape[2:])} with dilation {tuple(dilation)} does not fit into an input of "
            f"{format_shape(input.shape[2:])} with padding {tuple(padding)}: pad more."
        )
    return height, width


def _check_middle(down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    if up.shape[1] != down.shape[0]:
        raise ValueError(
            f"down and up must have one rank: down has {down.shape[0]} rows, up has {up.shape[1]} columns. Grouped "
            f"convolutions and other schemes are not fused: {_LAYERS}."
        )
    if bias is not None and tuple(bias.shape) != (up.shape[0],):
        raise ValueError(
            f"the bias must have one entry for each of the {up.shape[0]} rows of up, got {format_shape(bias.shape)}. "
            f"Layers of the pivoted form are not fused: {_LAYERS}."
        )


def _check_alike(input: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:  # noqa: A002 - the name in torch
    others = [("down", down), ("up", up), *([] if bias is None else [("bias", bias)])]
    if not input.is_floating_point():
        raise TypeError(f"the input must be of a floating dtype, got {input.dtype}: convert it with .to(down.dtype).")
    for name, one in others:
        if one.dtype != input.dtype:
            raise TypeError(f"{name} must be of the input's dtype {input.dtype}, got {one.dtype}: convert either with "
                            ".to(dtype), or run under torch.autocast.")  # fmt: skip
        if one.device != input.device:
            raise ValueError(
                f"{name} must be on the input's device {input.device}, got {one.device}: bring them together with "
                ".to(device)."
            )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(format_shape(one.shape) or "a scalar" for one in tensors)
