"""Outputs of the parts of a network that will not change any more, so that they need not run again for every layer.

While a network is compressed layer after layer, the same batches go through it for each. What lies before the layer at
work puts out the same as the last time. A part whose layers are all done is called, but what it put out is returned in
place of running it. That holds for parts that do nothing but compute: those that draw random numbers, change what they
are given, take or return anything but tensors and numbers, have hooks, or are differentiated, run as ever.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ._random_state import RandomState, devices_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

# Bytes of outputs that are kept at most.
_AT_MOST = 1 << 30

_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout)


class _Kept(NamedTuple):
    output: Any
    size: int


class FinishedParts:
    """Outputs of parts of one model, batch by batch.

    Memory: 1 GiB of outputs at most; parts that do not fit are run.

    Args:
        model: the model.

    Attributes:
        used: whether any output was returned in place of running a part.
    """

    def __init__(self, model: nn.Module) -> None:
        self.used = False
        self._model, self._devices = model, devices_of(model)
        self._kept: dict[int, dict[nn.Module, _Kept]] = {}
        self._size = 0
        self._given_up = False

    def give_up(self) -> None:
        """Run everything from now on."""
        self._kept, self._size, self._given_up = {}, 0, True

    @contextmanager
    def in_place(self, batch: int, unfinished: Collection[nn.Module]) -> Iterator[None]:
        """Let parts that were finished when the batch came the last time return what they put out then.

        Args:
            batch: its number.
            unfinished: layers and norms that are still to change; nothing that runs after the first of them is kept.
        """
        if self._given_up or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            yield
            return
        kept = self._kept.setdefault(batch, {})
        met: set[nn.Module] = set()
        still_to_change: list[nn.Module] = []  # what has run of that, in this run

        def note(module: nn.Module, _: Any) -> None:
            still_to_change.append(module)

        def forward_of(part: nn.Module) -> Callable[..., Any]:
            compute = part.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                may_stand_in = part not in met and not _may_differentiate()
                met.add(part)
                if may_stand_in and part in kept:
                    self.used = True
                    return _copied(kept[part].output)
                given = _plain_tensors_in((args, *kwargs.values()))
                if not may_stand_in or still_to_change or given is None:
                    return compute(*args, **kwargs)
                versions, random = [one._version for one in given], RandomState.now(self._devices)
                output = compute(*args, **kwargs)
                if versions == [one._version for one in given] and random.is_as(RandomState.now(self._devices)):
                    self._keep(kept, part, output, given)
                return output

            return forward

        parts = _parts(self._model, set(unfinished))
        with ExitStack() as stack:
            for module in unfinished:
                stack.callback(module.register_forward_pre_hook(note, prepend=True).remove)
            for part in parts:
                vars(part)["forward"] = forward_of(part)
                stack.callback(vars(part).pop, "forward")
            yield

    def _keep(self, kept: dict[nn.Module, _Kept], part: nn.Module, output: Any, given: list[Tensor]) -> None:
        """Keep an output in place of those of the parts of the part, if there is room."""
        tensors = _plain_tensors_in((output,))
        if not tensors or any(one.requires_grad for one in tensors):  # a copy would have no graph
            return
        storages = [one.untyped_storage().data_ptr() for one in tensors]
        if len({*storages}) < len(storages) or any(one.untyped_storage().data_ptr() in storages for one in given):
            return  # as copies they would not change together
        inner = [one for one in part.modules() if one in kept]
        size = sum(one.numel() * one.element_size() for one in tensors)
        growth = size - sum(kept[one].size for one in inner)
        if self._size + growth > _AT_MOST:
            return
        for one in inner:
            del kept[one]
        kept[part] = _Kept(_copied(output), size)
        self._size += growth


def _parts(model: nn.Module, unfinished: Collection[nn.Module]) -> list[nn.Module]:
    """Return the modules that are worth keeping the outputs of, and safe: no hook in them, nothing that will change."""
    parts: list[nn.Module] = []
    safe: dict[nn.Module, bool] = {}
    for module in reversed(list(model.modules())):  # children before their parents
        safe[module] = (
            module not in unfinished
            and not module._forward_hooks
            and not module._forward_pre_hooks
            and not isinstance(module, torch.jit.ScriptModule)
            and "forward" not in vars(module)
            and all(safe.get(child, False) for child in module.children())
        )
        if safe[module] and module is not model and any(one.dim() > 1 for one in module.parameters()):
            parts.append(module)
    return parts


def _may_differentiate() -> bool:
    """Say whether the model, which runs without gradients, takes some within: an output that is kept has no graph."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _plain_tensors_in(values: tuple[Any, ...]) -> list[Tensor] | None:
    """Return the tensors of nested tuples; None if there is anything else that could be changed or cannot be copied."""
    tensors: list[Tensor] = []
    for value in values:
        if type(value) in {Tensor, nn.Parameter}:
            is_mapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
            if is_mapped or value.is_inference() or value.layout is not torch.strided or value.is_nested:
                return None
            tensors.append(value)
        elif type(value) is tuple:
            inner = _plain_tensors_in(value)
            if inner is None:
                return None
            tensors += inner
        elif not isinstance(value, _NUMBERS):
            return None
    return tensors


def _copied(output: Any) -> Any:
    """Copy the tensors in nested tuples: who gets them may write into them."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_copied, output)) if type(output) is tuple else output
