"""Which norm a layer's output goes to, and to nothing else: read off a symbolic trace of the model."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch.fx
from torch import nn

from ._lowrank_layer import LowRankLayer
from ._norms import norms_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class Follower(NamedTuple):
    """A norm, and the layer that alone feeds it.

    Attributes:
        layer: qualified name of the layer; empty if there is none.
        reason: why there is none.
    """

    layer: str
    reason: str


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Take low-rank layers as one step: what they run by is decided at each call."""
        return isinstance(m, LowRankLayer) or super().is_leaf_module(m, module_qualified_name)


def followers(model: nn.Module) -> Mapping[str, Follower]:
    """Find for each BatchNorm of a model what feeds it.

    Args:
        model: in eval mode; it is not run, and not changed.

    Returns:
        By the name of the norm: the module whose output it takes, if nobody else takes that, and both are called once.

    Raises:
        ValueError: if the model cannot be traced.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # what a forward of the user's does with a proxy can raise anything
        reason = (str(error).splitlines() or ["no message"])[0].partition(". ")[0]
        raise ValueError(
            f"{type(model).__name__} cannot be traced symbolically, so what follows what is not known "
            f"({type(error).__name__}: {reason}). Name each layer with the norm that takes its output, and that alone: "
            "pairs=[('conv1', 'bn1')]."
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(modules[node.target] for node in calls)
    found = {name: Follower("", "it is never called") for name in norms_of(model)}
    names = {modules[name]: name for name in reversed(list(modules))}
    # What is read without a call: a weight that a penalty of the user's own is computed from, say.
    read = {modules.get(str(node.target).rpartition(".")[0]) for node in graph.nodes if node.op == "get_attr"}
    for node in calls:
        name = names[modules[node.target]]
        if name in found:
            found[name] = _fed_by(node, modules, times, names, read)
    return found


def _fed_by(
    node: torch.fx.Node,
    modules: Mapping[str, nn.Module],
    times: Mapping[nn.Module, int],
    names: Mapping[nn.Module, str],
    read: Collection[nn.Module | None],
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
    if modules[str(node.target)] in read or layer in read:
        return Follower("", "a value of it, or of the layer that feeds it, is used elsewhere")
    return Follower(names[layer], "")
