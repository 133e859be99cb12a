"""What a model keeps from one call to the next, beside its parameters: caches, hidden states, counters, queues."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._contents import OTHERS, TORCH_ATTRIBUTES, behind_proxy, is_own_object, package_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

# Layers of torch keep nothing, but models put things there; its wrappers keep what nobody should meddle with.
_LAYERS = "torch.nn.modules."

# Entries of a container: what has more is a table, such as a vocabulary, and would take its time at each run.
_LARGEST = 10_000

_CONTAINERS = (list, dict, set, deque)


class KeptState:
    """The buffers of a model, and what layers and modules of the user's hold in plain attributes, as they are now.

    Plain attributes are followed into lists, dictionaries, sets, tuples, and objects whose classes come from the same
    package as the module's, to the tensors and random generators that they hold.

    Args:
        model: any model.
        but: modules whose buffers are left alone.
        everywhere: also the plain attributes of torch's wrappers: what traces a model puts things there.
    """

    def __init__(self, model: nn.Module, but: Collection[nn.Module] = (), *, everywhere: bool = False) -> None:
        modules = list(model.modules())
        self._buffers = [(one._buffers, dict(one._buffers)) for one in modules if one not in but]
        tensors = {id(one): one for _, buffers in self._buffers for one in buffers.values() if one is not None}
        left_out = {id(one) for module in modules for one in (*module._parameters.values(), *module._buffers.values())}
        own = [one for one in modules if everywhere or _may_be_put_back(one)]
        self._attributes = [(vars(one), _plain(vars(one))) for one in own]
        self._containers: list[tuple[Any, Any]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        seen: dict[int, Any] = {}
        for module, (_, plain) in zip(own, self._attributes, strict=True):
            for one in _reach(plain.values(), seen, package_of(module)):
                if isinstance(one, Tensor):
                    if id(one) not in left_out and not isinstance(one, nn.Parameter):
                        tensors[id(one)] = one
                elif isinstance(one, torch.Generator):
                    self._generators.append((one, one.get_state()))
                else:
                    self._containers.append((one, one.copy()))
        self._tensors = [_Copied(one) for one in tensors.values() if _can_be_copied(one)]

    @torch.no_grad()
    def put_back_(self) -> bool:
        """Make all of it what it was, and say whether any of it was not."""
        changes = [
            *[_refill_(buffers, before) for buffers, before in self._buffers],
            *[_set_(attributes, plain) for attributes, plain in self._attributes],
            *[_refill_(container, content) for container, content in self._containers],
        ]
        changes += [one.put_back_() for one in self._tensors]
        for generator, state in self._generators:
            if not torch.equal(generator.get_state(), state):
                generator.set_state(state)
                changes.append(True)
        return any(changes)


class _Copied:
    """A tensor and the values that it had."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._values = tensor, tensor.detach().clone()
        self._as_it_is = tensor.data_ptr(), tensor._version

    def put_back_(self) -> bool:
        tensor = self._tensor
        has_changed = (tensor.data_ptr(), tensor._version) != self._as_it_is
        if has_changed:
            tensor.copy_(self._values)
            self._as_it_is = tensor.data_ptr(), tensor._version
        return has_changed


def _can_be_copied(tensor: Tensor) -> bool:
    """Say whether a tensor has values, in memory of its own, that may be written to."""
    return type(tensor.data) is Tensor and not tensor.is_inference() and tensor.layout is torch.strided


def _may_be_put_back(module: nn.Module) -> bool:
    return type(module).__module__.startswith(_LAYERS) or package_of(module) not in OTHERS


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in TORCH_ATTRIBUTES}


def _reach(values: Iterable[Any], seen: dict[int, Any], package: str) -> Iterable[Any]:
    """Yield the tensors, the generators and the containers that values lead to, each once.

    ``seen`` keeps what has been seen alive, so that no identity is given out twice. Of an object, what is yielded is
    the dictionary of its attributes. Modules are not entered: those of the model are looked at by themselves.
    """
    todo = list(values)
    while todo:
        one = behind_proxy(todo.pop())
        if id(one) in seen or isinstance(one, nn.Module):
            continue
        if isinstance(one, (Tensor, torch.Generator)):
            seen[id(one)] = one
            yield one
        elif isinstance(one, (*_CONTAINERS, tuple)):
            if len(one) <= _LARGEST:
                seen[id(one)] = one
                todo.extend(one.values() if isinstance(one, dict) else one)
                if not isinstance(one, tuple):
                    yield one
        elif is_own_object(one, package) and isinstance(getattr(one, "__dict__", None), dict):
            seen[id(one)] = one
            todo.append(vars(one))


def _are_same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[name] is value for name, value in before.items())


def _set_(attributes: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Put back the plain attributes of a module, and say whether they were others."""
    now = _plain(attributes)
    is_same = _are_same(now, plain)
    if not is_same:
        for name in now:
            del attributes[name]
        attributes.update(plain)
    return not is_same


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
