r"""Smoothness penalties as pure functions of a weight.

All three are *sums*, not means, and need no rescaling with the size of a layer. The gradient of the derivative
penalties at an entry involves only its neighbours, and that of the nuclear norm moves every singular value by the same
amount, whatever the shape; under the usual initialisations singular values are of order one in small and large
layers alike. One strength therefore serves a whole model, as one weight decay does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import FLOAT_DTYPES, check_choice, check_count, describe
from ._linalg import LinAlgError, nuclear_norm_and_polar
from ._matricise import SCHEMES, channel_view, matricise

__all__ = ["first_derivative", "nuclear_norm", "second_derivative"]


def _check_weight(weight: Tensor, groups: int) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {describe(weight)}.")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight must be of float64, float32, bfloat16 or float16, got {weight.dtype}.")
    if weight.dim() < 2:  # noqa: PLR2004 - the two channel axes
        raise ValueError(
            f"weight must have an output and an input channel axis, got shape {tuple(weight.shape)}: "
            "penalties make weights smooth along the channels, biases and norm scales have none to spare."
        )
    check_count(groups, "groups", max(1, weight.shape[0]), "the size of the first axis of the weight")
    if weight.shape[0] % groups:
        raise ValueError(
            f"groups must divide the first axis of the weight, got {groups} for shape {tuple(weight.shape)}."
        )
    # Half precision would lose the sums that follow.
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def _squared_differences(weight: Tensor, order: int, groups: int, *, transposed: bool) -> Tensor:
    view = channel_view(_check_weight(weight, groups), groups, transposed=transposed)
    along_out, along_in = (torch.diff(view, n=order, dim=axis) for axis in (1, 2))
    return along_out.square().sum() + along_in.square().sum()


def first_derivative(weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    r"""Sum of squared first differences along both channel axes.

    .. math:: \sum_{axis} \lVert D_{axis} W \rVert_F^2, \qquad (D W)_j = W_{j+1} - W_j

    Zero exactly on weights that are constant along the channels; unchanged when the channels are reversed. It acts as a
    weight decay of strength :math:`2\,(2 - 2\cos\omega)` on the frequency :math:`\omega` along the channels.

    Args:
        weight: ``(out, in / groups, *kernel)`` (``(in, out / groups, *kernel)`` if ``transposed``), at least two
            axes, any real floating dtype.
        groups: number of groups of the convolution, a divisor of ``weight.shape[0]``; differences never cross a group.
        transposed: whether the weight is that of a transposed convolution.

    Returns:
        A differentiable scalar ≥ 0, in float32 for half-precision weights and in the dtype of the weight otherwise.

    Raises:
        TypeError: if ``weight`` is not a floating tensor.
        ValueError: if it has fewer than two axes, or ``groups`` does not divide the first.

    Example:
        >>> import torch
        >>> from torchsmooth import functional
        >>> functional.first_derivative(torch.tensor([[1.0, 2.0], [1.0, 2.0]])).item()
        2.0

    Source: the derivative regularisers of Runkel et al., "Smooth Model Compression without Fine-Tuning", 2025
    (arXiv 2505.24469); the paper's exact discretisation was not available, this is the plain forward difference.
    """
    return _squared_differences(weight, 1, groups, transposed=transposed)


def second_derivative(weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    r"""Sum of squared second differences along both channel axes.

    .. math:: \sum_{axis} \lVert D^2_{axis} W \rVert_F^2, \qquad (D^2 W)_j = W_{j+2} - 2 W_{j+1} + W_j

    Zero exactly on weights that are affine along each channel axis; unchanged when the channels are reversed. It acts
    as a weight decay of strength :math:`2\,(2 - 2\cos\omega)^2` on the frequency :math:`\omega` along the channels.

    Args:
        weight: ``(out, in / groups, *kernel)`` (``(in, out / groups, *kernel)`` if ``transposed``), at least two
            axes, any real floating dtype.
        groups: number of groups of the convolution, a divisor of ``weight.shape[0]``; differences never cross a group.
        transposed: whether the weight is that of a transposed convolution.

    Returns:
        A differentiable scalar ≥ 0, in float32 for half-precision weights and in the dtype of the weight otherwise.

    Raises:
        TypeError: if ``weight`` is not a floating tensor.
        ValueError: if it has fewer than two axes, or ``groups`` does not divide the first.

    Example:
        >>> import torch
        >>> from torchsmooth import functional
        >>> functional.second_derivative(torch.tensor([[0.0, 1.0, 4.0]])).item()
        4.0

    Source: the derivative regularisers of Runkel et al., "Smooth Model Compression without Fine-Tuning", 2025
    (arXiv 2505.24469); the paper's exact discretisation was not available, this is the plain second difference.
    """
    return _squared_differences(weight, 2, groups, transposed=transposed)


def nuclear_norm(weight: Tensor, *, scheme: str = "channel", groups: int = 1, transposed: bool = False) -> Tensor:
    r"""Sum of the singular values of the weight's matricisation.

    .. math:: \lVert M \rVert_* = \sum_j \sigma_j(M)

    The gradient is :math:`U V^\top`. Where the matrix is rank-deficient the norm has a kink and every
    :math:`U V^\top + Q` with ``Q`` on the missing directions, :math:`\lVert Q \rVert_2 \le 1`, is a subgradient; the
    one used is the smallest, ``Q = 0``, which is zero at the zero matrix. There is no second derivative: asking for one
    raises. Half-precision weights are decomposed in float64.

    Args:
        weight: ``(out, in / groups, *kernel)`` (``(in, out / groups, *kernel)`` if ``transposed``), at least two
            axes, any real floating dtype.
        scheme: which matricisation (``"channel"``: out × in·kernel; ``"input"``: out·kernel × in; ``"spatial"``:
            out·kw × in·kh; ``"spatial_transposed"``: out·kh × in·kw, both for two kernel axes).
        groups: number of groups of the convolution, a divisor of ``weight.shape[0]``; the norms of the groups add up.
        transposed: whether the weight is that of a transposed convolution.

    Returns:
        A differentiable scalar ≥ 0, in float32 for half-precision weights and in the dtype of the weight otherwise.

    Raises:
        TypeError: if ``weight`` is not a floating tensor.
        ValueError: if it has fewer than two axes, ``groups`` does not divide the first, the scheme is unknown or
            does not fit the kernel, or the weight holds NaN or infinite values.

    Example:
        >>> import torch
        >>> from torchsmooth import functional
        >>> functional.nuclear_norm(torch.diag(torch.tensor([3.0, 1.0]))).item()
        4.0

    Source: Watson, "Characterization of the subdifferential of some matrix norms", 1992; as a penalty in training:
    Xu et al., "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", 2020, and Runkel et al., 2025
    (arXiv 2505.24469).
    """
    check_choice(scheme, "scheme", SCHEMES)
    view = channel_view(_check_weight(weight, groups), groups, transposed=transposed)
    layout = matricise((view.shape[0] * view.shape[1], *view.shape[2:]), scheme, groups)
    if view.numel() == 0:
        return view.sum()
    # The matrix products inside must keep their precision under autocast.
    with torch.autocast(weight.device.type, enabled=False):
        value: Tensor = _NuclearNorm.apply(layout.to_matrices(view))[0]  # type: ignore[no-untyped-call]
    return value


class _NuclearNorm(torch.autograd.Function):
    """The value and its gradient, both from one decomposition in the forward pass."""

    @staticmethod
    def forward(matrices: Tensor) -> tuple[Tensor, Tensor]:
        try:
            # LAPACK does not notice every NaN. A compiled graph cannot branch on values; there NaN gives NaN.
            if torch.compiler.is_compiling() or matrices.is_meta or bool(torch.isfinite(matrices).all()):
                return nuclear_norm_and_polar(matrices)
            cause = None
        except LinAlgError as error:
            cause = error
        raise ValueError(
            "the nuclear norm needs a weight of finite values, but this one holds NaN or infinite entries or could not "
            "be decomposed: a learning rate that is too high is the usual cause."
        ) from cause

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor, _: Tensor) -> Tensor:
        matrices, polar = ctx.saved_tensors
        gradient: Tensor = grad_value * _Once.apply(polar, matrices)  # type: ignore[no-untyped-call]
        return gradient


class _Once(torch.autograd.Function):
    """The polar factor, as a function of the matrix that refuses to be differentiated: not to would give a zero."""

    @staticmethod
    def forward(polar: Tensor, matrices: Tensor) -> Tensor:  # noqa: ARG004
        return polar.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:  # noqa: ARG004
        raise RuntimeError(
            "the second derivative of the nuclear norm was asked for (create_graph, or a gradient of a gradient), and "
            "there is none: take the penalty out of the loss that is differentiated twice."
        )
