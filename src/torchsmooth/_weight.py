"""What a penalty sees of a layer: a tensor, and how to read it as a weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import FLOAT_DTYPES, check_count, describe


class Weight(NamedTuple):
    """A tensor, and how to read it as a weight.

    Attributes:
        tensor: ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` if ``transposed``.
        groups: number of groups.
        transposed: whether the weight is that of a transposed convolution.
    """

    tensor: Tensor
    groups: int = 1
    transposed: bool = False


def check_weight(weight: Tensor, groups: int) -> Tensor:
    """Refuse what is no weight with two channel axes; return it in single precision or better."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {describe(weight)}.")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight must be of float64, float32, bfloat16 or float16, got {weight.dtype}.")
    if weight.dim() < 2:  # noqa: PLR2004 - the two channel axes
        raise ValueError(
            f"weight must have an output and an input channel axis, got shape {tuple(weight.shape)}: "
            "penalties make weights smooth along the channels, biases and norm scales have none to spare."
        )
    check_count(groups, "groups", max(1, weight.shape[0]), "the size of the first axis of the weight")
    if weight.shape[0] % groups:
        raise ValueError(
            f"groups must divide the first axis of the weight, got {groups} for shape {tuple(weight.shape)}."
        )
    # Half precision would lose the sums that follow.
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
