"""What a value that a module keeps in a plain attribute holds itself, so that layers and tensors are found inside."""

from __future__ import annotations

import functools
import weakref
from collections import UserDict, UserList, deque
from types import MappingProxyType, MemberDescriptorType, MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# What every module keeps: its children, parameters, hooks.
TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))

# Packages whose objects are nobody's own.
OTHERS = ("torch", __name__.partition(".")[0])

# Containers written in Python, around another one.
_WRITTEN_IN_PYTHON = (UserDict, UserList, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)


def package_of(value: object) -> str:
    """Return the package that the class of a value comes from."""
    return type(value).__module__.partition(".")[0]


def is_own_object(value: object, package: str) -> bool:
    """Say whether a value is an object that belongs to modules of a package: its class comes from there, too."""
    return isinstance(value, SimpleNamespace) or package_of(value) == package not in OTHERS


def behind_proxy(value: Any) -> Any:
    """Return what a ``weakref.proxy`` refers to, for which it passes but cannot be hashed; anything else as it is."""
    if type(value) not in weakref.ProxyTypes:
        return value
    try:
        return getattr(value.__str__, "__self__", None)  # that of a class is a function, and of no module
    except ReferenceError:  # nothing any more
        return None


def contents(value: Any, package: str) -> Iterable[Any] | None:
    """List what a value holds, if it is of a kind that can be looked into.

    Args:
        value: anything.
        package: that of the module which keeps it.
    """
    if type(value) in (str, int, float):  # most of what large tables hold
        return None
    if isinstance(value, nn.Module):
        plain = (one for name, one in vars(value).items() if name not in TORCH_ATTRIBUTES)
        return (*value._modules.values(), *value._parameters.values(), *value._buffers.values(), *plain)
    if isinstance(value, (dict, MappingProxyType)):
        return (*value.keys(), *value.values(), *_attributes(value, package))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return (*value, *_attributes(value, package))
    if isinstance(value, _WRITTEN_IN_PYTHON):
        return vars(value).values()
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, (MethodType, weakref.ref)):
        return (value.__self__ if isinstance(value, MethodType) else value(),)
    if package_of(value) == "numpy" and str(getattr(value, "dtype", "")) == "object":
        return list(value.ravel())
    return tuple(_attributes(value, package)) if is_own_object(value, package) else None


def _attributes(value: Any, package: str) -> Iterator[Any]:
    """Yield what an object has in attributes and slots; nothing of one of another package."""
    if not is_own_object(value, package):
        return
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        yield from own.values()
    for cls in type(value).__mro__:
        for member in vars(cls).values():
            if isinstance(member, MemberDescriptorType):
                try:
                    yield member.__get__(value)
                except AttributeError:  # not set
                    continue
