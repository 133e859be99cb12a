"""The linear algebra under both halves: spectra, truncated factors and polar factors of batches of matrices.

Weights in single or half precision are decomposed through the Gram matrix of their small side in float64: a product of
float32 entries is exact in float64, and the eigenvalues of that small symmetric matrix carry about 1e-8 of the largest
singular value, below the rounding of the weight itself. Against an SVD of the whole matrix that saves the more, the
wider the matrix (measured by ``benchmarks/decompose.py``). Float64 weights, for which squaring would lose half of the
digits, take the SVD.
"""

from __future__ import annotations

import torch
from torch import Tensor

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def working_copy(matrices: Tensor) -> Tensor:
    """Return the matrices in float64, on a device that has it."""
    if matrices.device.type == "mps":  # no float64 there
        matrices = matrices.cpu()
    work: Tensor = matrices.detach().to(torch.float64)
    return work


def _left_basis(matrices: Tensor) -> Tensor:
    """Return the left singular vectors of wide float64 matrices ``(..., m, n)``, m ≤ n, strongest first."""
    vectors: Tensor = torch.linalg.eigh(matrices @ matrices.mT).eigenvectors
    return vectors.flip(-1)


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values, largest first.

    Args:
        matrices: ``(..., m, n)``, any floating dtype, any strides.

    Returns:
        ``(..., min(m, n))`` in float64.
    """
    if matrices.dtype == torch.float64:
        values: Tensor = torch.linalg.svdvals(matrices.detach())
        return values
    work = working_copy(matrices)
    if work.shape[-2] > work.shape[-1]:
        work = work.mT
    eigenvalues: Tensor = torch.linalg.eigvalsh(work @ work.mT)
    return eigenvalues.flip(-1).clamp_min(0).sqrt()


def relative_tail_energies(values: Tensor) -> Tensor:
    """Squared relative error of every truncation: the share of the squares past the first r singular values.

    Args:
        values: ``(groups, k)`` in float64, largest first; the groups share one rank, so their energies add up.

    Returns:
        ``(k + 1,)`` on the CPU: one first, zero last, never increasing. All zero if the singular values are.
    """
    values = values.cpu()
    largest = values.max()
    if largest == 0:
        return values.new_zeros(values.shape[-1] + 1)
    # Divided first, or the squares of very large and very small values would leave the range of float64.
    energies = (values / largest).square().sum(0)
    # Summed from the small end, so that small tails are not lost beside the large values.
    tails = energies.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)]) / tails[0]


def truncated_factors(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of each matrix with ``rank``, as a product of two.

    Each singular value is shared between the factors as its square root on both sides, which keeps both in the
    range of half precision. The entry of largest magnitude of each left singular vector is positive, so equal
    input gives equal factors.

    Args:
        matrices: ``(groups, m, n)``, any floating dtype, finite.
        rank: 1 … min(m, n).

    Returns:
        ``up`` ``(groups, m, rank)`` and ``down`` ``(groups, rank, n)`` in float64, with
        ``up @ down`` the approximation.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
    """
    work = working_copy(matrices)
    if matrices.dtype == torch.float64:
        left, values, right = torch.linalg.svd(work, full_matrices=False)
        left, values, right = left[..., :rank], values[..., :rank], right[..., :rank, :]
        root = values.sqrt()
        up, down = left * root.unsqueeze(-2), right * root.unsqueeze(-1)
    elif work.shape[-2] <= work.shape[-1]:
        left = _left_basis(work)[..., :rank]
        right = left.mT @ work
        up, down = _balance(left, right)
    else:
        right = _left_basis(work.mT)[..., :rank].mT
        left = work @ right.mT
        down, up = (factor.mT for factor in _balance(right.mT, left.mT))
    strongest = up.gather(-2, up.abs().argmax(-2, keepdim=True))
    sign = torch.where(strongest < 0, -1.0, 1.0).to(up)
    return up * sign, down * sign.mT


def _balance(basis: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """Move the square root of each row's norm, which is the singular value, from ``projected`` to the basis."""
    root = torch.linalg.vector_norm(projected, dim=-1).sqrt()
    inverse = torch.where(root > 0, root, torch.ones_like(root)).reciprocal() * (root > 0)
    return basis * root.unsqueeze(-2), projected * inverse.unsqueeze(-1)


def nuclear_norm_and_polar(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the singular values of all matrices, and the factor U Vᵀ of each, which is its gradient.

    Directions with a singular value below the rounding of the matrix (``max(m, n) · eps`` of the largest) are
    left out of U Vᵀ: of all subgradients there it is the one of least norm, and it is zero at the zero matrix.

    Args:
        matrices: ``(groups, m, n)`` in float32 or float64.

    Returns:
        The norm, a scalar, and the polar factors ``(groups, m, n)``, both in the dtype of ``matrices``.

    Source: Watson, "Characterization of the subdifferential of some matrix norms", 1992.
    """
    tolerance = torch.finfo(matrices.dtype).eps * max(matrices.shape[-2:])
    work = working_copy(matrices)
    tall = work.shape[-2] > work.shape[-1]
    wide = work.mT if tall else work
    if matrices.dtype == torch.float64:
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
    else:
        left = _left_basis(wide)
        projected = left.mT @ wide
        values = torch.linalg.vector_norm(projected, dim=-1)
        right = projected / torch.where(values > 0, values, torch.ones_like(values)).unsqueeze(-1)
    kept = values > tolerance * values.amax(-1, keepdim=True)
    polar = (left * kept.unsqueeze(-2)) @ right
    return values.sum().to(matrices), (polar.mT if tall else polar).to(matrices)
