"""The decomposition of one weight, computed once and kept: any rank, any plan of a sweep and any copy can use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from ._decompose import decompose, is_good_for, singular_values
from ._leading import is_few, truncated_factors, whole_basis
from ._linalg import factors_in, relative_tail_energies, squared_norms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# How far, relative to the largest one of its group, squared singular values may be from those that were found first: a
# weight may be decomposed in float32 one time, and in another way the next.
_SAME = 2e-5
# The same for the squared norm of the weight.
_SAME_NORM = 1e-5


class Decomposition(Protocol):
    """What is kept of the decomposition of one weight."""

    def errors(self) -> Tensor:
        """Return the squared relative error of every rank."""

    def forget_(self) -> None:
        """Leave the memory of bases to others."""

    def factors(self, matrices: Tensor, rank: Any, /) -> tuple[Tensor, ...]:
        """Return the factors at a rank, without decomposing again if these are the matrices known here."""


class Anew:
    """A decomposition of which nothing is kept: every time it is made anew, whole."""

    def factors(self, matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return what :meth:`Spectrum.factors` does where the basis is kept, to the last bit."""
        return factors_in(whole_basis(matrices, rank), matrices)[:2]


class Spectrum:
    """The singular values of a weight in one matricisation and, once it is known, the basis of its small side.

    It holds no weight: k numbers for each group, k the full rank, and k × k for a basis, on the CPU. A basis is at most
    as large as a weight in float32, for small or smooth ones twice as large. Copies share it; pickles leave the basis
    out, as it can be computed again.

    Args:
        matrices: ``(groups, m, n)``, any floating dtype, finite.
        with_basis: whether to compute the basis now, which is cheaper than computing it later; otherwise
            :meth:`factors` does so when it is called.
        keep: whether to keep the basis; where memory is short, it is computed again each time.
    """

    def __init__(self, matrices: Tensor, *, with_basis: bool, keep: bool = True) -> None:
        self._basis: Tensor | None = None
        self._keep = keep
        if with_basis:
            values, basis = decompose(matrices)
            self._values, self._basis = values.cpu(), basis.cpu()
        else:
            self._values = singular_values(matrices).cpu()

    @classmethod
    def of_alike(cls, several: Sequence[Tensor], *, with_basis: bool, keep: bool = True) -> list[Spectrum]:
        """Decompose several weights of one shape in one call, each as it is alone but for rounding."""
        if len(several) == 1:
            return [cls(several[0], with_basis=with_basis, keep=keep)]
        together = cls(torch.cat(list(several)), with_basis=with_basis, keep=keep)
        found = []
        for group in range(0, len(together._values), len(several[0])):
            one = cls.__new__(cls)
            part = slice(group, group + len(several[0]))
            # Clones, or each would keep all of them in memory.
            one._values, one._keep = together._values[part].clone(), keep
            one._basis = None if together._basis is None else together._basis[part].clone()
            found.append(one)
        return found

    @property
    def basis(self) -> Tensor | None:
        """The singular vectors of the small side, ``(groups, k, k)``, where they are known."""
        return self._basis

    def forget_(self) -> None:
        """Let go of the basis: it is computed again when it is needed."""
        self._basis = None

    def errors(self) -> Tensor:
        """Return the squared relative error of every rank, ``(full_rank + 1,)``, one first and zero last."""
        return relative_tail_energies(self._values)

    def factors(self, matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return what ``truncated_factors`` does, without decomposing again if these are the matrices known here.

        Args:
            matrices: ``(groups, m, n)``, those of this spectrum or any others of the same shape.
            rank: 1 … full rank.
        """
        basis = self._basis
        if basis is None:
            if not self._keep and is_few(matrices, rank):
                return truncated_factors(matrices, rank)
            values, basis = decompose(matrices)
            if not self._agrees(values):  # the weight of another model: nothing to keep
                return truncated_factors(matrices, rank)
            self._basis = basis.cpu() if self._keep else None
        if not is_good_for(self._values, basis, rank):
            basis = decompose(matrices, exact=True)[1]
        up, down, sizes = factors_in(basis[..., :rank], matrices)
        return (up, down) if self._holds(sizes, matrices) else truncated_factors(matrices, rank)

    def _agrees(self, values: Tensor) -> bool:
        """Check singular values against those known here, in each group."""
        scale = self._values.amax(-1, keepdim=True)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # or squares would leave the range of float64
        found, kept = ((one / scale).square() for one in (values.cpu(), self._values[..., : values.shape[-1]]))
        return bool(((found - kept).abs() <= _SAME).all())

    def _holds(self, sizes: Tensor, matrices: Tensor) -> bool:
        """Check that the basis belongs to the matrices: what it holds of them, and what it leaves, is as it was."""
        scale = self._values.amax(-1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        whole = squared_norms(matrices.detach(), scale)
        expected = (self._values / scale.unsqueeze(-1)).square().sum(-1)
        return self._agrees(sizes) and bool(((whole - expected).abs() <= _SAME_NORM * expected).all())

    def __deepcopy__(self, memo: dict[int, Any]) -> Spectrum:
        return self  # nothing of it ever changes, but that a basis comes to be known

    def __getstate__(self) -> dict[str, Any]:
        return {"_values": self._values, "_basis": None, "_keep": self._keep}
