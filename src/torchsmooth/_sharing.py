"""Who else holds a layer or its weight: replacing one holder's copy alone would leave the others with the old one."""

from __future__ import annotations

import functools
from collections import deque
from types import MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# What every module keeps: its children, parameters, hooks.
_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))
_DEEPEST = 8


class Sharing:
    """All holders of modules and tensors inside one model.

    Besides the tree that torch knows (children, parameters, buffers), a module may keep a layer or a tensor in a plain
    attribute, alone or inside containers, or as the owner of a bound method.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[nn.Module, str] = {}
        self._tensors: dict[int, list[tuple[int, int, str]]] = {}
        for name, owner in model.named_modules():
            prefix = f"{name}." if name else ""
            for own_name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                self._add(tensor, f"{prefix}{own_name}")
            for attribute, value in vars(owner).items():
                if attribute not in _TORCH_ATTRIBUTES:
                    for one in _reach(value, _DEEPEST):
                        if isinstance(one, nn.Module):
                            self._modules[one] = f"also held by the plain attribute {prefix}{attribute}"
                        else:
                            self._add(one, f"the plain attribute {prefix}{attribute}")
            compiled = owner._modules.get("_orig_mod")
            if compiled is not None:  # the wrapper calls the forward that it was made with, whatever its child is now
                self._modules[compiled] = "compiled by itself (compress first, then torch.compile)"

    def of_module(self, module: nn.Module) -> str:
        """Say who holds a module beside its parents in the tree; empty if nobody does."""
        return self._modules.get(module, "")

    def of_weight(self, weight: Tensor, name: str) -> str:
        """Say what else lies over the memory of a weight, itself known by ``name``; empty if nothing does."""
        storage, start, end = _span(weight)
        for other_start, other_end, other in self._tensors.get(storage, ()):
            if other != name and start < other_end and other_start < end:
                return f"weight is shared with {other}"
        return ""

    def check_replaceable(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Refuse, by name, modules whose replacement some holder would not see."""
        for name, module in modules:
            if self.of_module(module):
                raise ValueError(f"layer {name!r} cannot be replaced: it is {self.of_module(module)}.")

    def _add(self, tensor: Tensor | None, name: str) -> None:
        if tensor is not None and not nn.parameter.is_lazy(tensor):
            storage, start, end = _span(tensor)
            self._tensors.setdefault(storage, []).append((start, end, name))


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """Return the storage of a tensor and the bytes of it that it lies over, or stand-ins where it has none."""
    base = getattr(tensor, "data", tensor)
    if type(base) is not Tensor or tensor.layout is not torch.strided or not tensor.numel() or not tensor.data_ptr():
        return id(tensor), 0, 1
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr()
    return tensor.untyped_storage().data_ptr(), start, start + reach * tensor.element_size()


def _reach(value: Any, depth: int) -> Iterator[Any]:
    """Yield the modules and tensors that a plain attribute leads to, without entering modules."""
    inside: Iterable[Any] = ()
    if isinstance(value, (nn.Module, Tensor)):
        yield value
    elif isinstance(value, dict):
        inside = (*value.keys(), *value.values())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inside = value
    elif isinstance(value, MethodType):
        inside = (value.__self__,)
    elif isinstance(value, functools.partial):
        inside = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, SimpleNamespace):
        inside = vars(value).values()
    if depth:
        for one in inside:
            yield from _reach(one, depth - 1)
