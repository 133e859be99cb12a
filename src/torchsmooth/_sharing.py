"""Who else holds a layer or its weight: replacing one holder's copy alone would leave the others with the old one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._contents import TORCH_ATTRIBUTES, behind_proxy, contents, package_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# How names of plain attributes begin.
_PLAIN = "the plain attribute "


class Sharing:
    """All holders of modules and tensors inside one model.

    Besides the tree that torch knows (children, parameters, buffers), a module may keep a layer or a tensor in a plain
    attribute: alone, inside containers, weak references, modules outside of the tree or objects whose classes come from
    the same package as the module's, or as the owner of a bound method. Nothing else is looked into, such as closures,
    classes and objects of other packages.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[nn.Module, str] = {}
        self._tensors: dict[int, list[tuple[int, int, str]]] = {}
        tree = set(model.modules())
        seen: dict[int, Any] = {}
        for name, owner in model.named_modules():
            prefix = f"{name}." if name else ""
            for own_name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                self._add(tensor, f"{prefix}{own_name}")
            for attribute, value in vars(owner).items():
                if attribute not in TORCH_ATTRIBUTES:
                    for one in _reach(value, seen, tree, package_of(owner)):
                        if isinstance(one, nn.Module):
                            self._modules[one] = f"also held by {_PLAIN}{prefix}{attribute}"
                        else:
                            self._add(one, f"{_PLAIN}{prefix}{attribute}")
            compiled = owner._modules.get("_orig_mod")
            if compiled is not None:  # the wrapper calls the forward that it was made with, whatever its child is now
                self._modules[compiled] = "compiled by itself (compress first, then torch.compile)"

    def of_module(self, module: nn.Module) -> str:
        """Say who holds a module beside its parents in the tree; empty if nobody does."""
        return self._modules.get(module, "")

    def of_weight(self, weight: Tensor, name: str, layer: str | None = None) -> str:
        """Say what else lies over the memory of a weight, itself known by ``name``; empty if nothing does.

        Plain attributes of ``layer`` do not count: a recurrent layer lists its weights in one.
        """
        storage, start, end = span_of(weight)
        own = None if layer is None else f"{_PLAIN}{layer}."
        for other_start, other_end, other in self._tensors.get(storage, ()):
            if own is not None and other.startswith(own):
                continue
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
            storage, start, end = span_of(tensor)
            self._tensors.setdefault(storage, []).append((start, end, name))


def names_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the names of each module of a model, all of those that are in it more than once."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def span_of(tensor: Tensor) -> tuple[int, int, int]:
    """Return the storage of a tensor and the bytes of it that it lies over, or stand-ins where it has none."""
    if type(tensor.data) is not Tensor or tensor.is_nested or tensor.layout is not torch.strided:
        return id(tensor), 0, 1
    if not tensor.numel() or not tensor.data_ptr():
        return id(tensor), 0, 1
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr()
    return tensor.untyped_storage().data_ptr(), start, start + reach * tensor.element_size()


def _reach(value: Any, seen: dict[int, Any], tree: set[nn.Module], package: str) -> Iterator[Any]:
    """Yield the modules of the tree and the tensors that a plain attribute leads to.

    Modules of the tree are not entered: whoever asks them for a child gets the replacement. ``seen`` is shared by all
    attributes and keeps what it has seen alive, so that no identity is given out twice.
    """
    todo = [value]
    while todo:
        one = behind_proxy(todo.pop())
        if isinstance(one, Tensor) or (isinstance(one, nn.Module) and one in tree):
            yield one
        elif id(one) not in seen:
            inside = contents(one, package)
            if inside is not None:
                seen[id(one)] = one
                todo.extend(inside)
