r"""Smoothness penalties as pure functions of a weight.

All three are *sums*, not means, and need no rescaling with the size of a layer. The gradient of the derivative
penalties at an entry involves only its neighbours, and that of the nuclear norm moves every singular value by the same
amount, whatever the shape; under the usual initialisations singular values are of order one in small and large
layers alike. One strength therefore serves a whole model, as one weight decay does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._checks import check_choice
from ._derivatives import squared_differences
from ._matricise import SCHEMES
from ._nuclear import Matrices, nuclear_norms, nuclear_ratios
from ._polar import POLAR_METHODS, PolarMethod
from ._weight import Weight, check_weight

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["first_derivative", "nuclear_norm", "nuclear_ratio", "second_derivative"]


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
    return squared_differences(check_weight(weight, groups), 1, groups, transposed=transposed)


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
    return squared_differences(check_weight(weight, groups), 2, groups, transposed=transposed)


def nuclear_norm(
    weight: Tensor, *, scheme: str = "channel", groups: int = 1, transposed: bool = False, method: PolarMethod = "auto"
) -> Tensor:
    r"""Sum of the singular values of the weight's matricisation.

    .. math:: \lVert M \rVert_* = \sum_j \sigma_j(M)

    The gradient is :math:`U V^\top`. Where the matrix is rank-deficient the norm has a kink and every
    :math:`U V^\top + Q` with ``Q`` on the missing directions, :math:`\lVert Q \rVert_2 \le 1`, is a subgradient; the
    one used is the smallest, ``Q = 0``, which is zero at the zero matrix. There is no second derivative: asking for one
    raises.

    Args:
        weight: ``(out, in / groups, *kernel)`` (``(in, out / groups, *kernel)`` if ``transposed``), at least two
            axes, any real floating dtype.
        scheme: which matricisation (``"channel"``: out × in·kernel; ``"input"``: out·kernel × in; ``"spatial"``:
            out·kw × in·kh; ``"spatial_transposed"``: out·kh × in·kw, both for two kernel axes).
        groups: number of groups of the convolution, a divisor of ``weight.shape[0]``; the norms of the groups add up.
        transposed: whether the weight is that of a transposed convolution.
        method: how the polar factor is computed. ``"svd"``, in float64, is the reference. ``"eigh"`` decomposes the
            small Gram matrix in float64: the same to the rounding of single precision, and the fastest on a CPU.
            ``"polar_express"`` uses matrix products alone, the fastest on a GPU: for singular values of at least about
            1e-3 of the largest, those of the factor are right to 1e-5, and fall smoothly to zero for smaller ones.
            ``"polar_express_bf16"`` does its products in bfloat16, right to 3e-2. ``"auto"``: the SVD for float64;
            else ``"eigh"`` on a CPU; else products, in bfloat16 for half-precision weights.

    Returns:
        A differentiable scalar ≥ 0, in float32 for half-precision weights and in the dtype of the weight otherwise.

    Raises:
        TypeError: if ``weight`` is not a floating tensor.
        ValueError: if it has fewer than two axes, ``groups`` does not divide the first, the scheme is unknown or
            does not fit the kernel, the method is unknown, or the weight is on the CPU and holds NaN or infinite values
            (elsewhere these give NaN: to look would make the device wait).

    Example:
        >>> import torch
        >>> from torchsmooth import functional
        >>> functional.nuclear_norm(torch.diag(torch.tensor([3.0, 1.0]))).item()
        4.0

    Source: Watson, "Characterization of the subdifferential of some matrix norms", 1992; as a penalty in training:
    Xu et al., "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", 2020, and Runkel et al., 2025
    (arXiv 2505.24469). The matrix products: Amsel et al., "The Polar Express", 2025 (arXiv 2505.16932).
    """
    one = _checked_matrices(Weight(weight, groups, transposed), scheme, method)
    return nuclear_norms(one.batch, one.method).sum()


def nuclear_ratio(
    weight: Tensor, *, scheme: str = "channel", groups: int = 1, transposed: bool = False, method: PolarMethod = "auto"
) -> Tensor:
    r"""Nuclear norm over Frobenius norm of the weight's matricisation: a low rank that shrinking cannot feign.

    .. math:: \lVert M \rVert_* \,/\, \lVert M \rVert_F \in [1, \sqrt{\min(m, n)}]

    One for a matrix of rank one, the square root of the rank where all singular values are equal. The scale of the
    weight does not matter, and the gradient is orthogonal to the weight: where a normalisation follows the layer, the
    nuclear norm can be lowered by shrinking the weight, which changes nothing; this can not.

    Args:
        weight: ``(out, in / groups, *kernel)`` (``(in, out / groups, *kernel)`` if ``transposed``), at least two
            axes, any real floating dtype.
        scheme: which matricisation, as for :func:`nuclear_norm`.
        groups: number of groups of the convolution, a divisor of ``weight.shape[0]``; the ratios of the groups add up.
        transposed: whether the weight is that of a transposed convolution.
        method: how the polar factor is computed, as for :func:`nuclear_norm`.

    Returns:
        A differentiable scalar ≥ 0, zero for a zero weight; in float32 for half-precision weights and in the dtype of
        the weight otherwise.

    Raises:
        TypeError: if ``weight`` is not a floating tensor.
        ValueError: as :func:`nuclear_norm`.

    Example:
        >>> import torch
        >>> from torchsmooth import functional
        >>> functional.nuclear_ratio(torch.diag(torch.tensor([2.0, 2.0, 2.0, 2.0]))).item()
        2.0

    Source: Hoyer, "Non-negative Matrix Factorization with Sparseness Constraints", 2004, for vectors; of singular
    values, as a penalty in training: Yang et al., "Learning Low-rank Deep Neural Networks via Singular Vector
    Orthogonality Regularization and Singular Value Sparsification", 2020.
    """
    one = _checked_matrices(Weight(weight, groups, transposed), scheme, method)
    return nuclear_ratios(one.batch, one.method).sum()


def _checked_matrices(weight: Weight, scheme: str, method: PolarMethod) -> Matrices:
    check_choice(scheme, "scheme", SCHEMES)
    check_choice(method, "method", POLAR_METHODS)
    return Matrices.of(weight, scheme, method)
