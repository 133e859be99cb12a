"""Which norm a layer's output goes to, and to nothing else: read off symbolic traces of the model."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch.fx

from ._checks import quoted
from ._norms import norms_of
from ._traces import traces_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import nn

    from ._traces import Trace


class Follower(NamedTuple):
    """A norm, and the layer that alone feeds it.

    Attributes:
        layer: qualified name of the layer; empty if there is none.
        reason: why there is none.
    """

    layer: str
    reason: str


class _Call(NamedTuple):
    """What one trace says.

    Attributes:
        fed: what feeds each norm that is called.
        used: the names of all modules that are called, or of which a value is used.
    """

    fed: Mapping[str, Follower]
    used: Collection[str]


def followers(model: nn.Module) -> Mapping[str, Follower]:
    """Find for each BatchNorm of a model what feeds it.

    Args:
        model: in eval mode; it is not run, and what it keeps between calls is put back.

    Returns:
        By the name of the norm: the module whose output it takes, if nobody else takes that, both are called once, and
        this is so whichever optional arguments the model is given.

    Raises:
        ValueError: if the model cannot be traced.
    """
    norms = norms_of(model)
    calls = [_read_off(trace, model, norms) for trace in traces_of(model)]
    return {name: _agreed(name, calls) for name in norms}


def _agreed(name: str, calls: Collection[_Call]) -> Follower:
    """Find what feeds a norm in all calls that it has a part in."""
    found = [call.fed[name] for call in calls if name in call.fed]
    if not found:
        return Follower("", "it is never called")
    for one in found:
        if one.reason:
            return one
    layers = {one.layer for one in found}
    if len(layers) > 1:
        return Follower("", f"what feeds it depends on the arguments of the model: {quoted(layers)}")
    if any(name not in call.fed and {name, *layers} & {*call.used} for call in calls):
        return Follower("", f"{quoted(layers)}, which feeds it, is used without it for other arguments of the model")
    return found[0]


def _read_off(trace: Trace, model: nn.Module, norms: Collection[str]) -> _Call:
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in trace.graph.nodes if node.op == "call_module"]
    times = Counter(modules[node.target] for node in calls)
    names = {modules[name]: name for name in reversed(list(modules))}
    fed = {}
    for node in calls:
        name = names[modules[node.target]]
        if name in norms:
            fed[name] = _fed_by(node, modules, times, names, trace)
    return _Call(fed, {names[one] for one in (*times, *trace.read)})


def _fed_by(
    node: torch.fx.Node,
    modules: Mapping[str, nn.Module],
    times: Mapping[nn.Module, int],
    names: Mapping[nn.Module, str],
    trace: Trace,
) -> Follower:
    given = node.args[0] if node.args else None
    if times[modules[str(node.target)]] > 1:
        return Follower("", "it is called more than once")
    if not isinstance(given, torch.fx.Node) or given.op != "call_module":
        return Follower("", "its input does not come from a layer")
    layer = modules[str(given.target)]
    if times[layer] > 1:
        return Follower("", f"{names[layer]!r}, which feeds it, is called more than once")
    if len(given.users) > 1:
        return Follower("", f"the output of {names[layer]!r} goes to others as well")
    if given in trace.kept:
        return Follower("", f"the output of {names[layer]!r} is kept, in an attribute or elsewhere, for others to read")
    if modules[str(node.target)] in trace.read or layer in trace.read:
        return Follower("", "a value of it, or of the layer that feeds it, is used elsewhere")
    return Follower(names[layer], "")
