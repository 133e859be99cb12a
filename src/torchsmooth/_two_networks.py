"""The dense network and the one that is compressed so far, which one model is in turn, run on the same batches."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ._batches import run
from ._calibration import running
from ._finished import FinishedParts
from ._layers import weight_of
from ._moments import Moments, input_rows, output_rows
from ._progress import progress
from ._running import given_to
from ._traffic import hook_first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ._calibration import Calibration
    from ._lowrank_layer import LowRankLayer
    from ._norms import FollowingNorms, Norm, Seen
    from ._traffic import Traffic

# Bytes of outputs that one run of the dense network notes at most, unless a single layer puts out more.
_AHEAD = 1 << 30


class DifferentError(Exception):
    """Parts that were taken for finished do not put out what they did when all of the network runs."""


class _Reached(BaseException):
    """Ends a run that has come as far as it was to go."""


class _Noted(NamedTuple):
    """What one run of the dense network noted: of layers the rows that they put out, call by call, and its norms."""

    outputs: dict[nn.Module, list[Tensor]]
    norms: Seen


class TwoNetworks:
    """A model as the dense network, and as the compressed one, as far as that has come.

    Args:
        model: the dense model, which is as before whenever no method runs.
        replacements: what takes the place of layers that are done.
        calibration: the batches.
        traffic: how the batches go through each of the layers.
        norms: those of the model.
        reuse: whether parts of the compressed network that will not change any more may be left out of runs.

    Attributes:
        done: layers whose replacement is filled in.
        biases: of some of them, the bias that they have in the compressed network.
    """

    def __init__(
        self,
        model: nn.Module,
        replacements: Mapping[nn.Module, LowRankLayer],
        calibration: Calibration,
        traffic: Mapping[nn.Module, Traffic],
        norms: FollowingNorms,
        *,
        reuse: bool,
    ) -> None:
        self.model, self.replacements, self.calibration = model, replacements, calibration
        self.traffic, self.norms = traffic, norms
        self.done: set[nn.Module] = set()
        self.biases: dict[nn.Module, Tensor] = {}
        self._finished = FinishedParts(model)
        if not reuse:
            self._finished.give_up()
        self._noted: dict[int, _Noted] = {}
        self._looked_for: set[str] = set()  # norms
        self._places = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child is not None and child in replacements
        ]

    def moments_at(self, module: nn.Module, following: Sequence[nn.Module]) -> Moments:
        """Pair what reaches a layer in the compressed network with what leaves it in the dense one.

        Args:
            module: the layer.
            following: those that will be asked for next, in order.

        Raises:
            DifferentError: if ``module`` is the last, and other rows reach it when no part of the network is left out.
        """
        moments = Moments()
        with running(self.model) as begin:
            if not any(module in noted.outputs for noted in self._noted.values()):
                self._note_dense(begin, [module, *following])
            self._settle_norms_before(begin, module)
            is_different = False
            for index, noted in self._noted.items():
                if module not in noted.outputs:
                    continue
                pairs = self._pairs(begin, index, module, noted)
                if not following and self._finished.used:
                    in_full = self._pairs(begin, index, module, noted, reuse=False)
                    is_different = is_different or not _are_close(pairs, in_full)
                for given, output in pairs:
                    moments.add(given, output)
        if not following and any(self.calibration.team.gather(is_different)):
            raise DifferentError
        moments.unite(self.calibration.team, weight_of(module).device)
        return moments

    def run_through(self) -> None:
        """Run both networks to the end, for the norms after the last layer."""
        norms = self.norms.unsettled
        seen: dict[int, Seen] = {}
        with running(self.model) as begin:
            for index, batch in enumerate(self.calibration.batches):
                begin(index)
                with self.norms.watching_dense() as seen[index]:
                    run(self.model, batch)
            self._settle(begin, norms, seen, {})

    def _settle_norms_before(self, begin: Callable[[int], bool], module: nn.Module) -> None:
        """Find the statistics of the norms between the layers that are done and a layer."""
        before = self.traffic[module].norms
        norms = [one for one in self.norms.unsettled if self.norms.names[one] in before.keys() - self._looked_for]
        self._looked_for.update(before)
        until = {index: self._calls([module], norms, index) for index in self._noted}
        self._settle(begin, norms, {index: noted.norms for index, noted in self._noted.items()}, until)

    def _settle(
        self,
        begin: Callable[[int], bool],
        norms: Sequence[Norm],
        seen: Mapping[int, Seen],
        until: Mapping[int, Mapping[nn.Module, int]],
    ) -> None:
        # Of several, the later ones get what the earlier ones let through, which is right only when those are known. So
        # each round finds one more for good, or all that are left.
        for again in range(len(norms)):
            # What was kept up to the last layer has been compared with what comes when all runs; what came since not.
            reuse = bool(until) or not again
            for index in progress(seen, "settling norms", enabled=False if until else self.calibration.show):
                if any(norm in seen[index] for norm in norms):
                    self._run_compressed(begin, index, seen[index], until.get(index, {}), finding=norms, reuse=reuse)
            if not self.norms.settle():
                return

    def _calls(self, layers: Sequence[nn.Module], norms: Sequence[Norm], index: int) -> dict[nn.Module, int]:
        """Return how often a batch comes to layers, and to those of the norms that it first comes to before them."""
        before = {name: calls for layer in layers for name, calls in self.traffic[layer].norms.items()}
        calls: dict[nn.Module, int] = {one: self.traffic[one].calls[index] for one in layers}
        return calls | {one: before[name][index] for one in norms if (name := self.norms.names[one]) in before}

    def _note_dense(self, begin: Callable[[int], bool], layers: list[nn.Module]) -> None:
        """Run the dense network as far as there is room to note what the layers put out: at least through the first."""
        self._noted = {}
        room = _AHEAD
        for index, batch in enumerate(self.calibration.batches):
            outputs: dict[nn.Module, list[Tensor]] = {one: [] for one in layers if self.traffic[one].calls[index]}
            # A norm may be called again after the layers behind it.
            calls = self._calls(list(outputs), self.norms.unsettled, index)

            def note(
                layer: nn.Module, _given: Tensor, output: Tensor, outputs: Any = outputs, seed: int = index
            ) -> None:
                nonlocal room
                if layer not in outputs:  # a norm
                    return
                rows = output_rows(layer, output, seed)
                room -= rows.numel() * rows.element_size()
                outputs[layer].append(rows)

            begin(index)
            with self.norms.watching_dense() as seen, _until(calls, note):
                _run_until_reached(self.model, batch)
            self._noted[index] = _Noted(outputs, seen)
            while room < 0 and len(layers) > 1:
                last = layers.pop()
                for noted in self._noted.values():
                    room += sum(rows.numel() * rows.element_size() for rows in noted.outputs.pop(last, ()))

    def _pairs(
        self, begin: Callable[[int], bool], index: int, module: nn.Module, noted: _Noted, *, reuse: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """Return rows that reach a layer in the compressed network, with what comes of them, for each call."""
        outputs = noted.outputs[module]
        pairs: list[tuple[Tensor, Tensor]] = []

        def note(layer: nn.Module, given: Tensor, own: Tensor) -> None:
            rows, call = input_rows(layer, given, index), len(pairs)
            is_alike = call < len(outputs) and outputs[call].shape[:2] == rows.shape[:2]
            # The compressed network may send a layer other rows; what the dense layer makes of those is known, too.
            pairs.append((rows, outputs[call] if is_alike else output_rows(layer, own, index)))

        until = {module: self.traffic[module].calls[index]}
        self._run_compressed(begin, index, noted.norms, until, note, reuse=reuse)
        return pairs

    def _run_compressed(
        self,
        begin: Callable[[int], bool],
        index: int,
        seen: Seen,
        until: Mapping[nn.Module, int],
        note: Callable[[nn.Module, Tensor, Tensor], None] = lambda *_: None,
        finding: Sequence[Norm] = (),
        *,
        reuse: bool = True,
    ) -> None:
        begin(index)
        with self._compressed(index, seen, finding, reuse=reuse), _until(until, note):
            _run_until_reached(self.model, self.calibration.batches[index])
        if begin(index):  # it keeps something from one call to the next, which parts left out would not see to
            self._finished.give_up()

    @contextmanager
    def _compressed(self, index: int, seen: Seen, finding: Sequence[Norm], *, reuse: bool) -> Iterator[None]:
        """Make the model the compressed network, as far as that has come, for one batch."""
        kept = {}
        try:
            for module, values in self.biases.items():
                owner = self.replacements[module].bias_owner
                kept[owner] = owner._parameters["bias"]
                own = owner._parameters["bias"]
                owner._parameters["bias"] = nn.Parameter(values.to(own), requires_grad=False)
            for parent, name, child in self._places:
                if child in self.done:
                    parent._modules[name] = self.replacements[child]
            unfinished = {*(one for one in self.replacements if one not in self.done), *self.norms.unsettled, *finding}
            finished = self._finished.in_place(index, unfinished) if reuse else nullcontext()
            with self.norms.in_place(seen, finding), finished:
                yield
        finally:
            for parent, name, child in self._places:
                parent._modules[name] = child
            for owner, bias in kept.items():
                owner._parameters["bias"] = bias


def _run_until_reached(model: nn.Module, batch: Any) -> None:
    try:
        run(model, batch)
    except _Reached:
        return


@contextmanager
def _until(calls: Mapping[nn.Module, int], note: Callable[[nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Note the calls of layers and norms, so many of each, and end the run at the last."""
    left = sum(calls.values())

    def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        nonlocal left
        left -= 1
        note(layer, given_to(args, kwargs), output)
        if not left:
            raise _Reached

    with ExitStack() as stack:
        for module in calls:
            stack.callback(hook_first(module, hook))
        yield


def _are_close(pairs: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> bool:
    """Say whether the same rows came, up to what rounding may differ by."""
    return len(pairs) == len(others) and all(
        one.shape == other.shape
        and torch.linalg.vector_norm(one - other, dtype=torch.float64)
        <= torch.finfo(one.dtype).eps ** 0.5 * torch.linalg.vector_norm(other, dtype=torch.float64)
        for (one, _), (other, _) in zip(pairs, others, strict=True)
    )
