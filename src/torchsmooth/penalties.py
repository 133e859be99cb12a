"""Descriptions of penalties: small frozen values that hold no tensor, so they copy, pickle and compare freely."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from . import functional
from ._checks import check_choice, check_real, describe
from ._derivatives import squared_differences, squared_differences_gradient
from ._linalg import without_autocast
from ._matricise import SCHEMES, Scheme, scheme_for
from ._nuclear import Matrices, alike, check_present, checked_norms_and_polars, nuclear_norms, stacked
from ._polar import POLAR_METHODS, PolarMethod
from ._weight import Weight, check_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["FirstDerivative", "NuclearNorm", "NuclearRatio", "Penalty", "SecondDerivative", "Weight"]

# What each closed form stands for: where one of these is overridden, a form inherited from further up is of another
# function.
_STANDS_FOR = {
    "value_and_gradient": ("__call__",),
    "gradient": ("__call__", "value_and_gradient"),
    "total": ("__call__",),
    "gradients": ("__call__", "value_and_gradient", "gradient"),
}


@dataclass(frozen=True)
class Penalty(ABC):
    """What a penalty is: a strength and a function of a weight.

    Derive a frozen dataclass from it, with a method :meth:`__call__`, to register a penalty of your own. A class that
    is derived from one of the library's may override that alone: the closed forms that it inherits are not used then.

    Args:
        strength: the factor in front of the penalty, finite and ≥ 0.

    Raises:
        TypeError: if the strength is not a number.
        ValueError: if it is negative, NaN or infinite.
    """

    strength: float

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, others in _STANDS_FOR.items():
            depth = _depth(cls, name)
            if cls.__mro__[depth] is not Penalty and any(_depth(cls, other) < depth for other in others):
                setattr(cls, name, vars(Penalty)[name])

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

    def value_and_gradient(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """Evaluate the penalty and its gradient, *without* the strength.

        Override it where the gradient has a closed form; here it is found by autograd.

        Args:
            weight: as for :meth:`__call__`; the gradient does not flow to it.
            groups: number of groups.
            transposed: whether the weight is that of a transposed convolution.

        Returns:
            A scalar and a tensor of the shape of ``weight``, in its dtype or a wider one, neither with a graph.
        """
        with torch.enable_grad():
            leaf = weight.detach().requires_grad_()
            value = _scalar(self(leaf, groups=groups, transposed=transposed))
            if not value.requires_grad:
                return value, torch.zeros_like(leaf, requires_grad=False)
            (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
        return value.detach(), gradient

    def gradient(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
        """Return the gradient alone. Override it where that is cheaper than :meth:`value_and_gradient`.

        Args:
            weight: as for :meth:`__call__`; the gradient does not flow to it.
            groups: number of groups.
            transposed: whether the weight is that of a transposed convolution.

        Returns:
            A tensor of the shape of ``weight``, in its dtype or a wider one, without a graph.
        """
        return self.value_and_gradient(weight, groups=groups, transposed=transposed)[1]

    def total(self, weights: Sequence[Weight]) -> Tensor:
        """Add up the penalty over at least one weight, differentiably.

        Override it, together with :meth:`gradients`, where many weights at once are cheaper than one after the other.

        Args:
            weights: each a tensor as for :meth:`__call__`, its number of groups, and whether it is transposed.

        Returns:
            A scalar, on the device of the first.
        """
        return added(
            [_scalar(self(tensor, groups=groups, transposed=transposed)) for tensor, groups, transposed in weights]
        )

    def gradients(self, weights: Sequence[Weight]) -> Iterator[tuple[int, Tensor]]:
        """Yield the gradient of each of some weights, with its index among them, in any order.

        Args:
            weights: as for :meth:`total`.

        Yields:
            Pairs of an index and a tensor of the shape of that weight, without a graph.
        """
        for index, (tensor, groups, transposed) in enumerate(weights):
            yield index, self.gradient(tensor, groups=groups, transposed=transposed)


def _depth(cls: type, name: str) -> int:
    """Count the classes before the one that a class has a method from."""
    return next(depth for depth, one in enumerate(cls.__mro__) if name in vars(one))


def _scalar(value: object) -> Tensor:
    """Refuse what a penalty of a user's own returns, unless it is a scalar."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return value
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else describe(value)
    raise TypeError(
        f"the penalty must return a tensor of shape (), got {got}: add up its entries by .sum(), and leave out .item()."
    )


def added(terms: Sequence[Tensor]) -> Tensor:
    """Add up at least one scalar, on the device of the first."""
    return sum((term.to(terms[0].device) for term in terms[1:]), terms[0])


@dataclass(frozen=True)
class _Nuclear(Penalty):
    """What is computed from the singular values of one matricisation of a weight."""

    scheme: Scheme = "channel"
    method: PolarMethod = "auto"
    _function: ClassVar[Callable[..., Tensor]]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.scheme, "scheme", SCHEMES)
        check_choice(self.method, "method", POLAR_METHODS)

    def __call__(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
        """Evaluate the penalty, without the strength, as the function of this name in :mod:`torchsmooth.functional`."""
        scheme = scheme_for(self.scheme, weight.dim())
        return self._function(weight, scheme=scheme, groups=groups, transposed=transposed, method=self.method)


@dataclass(frozen=True)
class NuclearNorm(_Nuclear):
    r"""Penalise the sum of the singular values, which makes the weight low-rank.

    Args:
        strength: the factor in front, finite and ≥ 0. The gradient moves every singular value by ``strength`` a
            step (times the learning rate), in layers of any size. Short trainings take more: ``examples/digits.py``
            uses 2e-2 for 280 steps.
        scheme: which matricisation of a convolution is made low-rank; see :func:`functional.nuclear_norm`. The
            spatial schemes need weights with two kernel axes; every other weight uses ``"channel"`` then.
        method: how the gradient is computed: ``"auto"``, ``"svd"``, ``"eigh"``, ``"polar_express"`` or
            ``"polar_express_bf16"``; see :func:`functional.nuclear_norm`.

    Raises:
        TypeError: if the strength is not a number.
        ValueError: if it is negative, NaN or infinite, or the scheme or the method is unknown.

    Example:
        >>> import torchsmooth
        >>> torchsmooth.NuclearNorm(strength=1e-3)
        NuclearNorm(strength=0.001, scheme='channel', method='auto')

    Source: Runkel et al., "Smooth Model Compression without Fine-Tuning", 2025 (arXiv 2505.24469).
    """

    strength: float = 1e-3
    _function: ClassVar[Callable[..., Tensor]] = staticmethod(functional.nuclear_norm)

    @torch.no_grad()
    def value_and_gradient(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """Evaluate the norm, and its gradient: the polar factor. Both come from one decomposition."""
        one = self._matrices(Weight(weight, groups, transposed))
        values, polars = _norms_and_polars(one.batch, one.method)
        return values.sum(), one.back(polars)

    def total(self, weights: Sequence[Weight]) -> Tensor:
        """Add up the norms; matrices of one shape are decomposed together."""
        many = [self._matrices(weight) for weight in weights]
        stacks = [[many[index] for index in indices] for indices in alike(many)]
        return added([nuclear_norms(stacked(stack), stack[0].method).sum() for stack in stacks])

    @torch.no_grad()
    def gradients(self, weights: Sequence[Weight]) -> Iterator[tuple[int, Tensor]]:
        """Yield the polar factors; matrices of one shape are decomposed together."""
        many = [self._matrices(weight) for weight in weights]
        for indices in alike(many):
            stack = [many[index] for index in indices]
            _, polars = _norms_and_polars(stacked(stack), stack[0].method)
            first = 0
            for index, one in zip(indices, stack, strict=True):
                yield index, one.back(polars[first : first + len(one.batch)])
                first += len(one.batch)

    def _matrices(self, weight: Weight) -> Matrices:
        return Matrices.of(weight, scheme_for(self.scheme, weight.tensor.dim()), self.method)


def _norms_and_polars(matrices: Tensor, method: PolarMethod) -> tuple[Tensor, Tensor]:
    if matrices.numel() == 0:
        return matrices.sum((-2, -1)), matrices
    check_present(matrices)
    with without_autocast(matrices.device):
        return checked_norms_and_polars(matrices, method)


@dataclass(frozen=True)
class NuclearRatio(_Nuclear):
    r"""Penalise the nuclear norm over the Frobenius norm: a low rank that shrinking the weight cannot feign.

    Its gradient is orthogonal to the weight, and shrinks as the weight grows. It suits layers that are followed by a
    normalisation, which undoes any change of scale.

    Args:
        strength: the factor in front, finite and ≥ 0.
        scheme: which matricisation of a convolution is made low-rank, as for :class:`NuclearNorm`.
        method: how the gradient is computed, as for :class:`NuclearNorm`.

    Raises:
        TypeError: if the strength is not a number.
        ValueError: if it is negative, NaN or infinite, or the scheme or the method is unknown.

    Example:
        >>> import torchsmooth
        >>> torchsmooth.NuclearRatio(strength=1e-2)
        NuclearRatio(strength=0.01, scheme='channel', method='auto')

    Source: as for :func:`functional.nuclear_ratio`.
    """

    strength: float = 1e-2
    _function: ClassVar[Callable[..., Tensor]] = staticmethod(functional.nuclear_ratio)


@dataclass(frozen=True)
class _Derivative(Penalty):
    """Squared differences of one order, with their gradient in closed form."""

    _order: ClassVar[int]

    def __call__(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
        """Evaluate the penalty, without the strength, as the function of this name in :mod:`torchsmooth.functional`."""
        return squared_differences(check_weight(weight, groups), self._order, groups, transposed=transposed)

    def value_and_gradient(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """Evaluate the penalty and its gradient, in closed form."""
        # A derived class may build a gradient of its own on what is returned here, or have nothing but that.
        kind = type(self) if type(self).value_and_gradient is _Derivative.value_and_gradient else _Derivative
        gradient = kind.gradient(self, weight, groups=groups, transposed=transposed)
        return _Derivative.__call__(self, weight.detach(), groups=groups, transposed=transposed), gradient

    def gradient(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:  # noqa: ARG002
        """Return the gradient, in closed form; the differences do not care which axis holds the outputs."""
        return squared_differences_gradient(check_weight(weight, groups), self._order, groups)


@dataclass(frozen=True)
class FirstDerivative(_Derivative):
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
    _order: ClassVar[int] = 1


@dataclass(frozen=True)
class SecondDerivative(_Derivative):
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
    _order: ClassVar[int] = 2
