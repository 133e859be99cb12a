"""Factors fitted to calibration data, layer after layer, in closed form and without gradients.

Layers are taken in the order in which the data reaches them. For each, the network that is compressed up to there says
what goes in, the dense network what should come out. The weight that maps the one to the other best is approximated at
the planned rank, in the sense of the error at the output; a bias takes up the difference of the means. The norms on the
way follow. The model itself runs as both networks in turn and is the dense one again whenever control leaves this file.
"""

from __future__ import annotations

import contextlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._batches import run
from ._calibration import (
    NOT_REACHED,
    Calibration,
    Traffic,
    grouped_weight,
    hook_first,
    running,
    why_uncalibrated,
)
from ._layers import weight_of
from ._linalg import LinAlgError, clamped, working_copy
from ._matricise import channel_view
from ._moments import Moments, check_moments, input_rows, output_rows
from ._norms import FollowingNorms
from ._progress import progress
from ._sharing import Sharing
from ._whitening import damped, target_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ._lowrank_layer import LowRankLayer
    from ._undo import Undo

# How much the layer's own weight counts beside the data, as a share of the mean energy of its inputs. It matters where
# the data is silent: for inputs that vary little, or are many more than the rows that were seen.
_RIDGE = 1e-3
# The same where rows are few for so many inputs, times inputs / rows: what a fit owes to chance grows like that. On 256
# sentences for inputs of 384 and 1,536 numbers, 1e-3 alone was worse than no data at all.
_DOUBT = 0.3
# Rows of the two networks that are paired by their place say nothing of each other where data decides which row comes
# where, as in a choice of the best. Below this correlation a layer is fitted to what it makes of its own inputs.
_LIKENESS = 0.3

NO_ROWS = "not calibrated: no data reaches it in the compressed network"
FUSED = "not calibrated: part of a fused recurrent layer"
UNLIKE = (
    "fitted to its own outputs: what reaches it has little in common with what does in the dense network (other rows, "
    "or too much was lost before it)"
)


@dataclass
class Refitted:
    """What a refit found, beside the factors, which are in the replacements already.

    Attributes:
        errors: relative error at the output of each refitted layer, by name: how far what comes out of the compressed
            network is from what the dense one puts out there, on the calibration data.
        notes: for the other layers, why they were not refitted.
    """

    norms: FollowingNorms
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    biases: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)

    @property
    def values(self) -> list[Tensor]:
        """What is to be written into the model."""
        return [values for _, values in self._written]

    @property
    def _written(self) -> list[tuple[Tensor, Tensor]]:
        return [*self.biases, *self.norms.statistics()]

    @torch.inference_mode()  # where tensors made in inference mode can be written to, and all others as well
    def write_(self, undo: Undo) -> None:
        """Write biases and BatchNorm statistics into the model, in place.

        Args:
            undo: gets what takes all of it back, before it is done.
        """
        before = [(tensor, tensor.clone()) for tensor, _ in self._written]

        @torch.inference_mode()
        def take_back() -> None:
            for tensor, values in before:
                with contextlib.suppress(RuntimeError):  # what cannot be written to is as it was
                    tensor.copy_(values)

        undo.add(take_back)
        for tensor, values in self._written:
            tensor.copy_(values)


class _Reached(BaseException):
    """Ends a run that has come as far as it was to go."""


def refit(
    model: nn.Module,
    replacements: Mapping[nn.Module, LowRankLayer],
    names: Mapping[nn.Module, str],
    calibration: Calibration,
    fall_back: Callable[[nn.Module], None],
) -> Refitted:
    """Fill in the factors of low-rank layers.

    Args:
        model: the dense model.
        replacements: what will take the place of each layer, with factors still to be filled in.
        names: the qualified name of each of these layers.
        calibration: the batches.
        fall_back: called for a layer that cannot be fitted to the data, to fill its replacement in without.

    Returns:
        What else was found. The model is as before.

    Raises:
        ValueError: if the layers' values come out NaN or infinite on the data.
    """
    (looked,) = calibration.look(model, {names[one]: one for one in replacements}, moments=False)
    traffic = {name: seen for name, (seen, _) in looked.items()}
    refitted = Refitted(FollowingNorms(model, calibration.team))
    work = _Work(model, replacements, calibration, refitted.norms)

    def leave(module: nn.Module, note: str) -> None:
        fall_back(module)
        work.done.add(module)
        refitted.notes[names[module]] = note

    reasons = {
        one: why_uncalibrated(one) if traffic[names[one]].reached else FUSED if work.is_fused(one) else NOT_REACHED
        for one in replacements
    }
    for module, why in reasons.items():
        if why:
            leave(module, why)
    steps = sorted((one for one, why in reasons.items() if not why), key=lambda one: traffic[names[one]].order)
    sharing = Sharing(model)
    for module in progress(steps, "refitting layers", enabled=calibration.show):
        name = names[module]
        bias = module._parameters.get("bias")
        own_bias = bias is not None and not sharing.of_weight(bias, f"{name}.bias")
        moments = work.moments_at(module, traffic[name])
        if not moments.count:  # called with nothing, or where data decides, not at all any more
            leave(module, NO_ROWS)
            continue
        if _unpair_(moments, module):
            refitted.notes[name] = UNLIKE
        if bias is not None and not own_bias:  # it stays, so that the factors need not bring it
            moments.outputs_mean -= working_copy(bias).reshape(moments.outputs_mean.shape)
        centred = own_bias or traffic[name].normed
        error = _fit_(replacements[module], module, moments, centred=centred, name=name)
        if own_bias and isinstance(bias, nn.Parameter):
            work.biases[module] = _bias_of(replacements[module], moments, bias.dtype)
            refitted.biases.append((bias, work.biases[module]))
        refitted.errors[name] = error
        work.done.add(module)
    if refitted.norms.unsettled:
        work.run_through()
    return refitted


def _unpair_(moments: Moments, dense: nn.Module) -> bool:
    """Take what a layer makes of its own inputs for the outputs, where those that were paired have nothing to say."""
    weight, bias = working_copy(grouped_weight(dense)), dense._parameters.get("bias")
    if moments.likeness(weight) >= _LIKENESS:
        return False
    moments.map_(weight, None if bias is None else working_copy(bias).reshape(moments.outputs_mean.shape))
    return True


def _fit_(low_rank: LowRankLayer, dense: nn.Module, moments: Moments, *, centred: bool, name: str) -> float:
    """Fit the factors of one layer, and return the relative error at its output."""
    weight = working_copy(grouped_weight(dense))
    exact, cross = moments.inner(centred=centred), moments.cross(centred=centred)
    check_moments(name, exact, cross)
    # With nothing coming in at all, the plain truncation is left.
    silent = exact.diagonal(dim1=-2, dim2=-1).sum(-1) == 0
    ridge = max(_RIDGE, _DOUBT * exact.shape[-1] / moments.count)
    inner = damped(exact, ridge) + torch.diag_embed(silent[:, None].to(exact).expand(exact.shape[:2]))
    try:
        target = target_weight(weight, exact, cross, ridge)
        low_rank.fit_(target, inner)
    except LinAlgError as failure:
        raise ValueError(
            f"the moments of layer {name!r} could not be decomposed ({failure}): leave it out with filter_fn."
        ) from failure
    fitted = _stored_weight(low_rank)
    energy = moments.energy(centred=centred)
    missed = energy - 2 * float((fitted * cross).sum()) + float(((fitted @ exact) * fitted).sum())
    return max(missed, 0.0) ** 0.5 / energy**0.5 if energy > 0 else 0.0


def _stored_weight(low_rank: LowRankLayer) -> Tensor:
    """Multiply out what is stored, in float64 and as patches see it, ``(groups, m, n)``."""
    factors = tuple(working_copy(factor) for factor in low_rank.factors())
    weight = low_rank.product_of(factors)
    return channel_view(weight, len(factors[0]), transposed=low_rank.transposed).flatten(2)


def _bias_of(low_rank: LowRankLayer, moments: Moments, dtype: torch.dtype) -> Tensor:
    """Return the bias with which the mean output is the dense network's, within the range of a dtype."""
    mean = (_stored_weight(low_rank) @ moments.inputs_mean.unsqueeze(-1)).squeeze(-1)
    return clamped((moments.outputs_mean - mean).flatten(), dtype)


class _Work:
    """The two networks that one model is in turn."""

    def __init__(
        self,
        model: nn.Module,
        replacements: Mapping[nn.Module, LowRankLayer],
        calibration: Calibration,
        norms: FollowingNorms,
    ) -> None:
        self.model, self.replacements, self.calibration, self.norms = model, replacements, calibration, norms
        self.done: set[nn.Module] = set()
        self.biases: dict[nn.Module, Tensor] = {}
        self._places = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child is not None and child in replacements
        ]

    def is_fused(self, module: nn.Module) -> bool:
        """Say whether a layer is part of one that torch computes as a whole, without calling it."""
        return any(child is module and isinstance(parent, nn.RNNBase) for parent, _, child in self._places)

    def moments_at(self, module: nn.Module, traffic: Traffic) -> Moments:
        """Pair what reaches a layer in the compressed network with what leaves it in the dense one."""
        moments = Moments()
        outputs: list[Tensor] = []
        pairs: list[tuple[Tensor, Tensor]] = []

        def note_output(layer: nn.Module, _given: Tensor, output: Tensor, seed: int) -> None:
            outputs.append(output_rows(layer, output, seed))

        def note_pair(layer: nn.Module, given: Tensor, own: Tensor, seed: int) -> None:
            rows, call = input_rows(layer, given, seed), len(pairs)
            is_alike = call < len(outputs) and outputs[call].shape[:2] == rows.shape[:2]
            # The compressed network may send a layer other rows; what the dense layer makes of those is known, too.
            pairs.append((rows, outputs[call] if is_alike else output_rows(layer, own, seed)))

        with running(self.model) as begin:
            for index, (batch, calls) in enumerate(zip(self.calibration.batches, traffic.calls, strict=True)):
                if not calls:
                    continue
                outputs.clear()
                pairs.clear()
                begin(index)
                with self.norms.watching_dense(), _until(module, calls, note_output, index):
                    self._run(batch)
                begin(index)
                with self._compressed(), _until(module, calls, note_pair, index):
                    self._run(batch)
                for given, output in pairs:
                    moments.add(given, output)
        self.norms.settle()
        moments.unite(self.calibration.team, weight_of(module).device)
        return moments

    def run_through(self) -> None:
        """Run both networks to the end, for the norms after the last layer."""
        with running(self.model) as begin:
            batches = progress(self.calibration.batches, "settling norms", enabled=self.calibration.show)
            for index, batch in enumerate(batches):
                begin(index)
                with self.norms.watching_dense():
                    self._run(batch)
                begin(index)
                with self._compressed():
                    self._run(batch)
        self.norms.settle()

    def _run(self, batch: Any) -> None:
        try:
            run(self.model, batch)
        except _Reached:
            return

    @contextmanager
    def _compressed(self) -> Iterator[None]:
        """Make the model the compressed network, as far as that has come."""
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
            with self.norms.in_place():
                yield
        finally:
            for parent, name, child in self._places:
                parent._modules[name] = child
            for owner, bias in kept.items():
                owner._parameters["bias"] = bias


@contextmanager
def _until(
    module: nn.Module, calls: int, note: Callable[[nn.Module, Tensor, Tensor, int], None], batch: int
) -> Iterator[None]:
    """Note each of the calls of a layer, and end the run at the last."""
    met = 0

    def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        nonlocal met
        met += 1
        note(layer, args[0] if args else kwargs["input"], output, batch)
        if met == calls:
            raise _Reached

    take_off = hook_first(module, hook)
    try:
        yield
    finally:
        take_off()
