"""Spectra of batches of matrices, and the singular vectors of their small side.

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
from typing import TYPE_CHECKING

import torch

from ._linalg import (
    eigen,
    eigenvalues,
    float32_is_whole,
    inner_products,
    pieces,
    single_scaled,
    widened,
    without_autocast,
)

if TYPE_CHECKING:
    from torch import Tensor

# Compute capabilities of GPUs that compute in float64 at half of the rate of float32 or better.
_EVEN = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}

# From this small side on, float32 is tried first: below it there is little time to be saved.
LARGE = 256
# How much larger than the one three quarters down the spectrum the largest squared singular value may be, so that
# float32 shows the spectrum at all; and so that its vectors are good for every rank.
_SEEN, _FLAT = 2e4, 500.0
# For one rank they are if it may be this much larger than the last one that is kept, and this share of the squares is
# left out.
_KEPT, _LEFT_OUT = 2e3, 1e-2
# How much larger than the geometric mean it may be for float32 to be worth trying; and, guessed from every fourth row,
# for a closer look.
_PROMISING, _WORTH_A_LOOK, _SAMPLED = 3e3, 4e3, 4


def _gram(wide: Tensor) -> Tensor:
    """Return M Mᵀ in float64."""
    batch = wide.reshape(-1, *wide.shape[-2:])
    parts = pieces(batch)
    gram = inner_products(next(parts))
    for piece in parts:
        gram += inner_products(piece)
    return gram.reshape(*wide.shape[:-1], wide.shape[-2])


def _single_gram(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Return M Mᵀ in float32, of matrices divided by powers of two first, and these powers."""
    scaled, power = single_scaled(wide)
    with without_autocast(scaled.device):
        return inner_products(scaled), power


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
    return bool((_steepness(gram) <= math.log(_PROMISING)).all())


def _is_worth_a_look(wide: Tensor) -> bool:
    """Guess the same from some of the rows, whose Gram matrix takes a sixteenth of the time.

    Their spectrum is flatter. It is taken for a power law, of which the exponent is that of the whole: the logarithm of
    what the largest of n eigenvalues is over their geometric mean is the exponent times log(n!) / n, which is close to
    log(n) − 1.
    """
    rows = wide.shape[-2]
    some = _single_gram(wide[..., ::_SAMPLED, :])[0]
    whole = _steepness(some) * ((math.log(rows) - 1) / (math.log(some.shape[-1]) - 1))
    return bool((whole <= math.log(_WORTH_A_LOOK)).all())


def _steepness(gram: Tensor) -> Tensor:
    """Return the logarithm of the largest eigenvalue, or less, over the geometric mean; infinite if unknown."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    mean = factor.diagonal(dim1=-2, dim2=-1).log().mean(-1) * 2
    traces = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    at_most_the_largest = gram.square().sum((-2, -1)) / traces
    return torch.where(failed == 0, at_most_the_largest.log() - mean, math.inf)


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
    if min(wide.shape[-2:]) < LARGE or not _single_pays(wide.device) or not float32_is_whole():
        return None
    if not _is_worth_a_look(wide):
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
