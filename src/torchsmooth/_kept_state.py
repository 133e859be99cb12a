"""What a model keeps from one call to the next, beside its parameters: caches, hidden states, counters, queues."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._sharing import TORCH_ATTRIBUTES

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

# Layers of torch keep nothing in plain attributes, and wrappers of torch what nobody should meddle with.
_OTHERS = ("torch", __name__.partition(".")[0])

# Entries of a container: what has more is a table, such as a vocabulary, and would take its time at each run.
_LARGEST = 10_000


class KeptState:
    """The buffers of a model, and the plain attributes of modules that are not torch's, as they are now.

    Args:
        model: any model.
        but: modules whose buffers are left alone.
    """

    def __init__(self, model: nn.Module, but: Collection[nn.Module] = ()) -> None:
        modules = list(model.modules())
        self._buffers = [(one._buffers, dict(one._buffers)) for one in modules if one not in but]
        self._tensors = [
            (tensor, tensor.data_ptr(), tensor._version, tensor.clone())
            for _, buffers in self._buffers
            for tensor in buffers.values()
            if tensor is not None and _can_be_copied(tensor)
        ]
        own = [one for one in modules if type(one).__module__.partition(".")[0] not in _OTHERS]
        self._attributes = [(vars(one), _plain(vars(one))) for one in own]
        self._containers = [
            (value, value.copy())
            for _, plain in self._attributes
            for value in plain.values()
            if isinstance(value, (list, dict, set, deque)) and len(value) <= _LARGEST
        ]

    @torch.no_grad()
    def put_back_(self) -> bool:
        """Make all of it what it was, and say whether any of it was not."""
        has_changed = False
        for buffers, before in self._buffers:
            if not _are_same(buffers, before):
                buffers.clear()
                buffers.update(before)
                has_changed = True
        for tensor, address, version, values in self._tensors:
            if tensor._version != version or tensor.data_ptr() != address:
                tensor.copy_(values)
                has_changed = True
        for attributes, plain in self._attributes:
            if not _are_same(_plain(attributes), plain):
                for name in _plain(attributes):
                    del attributes[name]
                attributes.update(plain)
                has_changed = True
        for container, content in self._containers:
            has_changed = _refill_(container, content) or has_changed
        return has_changed


def _can_be_copied(tensor: Tensor) -> bool:
    """Say whether a tensor has values, in memory of its own, that may be written to."""
    return type(tensor.data) is Tensor and not tensor.is_inference() and tensor.layout is torch.strided


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in TORCH_ATTRIBUTES}


def _are_same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[name] is value for name, value in before.items())


def _refill_(container: Any, before: Any) -> bool:
    """Put back what a container held, and say whether it held anything else."""
    if isinstance(container, dict):
        is_same = _are_same(container, before) and list(container) == list(before)
    elif isinstance(container, set):
        is_same = bool(container == before)
    else:
        is_same = len(container) == len(before) and all(now is one for now, one in zip(container, before, strict=True))
    if not is_same:
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(before)
    return not is_same
