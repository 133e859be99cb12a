"""Refusing models that others hold by their parameters, of which this is but a part, or that are no modules inside."""

from __future__ import annotations

import torch
from torch import nn

# Recognised by name: importing them takes long, and not every build of torch has them.
_FSDP1, _FSDP2 = "FullyShardedDataParallel", "FSDPModule"

_WAY = (
    "compress the model before fully_shard, or gather it first: on every rank, get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict, loaded into a model "
    "that is not sharded; compress that, and shard it again."
)


def check_whole(model: nn.Module) -> None:
    """Refuse a model that is sharded, compiled to TorchScript, or wrapped such that new parameters go unnoticed.

    Raises:
        ValueError: naming the layer, and what to do.
    """
    sharded = ""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{repr(name) if name else 'the model'} is a program of TorchScript ({type(module).__name__}), in "
                "which no layer can be replaced: compress the model that it was made of, and use torch.jit.trace, "
                "torch.export or torch.compile afterwards."
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{repr(name) if name else 'the model'} is wrapped in DistributedDataParallel, which would go on "
                "reducing the old parameters: compress the module inside (.module), and wrap that anew if training "
                "goes on."
            )
        for own_name, parameter in module._parameters.items():
            if parameter is not None and hasattr(parameter, "full_tensor"):
                raise ValueError(
                    f"parameter {own_name!r} of layer {name!r} is sharded ({type(parameter).__name__}): {_WAY}"
                )
        kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.distributed.")}
        if kinds & {_FSDP1, _FSDP2}:
            sharded = sharded or f"{repr(name) if name else 'the model'} is sharded ({min(kinds & {_FSDP1, _FSDP2})})"
    if sharded:  # its parameters may look whole between a forward and a backward pass
        raise ValueError(f"{sharded}: {_WAY}")
