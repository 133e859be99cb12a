"""Low-rank layers as one operator each, with fused kernels for GPUs: an opt-in, nothing here is chosen for you.

A low-rank layer is two products, and what lies between them is written to memory and read again. The kernels here keep
it on the chip. They need Triton and a CUDA device (on the CPU, Triton's interpreter runs them, for tests); where they
cannot run, the same functions compute the same by two ordinary calls. ``TORCHSMOOTH_FUSED=0`` in the environment turns
the kernels off.

>>> import torch, torchsmooth.fused
>>> layer = torchsmooth.LowRankLinear(64, 48, rank=8)
>>> inputs = torch.zeros(5, 64)
>>> torchsmooth.fused.low_rank_linear(inputs, layer.down.weight, layer.up.weight, layer.bias).shape
torch.Size([5, 48])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _fused_availability, _fused_operators
from ._checks import check_choice, describe
from ._geometry import zeros_for_same
from ._norms import affine_of

if TYPE_CHECKING:
    from collections.abc import Sequence

_Operands = tuple[Tensor, Tensor, Tensor, Tensor | None]

__all__ = ["fold_batchnorm", "is_available", "low_rank_conv2d", "low_rank_linear", "why_unavailable"]


def low_rank_linear(
    input: Tensor,  # noqa: A002 - the name in torch
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """Compute ``(input @ down.T) @ up.T + bias`` by one operator, ``torchsmooth::low_rank_linear``.

    The kernel serves float32, bfloat16 and float16, up to rank 256 in single and 512 in half precision: beyond, the two
    products themselves take so long that what lies between hardly counts. It adds up in float32 and casts the
    intermediate once to the dtype of the input; products in float32 are in TF32 only where torch's own may be
    (``torch.backends.cuda.matmul``). Everything else is computed by two calls, and so are the gradients.

    Args:
        input: ``(*, in)``, of any floating dtype and any strides.
        down: ``(rank, in)``, of the same dtype.
        up: ``(out, rank)``, of the same dtype.
        bias: ``(out,)``, of the same dtype.
        relu: whether to set negative outputs to zero.

    Returns:
        ``(*, out)``, contiguous.

    Raises:
        TypeError: if one of them is not a tensor, or dtypes differ.
        ValueError: if shapes do not fit together, or devices differ.

    Example:
        >>> import torch
        >>> from torchsmooth import fused
        >>> fused.low_rank_linear(torch.tensor([1.0, 2.0]), torch.ones(1, 2), torch.ones(3, 1))
        tensor([3., 3., 3.])
    """
    operands = _operands(input, down, up, bias)
    output: Tensor = _fused_operators.low_rank_linear(*operands, relu)
    return output


def low_rank_conv2d(
    input: Tensor,  # noqa: A002 - the name in torch
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    *,
    relu: bool = False,
) -> Tensor:
    """Convolve with ``down``, then with the 1×1 ``up``, by one operator, ``torchsmooth::low_rank_conv2d``.

    The two convolutions of scheme ``"channel"`` without groups. What :func:`low_rank_linear` says of dtypes, ranks and
    precision holds here, too; TF32 is up to ``torch.backends.cudnn``, which allows it unless told otherwise.

    Args:
        input: ``(batch, in, height, width)`` or ``(in, height, width)``, of any strides; channels_last is the fastest.
        down: ``(rank, in, kernel height, kernel width)``, of the same dtype.
        up: ``(out, rank, 1, 1)``, of the same dtype.
        bias: ``(out,)``, of the same dtype.
        stride: a number or a pair, at least 1.
        padding: zeros at each side, a number or a pair, or ``"same"`` (with stride 1) or ``"valid"``. For any other
            padding mode, pad the input first.
        dilation: a number or a pair, at least 1.
        relu: whether to set negative outputs to zero.

    Returns:
        ``(batch, out, height, width)`` of the output; channels_last if the input or ``down`` is.

    Raises:
        TypeError: if one of them is not a tensor, or dtypes differ.
        ValueError: if shapes do not fit together, devices differ, there are groups, or an option is out of range.

    Example:
        >>> import torch, torchsmooth
        >>> from torchsmooth import fused
        >>> layer = torchsmooth.LowRankConv2d(8, 16, 3, rank=4, padding=1)
        >>> fused.low_rank_conv2d(
        ...     torch.zeros(2, 8, 5, 5), layer.down.weight, layer.up.weight, layer.bias, padding=1
        ... ).shape
        torch.Size([2, 16, 5, 5])
    """
    image, *factors = _operands(input, down, up, bias)
    strides, dilations = _pair(stride, "stride"), _pair(dilation, "dilation")
    if isinstance(padding, str):
        image, paddings = _padded(image, down, strides, padding, dilations)
    else:
        paddings = _pair(padding, "padding")
    alone = image.dim() == 3  # noqa: PLR2004
    if alone:
        image = image.unsqueeze(0)
    output: Tensor = _fused_operators.low_rank_conv2d(image, *factors, strides, paddings, dilations, relu)
    return output.squeeze(0) if alone else output


def fold_batchnorm(up: Tensor, bias: Tensor | None, batchnorm: nn.Module) -> tuple[Tensor, Tensor]:
    """Fold a BatchNorm in eval mode into the factor before it: neither operand is changed.

    :func:`torchsmooth.fold_batchnorm_` does that to a whole model.

    Args:
        up: ``(out, rank, ...)``, of any floating dtype.
        bias: ``(out,)``, or ``None`` where there is none.
        batchnorm: ``nn.BatchNorm1d``, ``2d`` or ``3d`` with running statistics, over ``out`` features.

    Returns:
        The ``up`` and the ``bias`` that compute the same with nothing after them, computed in float32 or better and
        cast once to the dtype of ``up``.

    Raises:
        TypeError: if it is not a BatchNorm.
        ValueError: if it normalises by the batch (training mode, or no running statistics), or has other features.

    Example:
        >>> import torch
        >>> from torchsmooth import fused
        >>> up, bias = fused.fold_batchnorm(torch.ones(2, 1), None, torch.nn.BatchNorm2d(2, eps=3.0).eval())
        >>> up.flatten().tolist(), bias.tolist()
        ([0.5, 0.5], [0.0, 0.0])
    """
    if not isinstance(batchnorm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        raise TypeError(f"batchnorm must be an nn.BatchNorm1d, 2d or 3d, got {describe(batchnorm)}.")
    mean, variance = batchnorm.running_mean, batchnorm.running_var
    if batchnorm.training or mean is None or variance is None:
        raise ValueError(
            "a BatchNorm can be folded when it normalises by its running statistics, got one that "
            f"{'is in training mode: call .eval() first' if batchnorm.training else 'keeps none'}."
        )
    if batchnorm.num_features != up.shape[0]:
        raise ValueError(
            f"the BatchNorm must have {up.shape[0]} features, as up has rows, got {batchnorm.num_features}."
        )
    exact = torch.promote_types(torch.promote_types(up.dtype, variance.dtype), torch.float32)
    scale, shift = affine_of(batchnorm, lambda one: one.to(exact))
    if bias is not None:
        shift = shift + bias.to(exact) * scale
    folded = up.to(exact) * scale.reshape(-1, *[1] * (up.dim() - 1))
    return folded.to(up.dtype), shift.to(up.dtype)


def is_available(device: torch.device | str = "cuda") -> bool:
    """Tell whether the kernels can run on a device.

    Args:
        device: the device in question.

    Returns:
        Whether they can; :func:`why_unavailable` says why not.

    Raises:
        RuntimeError: if torch does not know the device.

    Example:
        >>> from torchsmooth import fused
        >>> fused.is_available("meta")
        False
    """
    return why_unavailable(device) is None


def why_unavailable(device: torch.device | str = "cuda") -> str | None:
    """Say what keeps the kernels from running on a device, so that two calls compute the result.

    Args:
        device: the device in question.

    Returns:
        The reason, or ``None`` where they run.

    Raises:
        RuntimeError: if torch does not know the device.

    Example:
        >>> from torchsmooth import fused
        >>> fused.why_unavailable("meta")
        "they run on CUDA devices, not on 'meta'"
    """
    return _fused_availability.why_unavailable(torch.device(device))


def _operands(input: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> _Operands:  # noqa: A002 - as in torch
    """Check that they are tensors, and cast them where autocast is on.

    Autocast knows torch's own operators: for these, what it does to two calls is done here.
    """
    named = {"input": input, "down": down, "up": up, "bias": bias}
    for name, one in named.items():
        if not isinstance(one, Tensor) and (name != "bias" or one is not None):
            raise TypeError(f"{name} must be a tensor, got {describe(one)}.")
    kind = input.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return input, down, up, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(one: Tensor) -> Tensor:
        return one.to(dtype) if one.is_floating_point() and one.dtype != torch.float64 else one

    return cast(input), cast(down), cast(up), None if bias is None else cast(bias)


def _pair(value: int | Sequence[int], name: str) -> list[int]:
    values: list[Any] = list(value) if isinstance(value, (tuple, list)) else [value, value]
    if len(values) != 2 or not all(isinstance(one, int) for one in values):  # noqa: PLR2004
        raise ValueError(f"{name} must be an integer or a pair of them, got {describe(value)}.")
    return values


def _padded(
    image: Tensor, down: Tensor, stride: list[int], padding: str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Spell a padding by name out; one that is wider on one side is put around the image itself, as torch does."""
    check_choice(padding, "padding by name", ("same", "valid"))
    if padding == "valid":
        return image, [0, 0]
    if stride != [1, 1]:
        raise ValueError(f"padding 'same' needs stride 1, got {tuple(stride)}: give the padding in numbers.")
    around = zeros_for_same(down.shape[2:], dilation)
    more = [after - before for before, after in around]
    if any(more):
        image = F.pad(image, (0, more[1], 0, more[0]))
    return image, [before for before, _ in around]
