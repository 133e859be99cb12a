"""The fused kernel of a low-rank linear layer; :mod:`torchsmooth._triton_tiles` says how it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ._triton_tiles import CONFIGS, add_product, bucket, expand, factor_arguments, fitting, launch, load_tile

if TYPE_CHECKING:
    from torch import Tensor

    from ._triton_tiles import Precision


def run(
    input: Tensor,  # noqa: A002 - the name in torch
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    output: Tensor,
    *,
    relu: bool,
    precision: Precision,
) -> None:
    """Fill ``output`` with ``(input @ down.T) @ up.T + bias``.

    Args:
        input: ``(rows, in)``, of any strides, on CUDA (or on the CPU where the kernel is interpreted).
        down: ``(rank, in)``.
        up: ``(out, rank)``.
        bias: ``(out,)``.
        output: ``(rows, out)``.
        relu: whether to set negative outputs to zero.
        precision: of the products in float32.
    """
    rows, in_size = input.shape
    arguments = {
        "inputs": input,
        "down": down,
        "rows": rows,
        "rows_bucket": bucket(rows),
        "in_size": in_size,
        "input_row": input.stride(0),
        "input_in": input.stride(1),
        "down_rank": down.stride(0),
        "down_in": down.stride(1),
        "output_row": output.stride(0),
        "output_out": output.stride(1),
        "precision": precision,
        **factor_arguments(up, bias, output, relu=relu),
    }
    launch(_kernel, _tuned, rows, input.device, arguments)


@triton.jit
def _kernel(inputs, down, up, bias, output, rows,
            rows_bucket,  # noqa: ARG001 - the tuner tells shapes apart by it
            in_size, out_size, rank, input_row, input_in, down_rank, down_in,
            up_out, up_rank, bias_step, output_row, output_out, has_bias: tl.constexpr,
            relu: tl.constexpr, head: tl.constexpr, tail: tl.constexpr, precision: tl.constexpr,
            block_rows: tl.constexpr, block_inner: tl.constexpr, block_columns: tl.constexpr,
            splits: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    inside = row < rows
    head_ranks = tl.arange(0, head)
    head_sum = tl.full((block_rows, head), 0.0, tl.float32)
    tail_sum = head_sum
    if tail > 0:
        tail_ranks = head + tl.arange(0, tail)
        tail_sum = tl.full((block_rows, tail), 0.0, tl.float32)
    for start in range(0, in_size, block_inner):
        inner = start + tl.arange(0, block_inner)
        tile = load_tile(inputs, row, input_row, inside, inner, input_in, in_size)
        head_sum = add_product(head_sum, tile, down, head_ranks, down_rank, rank, inner, down_in, in_size, precision)
        if tail > 0:
            tail_sum = add_product(
                tail_sum, tile, down, tail_ranks, down_rank, rank, inner, down_in, in_size, precision
            )
    expand(head_sum, tail_sum, up, bias, output, row * output_row, inside, output_out, out_size, rank, up_out, up_rank,
           bias_step, has_bias, relu, head, tail, block_rows, block_columns, splits, precision)  # fmt: skip


_KEY = ["rows_bucket", "in_size", "out_size", "rank", "precision"]
_tuned = triton.autotune(CONFIGS, key=_KEY, prune_configs_by={"early_config_prune": fitting})(_kernel)
