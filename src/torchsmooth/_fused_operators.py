"""The operators behind :mod:`torchsmooth.fused`, as compilers and exporters see them: one node for two products.

An operator computes the same everywhere: by a fused kernel where there is one for the device, the dtype and the rank,
and by two calls otherwise. Gradients are those of the two calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._fused_availability import has_kernel
from ._fused_checks import check_conv2d, check_linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._triton_tiles import Precision

Gradients = tuple[Tensor | None, ...]


@torch.library.custom_op(
    "torchsmooth::low_rank_linear",
    mutates_args=(),
    schema="(Tensor input, Tensor down, Tensor up, Tensor? bias, bool relu) -> Tensor",
)
def low_rank_linear(input: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, relu: bool) -> Tensor:  # noqa: A002, FBT001 - the schema's
    """Compute ``(input @ down.T) @ up.T + bias``."""
    check_linear(input, down, up, bias)
    if not has_kernel(input.device, input.dtype, down.shape[0]):
        output = F.linear(F.linear(input, down), up, bias)
        return output.relu_() if relu else output
    output = _empty_lines(input, up)
    if output.numel():
        from . import _triton_linear  # noqa: PLC0415 - imports Triton

        lines, out_lines = input.reshape(-1, input.shape[-1]), output.view(-1, output.shape[-1])
        precision = _precision(torch.backends.cuda.matmul)
        _triton_linear.run(lines, down, up, bias, out_lines, relu=relu, precision=precision)
    return output


@low_rank_linear.register_fake
def _linear_shape(input: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, relu: bool) -> Tensor:  # noqa: A002, ARG001, FBT001 - the schema's
    check_linear(input, down, up, bias)
    return _empty_lines(input, up)


def _empty_lines(input: Tensor, up: Tensor) -> Tensor:  # noqa: A002 - the name in torch
    return input.new_empty((*input.shape[:-1], up.shape[0]))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, down, up, _, relu = inputs  # noqa: A001 - the name in torch
    ctx.save_for_backward(input, down, up, output if relu else None)


def _linear_gradients(ctx: Any, gradient: Tensor) -> Gradients:
    input, down, up, output = ctx.saved_tensors  # noqa: A001 - the name in torch
    of_input, of_down, of_up, of_bias, _ = ctx.needs_input_grad
    gradient = _through_relu(gradient, output)
    lines, rows = input.reshape(-1, input.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    middle = rows @ up
    return (
        (middle @ down).reshape(input.shape) if of_input else None,
        middle.T @ lines if of_down else None,
        rows.T @ F.linear(lines, down) if of_up else None,
        rows.sum(0) if of_bias else None,
        None,
    )


low_rank_linear.register_autograd(_linear_gradients, setup_context=_save_linear)


@torch.library.custom_op(
    "torchsmooth::low_rank_conv2d",
    mutates_args=(),
    schema=(
        "(Tensor input, Tensor down, Tensor up, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
        "bool relu) -> Tensor"
    ),
)
def low_rank_conv2d(  # noqa: PLR0917 - the schema's
    input: Tensor,  # noqa: A002 - the name in torch
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,  # noqa: FBT001 - the schema's
) -> Tensor:
    """Convolve with ``down``, then with ``up``, a 1×1, and add the bias."""
    size = check_conv2d(input, down, up, bias, stride, padding, dilation)
    if not has_kernel(input.device, input.dtype, down.shape[0]):
        middle = F.conv2d(input, down, None, stride, padding, dilation)
        output = F.conv2d(middle, up, bias).contiguous(memory_format=_format(input, down))
        return output.relu_() if relu else output
    output = _empty_images(input, down, up, size)
    if output.numel():
        from . import _triton_conv2d  # noqa: PLC0415 - imports Triton

        backend = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)  # older releases have one setting for all
        precision = _precision(backend)
        _triton_conv2d.run(
            input, down, up[:, :, 0, 0], bias, output, stride, padding, dilation, relu=relu, precision=precision
        )
    return output


@low_rank_conv2d.register_fake
def _images_shape(  # noqa: PLR0917 - the schema's
    input: Tensor,  # noqa: A002 - the name in torch
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,  # noqa: ARG001, FBT001 - the schema's
) -> Tensor:
    return _empty_images(input, down, up, check_conv2d(input, down, up, bias, stride, padding, dilation))


def _empty_images(input: Tensor, down: Tensor, up: Tensor, size: tuple[int, int]) -> Tensor:  # noqa: A002
    shape = (input.shape[0], up.shape[0], *size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_format(input, down))


def _format(input: Tensor, down: Tensor) -> torch.memory_format:  # noqa: A002 - the name in torch
    """Return the memory format of the output: channels_last as soon as the input or the weight has it."""
    last = torch.channels_last
    if any(one.is_contiguous(memory_format=last) and not one.is_contiguous() for one in (input, down)):
        return last
    return torch.contiguous_format


def _save_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, down, up, bias, *ctx.geometry, relu = inputs  # noqa: A001 - the name in torch
    ctx.bias_sizes = None if bias is None else [bias.shape[0]]
    ctx.save_for_backward(input, down, up, output if relu else None)


def _conv2d_gradients(ctx: Any, gradient: Tensor) -> Gradients:
    input, down, up, output = ctx.saved_tensors  # noqa: A001 - the name in torch
    of_input, of_down, of_up, of_bias, *_ = ctx.needs_input_grad
    backward = torch.ops.aten.convolution_backward.default
    middle = F.conv2d(input, down, None, *ctx.geometry)
    plain = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    of_middle, up_gradient, bias_gradient = backward(
        _through_relu(gradient, output), middle, up, ctx.bias_sizes, *plain, [of_input or of_down, of_up, of_bias]
    )
    input_gradient = down_gradient = None
    if of_input or of_down:
        geometry = (*ctx.geometry, False, [0, 0], 1)
        input_gradient, down_gradient, _ = backward(of_middle, input, down, None, *geometry, [of_input, of_down, False])
    return input_gradient, down_gradient, up_gradient, bias_gradient, None, None, None, None


low_rank_conv2d.register_autograd(_conv2d_gradients, setup_context=_save_conv2d)


def _through_relu(gradient: Tensor, output: Tensor | None) -> Tensor:
    return gradient if output is None else gradient.masked_fill(output <= 0, 0.0)


def _precision(backend: Any) -> Precision:
    """Return how products in float32 are computed by the two calls themselves, as the user has set it."""
    if hasattr(backend, "fp32_precision"):
        return "tf32" if backend.fp32_precision == "tf32" else "ieee"
    return "tf32" if backend.allow_tf32 else "ieee"
