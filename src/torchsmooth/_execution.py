"""How a low-rank layer is run: from its factors as they are stored, or by a module that was derived from them.

What is derived (a merged weight, or the factors in the other form) belongs to no module tree: it is no part of the
state dict, of ``parameters()`` or of ``modules()``, so what is saved, counted and quantised stays small. It is used
only where it gives what the factors would: in eval mode, where no gradient of the factors is wanted, and as long as
nobody has changed them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._stepped import watch_steps_

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Execution = Literal["factored", "pivoted", "padded", "packed", "dense", "packed_dense", "fused"]

EXECUTIONS: tuple[str, ...] = get_args(Execution)

# What is exported holds the parameters of the model and nothing beside them.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
# Faster than is_compiling, and the same here.
_is_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling
_tracing_state: Callable[[], object] = torch._C._get_tracing_state

# The parameters or buffers of a module.
_Place: TypeAlias = dict[str, Tensor | None]

# A tensor that a derived module was made of: whose it is, where it lies, what changes when it is written to.
_Factor: TypeAlias = tuple[_Place, str, Tensor, int, int]

# A child of a layer, and what would be called with it.
_Child: TypeAlias = tuple[str, nn.Module, dict[int, Any], dict[int, Any], dict[str, Any]]

# Text, and private to this library, so that a replacement of the layer does not take it over.
_PLACE = "_torchsmooth_derived"


class Derived:
    """A module that computes what a layer computes, and what it was made of.

    Args:
        execution: how it does that.
        module: the module, in eval mode, with parameters that need no gradient.
        layer: the layer that it was derived from.

    Attributes:
        run: what to call instead of the layer's own way. The module has no hooks, so it need not be called itself.
        suits: says of an input whether it can be run like this; None where each can.
        traced: what ``torch.compile`` takes instead where it cannot trace ``run``.
        outdated: whether the factors are known to be others for good. A graph of ``torch.compile`` is made anew once
            this changes.
    """

    run: Callable[..., Tensor]
    suits: Callable[[Tensor], bool] | None
    traced: Callable[..., Tensor] | None

    def __init__(self, execution: str, module: nn.Module, layer: nn.Module) -> None:
        self.execution, self.module = execution, module
        self.together: Any = None  # by :mod:`_together`
        self.rewire_()
        self.outdated = False
        # What each call of the layer looks at, found once and in plain tuples, which are faster than named ones.
        self._modules = layer._modules
        children = [(name, one) for name, one in layer._modules.items() if one is not None]
        self._children = _as_they_are_called(children)
        owned = [cast("_Place", place) for _, one in children for place in (one._parameters, one._buffers)]
        places = [(place, key) for place in owned for key in place]
        self._factors = _as_they_are((place, key, place[key]) for place, key in places if place[key] is not None)
        # Such as a bias, which may still come.
        self._absent = tuple((place, key) for place, key in places if place[key] is None)
        watch_steps_(self)

    def is_fresh(self) -> bool:
        """Say whether the factors are those that this was made of."""
        if self.outdated:
            return False
        # At each call of the layer, so without a step too many.
        modules = self._modules
        for name, module, hooks, pre_hooks, own in self._children:
            if modules.get(name) is not module or hooks or pre_hooks or "forward" in own:
                return False  # put elsewhere; or what would not be called
        for place, key in self._absent:
            if place.get(key) is not None:
                return False
        for place, key, tensor, address, version in self._factors:
            if place.get(key) is not tensor or tensor.data_ptr() != address:
                return False
            if tensor._version != version:
                return False
        return True

    # Not traced by torch.compile, but asked once: a compiled graph holds the tensors that it was made with.
    is_fresh._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def can_be_traced(self) -> bool:
        """Say whether there is something that ``torch.compile`` can trace, made when it is asked for."""
        self.traced = self.traced or cast("Any", self.module).traced()
        return self.traced is not None and self.is_fresh()

    can_be_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def need_gradients(self) -> bool:
        """Say whether a gradient of the factors may be asked for, where gradients are recorded."""
        return any(tensor.requires_grad for _, _, tensor, _, _ in self._factors)

    def made_of(self) -> list[Tensor]:
        """Return the tensors that this was made of."""
        return [tensor for _, _, tensor, _, _ in self._factors]

    def outdate_(self) -> None:
        """Take note that the factors were changed, or that nobody could see it if they were."""
        self.outdated, self._factors = True, ()

    def rewire_(self) -> None:
        """Take note of what is to be called, once the module or its parameters are others."""
        self.run, self.suits, self.traced = _direct(self.module), getattr(self.module, "suits", None), None

    def renew_(self, *, fresh: bool) -> None:
        """Take note of where the factors are now, unless this did not belong to them any more."""
        self.together = None  # what is moved or copied does not lie side by side any more
        if fresh and not any(map(torch.is_inference, self.made_of())):  # those have no versions
            self._factors = _as_they_are((place, key, tensor) for place, key, tensor, _, _ in self._factors)
        else:
            self.outdate_()
        self.rewire_()

    def __getstate__(self) -> dict[str, Any]:
        state = {name: one for name, one in vars(self).items() if name not in ("run", "suits", "traced")}
        children = [(name, one) for name, one, *_ in self._children]
        return state | {"outdated": not self.is_fresh(), "together": None, "_children": children}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._children = _as_they_are_called(state["_children"])
        # Copies lie elsewhere, and where they are loaded there may be no kernels for them.
        self.renew_(fresh=not self.outdated and getattr(self.module, "has_kernels", True))
        watch_steps_(self)


def _as_they_are_called(children: Iterable[tuple[str, nn.Module]]) -> tuple[_Child, ...]:
    return tuple((name, one, one._forward_hooks, one._forward_pre_hooks, vars(one)) for name, one in children)


def _as_they_are(factors: Iterable[tuple[_Place, str, Any]]) -> tuple[_Factor, ...]:
    return tuple((place, key, tensor, tensor.data_ptr(), tensor._version) for place, key, tensor in factors)


def derived_of(layer: nn.Module) -> Derived | None:
    """Return what was derived from a layer, used or not."""
    derived: Derived | None = layer.__dict__.get(_PLACE)
    return derived


def use_(layer: nn.Module, derived: Derived | None) -> None:
    """Run a layer by what was derived from it; None: by its factors as they are stored."""
    if derived is None:
        layer.__dict__.pop(_PLACE, None)
    else:
        layer.__dict__[_PLACE] = derived


def active(layer: nn.Module, input: Tensor) -> Callable[..., Tensor] | None:  # noqa: A002 - as torch's layers have it
    """Return what to run on an input instead of the factors, if there is one and it would give what they give."""
    # As little as will do: in a model, all that is looked at here comes from memory again at each call.
    derived: Derived | None = layer.__dict__.get(_PLACE)
    if derived is None or layer.training or derived.outdated:
        return None
    # A trace holds the parameters of the model, as an export does; a symbolic one gives no tensors.
    if _is_exporting() or _tracing_state() is not None or not isinstance(input, Tensor):
        return None
    if torch.is_grad_enabled() and derived.need_gradients():
        return None
    if _is_compiling():
        return _active_in_a_graph(derived)
    if derived.suits is not None and not derived.suits(input):
        return None
    return derived.run if derived.is_fresh() else None


def _active_in_a_graph(derived: Derived) -> Callable[..., Tensor] | None:
    # What is compared here is compared again at each call of the graph, unlike what is_fresh looks at.
    for place, key, tensor, _, _ in derived._factors:
        if place.get(key) is not tensor:
            return None
    if derived.suits is not None:
        return derived.traced if derived.can_be_traced() else None
    return derived.run if derived.is_fresh() else None


def nobody_watches() -> bool:
    """Say whether operators are just run: neither counted, nor traced, nor transformed by ``torch.func``."""
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._len_torch_dispatch_stack()
        and _tracing_state() is None
    )


def _direct(module: nn.Module) -> Callable[..., Tensor]:
    """Return what a module computes, without what it asks itself at each call where that can be left out."""
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if type(module) is nn.Conv2d and module.padding_mode == "zeros":
        names = ("weight", "bias", "stride", "padding", "dilation", "groups")
        return partial(torch.conv2d, **{name: getattr(module, name) for name in names})
    forward: Callable[..., Tensor] = module.forward
    return forward
