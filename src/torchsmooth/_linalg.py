"""The linear algebra under both halves: spectra and truncated factors of batches of matrices.

Weights in single or half precision are decomposed through the Gram matrix of their small side in float64: a product of
float32 entries is exact in float64, and the eigenvalues of that small symmetric matrix carry about 1e-8 of the largest
singular value, below the rounding of the weight itself. Against an SVD of the whole matrix that saves the more, the
wider the matrix (measured by ``benchmarks/decompose.py``). Float64 weights, for which squaring would lose half of the
digits, take the SVD.

Large matrices try the same in float32 first, in about half of the time. Rounding there is about 1e-7 of the largest
squared singular value, so it is good enough where those that matter are not much smaller than that one, as in networks
trained in the ordinary way; where the spectrum has decayed, as smooth training makes it, float64 is taken after all.
With that, no truncation is further from the weight than the SVD's by 1e-6 of its norm (``tests/test_leading.py``).
"""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

# Dtypes whose squares stay in the range of float64.
_NARROW = (torch.float32, torch.bfloat16, torch.float16)

# Exponents of two up to which sums of squares stay well inside the range of float32.
_MODEST = 24

# Compute capabilities of GPUs that compute in float64 at half of the rate of float32 or better.
_EVEN = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}

# Entries of a weight that are in float64 at a time, where a loop over pieces will do.
_PIECE = 1 << 20

# Inner products are made in so many blocks of rows, unless those get too thin.
_BLOCKS = 8
_LEAST_BLOCK = 128

# From this small side on, float32 is tried first: below it there is little time to be saved.
LARGE = 256
# How much larger than the one three quarters down the spectrum the largest squared singular value may be, so that
# float32 shows the spectrum at all; and so that its vectors are good for every rank.
_SEEN, _FLAT = 2e4, 500.0
# How much larger than the geometric mean it may be for float32 to be worth trying.
_PROMISING = 3e3
# For one rank they are if it may be this much larger than the last one that is kept, and this share of the squares is
# left out.
_KEPT, _LEFT_OUT = 2e3, 1e-2


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


def _gram(wide: Tensor) -> Tensor:
    """Return M Mᵀ in float64."""
    batch = wide.reshape(-1, *wide.shape[-2:])
    parts = pieces(batch)
    gram = inner_products(next(parts))
    for piece in parts:
        gram += inner_products(piece)
    return gram.reshape(*wide.shape[:-1], wide.shape[-2])


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


def _single_gram(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Return M Mᵀ in float32, of matrices divided by powers of two first, and these powers."""
    scaled, power = single_scaled(wide)
    with torch.autocast(scaled.device.type, enabled=False):
        return inner_products(scaled), power


def _float32_is_whole() -> bool:
    """Say whether matrix products in float32 are computed in float32: the user may let them be rounded to TF32."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set by torch.backends, in a way that this older function cannot tell
        return False


def _single_pays(device: torch.device) -> bool:
    """Say whether an eigenproblem takes less time in float32 than in float64.

    On a GPU made for computing it takes more (those of ResNet-50 0.35 against 0.15 s on an H200, by
    ``benchmarks/compress_time.py``); where a chip has few units for float64 it takes less.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) not in _EVEN


def _no_steeper(squares: Tensor, limit: float) -> bool:
    """Compare the largest of ``(..., k)``, smallest first, to the one three quarters down."""
    return bool((squares[..., -1] <= limit * squares[..., squares.shape[-1] // 4]).all())


def _is_promising(gram: Tensor) -> bool:
    """Guess whether float32 will show the spectrum, from a Cholesky factor, which is found in a tenth of the time.

    Its diagonal tells the geometric mean of the eigenvalues. Where that is far below the largest one, so are many.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()):
        return False
    mean = factor.diagonal(dim1=-2, dim2=-1).log().mean(-1) * 2
    traces = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    at_most_the_largest = gram.square().sum((-2, -1)) / traces
    return bool((at_most_the_largest.log() - mean <= math.log(_PROMISING)).all())


def is_good_for(values: Tensor, basis: Tensor, rank: int) -> bool:
    """Say whether a basis gives a truncation as good as the SVD's; if not, it is to be found by ``exact=True``.

    Args:
        values: ``(..., k)`` in float64, and
        basis: ``(..., k, k)``, as :func:`decompose` returned them.
        rank: how much of the basis is to be used.
    """
    if basis.dtype == torch.float64:
        return True
    squares = (values / values.amax().clamp_min(torch.finfo(torch.float64).tiny)).square()
    if _no_steeper(squares.flip(-1), _FLAT):
        return True
    large_enough = squares[..., 0] <= _KEPT * squares[..., rank - 1]
    left_out = squares[..., rank:].sum(-1) >= _LEFT_OUT * squares.sum(-1)
    return bool((large_enough & left_out).all())


def _promising_gram(wide: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what :func:`_single_gram` does; None where float32 saves no time, is not whole, or will not do."""
    if min(wide.shape[-2:]) < LARGE or not _single_pays(wide.device) or not _float32_is_whole():
        return None
    gram, power = _single_gram(wide)
    return (gram, power) if _is_promising(gram) else None


def _roots(squares: Tensor) -> Tensor:
    """Return the singular values to eigenvalues, which are smallest first: largest first, in float64."""
    return squares.flip(-1).clamp_min(0).double().sqrt()


def decompose(matrices: Tensor, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and the singular vectors of the small side.

    Args:
        matrices: ``(..., m, n)``, any floating dtype, any strides.
        exact: whether to spare no time: float32 is not tried.

    Returns:
        ``(..., k)`` in float64, and ``(..., k, k)`` in float64 or, for large matrices, float32 (:func:`is_good_for`
        says for which ranks that will do), k = min(m, n); the columns of the second are orthonormal. They are left
        singular vectors of a wide or square matrix, right ones of a tall one.
    """
    wide = widened(matrices)
    if matrices.dtype == torch.float64:
        basis, values, _ = torch.linalg.svd(wide, full_matrices=False)
        return values, basis
    single = None if exact else _promising_gram(wide)
    if single is not None:
        squares, vectors = eigen(single[0])
        if _no_steeper(squares, _SEEN):
            return _roots(squares) * single[1].squeeze(-1), vectors.flip(-1)
    squares, vectors = eigen(_gram(wide))
    return _roots(squares), vectors.flip(-1)


def singular_values(matrices: Tensor, *, exact: bool = False) -> Tensor:
    """Singular values, largest first.

    Args:
        matrices: ``(..., m, n)``, any floating dtype, any strides.
        exact: whether to spare no time: float32 is not tried.

    Returns:
        ``(..., min(m, n))`` in float64.
    """
    if matrices.dtype == torch.float64:
        values: Tensor = torch.linalg.svdvals(matrices.detach())
        return values
    wide = widened(matrices)
    single = None if exact else _promising_gram(wide)
    if single is not None:
        squares = eigenvalues(single[0])
        if _no_steeper(squares, _SEEN):
            return _roots(squares) * single[1].squeeze(-1)
    return _roots(eigenvalues(_gram(wide)))


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


def factors_in(basis: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project each matrix onto a basis of its small side: the best approximation if that is its leading vectors.

    Each singular value is shared between the factors as its square root on both sides, which keeps both in the
    range of half precision. The entry of largest magnitude of each left singular vector is positive, so equal
    input gives equal factors.

    Args:
        basis: ``(groups, k, rank)``, the first columns of what :func:`decompose` returned.
        matrices: ``(groups, m, n)``, any floating dtype, finite.

    Returns:
        ``up`` ``(groups, m, rank)`` and ``down`` ``(groups, rank, n)`` in float64, their product the approximation,
        and ``(groups, rank)`` in float64: the norm of the projection onto each column, which is the singular value if
        the basis belongs to the matrices.
    """
    tall, wide = matrices.shape[-2] > matrices.shape[-1], widened(matrices)
    # Scaled first, or the squares of very large and very small entries would leave the range of float64; by a power of
    # four, so that nothing is rounded, neither here nor by the square root below.
    half = (_exponents(wide) // 2).to(torch.float64).exp2()
    basis = basis.to(half.device)
    if basis.dtype == torch.float32 and _float32_is_whole():  # what it was found in is good enough to use it in
        scaled, power = single_scaled(wide)
        with torch.autocast(scaled.device.type, enabled=False):
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
    return up * sign, down * sign.mT, sizes * (half * half).squeeze(-1)


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
