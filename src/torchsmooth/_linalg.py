"""The linear algebra under both halves: dtypes and scales, eigenvalues, truncated factors of batches of matrices."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

# Dtypes whose squares stay in the range of float64.
_NARROW = (torch.float32, torch.bfloat16, torch.float16)

# Exponents of two up to which sums of squares stay well inside the range of float32.
_MODEST = 24

# Entries of a weight that are in float64 at a time, where a loop over pieces will do.
_PIECE = 1 << 20

# Inner products are made in so many blocks of rows, unless those get too thin.
_BLOCKS = 8
_LEAST_BLOCK = 128


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Let products on a device keep their precision, also where it has no autocast (``meta``)."""
    # Not asked of the usual devices: the question breaks graphs of torch.compile in torch 2.4.
    if device.type in {"cpu", "cuda"} or torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def working_copy(matrices: Tensor) -> Tensor:
    """Return the matrices in float64, on a device that has it."""
    if matrices.device.type == "mps":  # no float64 there
        matrices = matrices.cpu()
    work: Tensor = matrices.detach().to(torch.float64)
    return work


def clamped(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Keep values in the range of a dtype: what is computed from finite ones in a wider dtype may pass it."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit)


def pieces(matrices: Tensor) -> Iterator[Tensor]:
    """Yield matrices ``(..., m, n)`` in float64, some columns at a time: a copy of the whole would take much memory."""
    rows = max(1, math.prod(matrices.shape[:-1]))
    for piece in torch.split(matrices, max(1, _PIECE // rows), -1):
        yield working_copy(piece)


def squared_norms(matrices: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return ‖M‖_F² of matrices ``(..., m, n)``, each divided by a scale first, in float64 on the CPU.

    Args:
        matrices: any floating dtype.
        scale: ``(...)``, positive: about the size of the norms, or in float64 squares may leave its range.
    """
    found = torch.zeros(matrices.shape[:-2], dtype=torch.float64, device="cpu")
    scale = torch.ones_like(found) if scale is None else scale.cpu()
    inside = matrices.dtype in _NARROW
    if inside and matrices.numel() and int(_exponents(matrices).abs().max()) <= _MODEST:
        rows = torch.linalg.vector_norm(matrices.to(torch.float32), dim=-1)  # each to float32's rounding
        squares: Tensor = rows.cpu().double().square().sum(-1)
        return squares / scale / scale
    for piece in pieces(matrices):
        scaled = piece if inside else piece / scale[..., None, None].to(piece.device)
        found += scaled.square().sum((-2, -1)).cpu()
    return found / scale / scale if inside else found


def inner_products(rows: Tensor) -> Tensor:
    """Return M Mᵀ of matrices ``(..., k, n)``, of which the lower triangle is computed and the upper one copied."""
    count = rows.shape[-2]
    size = max(_LEAST_BLOCK, math.ceil(count / _BLOCKS))
    products = rows.new_empty(*rows.shape[:-1], count)
    for start in range(0, count, size):
        stop = min(start + size, count)
        block = rows[..., start:stop, :] @ rows[..., :stop, :].mT
        products[..., start:stop, :stop] = block
        products[..., :start, start:stop] = block[..., :start].mT
    return products


def eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, smallest first, and eigenvectors of positive semidefinite matrices; no finite matrix is refused.

    LAPACK's divide and conquer gives up on some matrices with many eigenvalues of zero (such as the moments of inputs
    of which most are always zero), and not on the same one in another scale, order or shift.

    Args:
        matrices: ``(..., k, k)``, symmetric, in float64 or float32.

    Returns:
        ``(..., k)`` and ``(..., k, k)``, the eigenvectors in columns.

    Raises:
        LinAlgError: if an entry is NaN or infinite, where LAPACK notices.
    """
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except LinAlgError:
        if not bool(torch.isfinite(matrices).all()):
            raise
        return _eigen_otherwise(matrices)
    return values, vectors


def _eigen_otherwise(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same for matrices that were refused once."""
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    scaled = matrices / torch.where(largest > 0, largest, torch.ones_like(largest))
    shift = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    vectors: Tensor | None = None
    for reordered, attempt in product((False, True), (scaled, scaled + shift)):
        try:
            found = torch.linalg.eigh(attempt.flip(-2, -1) if reordered else attempt).eigenvectors
        except LinAlgError:
            continue
        vectors = found.flip(-2) if reordered else found
        break
    if vectors is None:
        vectors = torch.linalg.svd(scaled).U
    # The eigenvalues of a shifted matrix lack the digits of small ones: Rayleigh quotients have them.
    values, order = (vectors * (scaled @ vectors)).sum(-2).sort(-1)
    return values * largest.squeeze(-1), vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))


def eigenvalues(matrices: Tensor) -> Tensor:
    """The eigenvalues alone, as :func:`eigen`."""
    try:
        values: Tensor = torch.linalg.eigvalsh(matrices)
    except LinAlgError:
        return eigen(matrices)[0]
    return values


def widened(matrices: Tensor) -> Tensor:
    """Return matrices with no more rows than columns, transposed where they have more; a view without gradients."""
    matrices = matrices.detach()
    return matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices


def _exponents(matrices: Tensor) -> Tensor:
    """Return ``(..., 1, 1)``: the exponents of the powers of two next to the largest entries."""
    largest = torch.maximum(matrices.amax((-2, -1), keepdim=True), -matrices.amin((-2, -1), keepdim=True))
    return torch.frexp(working_copy(largest)).exponent


def single_scaled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices in float32, divided by powers of two so that squares stay in its range, and these powers."""
    exponents, single = _exponents(matrices), matrices.to(torch.float32)
    if int(exponents.abs().max()) <= _MODEST:
        return single, torch.ones_like(exponents, dtype=torch.float64)
    # In two steps, as the whole power may be out of the range of float32.
    half = exponents // 2
    scaled = (single * (-half).to(torch.float32).exp2()) * (half - exponents).to(torch.float32).exp2()
    return scaled, exponents.to(torch.float64).exp2()


def float32_is_whole() -> bool:
    """Say whether matrix products in float32 are computed in float32: the user may let them be rounded to TF32."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set by torch.backends, in a way that this older function cannot tell
        return False


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


def orthonormal(basis: Tensor) -> Tensor:
    """Return columns that are orthonormal to float32's rounding in float64, orthonormal to that of float64."""
    if basis.dtype == torch.float64:
        return basis
    exact = basis.double()  # one step of Newton and Schulz squares what is amiss
    return 1.5 * exact - 0.5 * (exact @ (exact.mT @ exact))


def factors_in(basis: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Project each matrix onto a basis of its small side: the best approximation if that is its leading vectors.

    Each singular value is shared between the factors as its square root on both sides, which keeps both in the
    range of half precision. The entry of largest magnitude of each left singular vector is positive, so equal
    input gives equal factors.

    Args:
        basis: ``(groups, k, rank)``, orthonormal columns, such as :func:`leading_basis` returns.
        matrices: ``(groups, m, n)``, any floating dtype, finite.

    Returns:
        ``up`` ``(groups, m, rank)`` and ``down`` ``(groups, rank, n)`` in float64, their product the approximation.
    """
    tall, wide = matrices.shape[-2] > matrices.shape[-1], widened(matrices)
    # Scaled first, or the squares of very large and very small entries would leave the range of float64; by a power of
    # four, so that nothing is rounded, neither here nor by the square root below.
    half = (_exponents(wide) // 2).to(torch.float64).exp2()
    basis = basis.to(half.device)
    if basis.dtype == torch.float32 and float32_is_whole():  # what it was found in is good enough to use it in
        scaled, power = single_scaled(wide)
        with without_autocast(scaled.device):
            projected = (basis.mT @ scaled).double() * (power / half / half)
        basis = orthonormal(basis)
    else:
        basis = orthonormal(basis)
        projected = torch.cat([basis.mT @ (piece / half / half) for piece in pieces(wide)], -1)
    sizes = torch.linalg.vector_norm(projected, dim=-1)
    root = sizes.sqrt()
    inverse = torch.where(root > 0, root, torch.ones_like(root)).reciprocal() * (root > 0)
    up, down = basis * (root.unsqueeze(-2) * half), projected * (inverse.unsqueeze(-1) * half)
    if tall:
        up, down = down.mT, up.mT
    strongest = up.gather(-2, up.abs().argmax(-2, keepdim=True))
    sign = torch.where(strongest < 0, -1.0, 1.0).to(up)
    return up * sign, down * sign.mT


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Share each term of a product evenly between its factors, to a power of two: nothing is rounded.

    Args:
        up: ``(groups, m, rank)`` in float64.
        down: ``(groups, rank, n)`` in float64.

    Returns:
        Factors with the same product. Those that are balanced already come back as they are.
    """
    sizes = torch.linalg.vector_norm(down, dim=-1) / torch.linalg.vector_norm(up, dim=-2)
    power = (sizes.log2() / 2).round()
    power = torch.where(power.isfinite(), power, torch.zeros_like(power))  # a term that is zero has no size
    return up * power.exp2().unsqueeze(-2), down * (-power).exp2().unsqueeze(-1)
