"""What a plan makes small: the sum over the layers of (relative error)² × importance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ._linalg import squared_norms, working_copy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# The importance of a weight that is not zero, at least: a product with errors and a quotient by costs must not vanish.
_LEAST = 2.0**-900


def importances(weights: Sequence[Tensor], rows: Sequence[int] | None = None) -> list[float]:
    """Return the importance of each layer: ‖W‖_F², so that the sum is one of *absolute* squared errors.

    How far a change of a weight reaches depends on the size of the change, not on that of the weight it is made to.
    A matrix is multiplied with inputs of about unit size, which makes the square that of the error at its output; of a
    table only one row is looked up at a time, so the mean over its rows counts.

    Args:
        weights: those of all layers that can be compressed, finite.
        rows: of tables, how many rows they have; 1 for other layers. None: there are no tables.

    Returns:
        The squares, divided by the largest: between 0 and 1 at any scale of the weights.
    """
    counts = [1] * len(weights) if rows is None else rows
    return relative_importances([log_norm(one, count) for one, count in zip(weights, counts, strict=True)])


def relative_importances(log_norms: Sequence[float]) -> list[float]:
    """Return the same for layers of which :func:`log_norm` is known, and not the weights any more."""
    largest = max(log_norms, default=-math.inf)
    return [max(4.0 ** (one - largest), _LEAST) if one > -math.inf else 0.0 for one in log_norms]


def log_norm(weight: Tensor, rows: int = 1) -> float:
    """Return log2 of ‖W‖_F over √rows: the norm, or a square on the way to it, may leave the range of float64."""
    largest = working_copy(torch.maximum(weight.detach().amax(), -weight.detach().amin()))
    if largest == 0:
        return -math.inf
    square = float(squared_norms(weight.detach().flatten(1), largest))
    return (math.log2(square) - math.log2(rows)) / 2 + math.log2(float(largest))
