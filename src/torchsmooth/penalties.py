"""Descriptions of penalties: small frozen values that hold no tensor, so they copy, pickle and compare freely."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import functional
from ._checks import check_choice, check_real
from ._matricise import SCHEMES, Scheme

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FirstDerivative", "NuclearNorm", "Penalty", "SecondDerivative"]


@dataclass(frozen=True)
class Penalty(ABC):
    """What a penalty is: a strength and a function of a weight.

    Derive a frozen dataclass from it, with a method :meth:`__call__`, to register a penalty of your own.

    Args:
        strength: the factor in front of the penalty, finite and ≥ 0.

    Raises:
        TypeError: if the strength is not a number.
        ValueError: if it is negative, NaN or infinite.
    """

    strength: float

    def __post_init__(self) -> None:
        name = f"strength of {type(self).__name__}"
        number = check_real(self.strength, name)
        if number < 0:
            raise ValueError(
                f"{name} must be ≥ 0, got {number}: a negative one would reward rough weights without bound."
            )
        object.__setattr__(self, "strength", number)

    @abstractmethod
    def __call__(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
        """Evaluate the penalty, *without* the strength.

        Args:
            weight: at least two axes, real floating dtype: ``(out, in / groups, *kernel)``, or
                ``(in, out / groups, *kernel)`` if ``transposed``.
            groups: number of groups.
            transposed: whether the weight is that of a transposed convolution.

        Returns:
            A differentiable scalar.
        """


@dataclass(frozen=True)
class NuclearNorm(Penalty):
    r"""Penalise the sum of the singular values, which makes the weight low-rank.

    Args:
        strength: the factor in front, finite and ≥ 0. The gradient moves every singular value by ``strength`` a
            step (times the learning rate), in layers of any size. Short trainings take more: ``examples/digits.py``
            uses 2e-2 for 280 steps.
        scheme: which matricisation of a convolution is made low-rank; see :func:`functional.nuclear_norm`. The
            spatial schemes need weights with two kernel axes; every other weight uses ``"channel"`` then.

    Raises:
        TypeError: if the strength is not a number.
        ValueError: if it is negative, NaN or infinite, or the scheme is unknown.

    Example:
        >>> import torchsmooth
        >>> torchsmooth.NuclearNorm(strength=1e-3)
        NuclearNorm(strength=0.001, scheme='channel')

    Source: Runkel et al., "Smooth Model Compression without Fine-Tuning", 2025 (arXiv 2505.24469).
    """

    strength: float = 1e-3
    scheme: Scheme = "channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.scheme, "scheme", SCHEMES)

    def __call__(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
        """Evaluate the nuclear norm, without the strength; see :func:`functional.nuclear_norm`."""
        planar = weight.dim() == 4  # noqa: PLR2004 - two channel axes, two kernel axes
        scheme = self.scheme if planar or self.scheme == "input" else "channel"
        return functional.nuclear_norm(weight, scheme=scheme, groups=groups, transposed=transposed)


@dataclass(frozen=True)
class FirstDerivative(Penalty):
    """Penalise squared differences between neighbouring channels.

    Args:
        strength: the factor in front, finite and ≥ 0: a weight decay of up to ``8 · strength`` on the roughest
            pattern along an axis, and none on the constant one. Short trainings take more.

    Raises:
        TypeError: if the strength is not a number.
        ValueError: if it is negative, NaN or infinite.

    Example:
        >>> import torchsmooth
        >>> torchsmooth.FirstDerivative(strength=1e-4)
        FirstDerivative(strength=0.0001)

    Source: Runkel et al., "Smooth Model Compression without Fine-Tuning", 2025 (arXiv 2505.24469).
    """

    strength: float = 3e-4

    def __call__(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
        """Evaluate the penalty, without the strength; see :func:`functional.first_derivative`."""
        return functional.first_derivative(weight, groups=groups, transposed=transposed)


@dataclass(frozen=True)
class SecondDerivative(Penalty):
    """Penalise squared second differences along the channels.

    Args:
        strength: the factor in front, finite and ≥ 0: a weight decay of up to ``32 · strength`` on the roughest
            pattern along an axis, and none on an affine one. Short trainings take more.

    Raises:
        TypeError: if the strength is not a number.
        ValueError: if it is negative, NaN or infinite.

    Example:
        >>> import torchsmooth
        >>> torchsmooth.SecondDerivative(strength=1e-4)
        SecondDerivative(strength=0.0001)

    Source: Runkel et al., "Smooth Model Compression without Fine-Tuning", 2025 (arXiv 2505.24469).
    """

    strength: float = 1e-4

    def __call__(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
        """Evaluate the penalty, without the strength; see :func:`functional.second_derivative`."""
        return functional.second_derivative(weight, groups=groups, transposed=transposed)
