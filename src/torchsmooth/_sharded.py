"""Tensors that are divided among processes (DTensor, as ``fully_shard`` makes them): whole ones, and parts of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, without importing that module for those who never use it."""
    return hasattr(tensor, "full_tensor")


def sharded_for(model: nn.Module) -> dict[int, Tensor]:
    """Find the sharded parameter for each one that ``fully_shard`` holds gathered, by the id of the latter.

    Gathered parameters take the place of the sharded ones around a forward and a backward pass (those of the root
    until the backward pass is done), maybe in a lower precision; the sharded ones are what an optimizer trains. There
    is no public way to them. Where the private one is missing, modules are read as they are.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        state_of = getattr(type(module), "_get_fsdp_state", None)
        state = None if state_of is None else state_of(module)
        # One group before torch 2.10 or so.
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for one in (one for group in groups for one in getattr(group, "fsdp_params", ())):
            gathered = getattr(one, "_unsharded_param", None)
            if gathered is not None:
                found[id(gathered)] = one.sharded_param
    return found


def settle(tensor: Tensor) -> None:
    """Wait until the gradient that a sharded tensor has already may be added to.

    ``fully_shard`` reduces gradients on streams of its own, for which the others wait only at the very end of the
    backward pass; autograd knows nothing of them.
    """
    kind: str = tensor.device_mesh.device_type  # type: ignore[attr-defined]
    if kind != "cpu" and not (tensor.is_leaf and tensor.grad is None):
        getattr(torch, kind).synchronize()


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all processes, which all have to ask for it; any other comes back as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Take from a tensor that all processes hold the part that ``like`` holds here; nothing is sent."""
    if not is_sharded(like):
        return tensor
    try:
        from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415 - see above
    except ImportError:  # before torch 2.5
        from torch.distributed._tensor import DTensor, Replicate  # type: ignore[attr-defined]  # noqa: PLC0415

    mesh = like.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)  # type: ignore[attr-defined]
