r"""The pivoted form of a product: r of its rows as they are, the pivots, and the others as combinations of them.

With Q an orthonormal basis of the columns of M, and J the pivots, M = P [I; B] C where C = M[J] and
B = Q[others] Q[J]⁻¹. All rounding of C is multiplied by B, so how far B grows decides about safety. The pivots are
those of the strong rank-revealing QR factorisation of Gu and Eisenstat: as long as an entry of B is larger than
:data:`GROWTH`, its row and the pivot of its column change places. |B| ≤ GROWTH holds for what comes out, whatever went
in.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from ._checks import describe
from ._linalg import LinAlgError

if TYPE_CHECKING:
    from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# Entries of B are at most this. The closer to 1, the less rounding is multiplied, and the more exchanges it takes.
GROWTH = 1.1
# Exchanges are made in float32, in half of the time, and down to a little less: afterwards B is computed in float64, so
# what is rounded does not matter, but no entry above GROWTH must round to one that is left alone.
_EXCHANGED = 0.999 * GROWTH

# Where B has entries larger than this, it has lost too many digits to go on with.
_TRUSTED = 1e3
_SMALL = 2048  # rows up to which MAGMA has nothing to say about its routines for small matrices
_UPDATES = 64  # exchanges after which B is computed anew in any case


class Pivoted(NamedTuple):
    """The pivoted form of a batch of products, in float64; rows ascend among the pivots and among the others.

    Attributes:
        pivots: ``(groups, rank)``, the rows that are kept as they are.
        others: ``(groups, rows - rank)``, the rest of the rows.
        free: ``(groups, rows - rank, rank)``, B: the combinations that give the others.
        kept: ``(groups, rank, columns)``, C: the rows that are kept.
    """

    pivots: Tensor
    others: Tensor
    free: Tensor
    kept: Tensor


def pivoted_rows(up: Tensor, down: Tensor) -> Pivoted:
    """Bring products into the pivoted form: the same matrices to rounding, with ``|free| ≤ GROWTH``.

    Args:
        up: ``(groups, rows, rank)`` in float64, finite, of whatever scale and conditioning, also of lower rank;
            ``1 ≤ rank < rows``.
        down: ``(groups, rank, columns)`` in float64, finite.

    Returns:
        Pivots, B and C of every group. Equal input gives equal output.

    Raises:
        LinAlgError: if a value is NaN or infinite after all.

    Source: Gu and Eisenstat, "Efficient algorithms for computing a strong rank-revealing QR factorization", 1996.
    """
    # Scaled column by column, which leaves their span alone: the squares of very large entries would overflow.
    scale = up.abs().amax(-2, keepdim=True)
    # Householder's basis is orthonormal even where columns are dependent or zero; any completion serves.
    basis = torch.linalg.qr(up / torch.where(scale > 0, scale, torch.ones_like(scale))).Q
    rank = up.shape[-1]
    order, free = _by_elimination(basis)
    if not float(free.abs().max()) <= _TRUSTED:  # or not a number
        order, free = _by_distance(basis)
    # Each exchange multiplies |det basis[pivots]| by the entry it is made for, which is above GROWTH, and no such
    # determinant is above 1, so this ends.
    while True:
        order = _exchanged(free, order)
        order = torch.cat([order[:, :rank].sort().values, order[:, rank:].sort().values], 1)
        rows = _take(basis, order)
        free = torch.linalg.solve(rows[:, :rank], rows[:, rank:], left=False)
        growth = float(free.abs().max())
        if growth <= GROWTH:
            pivots, others = order[:, :rank], order[:, rank:]
            return Pivoted(pivots, others, free, _take(up, pivots) @ down)
        if not math.isfinite(growth):
            raise LinAlgError("no pivots found: the factors hold NaN or infinite values.")


def _take(matrices: Tensor, rows: Tensor) -> Tensor:
    """Pick rows from each matrix of a batch."""
    return matrices.gather(1, rows.unsqueeze(-1).expand(-1, -1, matrices.shape[-1]))


def _by_elimination(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Choose pivots by Gaussian elimination: fast, and nearly always good, but B can double with every step.

    Args:
        basis: ``(groups, rows, rank)``, orthonormal columns.

    Returns:
        ``(groups, rows)``, the pivots first, and B by substitution with the triangle of the pivots.
    """
    rank = basis.shape[-1]
    # A GPU is given to routines for small matrices, which print warnings over larger ones, and takes longer.
    large = basis.device.type == "cuda" and basis.shape[-2] > _SMALL
    eliminated = torch.linalg.lu_factor_ex(basis.cpu() if large else basis)
    order = [list(range(basis.shape[-2])) for _ in basis]
    for rows, swaps in zip(order, eliminated.pivots.tolist(), strict=True):
        for step, other in enumerate(swaps):
            rows[step], rows[other - 1] = rows[other - 1], rows[step]
    factors = eliminated.LU.to(basis.device)
    triangle, others = factors[:, :rank], factors[:, rank:]
    free = torch.linalg.solve_triangular(triangle, others, upper=False, left=False, unitriangular=True)
    return torch.tensor(order, device=basis.device), free


def _by_distance(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Choose as pivot, one after the other, the row farthest from the span of those before: QR with column pivoting.

    Computed as a Cholesky factorisation of the projection Q Qᵀ, L Lᵀ with row exchanges. The squared distances that are
    left after k steps sum to rank - k, so none of the pivots is small.

    Args:
        basis: ``(groups, rows, rank)``, orthonormal columns.

    Returns:
        ``(groups, rows)``, the pivots first, and B by substitution with the triangle L[pivots].
    """
    groups, rows, rank = basis.shape
    every = torch.arange(groups, device=basis.device)
    factor = torch.zeros_like(basis)
    distances = basis.square().sum(-1)
    order = torch.arange(rows, device=basis.device).repeat(groups, 1)
    for step in range(rank):
        place = distances.gather(1, order[:, step:]).argmax(-1) + step
        pivot = order[every, place]
        order[every, place] = order[:, step].clone()
        order[:, step] = pivot
        column = basis @ basis[every, pivot].unsqueeze(-1)
        column -= factor[..., :step] @ factor[every, pivot, :step].unsqueeze(-1)
        factor[..., step] = (column / column[every, pivot].unsqueeze(-1).sqrt()).squeeze(-1)
        distances -= factor[..., step].square()
    factor = _take(factor, order)
    return order, torch.linalg.solve_triangular(factor[:, :rank], factor[:, rank:], upper=False, left=False)


def _exchanged(free: Tensor, order: Tensor) -> Tensor:
    """Exchange rows for pivots while an entry of B is too large, the largest first.

    Args:
        free: ``(groups, rows - rank, rank)``, B.
        order: ``(groups, rows)``, the pivots first.

    Returns:
        The new order.
    """
    rank = free.shape[-1]
    order, free = order.clone(), free.to(torch.float32)  # each exchange changes it by a matrix of rank one
    every = torch.arange(len(free), device=free.device)
    for _ in range(_UPDATES):
        row = torch.maximum(free.amax(-1), -free.amin(-1)).argmax(-1)
        along = free[every, row]
        column = along.abs().argmax(-1)
        entry = along[every, column]
        active = entry.abs() > _EXCHANGED
        if not bool(active.any()):
            break
        pivot, other = order[every, column], order[every, rank + row]
        order[every, column] = torch.where(active, other, pivot)
        order[every, rank + row] = torch.where(active, pivot, other)
        across = free[every, :, column]
        across[every, row] += 1
        along[every, column] -= 1
        factor = torch.where(active, -1 / entry, torch.zeros_like(entry))
        free.baddbmm_(across.unsqueeze(-1), (along * factor.unsqueeze(-1)).unsqueeze(-2))
        if float(entry.abs().max()) > _TRUSTED:
            break
    return order


def listed(pivots: Tensor, others: Tensor) -> Tensor:
    """List the rows of all groups, the pivots of every group first: ``(groups · rows,)``."""
    rows = pivots.shape[1] + others.shape[1]
    first = rows * torch.arange(len(pivots), device=pivots.device).unsqueeze(-1)
    return torch.cat([(pivots + first).flatten(), (others + first).flatten()])


def with_identity(free: Tensor, places: Tensor, groups: int, rank: int) -> Tensor:
    """Put the rows of the identity, which stand for the pivots, among the others: P [I; B] of every group.

    Args:
        free: B, ``(groups, rows - rank, rank)`` or flattened to ``(groups · (rows - rank), rank)``.
        places: ``(groups · rows,)``, for each row its place in the order that :func:`listed` makes.
        groups: number of groups.
        rank: number of pivots in each.

    Returns:
        ``(groups, rows, rank)``.
    """
    # Made of the factor, as a sharded one mixes with no plain tensor; the older ONNX exporter knows no diag_embed.
    identity = free.new_ones(rank, rank).tril().triu().repeat(groups, 1)
    rows = torch.cat([identity, free.reshape(-1, rank)])
    return rows.index_select(0, places).reshape(groups, -1, rank)


def why_no_order(order: object, groups: int, rank: int, rows: int, *, places: bool) -> str:
    """Say why a value cannot be the order of a pivoted layer; empty if it can.

    Args:
        order: what was found.
        groups: number of groups.
        rank: number of pivots in each.
        rows: rows (or columns) of each matrix.
        places: whether it tells the place of each row, instead of listing the rows, pivots first.
    """
    total = groups * rows
    if not isinstance(order, torch.Tensor):
        return f"expected a tensor of {total} integers, got {describe(order)}"
    if order.dtype not in _INTEGERS or tuple(order.shape) != (total,):
        return f"expected {total} integers, got shape {tuple(order.shape)} of {order.dtype}"
    if type(order.data) is not torch.Tensor:  # a fake or distributed one, whose values cannot be read here
        return ""
    if order.is_meta:
        return "it is on the meta device and has no values"
    values = order.detach().to("cpu", torch.int64)
    if not torch.equal(values.sort().values, torch.arange(total, device="cpu")):
        return f"expected each number from 0 to {total - 1} once"
    group = (values.argsort() if places else values) // rows
    every = torch.arange(groups, device="cpu")
    expected = torch.cat([every.repeat_interleave(rank), every.repeat_interleave(rows - rank)])
    return "" if torch.equal(group, expected) else f"expected {rank} pivots from each of {groups} groups of {rows}"
