"""What is planned for one layer: its choices, which of them was taken, and how to change that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ._budget import Frontier
from ._checks import check_choice, check_count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ._matricise import Matricisation, Scheme

__all__ = ["LayerPlan", "Option"]


@dataclass(frozen=True)
class Option:
    """One scheme for one layer: its shape, and the squared relative error of every rank."""

    matricisation: Matricisation
    errors: Tensor  # (full_rank + 1,) float64 on the CPU


class LayerPlan:
    """What is planned for one layer; ``rank`` and ``scheme`` can be set.

    Attributes:
        name: qualified name in the model.
        type: class name.
        shape: shape of the weight.
        parameters_before: entries of the weight.
        options: the schemes it can be stored in, with the error of each rank; empty if it cannot be compressed.
        reason: why it stays dense; empty otherwise.
    """

    def __init__(
        self, name: str, type_name: str, shape: tuple[int, ...], options: Mapping[Scheme, Option], reason: str = ""
    ) -> None:
        self.name, self.type, self.shape, self.reason = name, type_name, shape, reason
        self.parameters_before = math.prod(shape)
        self.options = options
        self._scheme: Scheme | None = None
        self._rank: int | None = None

    @property
    def rank(self) -> int | None:
        """Rank to keep in each group, 1 … ``full_rank``; None for a layer that stays dense.

        Setting it on a dense layer also chooses the scheme: the one with the least error at that rank.

        Raises:
            TypeError: if it is set to something else than an integer.
            ValueError: if it is set out of range, or on a layer that cannot be compressed.
        """
        return self._rank

    @rank.setter
    def rank(self, rank: int) -> None:
        options = self._require_options()
        allowed = options if self._scheme is None else {self._scheme: options[self._scheme]}
        most = max(one.matricisation.full_rank for one in allowed.values())
        rank = check_count(rank, f"rank of layer {self.name!r}", most, "the full rank; keep_dense() leaves it whole")
        fitting = {name: one for name, one in allowed.items() if rank <= one.matricisation.full_rank}
        self.choose(min(fitting, key=lambda name: float(fitting[name].errors[rank])), rank)

    @property
    def scheme(self) -> Scheme | None:
        """The matricisation; None for a layer that stays dense.

        Raises:
            ValueError: if it is set to a scheme that was not planned for, or the rank does not exist in it.
        """
        return self._scheme

    @scheme.setter
    def scheme(self, scheme: Scheme) -> None:
        if self._rank is None:
            self._require_options()
            raise ValueError(f"layer {self.name!r} stays dense: set its rank first, then the scheme.")
        self.choose(scheme, self._rank)

    @property
    def form(self) -> str:
        """How it will be stored: ``"factored"`` or ``"dense"``."""
        return "dense" if self._scheme is None else "factored"

    @property
    def full_rank(self) -> int | None:
        """The rank from which on nothing is lost, in the chosen scheme; None for a layer that stays dense."""
        return None if self._scheme is None else self.options[self._scheme].matricisation.full_rank

    @property
    def parameters_after(self) -> int:
        """Entries of the factors, or of the weight if it stays dense."""
        if self._scheme is None or self._rank is None:
            return self.parameters_before
        return self._rank * self.options[self._scheme].matricisation.triple_parameters

    @property
    def relative_error(self) -> float:
        """‖W − Ŵ‖_F / ‖W‖_F that the singular values and the rounding of the dtype predict; 0 if it stays dense."""
        if self._scheme is None or self._rank is None:
            return 0.0
        return math.sqrt(float(self.options[self._scheme].errors[self._rank]))

    def keep_dense(self, reason: str = "kept dense by the user") -> None:
        """Leave this layer as it is.

        Args:
            reason: what the report will say.
        """
        self._scheme, self._rank, self.reason = None, None, reason

    def choose(self, scheme: Scheme, rank: int) -> None:
        """Set scheme and rank together.

        Args:
            scheme: one of ``options``.
            rank: 1 … the full rank of that scheme.

        Raises:
            TypeError: if the rank is not an integer.
            ValueError: if the scheme or the rank is not among those, or the layer cannot be compressed.
        """
        check_choice(scheme, f"scheme of layer {self.name!r}", tuple(self._require_options()))
        most = self.options[scheme].matricisation.full_rank
        why = f"the full rank of scheme {scheme!r}; keep_dense() leaves the layer whole"
        self._rank = check_count(rank, f"rank of layer {self.name!r}", most, why)
        self._scheme, self.reason = scheme, ""

    def _require_options(self) -> Mapping[Scheme, Option]:
        if not self.options:
            raise ValueError(f"layer {self.name!r} cannot be compressed: {self.reason}.")
        return self.options

    def choices(self) -> tuple[Frontier, list[tuple[Scheme, int] | None]]:
        """Return the useful choices, smaller than dense, then dense, and what the labels of the frontier mean."""
        meanings: list[tuple[Scheme, int] | None] = []
        costs, errors = [], []
        for scheme, one in self.options.items():
            layout = one.matricisation
            most = min(layout.full_rank, (self.parameters_before - 1) // layout.triple_parameters)
            ranks = torch.arange(1, most + 1, device="cpu")  # whatever the default device is
            meanings += [(scheme, rank) for rank in range(1, most + 1)]
            costs.append(ranks * layout.triple_parameters)
            errors.append(one.errors[1 : most + 1])
        meanings.append(None)
        costs.append(torch.tensor([self.parameters_before], device="cpu"))
        errors.append(torch.zeros(1, dtype=torch.float64, device="cpu"))
        return Frontier.of(torch.cat(costs), torch.cat(errors)), meanings

    def __repr__(self) -> str:
        return f"LayerPlan({self.name!r}, scheme={self._scheme!r}, rank={self._rank}, reason={self.reason!r})"
