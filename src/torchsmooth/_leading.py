"""The leading singular vectors of a matrix where few are wanted: randomized subspace iteration.

A decomposition finds all k vectors of the small side, in a time that grows with k³. Where a sixteenth of them or fewer
are wanted of a large matrix, products with a thin block find those alone. How fast they come depends on how the
spectrum decays, so the energy that the block has caught is watched: what is still to come is extrapolated, and where
that would take more steps than a decomposition is worth, the decomposition is made after all. Either way the
truncation is as close to the matrix as the SVD's, to 1e-6 of its norm.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ._decompose import decompose, is_good_for
from ._linalg import eigen, factors_in, single_scaled, widened, without_autocast, working_copy

if TYPE_CHECKING:
    from torch import Tensor

_LARGE = 1024  # from this small side on
_FEW = 16  # and up to a small side divided by this
_SPARE = 10  # columns of the block beyond those that are wanted
_STEPS = 12
_PATIENCE = 3  # steps before it is judged whether the rest will do
# What may still be missing of the relative error of the truncation; a tenth of what is promised.
_TOLERANCE = 1e-7
_SEEN_IN_SINGLE = 3e-2  # relative error above which rounding in float32 does not hide what is gained
_SEED = 0


def leading_basis(matrices: Tensor, rank: int) -> Tensor:
    """The leading singular vectors of the small side.

    Args:
        matrices: ``(groups, m, n)``, any floating dtype, finite.
        rank: 1 … min(m, n).

    Returns:
        ``(groups, k, rank)``, k = min(m, n), in float64 or, for large matrices, float32, with orthonormal columns: the
        first of those that ``decompose`` returns, or others that hold as much of the matrices. Equal input gives equal
        output.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, algorithms 4.4 and 5.1.
    """
    with without_autocast(matrices.device):
        found = _tried(widened(matrices), rank) if is_few(matrices, rank) else None
    return whole_basis(matrices, rank) if found is None else found


def whole_basis(matrices: Tensor, rank: int) -> Tensor:
    """Decompose matrices, and return the first columns of the basis, good for that rank."""
    values, basis = decompose(matrices)
    if not is_good_for(values, basis, rank):
        basis = decompose(matrices, exact=True)[1]
    return basis[..., :rank]


def truncated_factors(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of each matrix with ``rank``, as a product of two.

    Args:
        matrices: ``(groups, m, n)``, any floating dtype, finite.
        rank: 1 … min(m, n).

    Returns:
        ``up`` ``(groups, m, rank)`` and ``down`` ``(groups, rank, n)`` in float64, with
        ``up @ down`` the approximation, balanced and signed as :func:`factors_in` does.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
    """
    return factors_in(leading_basis(matrices, rank), matrices)


def is_few(matrices: Tensor, rank: int) -> bool:
    """Say whether so few vectors are worth trying for without a decomposition."""
    small = min(matrices.shape[-2:])
    return small >= _LARGE and rank * _FEW <= small


def _tried(wide: Tensor, rank: int) -> Tensor | None:
    """Iterate in float32, and where little is left out in float64: there float32 cannot tell how much."""
    if wide.dtype != torch.float64:
        found, error = _iterated(single_scaled(wide)[0], rank)
        if error >= _SEEN_IN_SINGLE:
            return found
    work = working_copy(wide)
    largest = work.abs().amax()
    return _iterated(work / torch.where(largest > 0, largest, torch.ones_like(largest)), rank)[0]


def _iterated(work: Tensor, rank: int) -> tuple[Tensor | None, float]:
    """Iterate until the basis is good enough; None where that would take too long. Also return the relative error."""
    whole = float(torch.linalg.vector_norm(work, dtype=torch.float64)) ** 2
    if whole == 0:
        return None, 0.0
    generator = torch.Generator(device="cpu").manual_seed(_SEED)  # the same numbers on every device
    drawn = torch.randn(work.shape[-2], rank + _SPARE, generator=generator, dtype=torch.float32, device="cpu")
    basis = torch.linalg.qr(drawn.to(work)).Q.expand(*work.shape[:-1], -1)
    caught, gained, error = 0.0, math.inf, 1.0
    for step in range(_STEPS):
        projected = basis.mT @ work
        squares, turn = eigen(_gram_of_rows(projected))
        before, caught = caught, float(squares[..., -rank:].sum())
        last, gained = gained, max(0.0, caught - before)
        # In the long run gains shrink by a steady factor, so what is still to come is that of a geometric series. The
        # first ones shrink faster, which is why the factor that the Ritz values promise counts, too.
        promised = float((squares[..., 0] / squares[..., -rank].clamp_min(1e-300)).square().amax())
        factor = max(promised, gained / last) if math.isfinite(last) and last > 0 else 1.0
        to_come = gained * factor / (1 - factor) if factor < 1 else math.inf
        error = math.sqrt(max(whole - caught, 0.0) / whole)
        allowed = 2 * _TOLERANCE * max(error, _TOLERANCE) * whole
        if step and (to_come <= allowed or gained <= 1e-3 * allowed):
            return (basis @ turn.to(basis)).flip(-1)[..., :rank], error
        if step >= _PATIENCE and _too_slow(to_come, factor, allowed, _STEPS - step):
            break
        # Orthonormal on both sides: rounding is then relative to singular values, not to their squares.
        basis = torch.linalg.qr(work @ torch.linalg.qr(projected.mT).Q).Q
    return None, error


def _too_slow(to_come: float, factor: float, allowed: float, steps: int) -> bool:
    """Say whether what is to come will not have shrunk to what is allowed after some more steps."""
    return not math.isfinite(to_come) or to_come * factor**steps > allowed


def _gram_of_rows(projected: Tensor) -> Tensor:
    exact = projected.to(torch.float64)
    return exact @ exact.mT
