r"""Low-rank factors that keep what a layer puts out, instead of what its weight is.

With the second moment :math:`C = E[x x^T]` of the patches :math:`x` that a weight :math:`W` ``(m, n)`` is multiplied
with, the error at the output is :math:`E\lVert (W - \hat W) x\rVert^2 = \lVert (W - \hat W) C^{1/2}\rVert_F^2`. In the
``channel`` scheme the truncated SVD of :math:`W C^{1/2}` is the best :math:`\hat W`. In the other schemes the kernel
axes that go with ``up`` mix with C, so the first factor comes from the SVD with the mean of C over those axes, and the
second from the least squares problem with C itself, which is solved exactly.

Everything here is in float64 and batched over groups.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ._linalg import eigen, eigenvalues, inner_products
from ._matricise import matricise
from ._tucker import monotone, signed

if TYPE_CHECKING:
    from torch import Tensor

    from ._matricise import Matricisation
    from ._tucker_layout import TuckerLayout

# What keeps a singular moment solvable: added to its diagonal, as a share of the diagonal's mean.
_TINY = 1e-9
# The same for inner products of features of unit length, which rounding alone can make dependent.
_LEAST = 1e-12


def damped(inner: Tensor, share: float) -> Tensor:
    """Add a share of its mean diagonal to a moment ``(groups, n, n)``."""
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    return inner + torch.diag_embed((share * diagonal.mean(-1, keepdim=True)).expand(diagonal.shape))


def target_weight(weight: Tensor, inner: Tensor, cross: Tensor, ridge: float) -> Tensor:
    r"""Return the weight that best maps the rows of x to those of y: :math:`\min E\lVert y - W^* x\rVert^2`.

    What the rows leave open is decided for the layer's own weight: where x never went, W* is W.

    Args:
        weight: ``(groups, m, n)``.
        inner: E[x xᵀ] ``(groups, n, n)``.
        cross: E[y xᵀ] ``(groups, m, n)``.
        ridge: weight of ‖W* − W‖², as a share of the mean diagonal of ``inner``; positive.
    """
    level = ridge * inner.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    open_groups = (level == 0).flatten()
    level = torch.where(level == 0, torch.ones_like(level), level)
    best = torch.linalg.solve(damped(inner, ridge) + _identity_where(open_groups, inner), (cross + level * weight).mT)
    return torch.where(open_groups[:, None, None], weight, best.mT)


def _identity_where(chosen: Tensor, like: Tensor) -> Tensor:
    return torch.diag_embed(chosen[:, None].to(like).expand(like.shape[:2]))


def square_roots(inner: Tensor) -> tuple[Tensor, Tensor]:
    """Return S = C^{1/2} and its pseudo-inverse, by the symmetric eigenproblem: C may be singular."""
    values, vectors = eigen(inner)
    kept = values > _TINY * values[..., -1:].clamp_min(0)
    roots = torch.where(kept, values.clamp_min(0).sqrt(), torch.zeros_like(values))
    inverse = torch.where(kept, roots, torch.ones_like(roots)).reciprocal() * kept
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT, (vectors * inverse.unsqueeze(-2)) @ vectors.mT


def column_moment(inner: Tensor, layout: Matricisation) -> Tensor:
    """Average a moment of patches over the kernel axes that go with ``up``: ``(groups, columns, columns)``."""
    shared = [axis for axis in layout.up_axes if layout.kernel[axis] > 1]
    if not shared:
        return inner
    count, axes = len(layout.kernel), range(len(layout.kernel))
    split = inner.reshape(layout.groups, layout.in_channels, *layout.kernel, layout.in_channels, *layout.kernel)
    # Letters: g group, i and j channels, then one for each kernel axis on either side, the same where it is shared.
    left, right = "abcd"[:count], "mnop"[:count]
    right = "".join(left[axis] if axis in shared else right[axis] for axis in axes)
    kept_left = "".join(left[axis] for axis in axes if axis not in shared)
    kept_right = "".join(right[axis] for axis in axes if axis not in shared)
    mean = torch.einsum(f"gi{left}j{right}->gi{kept_left}j{kept_right}", split)
    sizes = math.prod(layout.kernel[axis] for axis in shared)
    return mean.reshape(layout.groups, layout.columns, layout.columns) / sizes


def first_factor(weight: Tensor, inner: Tensor, layout: Matricisation, rank: int) -> Tensor:
    """Return the rows of ``down``, ``(groups, rank, columns)``, strongest first.

    Args:
        weight: ``(groups, m, n)`` as patches see it.
        inner: the moment of the patches, ``(groups, n, n)``.
        layout: the scheme.
        rank: how many.
    """
    matrices = layout.to_matrices(weight.reshape(-1, layout.in_channels, *layout.kernel))
    moment = column_moment(inner, layout)
    if layout.rows <= layout.columns:  # left singular vectors of M S, which need no root: (M S) (M S)ᵀ = M C Mᵀ
        whitened = matrices @ moment @ matrices.mT
        vectors = eigen((whitened + whitened.mT) / 2)[1].flip(-1)[..., :rank]
        down = vectors.mT @ matrices
    else:
        root, inverse = square_roots(moment)
        whitened = matrices @ root
        vectors = eigen(whitened.mT @ whitened)[1].flip(-1)[..., :rank]
        down = vectors.mT @ inverse
    # The sign of an eigenvector is anybody's guess; so that equal input gives equal factors, it is fixed.
    return signed(down.mT).mT


def features(down: Tensor, layout: Matricisation) -> Tensor:
    """Return what ``up`` sees of a patch, as a matrix ``(groups, rank · positions of its kernel, n)`` on the patch."""
    kernel, rank = layout.kernel, down.shape[1]
    sizes = [kernel[axis] for axis in layout.down_axes]
    split = down.reshape(layout.groups, rank, layout.in_channels, *sizes)
    inner_axes, placed = list(range(3, 3 + len(sizes))), split
    for axis in layout.up_axes:
        eye = torch.eye(kernel[axis], dtype=down.dtype, device=down.device)
        placed = placed.unsqueeze(-1).unsqueeze(-1) * eye
    # Axes now: group, rank, channel, kernel axes of down, then (position in up's kernel, axis of the patch) pairs.
    ups = [3 + len(sizes) + 2 * index for index in range(len(layout.up_axes))]
    where = dict(zip(layout.down_axes, inner_axes, strict=True)) | {
        axis: position + 1 for axis, position in zip(layout.up_axes, ups, strict=True)
    }
    order = (0, 1, *ups, 2, *(where[axis] for axis in range(len(kernel))))
    return placed.permute(order).reshape(layout.groups, -1, layout.in_channels * math.prod(kernel))


def second_factor(weight: Tensor, inner: Tensor, down: Tensor, layout: Matricisation) -> tuple[Tensor, Tensor]:
    """Solve for the best ``up`` with a given ``down``, in the sense of the moment of the patches.

    Args:
        weight: ``(groups, m, n)``, what is to be approximated.
        inner: ``(groups, n, n)``.
        down: ``(groups, rank, columns)``.
        layout: the scheme.

    Returns:
        ``up`` as a factor ``(groups, rows, rank)``, and the approximation ``(groups, m, n)``.
    """
    root = _triangle(inner)
    directions, lengths = _directions(down, root, layout)
    gram = inner_products(directions)
    gram.diagonal(dim1=-2, dim2=-1).add_(_LEAST)
    solution = torch.linalg.solve(gram, directions @ (weight @ root).mT).mT / lengths.unsqueeze(-2)
    up = solution.reshape(layout.groups, layout.out_channels, down.shape[1], -1).transpose(-1, -2)
    return up.reshape(layout.groups, layout.rows, -1), solution @ features(down, layout)


def _triangle(inner: Tensor) -> Tensor:
    """Return L with L Lᵀ = C, however singular C is; zero for groups into which nothing comes."""
    empty = inner.diagonal(dim1=-2, dim2=-1).sum(-1) == 0
    triangle: Tensor = torch.linalg.cholesky(damped(inner, _TINY) + _identity_where(empty, inner))
    return triangle * ~empty[:, None, None]


def _directions(down: Tensor, root: Tensor, layout: Matricisation) -> tuple[Tensor, Tensor]:
    """Return features by a root of the moment, of length one each, and their lengths before.

    Late features are small beside the first ones, and would be lost in their rounding. The inner products of these rows
    are a Gram matrix, positive up to rounding, whatever the moment was like.
    """
    rows = _features_by(down, root, layout)
    lengths = torch.linalg.vector_norm(rows, dim=-1)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    return rows / lengths.unsqueeze(-1), lengths


def _features_by(down: Tensor, root: Tensor, layout: Matricisation) -> Tensor:
    """Return ``features(down, layout) @ root`` without the zeros that most of the features are."""
    if not layout.up_axes:
        return down @ root
    ups = [2 + axis for axis in layout.up_axes]
    downs = [2 + axis for axis in layout.down_axes]
    split = root.reshape(layout.groups, layout.in_channels, *layout.kernel, -1)
    # Axes now: group, position in up's kernel, what down sums over, column of the root.
    placed = split.permute(0, *ups, 1, *downs, split.dim() - 1).reshape(
        layout.groups, -1, layout.columns, root.shape[-1]
    )
    return (down.unsqueeze(1) @ placed).transpose(1, 2).flatten(1, 2)


class Output:
    """What a weight puts out of what it sees: by this the ranks of every scheme are measured.

    A share of 1e-9 of the moment's mean diagonal is spread over all inputs, so that one that never came in counts, too.

    Args:
        weight: ``(groups, m, n)`` as patches see it.
        inner: the moment of the patches, ``(groups, n, n)``.
    """

    def __init__(self, weight: Tensor, inner: Tensor) -> None:
        self.weight, self.inner = weight, inner
        self._root = _triangle(inner)
        self._wanted = weight @ self._root
        self.energy = float(self._wanted.square().sum())
        self._explained_by_channels: Tensor | None = None

    def explained(self, layout: Matricisation) -> Tensor:
        """Return coordinates of what each row of ``down`` adds: their squares add up to the energy that is kept.

        The features of the first r rows of ``down`` come first, so that one Cholesky factor holds the solutions for all
        r.

        Args:
            layout: the scheme.

        Returns:
            ``(groups, full_rank, positions, m)``.
        """
        if layout.down_axes:
            return self._explained(layout)
        if self._explained_by_channels is None:  # kept, as both "input" and Tucker ask for it
            self._explained_by_channels = self._explained(layout)
        return self._explained_by_channels

    def _explained(self, layout: Matricisation) -> Tensor:
        down = first_factor(self.weight, self.inner, layout, layout.full_rank)
        directions, _ = _directions(down, self._root, layout)
        gram = inner_products(directions)
        gram.diagonal(dim1=-2, dim2=-1).add_(_LEAST)
        triangle = torch.linalg.cholesky(gram)
        solved: Tensor = torch.linalg.solve_triangular(triangle, directions @ self._wanted.mT, upper=False)
        return solved.reshape(len(solved), layout.full_rank, -1, solved.shape[-1])


def output_errors(output: Output, layout: Matricisation) -> Tensor:
    """Return the squared relative error at the output of every rank, the second factor refitted for each.

    Args:
        output: what the layer puts out.
        layout: the scheme.

    Returns:
        ``(full_rank + 1,)`` in float64 on the CPU: one, never increasing, zero; all zero if nothing comes out at all.
    """
    if output.energy == 0:
        return torch.zeros(layout.full_rank + 1, dtype=torch.float64, device="cpu")
    gained = output.explained(layout).square().sum((0, 2, 3)).cumsum(0).cpu() / output.energy
    errors = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), (1 - gained).clamp_min(0)])
    errors[-1] = 0  # at full rank nothing is lost, whatever rounding says
    return errors.cummin(0).values


def tucker_output_errors(output: Output, layout: TuckerLayout) -> Tensor:
    """Return the squared relative error at the output of every pair of ranks, core and ``up`` refitted for each.

    With r_in rows of ``down``, the best that follows puts out what has the second moment G; at r_out the tail of the
    eigenvalues of G is missing beside what the refit misses. That is computed at up to 64 values of r_in, and
    interpolated in between.

    Args:
        output: what the layer puts out.
        layout: the shapes.

    Returns:
        ``(full_in + 1, full_out + 1)`` in float64 on the CPU: one where a rank is zero, never increasing, zero at full
        ranks; all zero if nothing comes out at all.
    """
    full_in, full_out = layout.full_rank
    errors = torch.ones(full_in + 1, full_out + 1, dtype=torch.float64, device="cpu")
    whole = output.energy
    if whole == 0:
        return torch.zeros_like(errors)
    plain = matricise((layout.groups * layout.out_channels, layout.in_channels, *layout.kernel), "input", layout.groups)
    explained = output.explained(plain)
    outputs = output.weight.shape[1]
    moment = explained.new_zeros(layout.groups, outputs, outputs)
    done = 0
    for rank in sorted({*layout.inner_ranks(), full_in}):
        block = explained[:, done:rank].flatten(1, 2)
        moment = moment + block.mT @ block
        values = eigenvalues(moment).clamp_min(0).flip(-1).sum(0)[:full_out].cpu() / whole
        errors[rank, 1:] = 1 - values.cumsum(0)
        steps = torch.arange(1, rank - done, dtype=torch.float64, device="cpu").unsqueeze(1) / (rank - done)
        errors[done + 1 : rank] = torch.lerp(errors[done], errors[rank], steps)
        done = rank
    return monotone(errors)
