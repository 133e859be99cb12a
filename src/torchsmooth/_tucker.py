r"""Tucker-2 of a convolution: a basis of the input channels, one of the output channels, and a core between them.

With the weight of one group seen as ``(out, in, k)``, k the positions of the kernel, an approximation of ranks
``(r_in, r_out)`` is :math:`\hat W_{oik} = \sum_{ab} U_{oa} G_{abk} V_{bi}`: three convolutions, 1×1, the kernel, 1×1.

The bases of the higher-order singular value decomposition (the left singular vectors of the unfoldings) give the errors
of all pairs of ranks at once: what is missing is what lies outside of a block of the core. For one pair they are then
refined in turn, each the best for the other, so the error only gets smaller.

Everything here is in float64, batched over groups, and deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._decompose import decompose
from ._linalg import eigen, inner_products, orthonormal, working_copy

# Sweeps over the two bases; more have not been seen to gain anything that matters. The first one takes some per cent
# from what is missing, each further one about a tenth of what the last one took: below this share, the rest is left.
_SWEEPS, _WORTH_A_SWEEP = 3, 1e-3

# What a sweep has to gain, of all that is caught: bases that are best already would be changed for others by rounding.
_ROUNDING = 1e-12


def _scaled(tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Divide by a power of two, so that squares stay in the range of float64; also return that power."""
    work = working_copy(tensors)
    power = torch.frexp(work.abs().max()).exponent.to(torch.float64).exp2()
    return work / power, power


def _unfolded(tensors: Tensor, axis: int) -> Tensor:
    """Matrices ``(groups, size, rest)`` with the rows along one axis of ``(groups, out, in, k)``."""
    return tensors.movedim(axis, 1).flatten(2)


def _basis(matrices: Tensor, rank: int, *, exact: bool) -> Tensor:
    """The leading left singular vectors, ``(groups, m, rank)``; ``exact`` where squaring would lose digits."""
    rows, columns = matrices.shape[-2:]
    if exact or rank <= columns < rows:  # of a tall matrix, the Gram matrix would be the larger one
        wanted = torch.linalg.svd(matrices, full_matrices=rank > columns).U
    else:
        wanted = eigen(inner_products(matrices))[1].flip(-1)
    return signed(wanted[..., :rank])


def signed(basis: Tensor) -> Tensor:
    """Make the entry of largest magnitude of each column positive."""
    strongest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    return basis * torch.where(strongest < 0, -1.0, 1.0).to(basis)


def tucker_bases(tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The bases of the higher-order SVD, strongest first.

    They are those of the small side in the schemes ``channel`` and ``input``, unless that is the other side.

    Args:
        tensors: ``(groups, out, in, k)``, any floating dtype, finite.

    Returns:
        Of the outputs ``(groups, out, full_out)`` and of the inputs ``(groups, in, full_in)``, in float64, with
        ``full_in = min(in, out · k)`` and ``full_out = min(out, in · k)``.

    Source: De Lathauwer, De Moor and Vandewalle, "A multilinear singular value decomposition", 2000.
    """
    outer, inner = (_small_side(_unfolded(tensors, axis)) for axis in (1, 2))
    return outer, inner


def _small_side(matrices: Tensor) -> Tensor:
    rows, columns = matrices.shape[-2:]
    if rows > columns:
        return _basis(working_copy(matrices), columns, exact=True)
    return orthonormal(decompose(matrices)[1])


def tucker_core(tensors: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Coordinates ``(groups, r_out, r_in, k)`` in two orthonormal bases."""
    return torch.einsum("goik,goa,gib->gabk", tensors, outer, inner)


def tucker_energies(tensors: Tensor, bases: tuple[Tensor, Tensor]) -> Tensor:
    """Squares of the core, ``(r_in, r_out)`` in float64 on the CPU, as shares of those of the tensors.

    Args:
        tensors: ``(groups, out, in, k)``, any floating dtype, finite; the groups share one pair of ranks.
        bases: as of :func:`tucker_bases`, or the first columns of them.
    """
    work, _ = _scaled(tensors)
    core = tucker_core(work, *(basis.to(work) for basis in bases))
    energies = core.square().sum((0, 3)).mT.cpu()
    whole = float(work.square().sum())
    return energies / whole if whole > 0 else energies


def tucker_errors(energies: Tensor) -> Tensor:
    """Squared relative error of every pair of ranks, with the bases of the higher-order SVD.

    Args:
        energies: as of :func:`tucker_energies`.

    Returns:
        ``(full_in + 1, full_out + 1)`` in float64 on the CPU: one where either rank is zero, never increasing along
        either, zero at full ranks. All zero for a zero weight.
    """
    full_in, full_out = energies.shape
    if float(energies.sum()) == 0:
        return energies.new_zeros(full_in + 1, full_out + 1)
    # Only sums of what is missing, from the small end: a difference of two large energies would lose small tails.
    behind = torch.zeros(full_in, full_out + 1, dtype=torch.float64, device="cpu")
    behind[:, :-1] = energies.flip(1).cumsum(1).flip(1)  # of one row, from a column on
    missing = torch.zeros(full_in + 1, full_out + 1, dtype=torch.float64, device="cpu")
    missing[:-1] += behind[:, :1].flip(0).cumsum(0).flip(0)  # the rows left out
    missing[1:] += behind.cumsum(0)  # what the others leave out
    return monotone(missing / missing[0, 0])


def monotone(errors: Tensor) -> Tensor:
    """Make errors of pairs of ranks one at rank zero, zero at full ranks and never increasing, as rounding may not."""
    errors = errors.clamp(0, 1)
    errors[0], errors[:, 0] = 1, 1
    errors[-1, -1] = 0
    return errors.cummin(0).values.cummin(1).values


def tucker_factors(
    tensors: Tensor,
    ranks: tuple[int, int],
    bases: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate tensors at a pair of ranks: never worse than the truncated higher-order SVD, a little better.

    Args:
        tensors: ``(groups, out, in, k)``, any floating dtype, finite.
        ranks: ``(r_in, r_out)``, each 1 … the full rank of its side.
        bases: what :func:`tucker_bases` returned for these tensors; None where it is not known.

    Returns:
        ``up`` ``(groups, out, r_out)`` and ``down`` ``(groups, r_in, in)``, with orthonormal columns and rows, and the
        ``core`` ``(groups, r_out, r_in, k)``, in the order up, core, down; all in float64. Equal input gives equal
        factors, of fixed signs.

    Source: De Lathauwer, De Moor and Vandewalle, "On the best rank-1 and rank-(R1, R2, …, RN) approximation of
    higher-order tensors", 2000.
    """
    r_in, r_out = ranks
    exact = tensors.dtype == torch.float64
    work, power = _scaled(tensors)
    outer, inner = _leading(tucker_bases(tensors) if bases is None else bases, ranks, work)
    core = tucker_core(work, outer, inner)
    if r_in < work.shape[2] or r_out < work.shape[1]:
        whole, caught = work.square().sum((1, 2, 3)), core.square().sum((1, 2, 3))
        for _ in range(_SWEEPS):
            newer = _basis(torch.einsum("goik,gib->gobk", work, inner).flatten(2), r_out, exact=exact)
            projected = torch.einsum("goik,goa->giak", work, newer)
            newest = _basis(projected.flatten(2), r_in, exact=exact)
            candidate = torch.einsum("giak,gib->gabk", projected, newest)
            now = candidate.square().sum((1, 2, 3))
            better = now - caught > _ROUNDING * caught
            if not bool(better.any()):
                break
            pick = better[:, None, None]
            outer, inner = torch.where(pick, newer, outer), torch.where(pick, newest, inner)
            core = torch.where(pick[..., None], candidate, core)
            gained, caught = now - caught, torch.maximum(now, caught)
            if bool((gained <= _WORTH_A_SWEEP * (whole - caught)).all()):
                break
    return outer, core * power, inner.mT


def _leading(bases: tuple[Tensor, Tensor], ranks: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    (outer, inner), (r_in, r_out) = bases, ranks
    return signed(outer[..., :r_out].to(like)), signed(inner[..., :r_in].to(like))


def tucker_product(up: Tensor, core: Tensor, down: Tensor) -> Tensor:
    """Multiply factors out: ``(groups, out, in, k)``."""
    inner = torch.einsum("gabk,gbi->gaik", core, down)
    return (up @ inner.flatten(2)).reshape(*up.shape[:2], *inner.shape[2:])


def tucker_balanced(up: Tensor, core: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Share the size of each term between the factors, a third each, to powers of two: nothing is rounded."""
    columns, rows = _power(torch.linalg.vector_norm(up, dim=-2)), _power(torch.linalg.vector_norm(down, dim=-1))
    up, core, down = (
        up / columns.unsqueeze(-2),
        core * columns[:, :, None, None] * rows[:, None, :, None],
        down / rows.unsqueeze(-1),
    )
    outer = _power(core.square().sum((2, 3)), 1 / 6)
    inner = _power(core.square().sum((1, 3)), 1 / 6)
    shared = core / outer[:, :, None, None] / inner[:, None, :, None]
    return up * outer.unsqueeze(-2), shared, down * inner.unsqueeze(-1)


def _power(sizes: Tensor, exponent: float = 1.0) -> Tensor:
    """The power of two next to ``sizes ** exponent``; one where that is zero or infinite."""
    power = (sizes.log2() * exponent).round()
    return torch.where(power.isfinite(), power, torch.zeros_like(power)).exp2()
