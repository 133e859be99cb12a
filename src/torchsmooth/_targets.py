"""What a budget can count: parameters, multiply-accumulates, or time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ._latency import measure_times
from ._layers import KINDS
from ._macs import observe_macs
from ._prices import MacPrices
from ._recurrent import FUSED, fused_parts
from ._running import as_inputs
from ._weight_reads import watching_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from ._prices import Prices
    from ._running import Inputs
    from .layer_plan import LayerPlan

Target = Literal["params", "macs", "latency"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True)
class Words:
    """How to speak of a target."""

    unit: str
    share: str
    none_cheaper: str
    budget_reason: str


WORDS: dict[Target, Words] = {
    "params": Words(
        "parameters", "the model's parameters", "no rank makes it smaller", "worth its parameters in this budget"
    ),
    "macs": Words(
        "multiply-accumulates",
        "the model's multiply-accumulates",
        "no rank needs fewer multiply-accumulates",
        "worth its multiply-accumulates in this budget",
    ),
    "latency": Words("nanoseconds", "the model's time", "no rank is faster", "worth its time in this budget"),
}

NOT_REACHED = "never called on the example inputs"
FUSED_PART = f"{FUSED}: low rank makes it smaller, not faster"
READ = "the model reads its weight at each call, which a low-rank layer would have to multiply out"
# Of layers whose ranks are not known by their shapes to cost less: not seen at work, or not at work alone.
UNPRICED = (NOT_REACHED, FUSED_PART, READ)


def needed_inputs(target: Target, example_inputs: Any) -> Inputs | None:
    """Read the example inputs that a target needs; None where they are not needed."""
    inputs = None if example_inputs is None else as_inputs(example_inputs)
    if target == "params":
        if inputs is not None:
            raise ValueError(
                "example_inputs are what targets 'macs' and 'latency' are measured on, and target 'params' takes none: "
                "name one of these targets, or leave them out; data to fit to is given as calibration=."
            )
        return None
    if inputs is not None:
        return inputs
    raise ValueError(
        f"target {target!r} is measured on example_inputs, got None: pass a tensor, a tuple of positional arguments or "
        "a dict of keyword arguments for the model."
    )


def price_(
    model: nn.Module,
    parameters: int,
    target: Target,
    inputs: Inputs | None,
    candidates: Mapping[str, tuple[LayerPlan, nn.Module]],
    *,
    multiple: int,
    show: bool | None,
) -> int:
    """Set the prices of the layers that can be compressed, and return what the whole model costs."""
    if target == "params" or inputs is None:
        return parameters
    fused = fused_parts(model)
    modules = {name: module for name, (_, module) in candidates.items()}
    prices: Mapping[str, Prices]
    reads: Mapping[nn.Module, int]
    if target == "macs":
        with watching_weights(modules.values()) as counted:
            whole, found = observe_macs(model, inputs, modules)
        prices = {
            name: MacPrices(found[name], math.prod(layer.shape), KINDS[type(module)].work, counted[module])
            for name, (layer, module) in candidates.items()
        }
        called, reads = {name for name in modules if found[name].outputs}, counted
    else:
        whole, times, reads = measure_times(model, inputs, candidates, multiple=multiple, show=show)
        prices, called = times, {name for name in modules if times[name].dense}
    for name, (layer, module) in candidates.items():
        layer.prices = prices[name]
        if name not in called:
            layer.reason = FUSED_PART if module in fused else NOT_REACHED
        elif module in reads and not _can_be_cheaper(layer, multiple):
            layer.reason = READ
    return whole


def _can_be_cheaper(layer: LayerPlan, multiple: int) -> bool:
    tables = (
        layer.prices.table(scheme, option.matricisation, form, multiple)[1]
        for scheme, option in layer.options.items()
        for form in layer.forms
    )
    return any(bool((costs < layer.prices.dense).any()) for costs in tables)
