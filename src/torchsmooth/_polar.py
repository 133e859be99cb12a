"""Nuclear norms of batches of matrices, and their polar factors U Vᵀ, which are the gradients: three ways to get them.

``"svd"``
    The reference: an SVD in float64.
``"eigh"``
    The eigenvalues of the small Gram matrix in float64, as in :mod:`torchsmooth._decompose`. The fastest on a CPU
    (measured by ``benchmarks/polar.py``). Of weights in single precision, singular values of the factor are within
    1e-5 of one; within 3e-4 where those of the weight are near its rounding, below which they are left out.
``"polar_express"``
    Seven steps of X ← aX + (bA + cA²)X with A = XXᵀ: matrix products only, which is what a GPU is good at, for a whole
    batch at once. No step can fail: there is nothing to converge. With ``"polar_express_bf16"`` the products are in
    bfloat16, which is enough for a gradient; directions with a singular value below its rounding, 4e-3 of the largest,
    then get noise, never longer than that of any other direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

from ._linalg import eigen, working_copy

if TYPE_CHECKING:
    from torch import Tensor

PolarMethod = Literal["auto", "svd", "eigh", "polar_express", "polar_express_bf16"]
POLAR_METHODS: tuple[PolarMethod, ...] = get_args(PolarMethod)

# The odd quintics a x + b x³ + c x⁵ whose composition brings every singular value of the interval [SMALLEST, 1] as near
# to one as seven quintics can: after six of them they lie within 1.2e-3, after seven within 1e-8. Made as Amsel et al.,
# "The Polar Express", 2025 (arXiv 2505.16932), section 3, describe: each is the best one on the interval that the ones
# before it leave; on the first intervals, which are long, that interval is cut at 0.024 of its upper end, and the
# quintic rescaled to be centred at one.
SMALLEST = 1e-3
_QUINTICS = (
    (8.287212018145622, -23.59588651909882, 17.300387312530923),
    (4.107059111542197, -2.9478499167379084, 0.5448431082926601),
    (3.948690853482295, -2.908902115962947, 0.5518191394370135),
    (3.3184196573706055, -2.488488024314878, 0.5100489401237208),
    (2.3006520199548186, -1.6689039845747518, 0.4188073119525678),
    (1.8913014077873979, -1.2679957938, 0.3768040894852483),
    (1.875, -1.25, 0.375),
)
# In bfloat16 a singular value can be rounded up past the interval, where the quintics grow without bound.
_CUSHION = 1.01

# Of a singular value, in single precision, with room for the product.
_LARGEST_INVERSE = 1e30


def resolve(method: PolarMethod, dtype: torch.dtype, device: torch.device) -> PolarMethod:
    """Choose a method where it is left open.

    Args:
        method: any; only ``"auto"`` is replaced.
        dtype: of the weight, before it is cast to anything else.
        device: of the weight.
    """
    if method != "auto":
        return method
    if dtype == torch.float64:
        return "svd"
    if device.type in ("cpu", "meta"):
        return "eigh"
    return "polar_express" if dtype == torch.float32 else "polar_express_bf16"


def nuclear_norms_and_polars(matrices: Tensor, method: PolarMethod) -> tuple[Tensor, Tensor]:
    """The sum of the singular values of each matrix, and its factor U Vᵀ.

    For ``"svd"`` and ``"eigh"``, directions with a singular value below the rounding of the matrix (``max(m, n) · eps``
    of the largest) are left out of U Vᵀ: of all subgradients there it is the one of least norm, and it is zero at the
    zero matrix. For the others, the singular values of the factor lie within 1e-5 of one (3e-2 in bfloat16) for those
    of the matrix that are at least 1e-3 of :func:`_bounds`, and go smoothly to zero with the ones below.

    Args:
        matrices: ``(batch, m, n)`` in float32 or float64.
        method: any but ``"auto"``.

    Returns:
        ``(batch,)`` and ``(batch, m, n)``, both in the dtype of ``matrices``.

    Source: Watson, "Characterization of the subdifferential of some matrix norms", 1992.
    """
    if method in ("polar_express", "polar_express_bf16"):
        return _by_products(matrices, torch.bfloat16 if method == "polar_express_bf16" else matrices.dtype)
    tolerance = torch.finfo(matrices.dtype).eps * max(matrices.shape[-2:])
    exponents = None
    if method == "eigh" and matrices.dtype == torch.float64:  # which holds the squares of all that is narrower
        matrices, exponents = _scaled(matrices)
    work = working_copy(matrices)
    tall = work.shape[-2] > work.shape[-1]
    wide = work.mT if tall else work
    if method == "svd":
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        kept = values > tolerance * values.amax(-1, keepdim=True)
        polars = (left * kept.unsqueeze(-2)) @ right
    else:
        squares, left = eigen(wide @ wide.mT)
        values = squares.clamp_min(0).sqrt()
        largest = values.amax(-1, keepdim=True)
        kept = values > tolerance * largest
        inverse = torch.where(kept, values, torch.ones_like(values)).reciprocal() * kept
        root = (left * inverse.unsqueeze(-2)) @ left.mT
        # Single precision magnifies its rounding by largest / smallest singular value: enough where that is moderate,
        # and where the inverses are in its range.
        small = (inverse * largest < 100) & (inverse < _LARGEST_INVERSE)  # noqa: PLR2004
        if not torch.compiler.is_compiling() and not matrices.is_meta and bool(small.all()):
            root, wide = root.to(matrices), (matrices.mT if tall else matrices)
        polars = root @ wide
    norms = values.sum(-1) if exponents is None else torch.ldexp(values.sum(-1), exponents[:, 0, 0])
    return norms.to(matrices), (polars.mT if tall else polars).to(matrices)


def _by_products(matrices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same by matrix products alone, in ``dtype``."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    x = _scaled(wide)[0].to(dtype)
    cushion = 1.0 if dtype != torch.bfloat16 else _CUSHION
    gram = x @ x.mT
    size = _bounds(gram) * cushion
    x = x / torch.where(size > 0, size, torch.ones_like(size)).to(x)
    for step, (a, b, c) in enumerate(_QUINTICS):
        # The last quintic maps a little more than [0, 1] to a little less than it: no cushion is needed there.
        shrink = cushion if step < len(_QUINTICS) - 1 else 1.0
        gram = x @ x.mT
        update = torch.baddbmm(gram, gram, gram, beta=b / shrink**3, alpha=c / shrink**5)
        x = torch.baddbmm(x, update, x, beta=a / shrink)
    polars = x.to(matrices)
    values = (wide * polars).sum((-2, -1))
    return values, (polars.mT if tall else polars)


def _scaled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each matrix by a power of two, so that squares stay in range and nothing is rounded; zero stays zero.

    Returns:
        The matrices, and the exponents, ``(batch, 1, 1)``.
    """
    exponents = torch.frexp(matrices.abs().amax((-2, -1), keepdim=True)).exponent
    return torch.ldexp(matrices, -exponents), exponents


def _bounds(gram: Tensor) -> Tensor:
    """Bound the largest singular value of each X from its Gram matrix XXᵀ: (Σ σ⁸)^⅛, at most k^⅛ too large.

    Args:
        gram: ``(batch, k, k)``.

    Returns:
        ``(batch, 1, 1)`` in float32 or wider.
    """
    wider = torch.promote_types(gram.dtype, torch.float32)
    square = torch.linalg.matrix_norm(gram @ gram, keepdim=True, dtype=wider)
    bound: Tensor = square.sqrt().sqrt()
    return bound
