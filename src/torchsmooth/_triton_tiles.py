"""What the fused kernels share: how a rank is tiled, the loads, and the product that expands a tile to the output.

Both kernels have the same two phases. A program owns a tile of rows (inputs of a linear layer, pixels of an image) and
first computes all of their ``rank`` intermediate numbers, adding up in float32; then it casts them once to the dtype of
the input, as the first of two calls would when it stores them, and multiplies them with one tile of ``up`` after the
other. So the rows of the input are read once, the output is written once, and what lies between never leaves the chip.
The factors are read by every program; they are small, and come from the second-level cache.

A tensor of a kernel has sizes that are powers of two. Rounding the rank itself up to one would nearly double the work
for a rank just above it, so the intermediate is held in two parts, a head and a tail: 33 = 32 + 1 takes 32 + 16.

This module and the kernels are imported where one is about to run: nothing else needs Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

Precision = Literal["ieee", "tf32"]

_SMALLEST = 16  # the least size of a side of tl.dot

# One that fits everywhere: for the interpreter, and where results have to be the same in every process.
FIXED = {"block_rows": 32, "block_inner": 32, "block_columns": 32, "splits": 2, "num_warps": 4, "num_stages": 2}

# ``splits`` programs share the output columns of the same rows, and each computes the intermediate anew: the first
# product is done several times over, but the chip is filled where there are few rows. The alternative, two launches and
# the intermediate between them, is what two library calls are. Which is the better is measured, not guessed.
CONFIGS = [
    triton.Config(
        {"block_rows": rows, "block_inner": inner, "block_columns": columns, "splits": splits},
        num_warps=warps,
        num_stages=stages,
    )
    for rows, inner, columns, splits, warps, stages in (
        (128, 64, 64, 1, 8, 3),
        (128, 32, 128, 1, 8, 3),
        (64, 64, 64, 1, 4, 3),
        (64, 32, 64, 2, 4, 3),
        (32, 64, 64, 1, 4, 3),
        (32, 64, 64, 4, 4, 3),
        (16, 64, 64, 16, 4, 3),
        (32, 32, 32, 2, 4, 2),  # FIXED: one that does not fit is passed over, and one must be left
    )
]

# What registers and shared memory can hold of an intermediate; products in float32 take more of both for each entry.
_MOST_ON_CHIP = 1 << 17


def fitting(configs: list[Any], named: dict[str, Any], **arguments: Any) -> list[Any]:
    """Return the configurations worth a measurement: the others take long to compile, and spill."""
    known = named | arguments
    ranks, size = known["head"] + known["tail"], known["up"].element_size()
    return [one for one in configs if one.kwargs["block_rows"] * ranks * size * size <= _MOST_ON_CHIP]


def rank_tiles(rank: int) -> tuple[int, int]:
    """Return the powers of two that hold a rank: of the head, and of the tail, which may be 0."""
    head = max(_SMALLEST, 1 << (rank.bit_length() - 1))
    if rank <= head:
        return head, 0
    tail = max(_SMALLEST, triton.next_power_of_2(rank - head))
    return (2 * head, 0) if tail == head else (head, tail)


def bucket(rows: int) -> int:
    """Return the power of two that numbers of rows are told apart by when a configuration is chosen."""
    return int(triton.next_power_of_2(rows))


def launch(kernel: Any, tuned: Any, rows: int, device: torch.device, arguments: dict[str, Any]) -> None:
    """Run a kernel over all rows.

    Args:
        kernel: the kernel itself.
        tuned: the same, with a configuration that is measured at the first call for each shape.
        rows: how many rows there are.
        device: where the tensors are.
        arguments: all but those of a configuration.
    """

    def grid(chosen: dict[str, Any]) -> tuple[int, int]:
        return -(-rows // chosen["block_rows"]), chosen["splits"]

    if INTERPRETED:
        kernel[grid](**arguments, **FIXED)
        return
    with torch.cuda.device(device):
        # Configurations add up in different orders, and the clock may choose another one tomorrow.
        if torch.are_deterministic_algorithms_enabled():
            kernel[grid](**arguments, **FIXED)
        else:
            tuned[grid](**arguments)


def factor_arguments(up: Tensor, bias: Tensor | None, output: Tensor, *, relu: bool) -> dict[str, Any]:
    """Return what a kernel has to know of the second product: ``up`` is ``(out, rank)``."""
    out_size, rank = up.shape
    head, tail = rank_tiles(rank)
    return {
        "up": up,
        "bias": output if bias is None else bias,
        "output": output,
        "out_size": out_size,
        "rank": rank,
        "up_out": up.stride(0),
        "up_rank": up.stride(1),
        "bias_step": 0 if bias is None else bias.stride(0),
        "has_bias": bias is not None,
        "relu": relu,
        "head": head,
        "tail": tail,
    }


@triton.jit
def load_tile(
    base,
    first,
    first_step,
    inside,
    second,
    second_step,
    size,
):
    """Load ``base[first * first_step + second * second_step]``; zero where not ``inside``, or where second >= size.

    Offsets are of 64 bits: a tensor may have more than 2^31 entries, and strides may reach further.
    """
    places = base + (first.to(tl.int64) * first_step)[:, None] + (second.to(tl.int64) * second_step)[None, :]
    return tl.load(places, mask=inside[:, None] & (second < size)[None, :], other=0.0)


# Triton looks at TRITON_INTERPRET when a function is decorated: it is compiled or interpreted for good.
INTERPRETED = not isinstance(load_tile, triton.JITFunction)
_WIDEN = tl.constexpr(INTERPRETED)  # a kernel reads no other globals than such


@triton.jit
def multiply_add(total, left, right, precision: tl.constexpr):
    """Add a product of two tiles to a sum in float32."""
    if _WIDEN:  # the interpreter would multiply the bits of bfloat16 as integers; in float32 the products are the same
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=precision)


@triton.jit
def add_product(total, tile, down, ranks, down_rank, rank, inner,
                down_inner, size, precision: tl.constexpr):  # fmt: skip
    """Add the product of a tile of rows with the same columns of ``down``, for some of the ranks."""
    factor = load_tile(down, inner, down_inner, inner < size, ranks, down_rank, rank)
    return multiply_add(total, tile, factor, precision)


@triton.jit
def rounded(total, ranks, rank, like):
    """Cast sums to the dtype that ``like`` points to; beyond the rank, inf × 0 may have left something."""
    return tl.where((ranks < rank)[None, :], total, 0.0).to(like.dtype.element_ty)


@triton.jit
def expand(head_sum, tail_sum, up, bias, output, rows, inside, output_out,
           out_size, rank, up_out, up_rank, bias_step, has_bias: tl.constexpr,
           relu: tl.constexpr, head: tl.constexpr, tail: tl.constexpr, block_rows: tl.constexpr,
           block_columns: tl.constexpr, splits: tl.constexpr, precision: tl.constexpr):  # fmt: skip
    """Multiply the intermediate with ``up``, add the bias, and store: the second phase.

    ``rows`` are offsets into the output, ``output_out`` its step from one output feature to the next.
    """
    head_ranks = tl.arange(0, head)
    head_part = rounded(head_sum, head_ranks, rank, up)
    if tail > 0:
        tail_ranks = head + tl.arange(0, tail)
        tail_part = rounded(tail_sum, tail_ranks, rank, up)
    for start in range(tl.program_id(1) * block_columns, out_size, splits * block_columns):
        columns = start + tl.arange(0, block_columns)
        total = tl.full((block_rows, block_columns), 0.0, tl.float32)
        factor = load_tile(up, head_ranks, up_rank, head_ranks < rank, columns, up_out, out_size)
        total = multiply_add(total, head_part, factor, precision)
        if tail > 0:
            factor = load_tile(up, tail_ranks, up_rank, tail_ranks < rank, columns, up_out, out_size)
            total = multiply_add(total, tail_part, factor, precision)
        if has_bias:
            total += tl.load(bias + columns.to(tl.int64) * bias_step, mask=columns < out_size, other=0.0)[None, :]
        if relu:
            total = tl.where(total < 0.0, 0.0, total)  # and not a maximum: NaN stays NaN
        places = output + rows[:, None] + (columns.to(tl.int64) * output_out)[None, :]
        tl.store(places, total.to(output.dtype.element_ty), mask=inside[:, None] & (columns < out_size)[None, :])
