"""What calibration data says about the layers of a model: where it goes, and the second moments of what arrives."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ._batches import collect, run
from ._layers import KINDS, weight_of
from ._matricise import channel_view
from ._moments import Moments, input_rows
from ._norms import norms_of
from ._progress import progress
from ._ranks import ALONE
from ._running import check_not_mapped, given_to, observing
from ._traffic import Watcher, hook_first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from ._ranks import Team
    from ._traffic import Traffic

# Inputs wider than this are not whitened: their moment has that many rows and columns, in float64.
WIDEST = 8192
# Bytes of moments that one pass gathers at most, unless a single layer needs more.
_AT_ONCE = 1 << 30

TOO_WIDE = f"not calibrated: its input is wider than {WIDEST:,}"
NOT_REACHED = "not calibrated: never called on the data"


class Calibration:
    """Unlabelled batches, kept to be run again.

    Memory: the inputs of the batches and, at a time, the moments of as many layers as fit 1 GiB, or of one; a refit
    keeps what parts of the two networks put out, 1 GiB of each at most.

    Among several ranks, each runs batches of its own, and what it learns of them counts together with what the others
    learn of theirs.

    Args:
        batches: an iterable of inputs.
        show: whether to show progress; None: on a terminal.
        team: the ranks.
    """

    def __init__(self, batches: Any, show: bool | None = None, team: Team = ALONE) -> None:  # noqa: FBT001 - three states
        self.batches = collect(batches, "calibration")
        self.show, self.team = show, team

    @classmethod
    def of(cls, batches: Any, show: bool | None, team: Team = ALONE) -> Calibration | None:  # noqa: FBT001 - three states
        """Keep batches, unless there are none or they are kept already."""
        return batches if batches is None or isinstance(batches, cls) else cls(batches, show, team)

    def look(
        self, model: nn.Module, layers: Mapping[str, nn.Module], *, moments: bool
    ) -> Iterator[dict[str, tuple[Traffic, Moments]]]:
        """Run the batches, and yield each layer with its traffic and the moments of its input: so many at a time.

        Of the traffic, ``calls`` are those of this rank alone.

        Args:
            model: a model, which is as before at every yield.
            layers: layers of it that can be compressed, by name.
            moments: whether to gather moments at all; of layers that are not calibrated none are.
        """
        for group in _groups(layers) if moments else [dict(layers)]:
            gathered = {name: Moments() for name in group}
            names = {module: name for name, module in group.items()}
            watcher = Watcher(names, norms_of(model))
            traffic = watcher.traffic
            with running(model) as begin, watcher.attached(each_use=not moments):

                def gather(module: nn.Module, args: Any, kwargs: Any, _output: Tensor) -> None:
                    name = names[module]  # noqa: B023 - called in this turn of the loop only
                    given = given_to(args, kwargs)
                    check_not_mapped(name, given)
                    if moments and not why_uncalibrated(module):
                        rows = input_rows(module, given, len(traffic[name].calls))  # noqa: B023
                        gathered[name].add(rows, rows[..., :0])  # noqa: B023

                with ExitStack() as stack:
                    for module in names:
                        stack.callback(hook_first(module, gather))
                    for index, batch in enumerate(progress(self.batches, "calibrating", enabled=self.show)):
                        begin(index)
                        watcher.begin()
                        watcher.returned(run(model, batch))
            watcher.finish(self.team)
            for name, module in group.items() if moments else ():
                gathered[name].unite(self.team, weight_of(module).device)
            yield {name: (traffic[name], gathered.pop(name)) for name in group}


@contextmanager
def running(model: nn.Module) -> Iterator[Callable[[int], bool]]:
    """Run a model only to look at it: in eval mode, without gradients, and without what skips hooks.

    That is compiled code, and the fast path of transformer encoders with the nested tensors that go through it.

    Yields:
        What makes runs over the same batch alike, as :func:`observing` does.
    """
    # Telling the compiler imports it, which takes seconds; what was compiled has imported it.
    compiled = "torch._dynamo" in sys.modules
    stance = getattr(torch.compiler, "set_stance", None) if compiled else None  # since torch 2.6
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with observing(model) as begin, stance("force_eager") if stance else nullcontext():
            yield begin
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def width_of(layer: nn.Module) -> int:
    """Return how many numbers each output of a layer is made of."""
    kind = KINDS[type(layer)]
    return channel_view(weight_of(layer), kind.groups(layer), transposed=kind.transposed)[0, 0].numel()


def grouped_weight(layer: nn.Module) -> Tensor:
    """Return the weight as patches see it, ``(groups, out / groups, n)``."""
    kind = KINDS[type(layer)]
    return channel_view(weight_of(layer).detach(), kind.groups(layer), transposed=kind.transposed).flatten(2)


def why_uncalibrated(layer: nn.Module) -> str:
    """Say why a layer is compressed without data, even where some reaches it; empty if it is fitted to it."""
    return KINDS[type(layer)].uncalibrated or (TOO_WIDE if width_of(layer) > WIDEST else "")


def _groups(layers: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """Split layers, in order, so that the moments of each part fit the memory."""
    groups: list[dict[str, nn.Module]] = []
    room = 0
    for name, module in layers.items():
        width = width_of(module)
        need = 0 if why_uncalibrated(module) else 8 * KINDS[type(module)].groups(module) * width**2
        if not groups or need > room:
            groups.append({})
            room = _AT_ONCE
        groups[-1][name] = module
        room -= need
    return groups
