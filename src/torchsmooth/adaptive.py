"""Penalties that change while a network trains: what they are described by, and what moves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ._checks import check_open_unit, describe
from ._registered import checked_names, names_under
from .penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from ._weight import Weight

__all__ = ["Adaptation", "AdaptivePenalty", "Constrained"]


class AdaptivePenalty(Penalty):
    """A penalty with a state: the description says how to begin, :func:`torchsmooth.attach_` keeps what moves.

    Derive a frozen dataclass from it, with a method :meth:`begin`, for one of your own.
    """

    @abstractmethod
    def begin(self, model: nn.Module) -> Adaptation:
        """Start for one model; it has the penalty registered already."""

    def __call__(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> NoReturn:  # noqa: ARG002
        """Refuse: without a state there is no value."""
        raise ValueError(
            "this penalty changes while the network trains, and its state is kept by attach_(optimizer, model): call "
            "that, and leave penalty_loss(model) out of the loss."
        )


class Adaptation(ABC):
    """The moving part of an adaptive penalty, for one model and one training.

    Attributes:
        every: steps from one evaluation to the next, set by :func:`torchsmooth.attach_`, which adds so many times the
            gradient there. What moves by some amount a step should move by so many times that amount.
    """

    every: int = 1

    @abstractmethod
    def advance(self, step: int) -> None:
        """Get ready for a step at which the penalty is evaluated; called for each, in order, and again if it failed."""

    @abstractmethod
    def term(self, name: str, weight: Weight) -> tuple[Tensor, Tensor]:
        """Return value and gradient for one weight, both *with* the strength; twice a step if a closure is.

        Args:
            name: the qualified name of the tensor.
            weight: the tensor, and how to read it.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: tensors, numbers, strings, and dictionaries and lists of those."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""


@dataclass(frozen=True)
class Constrained(AdaptivePenalty):
    r"""Hold a penalty below a bound on each weight, with a strength for each that sets itself.

    The bound κ is a fraction of the value R₀ that the weight has when the penalty is first evaluated. A multiplier for
    each weight starts at zero and moves at every step in proportion to what is missing,

    .. math:: \lambda \leftarrow \left[\lambda + \mu\,(\min(R(W), R_0) / \kappa - 1)\right]_+

    and the gradient is :math:`\lambda \nabla R(W)`: nothing once the bound is met with room to spare. No strength
    has to be found by hand; the rate μ says how fast it is approached. With ``attach_(..., every=k)`` the multiplier
    moves by k times as much at each k-th step.

    So the first value has to mean something: weights of ordinary initial sizes. A weight that is zero then is left
    alone, and one that begins close to zero is held close to it. Let the penalty begin later for such, by a schedule
    that is zero until they have grown.

    Args:
        penalty: what is held below a bound: ``NuclearNorm()``, ``NuclearRatio()``, ...; its own strength is not used.
        bound: fraction of the first value, strictly between 0 and 1.
        strength: the rate μ, finite and ≥ 0: what the multiplier gains a step at twice the bound.

    Raises:
        TypeError: if an argument is of a wrong type, or the penalty is itself adaptive.
        ValueError: if a number is out of range.

    Example:
        >>> import torch, torchsmooth
        >>> layer = torch.nn.Linear(8, 8)
        >>> constraint = torchsmooth.Constrained(torchsmooth.NuclearNorm(), bound=0.5)
        >>> optimizer = torch.optim.SGD(torchsmooth.smooth_(layer, constraint).parameters(), lr=0.1)
        >>> handle = torchsmooth.attach_(optimizer, layer)

    Source: Franke et al., "Improving Deep Learning Optimization through Constrained Parameter Regularization", 2024
    (CPR): an augmented Lagrangian for each matrix. The bound relative to the first value, and the division by it,
    which frees the rate of the unit of the penalty, are the library's own, and so is that a weight grown beyond its
    first value counts as one of that value: from close to zero it would drive the multiplier without limit.
    """

    strength: float
    penalty: Penalty
    bound: float

    def __init__(self, penalty: Penalty, bound: float = 0.5, strength: float = 1e-4) -> None:
        object.__setattr__(self, "penalty", penalty)
        object.__setattr__(self, "bound", check_open_unit(bound, "bound", "the fraction of the first value"))
        object.__setattr__(self, "strength", strength)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        penalty: object = self.penalty
        if not isinstance(penalty, Penalty) or isinstance(penalty, AdaptivePenalty):
            raise TypeError(
                "Constrained needs a penalty such as NuclearNorm() that is not adaptive itself, got "
                f"{describe(self.penalty)}."
            )

    def begin(self, model: nn.Module) -> Adaptation:
        """Start with all multipliers at zero."""
        return _Multipliers(self, model)


class _Multipliers(Adaptation):
    """A multiplier and a bound for each weight, as scalars on its device."""

    def __init__(self, description: Constrained, model: nn.Module) -> None:
        self._description, self._model = description, model
        self._multipliers: dict[str, Tensor] = {}
        self._bounds: dict[str, Tensor] = {}
        self._moved: set[str] = set()
        self._step: int | None = None

    def advance(self, step: int) -> None:
        if step != self._step:  # a step that failed and is taken again moves nothing twice
            self._moved.clear()
        self._step = step
        self._forget_removed()

    def term(self, name: str, weight: Weight) -> tuple[Tensor, Tensor]:
        tensor, groups, transposed = weight
        value, gradient = self._description.penalty.value_and_gradient(tensor, groups=groups, transposed=transposed)
        if name not in self._bounds:
            self._bounds[name] = self._description.bound * value
            self._multipliers[name] = torch.zeros_like(value)
        bound = self._bounds[name] = self._bounds[name].to(value)
        multiplier = self._multipliers[name].to(value)
        if name not in self._moved:
            # A weight that was zero from the start has a bound of zero, and is left alone.
            excess = torch.where(bound > 0, value / bound - 1.0, torch.zeros_like(value))
            excess = excess.clamp_max(1.0 / self._description.bound - 1.0)
            multiplier = (multiplier + self.every * self._description.strength * excess).clamp_min(0.0)
            self._multipliers[name] = multiplier
            self._moved.add(name)
        return multiplier * value, multiplier * gradient

    def state_dict(self) -> dict[str, Any]:
        self._forget_removed()
        return {"multipliers": dict(self._multipliers), "bounds": dict(self._bounds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        multipliers, bounds = dict(state["multipliers"]), dict(state["bounds"])
        names = checked_names(bounds.keys(), self._model, self._description)
        self._multipliers = {name: multipliers[name] for name in bounds if name in names}
        self._bounds = {name: bounds[name] for name in bounds if name in names}
        self._step = None

    def _forget_removed(self) -> None:
        """Forget weights that the penalty was removed from: it may come back, and is a new one then."""
        names = names_under(self._model, self._description)
        for one in (self._multipliers, self._bounds):
            for name in one.keys() - names:
                del one[name]
