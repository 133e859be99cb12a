"""How batches go through the layers of a model: how often, in which order, and where what comes out goes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._geometry import ANY_CONVOLUTION
from ._running import given_to

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from ._ranks import Team


@dataclass
class Traffic:
    """How the batches go through one layer.

    Attributes:
        calls: how often it is called, for each batch of this rank.
        order: its place among the layers and norms, by the first call.
        normed: whether a BatchNorm takes each output, feature by feature, and neither does anything else take it nor
            that norm anything else, so that its mean does not matter.
        norms: the BatchNorm layers that batches come to before they first come here, by name, with how often each is
            called, for each batch of this rank.
        read: whether its weight or bias is seen to be read on this rank while it does not run itself.
    """

    calls: list[int] = field(default_factory=list)
    order: int = -1
    normed: bool = True
    norms: Mapping[str, Sequence[int]] = field(default_factory=dict)
    read: bool = False

    @property
    def reached(self) -> bool:
        """Whether any batch comes here."""
        return self.order >= 0


@dataclass
class _Output:
    """What a layer put out, whether its features are where a norm has its channels, and whether a norm took it."""

    reference: weakref.ref[Tensor]
    layer: str
    by_channel: bool
    taken: bool = False


class Watcher:
    """Notes the traffic of layers while batches run.

    Args:
        names: of the layers.
        norms: the BatchNorm layers of the model, by name.

    Attributes:
        traffic: that of each layer, by name; order and norms are there at the end.
    """

    def __init__(self, names: Mapping[nn.Module, str], norms: Mapping[str, nn.Module]) -> None:
        self.traffic = {name: Traffic() for name in names.values()}
        self._names, self._norms = names, norms
        self._norm_calls: dict[str, list[int]] = {name: [] for name in norms}
        self._parameters = {id(one): name for module, name in names.items() for one in module.parameters()}
        self._running: list[str] = []  # layers
        self._sequence: list[str] = []  # of the batch that runs
        self._order: list[str] = []
        self._outputs: dict[int, _Output] = {}  # of layers in this run, by identity
        self._taking: list[int] = []  # what norms that are running were given
        self._taken: dict[str, int] = {}  # outputs of each layer that norms took
        self._used: set[str] = set()  # layers with outputs that anything else took
        self._sources: dict[str, set[str]] = {}  # of each norm, the layers whose outputs it takes; "" is anything else

    def begin(self) -> None:
        """Begin with the next batch."""
        self._end()
        for calls in (*(one.calls for one in self.traffic.values()), *self._norm_calls.values()):
            calls.append(0)

    def returned(self, output: Any) -> None:
        """Note what the model returned: that is used outside."""
        for tensor in tensors_in(output):
            self._use(tensor)

    @contextmanager
    def attached(self, *, each_use: bool) -> Iterator[Watcher]:
        """Watch what runs.

        Args:
            each_use: whether to look at each operation even if there are no norms; what it is given is then known, but
                torch may round otherwise.
        """
        with ExitStack() as stack:
            for module in self._names:
                stack.callback(module.register_forward_pre_hook(self._calling).remove)
                stack.callback(hook_first(module, self._called))
            for name, norm in self._norms.items():

                def begin(_norm: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    self._note(name)
                    self._norm_calls[name][-1] += 1
                    self._taking.append(id(given_to(args, kwargs)))

                def end(_norm: nn.Module, args: Any, kwargs: Any, _output: Any, name: str = name) -> None:
                    given = given_to(args, kwargs)
                    self._taking.remove(id(given))
                    self._take(name, given)

                stack.callback(norm.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(hook_first(norm, end))
            stack.enter_context(_Uses(self._use) if each_use or self._norms else nullcontext())
            yield self

    def finish(self, team: Team) -> None:
        """Settle order and norms, for all ranks together."""
        self._end()
        order: list[str] = []
        for sequence in team.gather(self._order):
            _merge_(order, sequence)
        everywhere = team.gather({name: self._is_normed(name) for name in self.traffic})
        mixed = self._mixed(team)
        before: dict[str, Sequence[int]] = {}
        for place, name in enumerate(order):
            if name in self.traffic:
                one = self.traffic[name]
                one.order, one.norms = place, dict(before)
                # Of ranks where no batch comes to it nothing is said.
                one.normed = name not in mixed and all(there[name] is not False for there in everywhere)
            else:
                before[name] = self._norm_calls[name]

    def _is_normed(self, name: str) -> bool | None:
        calls = sum(self.traffic[name].calls)
        return name not in self._used and self._taken.get(name, 0) == calls if calls else None

    def _mixed(self, team: Team) -> set[str]:
        """Return the layers with norms that take anything else as well: such a norm takes up one mean for all of it."""
        sources: dict[str, set[str]] = {}
        for there in team.gather(self._sources):
            for norm, some in there.items():
                sources.setdefault(norm, set()).update(some)
        return {layer for some in sources.values() if len(some) > 1 for layer in some}

    def _end(self) -> None:
        _merge_(self._order, self._sequence)
        self._sequence, self._outputs, self._taking, self._running = [], {}, [], []

    def _note(self, name: str) -> None:
        if name not in self._sequence:
            self._sequence.append(name)

    def _calling(self, module: nn.Module, _args: Any) -> None:
        self._running.append(self._names[module])

    def _called(self, module: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> None:
        name = self._names[module]
        self._running.remove(name)
        self._note(name)
        self.traffic[name].calls[-1] += 1
        # What comes out without an axis of examples is not looked at feature by feature, either.
        axes = len(module.kernel_size) if isinstance(module, ANY_CONVOLUTION) else 0
        self._outputs[id(output)] = _Output(weakref.ref(output), name, output.dim() == axes + 2)

    def _output(self, tensor: Tensor) -> _Output | None:
        found = self._outputs.get(id(tensor))
        return found if found is not None and found.reference() is tensor else None  # dead ones leave their identity

    def _take(self, norm: str, given: Tensor) -> None:
        output = self._output(given)
        self._sources.setdefault(norm, set()).add("" if output is None else output.layer)
        if output is None:
            return
        if not output.by_channel:
            self._used.add(output.layer)
        elif not output.taken:
            output.taken = True
            self._taken[output.layer] = self._taken.get(output.layer, 0) + 1

    def _use(self, tensor: Tensor) -> None:
        reads = self._parameters.get(id(tensor))
        if reads is not None and reads not in self._running:
            self.traffic[reads].read = True
        output = None if id(tensor) in self._taking else self._output(tensor)
        if output is not None:
            self._used.add(output.layer)


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of each tensor that an operation is given."""

    supports_higher_order_operators = True  # such as flex_attention; refused otherwise

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in(args, kwargs):
            self._tell(tensor)
        return func(*args, **(kwargs or {}))


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """Yield the tensors in containers and dataclasses."""
    todo: list[Any] = list(values)
    seen: dict[int, Any] = {}
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) in seen:  # a container may hold itself
            continue
        elif isinstance(value, (Mapping, tuple, list)):
            seen[id(value)] = value
            todo.extend(value.values() if isinstance(value, Mapping) else value)
        elif is_dataclass(value) and not isinstance(value, type):
            seen[id(value)] = value
            todo.extend(getattr(value, one.name, None) for one in fields(value))


def _merge_(order: list[str], sequence: Sequence[str]) -> None:
    """Put names that an order lacks into it, each behind the one that it follows in a sequence."""
    known = set(order)
    if known.issuperset(sequence):
        return
    place = 0
    for name in sequence:
        if name in known:
            place = max(place, order.index(name) + 1)
        else:
            order.insert(place, name)
            known.add(name)
            place += 1


def hook_first(module: nn.Module, hook: Callable[[nn.Module, Any, Any, Tensor], None]) -> Callable[[], None]:
    """Have a module's own output noted, before hooks of the user change it; returns what takes the hook off again."""
    return module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove
