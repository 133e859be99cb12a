"""Tensors that are divided among processes (DTensor, as ``fully_shard`` makes them): whole ones, and parts of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, without importing that module for those who never use it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all processes, which all have to ask for it; any other comes back as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Take from a tensor that all processes hold the part that ``like`` holds here; nothing is sent."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415 - see above

    mesh = like.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)  # type: ignore[attr-defined]
