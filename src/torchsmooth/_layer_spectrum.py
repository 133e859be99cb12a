"""What one weight looks like: its singular values, and how rough it is along the channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from . import functional
from ._checks import check_open_unit
from ._decompose import singular_values
from ._linalg import relative_tail_energies, working_copy
from ._matricise import Scheme, channel_view, matricise

RATIO_MEANS = "the fraction of its parameters that each layer is to lose: 0.8 = 80 % fewer"


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """The singular values of one weight, and what follows from them.

    The groups of a convolution are matrices of their own that share one rank. Wherever one number stands for all of
    them, the j-th singular values of all groups count together, as √(Σ_g σ_gj²).

    Attributes:
        name: qualified name of the layer in the model; empty if the model is the layer.
        type: its class name.
        shape: shape of the weight.
        scheme: which matricisation the singular values belong to.
        matrix_shape: rows and columns of the matrix of each group.
        singular_values: ``(groups, full_rank)`` in float64 on the CPU, in each group the largest first.
        first_difference: ‖D W‖² / ‖W‖², the penalty ``functional.first_derivative`` (differences of neighbouring
            output channels, and of neighbouring input channels) over the squared norm of the weight. It does not
            depend on the scale: 0 for a weight that is constant along the channels, about 4 for many independent
            entries, 8 at most. 0 for a zero weight.
        second_difference: ‖D² W‖² / ‖W‖², the same with ``functional.second_derivative``: 0 for a weight that is
            affine along the channels, about 12 for many independent entries, 32 at most.
        tied: other names under which the model uses the same weight.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    scheme: Scheme
    matrix_shape: tuple[int, int]
    singular_values: Tensor
    first_difference: float
    second_difference: float
    tied: tuple[str, ...] = ()

    @property
    def full_rank(self) -> int:
        """The rank from which on nothing is lost, in each group."""
        return min(self.matrix_shape)

    @property
    def relative_values(self) -> Tensor:
        """The singular values over the largest, ``(full_rank,)``, groups together; zero for a zero weight."""
        values = self.singular_values
        largest = values.amax() if values.numel() else values.sum()
        if largest == 0:
            return values.new_zeros(self.full_rank)
        # Divided first: the squares of very large or very small values would leave the range of float64.
        together: Tensor = torch.linalg.vector_norm(values / largest, dim=0)
        return together / together[0]

    @property
    def effective_rank(self) -> float:
        """How many directions the weight uses, 1 … ``full_rank``: exp of the entropy of the singular values.

        The singular values are divided by their sum first; 0 for a zero weight.

        Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
        """
        values = self.relative_values
        total = values.sum()
        return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0

    @property
    def relative_rank(self) -> float:
        """The effective rank as a fraction of the full one."""
        return self.effective_rank / self.full_rank if self.full_rank else 0.0

    @property
    def stable_rank(self) -> float:
        """‖W‖_F² / σ₁², 1 … ``full_rank``: low where few directions carry the norm; 0 for a zero weight."""
        return float(self.relative_values.square().sum())

    def rank_at(self, ratio: float) -> int:
        """Return the largest rank r with r·(m + n) ≤ (1 − ratio)·m·n for the m × n matrix of each group.

        Args:
            ratio: the fraction of the parameters of this weight to remove, 0 < ratio < 1, by factoring it.

        Returns:
            0 … ``full_rank`` − 1; the factored form has this rank when it is that much smaller.

        Raises:
            TypeError: if ``ratio`` is not a real number.
            ValueError: if it is not between 0 and 1.
        """
        ratio = check_open_unit(ratio, "ratio", RATIO_MEANS)
        rows, columns = self.matrix_shape
        # The decimal that was written, not the float: 20 % of 10 × 10 pays for a whole rank.
        return math.floor((1 - Fraction(str(ratio))) * rows * columns / (rows + columns)) if self.full_rank else 0

    def energy(self, ratio: float) -> float:
        """Return the share of ‖W‖_F² that is kept when the weight is factored to a ``ratio`` fewer parameters.

        That is 1 minus the square of the relative error of :meth:`rank_at`. A zero weight loses nothing: 1.

        Args:
            ratio: the fraction of the parameters of this weight to remove, 0 < ratio < 1.

        Returns:
            0 … 1.

        Raises:
            TypeError: if ``ratio`` is not a real number.
            ValueError: if it is not between 0 and 1.
        """
        return 1.0 - float(self._tail()[self.rank_at(ratio)])

    def rank_for(self, energy: float) -> int:
        """Return the smallest rank that keeps a share of ‖W‖_F².

        Args:
            energy: the share to keep, 0 < energy < 1.

        Returns:
            0 … ``full_rank``; 0 only for a zero weight.

        Raises:
            TypeError: if ``energy`` is not a real number.
            ValueError: if it is not between 0 and 1.
        """
        energy = check_open_unit(energy, "energy", "the share of the squared singular values to keep")
        return int((self._tail() > 1.0 - energy).sum())

    def _tail(self) -> Tensor:
        if not self.singular_values.numel():
            return self.singular_values.new_zeros(self.full_rank + 1)
        return relative_tail_energies(self.singular_values)

    def to_dict(self, ratio: float) -> dict[str, Any]:
        """Return all of it as plain lists and numbers, ready for JSON; the energy is that at a ratio.

        Args:
            ratio: fraction of the layer's parameters, strictly between 0 and 1.
        """
        return {
            "name": self.name,
            "type": self.type,
            "shape": list(self.shape),
            "scheme": self.scheme,
            "matrix_shape": list(self.matrix_shape),
            "full_rank": self.full_rank,
            "effective_rank": self.effective_rank,
            "relative_rank": self.relative_rank,
            "stable_rank": self.stable_rank,
            "energy": self.energy(ratio),
            "first_difference": self.first_difference,
            "second_difference": self.second_difference,
            "singular_values": self.singular_values.tolist(),
            "tied": list(self.tied),
        }


def measured(weight: Tensor, scheme: Scheme, groups: int, *, transposed: bool) -> dict[str, Any]:
    """Measure a finite weight, on its own device; the result is what a ``LayerSpectrum`` needs to know of it.

    Args:
        weight: ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` if ``transposed``.
        scheme: one that fits its kernel.
        groups: number of groups.
        transposed: whether the weight is that of a transposed convolution.
    """
    view = channel_view(weight.detach(), groups, transposed=transposed)
    layout = matricise((view.shape[0] * view.shape[1], *view.shape[2:]), scheme, groups)
    matrices = layout.to_matrices(view)
    empty = not matrices.numel()
    first, second = (0.0, 0.0) if empty else _roughness(weight, groups, transposed=transposed)
    values = torch.zeros(groups, layout.full_rank, dtype=torch.float64, device="cpu")
    return {
        "shape": tuple(weight.shape),
        "scheme": scheme,
        "matrix_shape": (layout.rows, layout.columns),
        "singular_values": values if empty else singular_values(matrices, exact=True).cpu(),
        "first_difference": first,
        "second_difference": second,
    }


def _roughness(weight: Tensor, groups: int, *, transposed: bool) -> tuple[float, float]:
    """Squared first and second differences along the channels, over the squared norm."""
    work = working_copy(weight)
    # Scaled first, or squares would leave the range of float64; by powers of two, which round nothing. In two steps,
    # as the whole power may be out of range itself.
    exponent = torch.frexp(work.abs().max()).exponent
    for half in (exponent // 2, exponent - exponent // 2):
        work = work * torch.exp2(-half.to(torch.float64))
    norm = float(work.square().sum())
    if norm == 0:
        return 0.0, 0.0
    differences = (functional.first_derivative, functional.second_derivative)
    first, second = (float(one(work, groups=groups, transposed=transposed)) / norm for one in differences)
    return first, second
