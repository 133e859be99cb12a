"""A model traced symbolically, in each way its optional arguments can be given; and what a graph does not say."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.fx
from torch import nn

from ._checks import quoted
from ._lowrank_layer import LowRankLayer
from ._norms import norms_of
from ._running import tracing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping


class Trace(NamedTuple):
    """What a model does when it is called in one way.

    Attributes:
        graph: by ``torch.fx``, with BatchNorm layers and low-rank layers in one step each.
        kept: calls of modules whose outputs somebody still has when the call is over, in an attribute, say.
        read: modules of which a value is used without a call of the module.
    """

    graph: torch.fx.Graph
    kept: Collection[torch.fx.Node]
    read: Collection[nn.Module]


def traces_of(model: nn.Module) -> list[Trace]:
    """Trace a model with all of its arguments given, with the first alone, and with the first and each single other.

    Args:
        model: in the mode that it is to be run in; it is not run, and what it keeps between calls is put back.

    Returns:
        The traces: one for a model of one argument, at most two more than there are optional arguments for others.

    Raises:
        ValueError: if the model cannot be traced in one of these ways.
    """
    if "forward" in vars(model):
        raise _refusal(model, "its forward was replaced on the instance")
    traces: list[Trace] = []
    for absent in _ways_to_call(model):
        tracer = _Tracer(model, absent)
        try:
            with tracing(model):
                traces.append(tracer.traced())
        except Exception as error:  # what a forward of the user's does with a proxy can raise anything
            reason = (str(error).splitlines() or ["no message"])[0].partition(". ")[0]
            called = f", called without {quoted(absent)}" if absent else ""
            raise _refusal(model, f"{type(error).__name__}{called}: {reason}") from error
    return traces


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} cannot be traced symbolically, so what follows what is not known ({reason}). Name "
        "each layer with the norm that takes its output, and that alone: pairs=[('conv1', 'bn1')]."
    )


def _ways_to_call(model: nn.Module) -> list[dict[str, Any]]:
    """List sets of optional arguments to leave out, each with what they are then."""
    forward = inspect.unwrap(type(model).forward)
    _, *parameters = inspect.signature(forward).parameters.values()
    absent: dict[str, Any] = {}
    for one in parameters[1:]:  # the first is the input, whatever its default
        if one.kind in {one.VAR_POSITIONAL, one.VAR_KEYWORD}:
            absent[one.name] = () if one.kind == one.VAR_POSITIONAL else {}
        elif one.default is not one.empty:
            absent[one.name] = one.default
    ways = [{}, absent, *({other: absent[other] for other in absent if other != name} for name in absent)]
    return [way for place, way in enumerate(ways) if way.keys() not in [one.keys() for one in ways[:place]]]


class _Tracer(torch.fx.Tracer):
    """Notes what the graph does not say.

    Args:
        model: what is traced.
        absent: arguments of its ``forward`` that are left out, with what they are then.
    """

    def __init__(self, model: nn.Module, absent: Mapping[str, Any]) -> None:
        super().__init__()
        self._model, self._absent = model, absent
        norms = norms_of(model).values()
        layers = [one for one in model.modules() if isinstance(one, LowRankLayer)]
        self._steps = {*norms, *layers}
        # What is computed of these is computed at once: the graph holds the result, if anything.
        self._owners = {id(one): norm for norm in norms for one in norm.buffers()} | {
            id(one): layer for layer in layers for one in (*layer.parameters(), *layer.buffers())
        }
        self._read: set[nn.Module] = set()
        self._proxies: list[tuple[torch.fx.Node, weakref.ref[torch.fx.Proxy]]] = []

    def traced(self) -> Trace:
        """Trace the model. Called once, while it still has what the trace left in it."""
        graph = self.trace(self._model)
        if self._kept():
            gc.collect()  # what is not reachable has nobody
        modules = dict(self._model.named_modules(remove_duplicate=False))
        for node in graph.nodes:
            if node.op in {"get_attr", "call_module"}:
                parts = str(node.target).split(".")
                around = [modules.get(".".join(parts[:count])) for count in range(len(parts))]
                self._read.update(one for one in around if one is not None)
        return Trace(graph, self._kept(), self._read)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Take low-rank layers and norms as one step each: what runs inside of them is decided at each call."""
        return m in self._steps or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: FBT001 - as torch has it
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Any, list[Any]]:
        """Leave out the arguments that are to be left out."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        names = inspect.unwrap(root_fn).__code__.co_varnames
        # There may be locals after the arguments.
        return function, [self._absent.get(name, one) for name, one in zip(names, args, strict=False)]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Note whose value is asked for; the weight of a low-rank layer cannot be computed of proxies."""
        owner = self._owners.get(id(attr_val))
        if owner is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        self._read.add(owner)
        # A copy, for what is done to it in place would be done.
        return attr_val.detach().clone() if isinstance(attr_val, nn.Parameter) else attr_val

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        """Note who stands for a node, to see whether somebody keeps it."""
        made = super().proxy(node)
        self._proxies.append((node, weakref.ref(made)))
        return made

    def _kept(self) -> set[torch.fx.Node]:
        return {node for node, proxy in self._proxies if node.op == "call_module" and proxy() is not None}
