"""The fused kernel of a k×k convolution and the 1×1 after it; :mod:`torchsmooth._triton_tiles` says how it is done.

The first is an implicit matrix product: a row is a pixel of the output, and what it is multiplied with is gathered from
the input, one tap of the kernel and a block of channels at a time. In channels_last such a block is contiguous, which
is why that is the format to be fast in; any other is read right, by its strides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ._triton_tiles import CONFIGS, add_product, bucket, expand, factor_arguments, fitting, launch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ._triton_tiles import Precision


def run(
    input: Tensor,  # noqa: A002 - the name in torch
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    output: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    relu: bool,
    precision: Precision,
) -> None:
    """Fill ``output`` with the two convolutions of ``input``, bias added.

    Args:
        input: ``(batch, in, height, width)``, of any strides, on CUDA (or on the CPU where the kernel is interpreted).
        down: ``(rank, in, kernel height, kernel width)``.
        up: ``(out, rank)``.
        bias: ``(out,)``.
        output: ``(batch, out, height, width)`` of the output.
        stride: of the first convolution, along both axes.
        padding: the same.
        dilation: the same.
        relu: whether to set negative outputs to zero.
        precision: of the products in float32.
    """
    (batch, _, out_height, out_width), (_, channels, height, width) = output.shape, input.shape
    rows = batch * out_height * out_width
    arguments = {
        "inputs": input,
        "down": down,
        "rows": rows,
        "rows_bucket": bucket(rows),
        "channels": channels,
        "height": height,
        "width": width,
        "out_height": out_height,
        "out_width": out_width,
        "kernel_height": down.shape[2],
        "kernel_width": down.shape[3],
        "precision": precision,
        **dict(zip(("stride_y", "stride_x"), stride, strict=True)),
        **dict(zip(("padding_y", "padding_x"), padding, strict=True)),
        **dict(zip(("dilation_y", "dilation_x"), dilation, strict=True)),
        **dict(zip(("input_image", "input_channel", "input_y", "input_x"), input.stride(), strict=True)),
        **dict(zip(("down_rank", "down_channel", "down_y", "down_x"), down.stride(), strict=True)),
        **dict(zip(("output_image", "output_out", "output_y", "output_x"), output.stride(), strict=True)),
        **factor_arguments(up, bias, output, relu=relu),
    }
    launch(_kernel, _tuned, rows, input.device, arguments)


@triton.jit
def _kernel(inputs, down, up, bias, output, rows,
            rows_bucket,  # noqa: ARG001 - the tuner tells shapes apart by it
            channels, height, width, out_height, out_width, kernel_height,
            kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y,
            dilation_x, input_image, input_channel, input_y, input_x, down_rank,
            down_channel, down_y, down_x, output_image, output_out, output_y,
            output_x, out_size, rank, up_out, up_rank, bias_step,
            has_bias: tl.constexpr, relu: tl.constexpr, head: tl.constexpr, tail: tl.constexpr,
            precision: tl.constexpr, block_rows: tl.constexpr, block_inner: tl.constexpr,
            block_columns: tl.constexpr, splits: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    inside = row < rows
    image, out_y, out_x = row // out_width // out_height, row // out_width % out_height, row % out_width
    top, left = out_y * stride_y - padding_y, out_x * stride_x - padding_x

    head_ranks = tl.arange(0, head)
    head_sum = tl.full((block_rows, head), 0.0, tl.float32)
    tail_sum = head_sum
    if tail > 0:
        tail_ranks = head + tl.arange(0, tail)
        tail_sum = tl.full((block_rows, tail), 0.0, tl.float32)
    blocks = (channels + block_inner - 1) // block_inner
    # One loop over taps and channels: the compiler overlaps loads and products of the innermost loop only. Where a tap
    # looks beyond the edge depends on the row alone, since no block of channels reaches over two taps.
    for step in range(0, kernel_height * kernel_width * blocks):  # noqa: PIE808 - Triton's own range wants both
        tap = step // blocks
        tap_y, tap_x = tap // kernel_width, tap % kernel_width
        inner = step % blocks * block_inner + tl.arange(0, block_inner)
        y, x = top + tap_y * dilation_y, left + tap_x * dilation_x
        seen = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixels = inputs + (image * input_image + y * input_y + x * input_x)[:, None]
        places = pixels + (inner.to(tl.int64) * input_channel)[None, :]
        tile = tl.load(places, mask=seen[:, None] & (inner < channels)[None, :], other=0.0)
        factor = down + tap_y * down_y + tap_x * down_x
        head_sum = add_product(
            head_sum, tile, factor, head_ranks, down_rank, rank, inner, down_channel, channels, precision
        )
        if tail > 0:
            tail_sum = add_product(
                tail_sum, tile, factor, tail_ranks, down_rank, rank, inner, down_channel, channels, precision
            )
    pixels_out = image * output_image + out_y * output_y + out_x * output_x
    expand(head_sum, tail_sum, up, bias, output, pixels_out, inside, output_out, out_size, rank, up_out, up_rank,
           bias_step, has_bias, relu, head, tail, block_rows, block_columns, splits, precision)  # fmt: skip


_KEY = ["rows_bucket", "channels", "out_size", "rank", "kernel_height", "kernel_width", "stride_y", "stride_x",
        "input_channel", "precision"]  # fmt: skip
_tuned = triton.autotune(CONFIGS, key=_KEY, prune_configs_by={"early_config_prune": fitting})(_kernel)
