"""Which ways to run a layer are tried, and how: the arguments of ``tune_``, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from ._checks import check_choice, describe, quoted
from ._execution import EXECUTIONS
from ._lowrank_layer import LowRankLayer

if TYPE_CHECKING:
    import torch
    from torch import nn

# On what device a way is tried where none are named; the others everywhere.
_TRIED_ON = {"padded": "cuda", "packed": "cpu", "packed_dense": "cpu", "fused": "nowhere"}


def default_executions(device: torch.device) -> tuple[str, ...]:
    """List the ways that are tried on a device where none are named."""
    return tuple(one for one in EXECUTIONS if _TRIED_ON.get(one, device.type) == device.type)


def checked_executions(executions: object) -> tuple[str, ...]:
    """Return the ways that are named, in the order that they are tried in."""
    if isinstance(executions, str) or not isinstance(executions, Sequence):
        known = quoted(EXECUTIONS, len(EXECUTIONS))
        raise TypeError(f"executions must be a sequence of names out of {known}, got {describe(executions)}.")
    for one in executions:
        check_choice(one, "executions", EXECUTIONS)
    return tuple(one for one in EXECUTIONS if one in executions)


def check_graphs(asked: object, device: torch.device) -> None:
    """Refuse to time CUDA graphs where there can be none."""
    if not isinstance(asked, bool):
        raise TypeError(f"cuda_graphs must be True or False, got {describe(asked)}.")
    if asked and device.type != "cuda":
        raise ValueError(
            f"cuda_graphs=True times CUDA graphs, and the model is on {str(device)!r}: bring it to the GPU it is to "
            "run on, or leave cuda_graphs out."
        )


def refuse_to_tune(model: nn.Module) -> NoReturn:
    """Say why there is nothing to tune in a model."""
    kind = type(model).__name__
    others = {name: type(one).__name__ for name, one in model.named_modules() if isinstance(one, LowRankLayer)}
    if others:
        name, other = next(iter(others.items()))
        raise ValueError(
            f"there is nothing to tune in this {kind}: its low-rank layers, such as {name!r} ({other}), have one way "
            "to run only. It runs as it is; leave tune_ out."
        )
    raise ValueError(
        f"there is no low-rank layer to tune in this {kind}: compress it first, with torchsmooth.svd_compress_, or "
        "load a compressed state dict with torchsmooth.load_compressed_."
    )
