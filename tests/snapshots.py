"""Everything that an error must leave as it was: more than values, down to the entries of every module's dictionary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator


_PLAIN = (bool, int, float, str, tuple)


def bits(tensor: Tensor) -> Tensor | None:
    """Return a copy of the bits of a tensor; None if it has no values."""
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return None
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        return torch.cat([bits(tensor._indices()), bits(tensor._values())])
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.contiguous().flatten().view(torch.uint8).clone()


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    """Compare copies of bits."""
    return one is other if one is None or other is None else torch.equal(one, other)


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Compare state dicts: keys in order, shapes, dtypes and bits."""
    return list(one) == list(other) and all(
        value.shape == other[key].shape and value.dtype == other[key].dtype and same_bits(bits(value), bits(other[key]))
        for key, value in one.items()
    )


def _reach(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield what a dictionary entry of a module holds, containers opened."""
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _reach(inner, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from _reach(inner, f"{path}[{place}]")
    elif isinstance(value, SimpleNamespace):
        yield from _reach(vars(value), path)


class Snapshot:
    """A model as it is now, to be compared with what it is later.

    All objects are kept alive, so that an identity is not given out twice.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._random = torch.get_rng_state()
        self._objects = list(self._walk())
        self._tensors = {
            id(value): (path, value, self._look(value), bits(value))
            for path, value in self._objects
            if isinstance(value, Tensor)
        }

    def _walk(self) -> Iterator[tuple[str, Any]]:
        seen = set()
        for name, module in self._model.named_modules(remove_duplicate=False):
            yield name, module
            if module not in seen:
                seen.add(module)
                yield f"{name}: class", type(module)
                for key, value in vars(module).items():
                    yield from _reach(value, f"{name}: {key}")

    @staticmethod
    def _look(tensor: Tensor) -> Any:
        if nn.parameter.is_lazy(tensor):
            return None
        strided = tensor.layout is torch.strided
        place = (tensor.stride(), tensor.storage_offset(), tensor.untyped_storage().data_ptr()) if strided else None
        grad = tensor.grad if tensor.is_leaf else None
        return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, place, id(grad)

    def difference(self) -> str:
        """Say what is not as it was; empty if all is."""
        if not torch.equal(torch.get_rng_state(), self._random):
            return "the random state"
        now = list(self._walk())
        for (path, value), (new_path, new) in zip(self._objects, now, strict=False):
            if path != new_path:
                return f"{path} has become {new_path}"
            if new is not value and not (isinstance(value, _PLAIN) and type(new) is type(value) and new == value):
                return path
        if len(now) != len(self._objects):
            return f"{len(self._objects)} entries have become {len(now)}"
        for path, tensor, look, before in self._tensors.values():
            if self._look(tensor) != look or not same_bits(bits(tensor), before):
                return f"values or layout of {path}"
        return ""
