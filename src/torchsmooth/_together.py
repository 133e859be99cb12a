"""The projections of query, key and value as one product, where all three were merged to dense weights.

As ``nn.MultiheadAttention`` does it: with few rows, three products take longer than one three times as wide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._execution import Derived, active, derived_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class Together(NamedTuple):
    """Merged layers whose weights are parts of one."""

    members: tuple[Derived, ...]
    weight: Tensor
    bias: Tensor | None
    lengths: list[int]


def join_(derived: Sequence[Derived | None]) -> None:
    """Put the weights of merged linear layers side by side, where they take inputs of one size.

    Args:
        derived: what was derived from each of the layers, or None.
    """
    members = tuple(one for one in derived if one is not None and one.execution == "dense")
    modules: list[Any] = [one.module for one in members]
    sizes = {(one.in_features, one.weight.dtype, one.weight.device, one.bias is None) for one in modules}
    if len(members) < len(derived) or len(sizes) > 1:
        return
    lengths = [one.out_features for one in modules]
    with torch.no_grad():
        weight = torch.cat([one.weight for one in modules])
        bias = None if modules[0].bias is None else torch.cat([one.bias for one in modules])
        for name, whole in (("weight", weight), ("bias", bias)):
            for module, part in zip(modules, () if whole is None else torch.split(whole, lengths), strict=False):
                module.register_parameter(name, nn.Parameter(part, requires_grad=False))
    for one in members:
        one.rewire_()
        one.together = Together(members, weight, bias, lengths)


def run_together(layers: Sequence[nn.Module], input: Tensor) -> tuple[Tensor, ...] | None:  # noqa: A002 - as in torch
    """Apply layers to one input by one product; None where they were not joined, or must be called one by one.

    Args:
        layers: children that were joined, perhaps.
        input: what all of them take.

    Returns:
        Their outputs.
    """
    first = derived_of(layers[0])
    together: Together | None = None if first is None else first.together
    if together is None:
        return None
    for layer, one in zip(layers, together.members, strict=True):
        others = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
        if others or derived_of(layer) is not one or active(layer, input) is None:
            return None
    return torch.split(F.linear(input, together.weight, together.bias), together.lengths, -1)
