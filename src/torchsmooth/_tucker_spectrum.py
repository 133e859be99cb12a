"""The higher-order SVD of one weight, computed once and kept, as :class:`Spectrum` keeps that of a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._checksum import Outline
from ._linalg import orthonormal
from ._tucker import tucker_bases, tucker_energies, tucker_errors, tucker_factors

if TYPE_CHECKING:
    from torch import Tensor


class TuckerSpectrum:
    """Bases of the inputs and of the outputs of a weight, and how its energy spreads over their pairs.

    It holds in² + out² + in · out numbers in float64 on the CPU for each group, no weight. Copies share it; pickles
    leave the bases out, as they can be computed again.

    Args:
        tensors: ``(groups, out, in, k)``, any floating dtype, finite.
        outer: the basis of the outputs, where it is known: ``(groups, out, full_out)`` in float64.
        inner: that of the inputs, ``(groups, in, full_in)``.
    """

    def __init__(self, tensors: Tensor, outer: Tensor | None = None, inner: Tensor | None = None) -> None:
        if outer is None or inner is None:
            outer, inner = tucker_bases(tensors)
        outer, inner = orthonormal(outer), orthonormal(inner)
        self._bases: tuple[Tensor, Tensor] | None = (outer.cpu(), inner.cpu())
        self._energies = tucker_energies(tensors, (outer, inner))
        self._outline = Outline.of(tensors)

    def forget_(self) -> None:
        """Let go of the bases: they are computed again when they are needed."""
        self._bases = None

    def errors(self) -> Tensor:
        """Return the squared relative error of every pair of ranks, ``(full_in + 1, full_out + 1)``."""
        return tucker_errors(self._energies)

    def factors(self, tensors: Tensor, ranks: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what ``tucker_factors`` does, without decomposing again if these are the tensors known here.

        The bases are refined for the pair of ranks in any case.

        Args:
            tensors: ``(groups, out, in, k)``, those of this spectrum or any others of the same shape.
            ranks: ``(r_in, r_out)``, each 1 … full rank.
        """
        known = self._bases is not None and Outline.of(tensors) == self._outline
        return tucker_factors(tensors, ranks, self._bases if known else None)

    def __deepcopy__(self, memo: dict[int, Any]) -> TuckerSpectrum:
        return self  # nothing of it ever changes

    def __getstate__(self) -> dict[str, Any]:
        return {"_energies": self._energies, "_bases": None, "_outline": self._outline}
