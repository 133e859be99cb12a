"""Replacing modules inside a model: all of them, everywhere they occur, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ._lowrank_layer import LowRankLayer
from ._source_layer import CALLED
from .lowrank import LowRankLinear
from .lowrank_conv import LowRankConv2d
from .lowrank_transposed import LowRankConvTranspose2d
from .tucker import TuckerConv2d

if TYPE_CHECKING:
    from collections.abc import Mapping

# Handles that a user holds refer to these dictionaries, so a replacement shares them instead of copying.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


# Says, in a module that stands for one of a registered type, for which: text, so that it can be pickled.
SOURCE = "_torchsmooth_source"

# What the layers themselves keep; anything else a user has put there. A table that draws its values on the meta device
# would import the compiler, a second or two of every program's start: the one here is given, and a LowRankEmbedding
# keeps nothing under other names than these.
_STANDARD = frozenset().union(
    *(
        vars(layer)
        for layer in (
            nn.Linear(1, 1, device="meta"),
            nn.Conv2d(1, 1, 1, device="meta"),
            nn.ConvTranspose2d(1, 1, 1, device="meta"),
            nn.Embedding(1, 1, _weight=torch.empty(1, 1, device="meta")),
            LowRankLinear(1, 1, 1, device="meta"),
            LowRankConv2d(1, 1, 1, 1, device="meta"),
            LowRankConvTranspose2d(1, 1, 1, 1, device="meta"),
            TuckerConv2d(2, 2, 2, 1, device="meta"),
        )
    )
)


def take_over_(new: nn.Module, old: nn.Module) -> None:
    """Give a replacement the hooks, the very bias and the user's own attributes of the layer it stands in for."""
    take_over_hooks_(new, old, private=True)
    bias = getattr(old, "bias", None)  # an embedding has none
    if isinstance(bias, nn.Parameter):
        owner = new.bias_owner if isinstance(new, LowRankLayer) else new
        owner.register_parameter("bias", bias)


def take_over_hooks_(new: nn.Module, old: nn.Module, *, private: bool = False) -> None:
    """Give a replacement the hooks and the user's own attributes of the module it stands in for.

    Args:
        new: the replacement.
        old: what it replaces.
        private: also attributes that begin with an underscore; in a composite layer those are its own.
    """
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    for name, value in vars(old).items():
        # One by the name of a child or a method would hide it.
        hiding = name in new._modules or (hasattr(type(new), name) and name not in CALLED)
        if name in _STANDARD or hiding or (name.startswith("_torchsmooth") and name != SOURCE):
            continue
        if private or not name.startswith("_"):
            new.__dict__.setdefault(name, value)


def swap_(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever the module that it replaces occurs; on any error, undo.

    Args:
        model: the model to change.
        replacements: old module to new module.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and child in replacements
    ]
    try:
        for parent, name, child in places:
            _put(parent, name, replacements[child])
    except BaseException:  # also an interruption from the keyboard
        for parent, name, child in places:
            parent._modules[name] = child
        raise


def _put(parent: nn.Module, name: str, child: nn.Module) -> None:
    # Not setattr: a parent with a __setattr__ of its own could do anything, and the place exists already.
    parent._modules[name] = child
