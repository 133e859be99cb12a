"""Choosing how each low-rank layer is run, by measuring on the device at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch

from ._checks import check_choice, check_module
from ._derive import derive, is_tunable
from ._execution import EXECUTIONS, Execution, derived_of, use_
from ._fused_layers import why_not_fused
from ._latency import device_of, layout_of, observe_calls
from ._lowrank_layer import LowRankLayer
from ._memory_format import Placed, are_channels_last, as_they_are, channels_last, differ, put_
from ._progress import progress as show_progress
from ._recurrent import FUSED, fused_parts
from ._running import as_inputs, observing
from ._table import format_milliseconds, format_share, format_table
from ._timing import median_nanoseconds
from ._together import join_
from ._tried import check_graphs, checked_executions, default_executions, refuse_to_tune
from ._undo import Undo
from .attention import LowRankMultiheadAttention
from .lowrank import LowRankLinear

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from ._execution import Derived
    from ._running import Inputs

__all__ = ["TunedLayer", "TuningReport", "tune_"]

MemoryFormat = Literal["auto", "keep"]

# By what share another way has to be faster to be taken: less than that is chance.
_MARGIN = 0.03

_PACKED = ("packed", "packed_dense")


@dataclass(frozen=True)
class TunedLayer:
    """How one layer is run.

    Attributes:
        name: qualified name in the model, the first one if it has several.
        type: class name.
        form: how its factors are stored.
        execution: how it is run from now on: ``"factored"``, ``"pivoted"``, ``"padded"``, ``"packed"``, ``"dense"``,
            ``"packed_dense"`` or ``"fused"``.
        seconds: for each way that was tried, what one call took, alone.
        note: what else there is to say.
    """

    name: str
    type: str
    form: str
    execution: str
    seconds: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class TuningReport:
    """What :func:`torchsmooth.tune_` chose; ``print`` shows a table.

    Attributes:
        layers: the low-rank layers.
        memory_format: ``"channels_last"`` if the weights of convolutions were brought there; ``"kept"`` otherwise.
        seconds_before: what the model took for the example inputs before.
        seconds_after: what it takes now, measured in turn with that.
        seconds_dense: what it takes with all layers merged to dense weights, measured in turn with those; None where
            that was not among ``executions``, or layers cannot be merged.
        note: what else there is to say.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> report = torchsmooth.svd_compress_(model, ratio=0.5)
        >>> tuned = torchsmooth.tune_(model.eval(), torch.zeros(8, 64))
        >>> [layer.execution in layer.seconds for layer in tuned.layers]
        [True, True]
    """

    layers: tuple[TunedLayer, ...]
    memory_format: str
    seconds_before: float
    seconds_after: float
    seconds_dense: float | None = None
    note: str = ""

    def __str__(self) -> str:
        header = ("layer", "type", "stored", "run", *(f"{one} ms" for one in self._tried()), "note")
        rows = [
            (
                one.name, one.type, one.form, one.execution,
                *(format_milliseconds(one.seconds[way]) if way in one.seconds else "–" for way in self._tried()),
                one.note,
            )
            for one in self.layers
        ]  # fmt: skip
        table = format_table(header, rows, right=range(4, len(header) - 1))
        before, after = format_milliseconds(self.seconds_before), format_milliseconds(self.seconds_after)
        share = format_share(self.seconds_after, self.seconds_before)
        dense = "" if self.seconds_dense is None else f", all layers dense {format_milliseconds(self.seconds_dense)} ms"
        kept = self.memory_format.replace("_", " ") + (f" ({self.note})" if self.note else "")
        return f"{table}\nas stored {before} → tuned {after} ms ({share}){dense}; memory format {kept}"

    def _tried(self) -> list[str]:
        return [one for one in EXECUTIONS if any(one in layer.seconds for layer in self.layers)]


def tune_(
    model: nn.Module,
    example_inputs: Any,
    *,
    executions: Sequence[Execution] | None = None,
    memory_format: MemoryFormat = "auto",
    cuda_graphs: bool = False,
    progress: bool | None = None,
) -> TuningReport:
    """Choose for each low-rank layer the fastest way to run it on this device, for inputs like these; in place.

    A layer can be run from its factors as they are stored, in the other form, with its rank padded to a multiple of
    eight (in half precision a GPU is several times slower at others), by one fused operator, or with the factors merged
    to a dense weight; on a CPU also with the weights of factors, or the dense one, packed: laid out once as the kernels
    of oneDNN want them, and not at each call. What that takes is derived from the factors and kept beside them, in
    memory only: parameters and state dict stay as small as they were. The model is timed as a whole, too, with all
    layers as chosen, all as stored and all dense, and what is fastest stays: the model comes out no slower than either,
    to the accuracy of the clock.

    What was chosen is used in eval mode and without gradients (``torch.no_grad`` or ``torch.inference_mode``, or where
    no factor requires any), as long as the factors are those that were there; otherwise the factors are run as they
    are stored. So train, load or quantise first, and tune last. ``executions=["factored", "pivoted"]`` keeps layers
    from being merged or packed, which saves memory.

    What cannot be seen: a change through ``.data``, by another process after ``share_memory()``, or by replaying a CUDA
    graph. Tune again after one. A graph of ``torch.compile`` is made anew after ``load_state_dict``, a step of an
    optimizer, or where a factor is another parameter, but does not see values that were written by hand (``copy_``
    under ``torch.no_grad``), nor a child that was changed: tune again after those, too. Of factors made under
    ``torch.inference_mode()`` no change can be seen: they are run as they are stored.

    In a trace (``torch.jit.trace``, ``torch.fx``) and in an export all layers are run by their factors. Packed weights
    are used by plain calls in eager mode: under ``torch.compile`` a merged layer is run by an ordinary dense weight and
    others by their factors, and under autocast or in a transform of ``torch.func`` each layer that is packed runs its
    factors. Packed weights are not taken along to another device or dtype.

    Args:
        model: with low-rank layers, on the device and in the dtype that it will run in. The mode does not matter.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; of the batch size to
            tune for. The model is run on them.
        executions: the ways to choose from, besides the one that is stored; None for ``"factored"``, ``"pivoted"`` and
            ``"dense"``, too ``"packed"`` (factors) and ``"packed_dense"`` on a CPU, and ``"padded"`` on CUDA.
            Convolutions are packed in ``torch.channels_last`` alone. ``"fused"``, by one operator with a kernel of
            ``torchsmooth.fused``, is tried only where it is named here: a kernel is compiled and tuned for each shape,
            which takes some seconds for each.
        memory_format: ``"auto"`` also tries convolution weights in ``torch.channels_last``, and leaves them so where
            that is faster; ``"keep"`` does not. A model that fails like that keeps what it has, which the report says.
            What ``state_dict()`` returns is in the memory format of the model. The state of an optimizer that has made
            a step before stays as it was, and fused ones take one number for another then: in the middle of a training
            give ``"keep"``, or make the optimizer anew.
        cuda_graphs: whether to time CUDA graphs, as the model will be run (by ``torch.cuda.graph``, or by
            ``torch.compile`` with ``mode="reduce-overhead"``). Launching a kernel can take longer than what it does: of
            small batches, two small products take longer than one large one, unless they are recorded.
        progress: True shows how far it is, False does not; None where the standard error stream is a terminal.

    Returns:
        What was chosen for each layer, and what was measured.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if there is no low-rank layer, a name is unknown, or ``cuda_graphs`` is asked for where the model is
            not on a CUDA device, or does what no graph can record.
        Exception: what the model raises on the inputs; it is then as it was.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3)).eval()
        >>> _ = torchsmooth.svd_compress_(model, ratio=0.6)
        >>> keys = list(model.state_dict())
        >>> report = torchsmooth.tune_(model, torch.zeros(1, 16, 12, 12))
        >>> list(model.state_dict()) == keys, report.seconds_after > 0
        (True, True)
    """
    check_module(model)
    inputs = as_inputs(example_inputs)
    device = device_of(model)
    allowed = default_executions(device) if executions is None else checked_executions(executions)
    check_graphs(cuda_graphs, device)
    check_choice(memory_format, "memory_format", get_args(MemoryFormat))
    layers = {name: one for name, one in model.named_modules() if isinstance(one, LowRankLayer) and is_tunable(one)}
    if not layers:
        refuse_to_tune(model)
    # Parameters that are moved in inference mode could be neither written to nor trained outside of it.
    with torch.inference_mode(mode=False):
        return _Tuner(model, inputs, layers, allowed, cuda_graphs, progress).tune_(
            try_channels_last=memory_format == "auto"
        )


class _Setting(NamedTuple):
    """A way to run the whole model: where its weights lie, and what each layer is run by."""

    placed: list[Placed]
    derived: dict[LowRankLayer, Derived | None]

    @property
    def is_dense(self) -> bool:
        """Whether each layer is merged to a dense weight."""
        return all(one is not None and one.execution == "dense" for one in self.derived.values())

    def put_(self) -> None:
        put_(self.placed)
        for layer, derived in self.derived.items():
            use_(layer, derived)


@dataclass
class _Tuner:
    model: nn.Module
    inputs: Inputs
    layers: Mapping[str, LowRankLayer]
    allowed: tuple[str, ...]
    graphs: bool
    show: bool | None
    notes: dict[str, str] = field(default_factory=dict)
    given: list[Placed] = field(init=False)
    fused: set[nn.Module] = field(init=False)
    note: str = ""

    def tune_(self, *, try_channels_last: bool) -> TuningReport:
        self.given = as_they_are(self.model)
        self.fused = fused_parts(self.model)
        given = _Setting(self.given, {layer: derived_of(layer) for layer in self.layers.values()})
        with Undo() as undo:
            undo.add(given.put_)
            formats = [given.placed]
            if try_channels_last:
                other = channels_last(given.placed)
                formats += [other] if differ(given.placed, other) else []
            settings: list[_Setting] = []
            times: list[dict[str, dict[str, float]]] = []
            for placed in formats:
                try:
                    found, measured = self._settings_in(placed)
                except Exception as error:
                    if placed is given.placed:
                        raise
                    # Such as a view of what a convolution returns: nobody has asked for this format.
                    self.note = f"in channels last the model fails: {type(error).__name__}: {error}".splitlines()[0]
                    continue
                settings += found
                times += [measured] * len(found)
            seconds = self._compare(settings)
            # The best ones once more: what passed over the machine in the meantime has met only some of them.
            finals = sorted({0, *sorted(range(len(settings)), key=seconds.__getitem__)[:3]})
            for index, again in zip(finals, self._compare([settings[index] for index in finals]), strict=True):
                seconds[index] = (seconds[index] + again) / 2
            best = min(range(len(settings)), key=lambda index: seconds[index] * (1 + _MARGIN * (index > 0)))
            settings[best].put_()
            undo.keep()
        dense = [one for setting, one in zip(settings, seconds, strict=True) if setting.is_dense]
        return self._report(settings[best], times[best], seconds[0], seconds[best], min(dense, default=None))

    def _settings_in(self, placed: list[Placed]) -> tuple[list[_Setting], dict[str, dict[str, float]]]:
        """Return the ways to run the whole model in a memory format: as stored first; and what single layers took."""
        last = are_channels_last(placed)
        stored = _Setting(placed, dict.fromkeys(self.layers.values()))
        stored.put_()
        with observing(self.model):
            calls = observe_calls(self.model, self.inputs, {one: name for name, one in self.layers.items()})
        known: dict[object, dict[str, float]] = {}
        measured: dict[str, dict[str, float]] = {}
        chosen: dict[LowRankLayer, Derived | None] = {}
        packed: dict[LowRankLayer, Derived | None] = {}
        dense: dict[LowRankLayer, Derived | None] = {}
        for name, layer in show_progress(self.layers.items(), "Tuning layers", len(self.layers), self.show):
            chosen[layer] = packed[layer] = dense[layer] = None
            if layer not in calls:
                self.notes[name] = FUSED if layer in self.fused else "never called"
                continue
            called = calls[layer]
            # Packed weights are not used under autocast.
            allowed = [one for one in self.allowed if called.autocast is None or one not in _PACKED]
            key = _alike(layer, called.args), called.autocast
            ways: dict[str, Derived | None] = {}
            if key not in known:
                ways = self._ways(name, layer, allowed, called.args, last=last)
                with called.alike():
                    known[key] = _measure(layer, ways, called.args, graphs=self.graphs)
            measured[name] = times = known[key]
            fastest = min(times, key=lambda way: times[way] * (1 + _MARGIN * (way != layer.form)))
            # Alone, a layer finds its weight in the caches, and laying it out takes less than in the model.
            fastest_packed = min((way for way in times if way in _PACKED), key=times.__getitem__, default=fastest)
            # A layer like one that was measured: of the others nothing is needed, and pivots take a while to find.
            wanted = [one for one in allowed if one in (fastest, fastest_packed, "dense", "fused")]
            ways = ways or self._ways(name, layer, wanted, called.args, last=last)
            chosen[layer], packed[layer], dense[layer] = ways[fastest], ways[fastest_packed], ways.get("dense")
        merged: Any = dense  # projections need not be low-rank layers
        for attention in (one for one in self.model.modules() if isinstance(one, LowRankMultiheadAttention)):
            join_([merged.get(one) for one in (attention.q_proj, attention.k_proj, attention.v_proj)])
        ways_of_all = [chosen, *([packed] if packed != chosen else []), dense]
        return [stored, *(_Setting(placed, one) for one in ways_of_all if any(one.values()))], measured

    def _ways(
        self, name: str, layer: LowRankLayer, executions: Sequence[str], args: tuple[Any, ...], *, last: bool
    ) -> dict[str, Derived | None]:
        """Derive what a layer could be run by, besides its factors as they are stored."""
        ways: dict[str, Derived | None] = {layer.form: None}
        for execution in executions:
            # What packed convolutions return has the channels last: with others, shapes would be the same, strides not.
            if execution == layer.form or (execution in _PACKED and not last and not isinstance(layer, LowRankLinear)):
                continue
            try:
                derived = derive(layer, execution, args[0] if args else None)
            except ValueError as error:
                self.notes[name] = f"as stored: {error}"
                break
            if derived is not None:
                if last:  # at a rank of one the format of the factors does not tell
                    put_(channels_last(as_they_are(derived.module)))
                ways[execution] = derived
            elif execution == "fused":
                self.notes[name] = f"not fused: {why_not_fused(layer)}"
        return ways

    def _compare(self, settings: Sequence[_Setting]) -> list[float]:
        """Time the whole model in several settings, in turn."""
        with observing(self.model):
            runs: list[Callable[[], object]] = [partial(self.inputs.run, self.model)] * len(settings)
            ready = [setting.put_ for setting in settings]
            device = device_of(self.model)
            times = median_nanoseconds(runs, device, ready, cuda_graphs=self.graphs, show=self.show)
            return [time / 1e9 for time in times]

    def _report(
        self,
        setting: _Setting,
        times: Mapping[str, dict[str, float]],
        before: float,
        after: float,
        dense: float | None,
    ) -> TuningReport:
        layers = []
        for name, layer in self.layers.items():
            derived = setting.derived[layer]
            execution = layer.form if derived is None else derived.execution
            layers.append(
                TunedLayer(
                    name, type(layer).__name__, layer.form, execution, times.get(name, {}), self.notes.get(name, "")
                )
            )
        changed = differ(as_they_are(self.model), self.given)
        memory_format = "channels_last" if changed else "kept"
        return TuningReport(tuple(layers), memory_format, before, after, dense, self.note)


def _alike(layer: LowRankLayer, args: tuple[Any, ...]) -> object:
    """Return a key that layers share which take equally long."""
    given = layout_of(args)
    # With their names and types: pruned and quantised ones look like others, and cannot be run like them.
    factors = [(name, type(one), one.dtype, one.stride(), one.device) for name, one in layer.named_parameters()]
    return type(layer), repr(layer), str(factors), given


def _measure(
    layer: LowRankLayer, ways: Mapping[str, Derived | None], args: tuple[Any, ...], *, graphs: bool
) -> dict[str, float]:
    """Time one call of a layer in several ways."""
    with observing(layer):
        calls = [partial(layer.forward if derived is None else derived.run, *args) for derived in ways.values()]
        times = median_nanoseconds(calls, device_of(layer), cuda_graphs=graphs)
    return {way: time / 1e9 for way, time in zip(ways, times, strict=True)}
