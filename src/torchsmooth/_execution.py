"""How a low-rank layer is run: from its factors as they are stored, or by a module that was derived from them.

What is derived (a merged weight, or the factors in the other form) belongs to no module tree: it is no part of the
state dict, of ``parameters()`` or of ``modules()``, so what is saved, counted and quantised stays small. It is used
only where it gives what the factors would: in eval mode, where no gradient of the factors is wanted, and as long as
nobody has changed them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

Execution = Literal["factored", "pivoted", "padded", "packed", "dense", "packed_dense", "fused"]

EXECUTIONS: tuple[str, ...] = get_args(Execution)

# What is exported holds the parameters of the model and nothing beside them.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)

# Text, and private to this library, so that a replacement of the layer does not take it over.
_PLACE = "_torchsmooth_derived"


class _Source(NamedTuple):
    """A tensor that a derived module was made of: whose it is, where it lies, what changes when it is written to."""

    child: str
    owner: nn.Module
    hooks: Mapping[int, Any]  # of the owner, as is the next: found once, for it takes a while
    pre_hooks: Mapping[int, Any]
    place: Mapping[str, Tensor | None]
    key: str
    tensor: Tensor
    address: int
    version: int | None

    def renewed(self) -> _Source:
        """Take note of the tensor as it is now."""
        tensor = self.tensor
        return self._replace(address=tensor.data_ptr(), version=None if tensor.is_inference() else tensor._version)


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
    """

    # In one piece, as each call of the layer looks at it.
    __slots__ = ("_doubt", "_modules", "_sources", "execution", "module", "run", "suits", "together", "traced")

    run: Callable[..., Tensor]
    suits: Callable[[Tensor], bool] | None
    traced: Callable[..., Tensor] | None

    def __init__(self, execution: str, module: nn.Module, layer: nn.Module) -> None:
        self.execution, self.module = execution, module
        self.together: Any = None  # by :mod:`_together`
        self.rewire_()
        self._modules = layer._modules
        self._doubt: list[float] | None = None
        # None once the factors are not those any more that this was made of.
        self._sources: tuple[_Source, ...] | None = tuple(
            _Source(child, owner, owner._forward_hooks, owner._forward_pre_hooks, place, key, tensor, 0, 0).renewed()
            for child, owner in layer._modules.items()
            if owner is not None
            for place in (owner._parameters, owner._buffers)
            for key, tensor in place.items()
            if tensor is not None
        )

    def is_fresh(self) -> bool:
        """Say whether the factors are those that this was made of."""
        if self._sources is None:
            return False
        # At each call of the layer, so without a step too many.
        modules = self._modules
        for child, owner, hooks, pre_hooks, place, key, tensor, address, version in self._sources:
            if modules.get(child) is not owner or hooks or pre_hooks:
                return False  # put elsewhere; or hooks, which would not be called
            if place.get(key) is not tensor or tensor.data_ptr() != address:
                return False
            if version is not None and tensor._version != version:
                return False
        return self._doubt is None or self._doubt == self._sums()

    # Not traced by torch.compile, but asked once: a compiled graph holds the tensors that it was made with.
    is_fresh._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def doubt_(self) -> None:
        """Look at the values of the factors next time: a fused optimizer writes to them without a new version."""
        if self._doubt is None and nobody_watches() and self.is_fresh():
            self._doubt = self._sums()

    def settle_(self) -> None:
        """Trust the factors again, or never more, if they are others."""
        if self._doubt is not None:
            self._sources = self._sources if self.is_fresh() else None
            self._doubt = None

    @torch.no_grad()
    def _sums(self) -> list[float]:
        tensors = [one.tensor.detach().double() for one in self._sources or ()]
        return torch.stack([one for each in tensors for one in (each.sum(), each.square().sum())]).tolist()

    def can_be_traced(self) -> bool:
        """Say whether there is something that ``torch.compile`` can trace, made when it is asked for."""
        self.traced = self.traced or cast("Any", self.module).traced()
        return self.traced is not None and self.is_fresh()

    can_be_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def need_gradients(self) -> bool:
        """Say whether a gradient of the factors may be asked for, where gradients are recorded."""
        return any(source.tensor.requires_grad for source in self._sources or ())

    def rewire_(self) -> None:
        """Take note of what is to be called, once the module or its parameters are others."""
        self.run, self.suits, self.traced = _direct(self.module), getattr(self.module, "suits", None), None

    def renew_(self, *, fresh: bool) -> None:
        """Take note of where the factors are now, unless this did not belong to them any more."""
        self.together = None  # what is moved or copied does not lie side by side any more
        known = self._sources if fresh else None
        self._sources = known and tuple(one.renewed() for one in known)
        self._doubt = None
        self.rewire_()

    def __getstate__(self) -> dict[str, Any]:
        made = {"run", "suits", "traced", "_doubt"}
        state = {name: getattr(self, name) for name in self.__slots__ if name not in made}
        return state | {"_sources": self._sources if self.is_fresh() else None, "together": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        # Copies lie elsewhere, and where they are loaded there may be no kernels for them.
        self.renew_(fresh=getattr(self.module, "has_kernels", True))


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
    if derived is None or _is_exporting():
        return None
    if torch.is_grad_enabled() and derived.need_gradients():
        if not torch.compiler.is_compiling():
            derived.doubt_()
        return None
    if layer.training:
        return None
    if derived._doubt is not None and not torch.compiler.is_compiling():
        derived.settle_()
    if derived.suits is not None:
        if torch.compiler.is_compiling():
            return derived.traced if derived.can_be_traced() else None
        if not derived.suits(input):
            return None
    return derived.run if derived.is_fresh() else None


def nobody_watches() -> bool:
    """Say whether operators are just run: neither counted, nor traced, nor transformed by ``torch.func``."""
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
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
