"""What a plan makes small: the sum over the layers of (relative error)² × importance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ._linalg import pieces, working_copy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def importances(weights: Sequence[Tensor]) -> list[float]:
    """Return the importance of each layer: ‖W‖_F², so that the sum is one of *absolute* squared errors.

    How far a change of a weight reaches depends on the size of the change, not on that of the weight it is made to.

    Args:
        weights: those of all layers that can be compressed, finite.

    Returns:
        The squares, divided by the largest: between 0 and 1 at any scale of the weights.
    """
    logarithms = [_log_norm(one) for one in weights]
    largest = max(logarithms, default=-math.inf)
    return [4.0 ** (one - largest) if one > -math.inf else 0.0 for one in logarithms]


def _log_norm(weight: Tensor) -> float:
    """Return log2 ‖W‖_F: the norm itself, or a square on the way to it, may leave the range of float64."""
    largest = float(working_copy(torch.maximum(weight.detach().amax(), -weight.detach().amin())))
    if largest == 0:
        return -math.inf
    squares = [float((piece / largest).square().sum()) for piece in pieces(weight.detach().flatten(1))]
    return math.log2(math.fsum(squares)) / 2 + math.log2(largest)
