"""Measured times of a model, of its layers, and of the low-rank layers that could take their place."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ._layers import KINDS, weight_of
from ._prices import TimePrices
from ._progress import progress
from ._running import check_not_mapped, observing
from ._swap import swap_
from ._timing import median_nanoseconds
from ._undo import Undo
from ._weight_reads import watching_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from ._expansion import Expansion
    from ._matricise import Form, LayerScheme
    from ._running import Inputs
    from ._tucker_layout import Rank
    from .layer_plan import LayerPlan

_GRID = 6  # ranks tried in each scheme and form
_PAIRS = 9  # the same for pairs of ranks

_Times = dict[tuple["LayerScheme", "Form"], dict["Rank", int]]


class Calls(NamedTuple):
    """What a layer was called with first, how often it was called, and the dtype of autocast there, if it was on."""

    args: tuple[Any, ...]
    times: int
    autocast: torch.dtype | None = None

    def alike(self) -> AbstractContextManager[Any]:
        """Return what makes operators run as they did in the model."""
        if self.autocast is None:
            return nullcontext()
        device = next(one.device.type for one in self.args if isinstance(one, Tensor))
        return torch.autocast(device, dtype=self.autocast, cache_enabled=False)


def measure_times(
    model: nn.Module,
    inputs: Inputs,
    layers: Mapping[str, tuple[LayerPlan, nn.Module]],
    *,
    multiple: int,
    show: bool | None,
) -> tuple[int, dict[str, TimePrices], Mapping[nn.Module, int]]:
    """Time a model, and for each layer what it takes dense and at a few ranks of every scheme and form.

    Args:
        model: any model.
        inputs: arguments for it.
        layers: the layers to look at and their modules, by name.
        multiple: only ranks that are multiples of this; 0: of what suits each.
        show: whether to show progress; None for where somebody looks.

    Returns:
        Nanoseconds of the model; the prices of each layer, for all of its calls together; and how often the model reads
        the weights of layers, which is part of the prices. Those of a layer that is never called are zero. Those of all
        layers add up to no more than the time of the model.
    """
    known: dict[object, tuple[int, _Times]] = {}
    measured: dict[str, tuple[int, int, _Times]] = {}
    with observing(model):
        device = device_of(model)
        (whole,) = median_nanoseconds([partial(inputs.run, model)], device)
        names = {module: name for name, (_, module) in layers.items()}
        with watching_weights(names) as reads:
            calls = observe_calls(model, inputs, names, before_another=reads.clear)
        for name, (layer, module) in progress(layers.items(), "Timing layers", len(layers), show):
            if module not in calls:
                measured[name] = 0, 0, {}
                continue
            called = calls[module]
            reads_of_call = reads[module] / called.times
            key = _alike(module, called.args), called.autocast, reads_of_call
            if key not in known:
                with called.alike():
                    known[key] = _measure(layer, module, called.args, multiple, reads_of_call)
            measured[name] = called.times, *known[key]
    together = sum(count * dense for count, dense, _ in measured.values())
    share = min(1.0, whole / together) if together else 1.0  # timed alone, layers may take longer than in the model

    def total(count: int, time: int) -> int:
        return round(share * count * time)

    prices = {
        name: TimePrices(
            total(count, dense),
            {key: {rank: total(count, time) for rank, time in each.items()} for key, each in times.items()},
        )
        for name, (count, dense, times) in measured.items()
    }
    return whole, prices, reads


def compare_times(
    model: nn.Module, inputs: Inputs, replacements: Mapping[nn.Module, nn.Module], expansion: Expansion
) -> tuple[float, float]:
    """Time a model as it was given against itself with some layers replaced, in alternating runs.

    Args:
        model: a model, expanded; afterwards, and after an error, it is as before.
        inputs: arguments for it.
        replacements: old module to new module.
        expansion: what was expanded.

    Returns:
        Seconds before and after.
    """
    back = {new: old for old, new in replacements.items()}

    def as_it_was() -> None:
        swap_(model, back)
        expansion.take_out_()

    def low_rank() -> None:
        expansion.put_back_()
        swap_(model, replacements)

    ready: list[Callable[[], object]] = [as_it_was, low_rank]
    everything = nn.ModuleList([model, *replacements.values(), *expansion.originals])
    with Undo() as undo:
        undo.add(swap_, model, back)
        undo.add(expansion.put_back_)  # which is run before that
        with observing(everything):
            run = partial(inputs.run, model)
            before, after = median_nanoseconds([run, run], device_of(model), ready)
    return before / 1e9, after / 1e9


def device_of(model: nn.Module) -> torch.device:
    """Return where a model computes."""
    return next((one.device for one in model.parameters()), torch.device("cpu"))


def observe_calls(
    model: nn.Module, inputs: Inputs, names: Mapping[Any, str], before_another: Callable[[], object] | None = None
) -> dict[nn.Module, Calls]:
    """Run a model, and note what some of its modules, known by these names, were called with.

    Where it has to be run a second time, ``before_another`` is called first.
    """
    found: dict[nn.Module, Calls] = {}
    by_keyword: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module not in names:
            return
        if not args:
            by_keyword.add(module)
            return
        check_not_mapped(names[module], args[0])
        device = next((one.device.type for one in args if isinstance(one, Tensor)), "cpu")
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        first = found.get(module, Calls(args, 0, dtype))
        found[module] = first._replace(times=first.times + 1)

    # A hook for all modules: hooks of its own would keep nn.TransformerEncoderLayer from running its layers fused, and
    # what is fused gets no faster by a low-rank layer.
    handle = register_module_forward_pre_hook(note)
    try:
        inputs.run(model)
    finally:
        handle.remove()
    if by_keyword:  # which hooks for all modules are not given
        with ExitStack() as stack:
            for module in by_keyword:
                hook = module.register_forward_pre_hook(
                    lambda module, args, kwargs: note(module, args or (kwargs["input"],)), with_kwargs=True
                )
                stack.callback(hook.remove)
                found.pop(module, None)
            if before_another is not None:
                before_another()
            inputs.run(model)
    return found


def layout_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return how the tensors among some arguments lie in memory; of nested ones, all of their sizes."""
    return tuple(
        (str(one._nested_tensor_size()) if one.layout is torch.strided else tuple(one.values().shape), one.dtype)
        if one.is_nested
        else (tuple(one.shape), one.stride(), one.dtype)
        for one in args
        if isinstance(one, Tensor)
    )


def _alike(module: nn.Module, args: tuple[Any, ...]) -> object:
    """Return a key that layers share which take equally long."""
    weight = weight_of(module)
    return type(module), module.extra_repr(), layout_of(args), weight.dtype, weight.stride(), weight.device


def _measure(
    layer: LayerPlan, module: nn.Module, args: tuple[Any, ...], multiple: int, reads: float
) -> tuple[int, _Times]:
    """Time one call of a layer, and of what could take its place; with what the model reads of its weight beside."""
    candidates = {
        (scheme, form, rank): _candidate(module, scheme, form, rank)
        for form in layer.forms
        for scheme, option in layer.options.items()
        for rank in option.matricisation.few(form, multiple, _GRID if scheme != "tucker" else _PAIRS)
    }
    # forward, not the call: hooks are the user's, and the same before and after.
    calls = [partial(one.forward, *args) for one in (module, *candidates.values())]
    device = weight_of(module).device
    dense, *rest = median_nanoseconds(calls, device)
    if reads and candidates:
        multiplied_out = median_nanoseconds([partial(getattr, one, "weight") for one in candidates.values()], device)
        rest = [time + round(reads * more) for time, more in zip(rest, multiplied_out, strict=True)]
    times: _Times = {}
    for (scheme, form, rank), time in zip(candidates, rest, strict=True):
        times.setdefault((scheme, form), {})[rank] = time
    return dense, times


def _candidate(module: nn.Module, scheme: LayerScheme, form: Form, rank: Rank) -> nn.Module:
    candidate = KINDS[type(module)].like(module, rank, scheme, form)
    for parameter in candidate.parameters():
        if parameter.dim() > 1:
            parameter.fill_(0.01)  # what is in uninitialised memory may be subnormal, and slow
    return candidate
