"""The decomposition of one weight, computed once and kept: any rank, any plan of a sweep and any copy can use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from ._checksum import Outline
from ._decompose import decompose, is_good_for, singular_values
from ._leading import is_few, truncated_factors, whole_basis
from ._linalg import factors_in, relative_tail_energies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


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
        return factors_in(whole_basis(matrices, rank), matrices)


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
        self._keep, self._outline = keep, _outline(matrices)
        self._values, self._basis = _decomposed(matrices, with_basis=with_basis)

    @classmethod
    def of_alike(cls, several: Sequence[Tensor], *, with_basis: bool, keep: bool = True) -> list[Spectrum]:
        """Decompose several weights of one shape in one call, each as it is alone but for rounding."""
        if len(several) == 1:
            return [cls(several[0], with_basis=with_basis, keep=keep)]
        values, basis = _decomposed(torch.cat(list(several)), with_basis=with_basis)
        found = []
        for number, matrices in enumerate(several):
            one = cls.__new__(cls)
            part = slice(number * len(matrices), (number + 1) * len(matrices))
            # Clones, or each would keep all of them in memory.
            one._values, one._basis = values[part].clone(), None if basis is None else basis[part].clone()
            one._keep, one._outline = keep, _outline(matrices)
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
        if _outline(matrices) != self._outline:  # the weight of another model, or of another day
            return truncated_factors(matrices, rank)
        basis = self._basis
        if basis is None:
            if not self._keep and is_few(matrices, rank):
                return truncated_factors(matrices, rank)
            basis = decompose(matrices)[1]
            self._basis = basis.cpu() if self._keep else None
        if not is_good_for(self._values, basis, rank):
            basis = decompose(matrices, exact=True)[1]
        return factors_in(basis[..., :rank], matrices)

    def __deepcopy__(self, memo: dict[int, Any]) -> Spectrum:
        return self  # nothing of it ever changes, but that a basis comes to be known

    def __getstate__(self) -> dict[str, Any]:
        return {"_values": self._values, "_basis": None, "_keep": self._keep, "_outline": self._outline}


def _decomposed(matrices: Tensor, *, with_basis: bool) -> tuple[Tensor, Tensor | None]:
    if not with_basis:
        return singular_values(matrices).cpu(), None
    values, basis = decompose(matrices)
    return values.cpu(), basis.cpu()


def _outline(matrices: Tensor) -> tuple[bool, Outline]:
    """Outline matrices or, where those lie in memory in order, their transposes: otherwise a copy would be made."""
    transposed = matrices.mT.is_contiguous()
    return transposed, Outline.of(matrices.mT if transposed else matrices)
