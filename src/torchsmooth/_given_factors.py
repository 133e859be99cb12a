"""Factors that a user hands to a low-rank layer: checked, and copied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ._checks import describe
from ._linalg import working_copy

if TYPE_CHECKING:
    from collections.abc import Mapping


def checked_copies(factors: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """Return factors in float64, or refuse what is no tensor of the right shape with finite real values.

    Args:
        factors: what was given, by the names of the arguments.
        shapes: what shapes they should have, by the same names.

    Raises:
        TypeError: if one is not a tensor of a floating dtype.
        ValueError: if a shape is another, or a value NaN or infinite.
    """
    copies = []
    for name, factor in factors.items():
        if not isinstance(factor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {describe(factor)}.")
        if not factor.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {factor.dtype}.")
        if tuple(factor.shape) != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {tuple(factor.shape)}.")
        copy = working_copy(factor)
        if not bool(copy.isfinite().all()):
            raise ValueError(f"{name} must hold finite values, got NaN or infinite ones.")
        copies.append(copy)
    return copies
