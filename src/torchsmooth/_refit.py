"""Factors fitted to calibration data, layer after layer, in closed form and without gradients.

Layers are taken in the order in which the data reaches them. For each, the network that is compressed up to there says
what goes in, the dense network what should come out. The weight that maps the one to the other best is approximated at
the planned rank, in the sense of the error at the output; a bias takes up the difference of the means. The norms on the
way follow. The model itself runs as both networks in turn and is the dense one again whenever control leaves this file.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._calibration import (
    NOT_REACHED,
    grouped_weight,
    why_uncalibrated,
)
from ._linalg import LinAlgError, clamped, working_copy
from ._matricise import channel_view
from ._moments import check_moments
from ._norms import FollowingNorms
from ._progress import progress
from ._recurrent import FUSED, fused_parts
from ._sharing import Sharing
from ._two_networks import DifferentError, TwoNetworks
from ._whitening import damped, target_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ._calibration import Calibration
    from ._lowrank_layer import LowRankLayer
    from ._moments import Moments
    from ._traffic import Traffic
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
FUSED_PART = f"not calibrated: {FUSED}"
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
    traffic = {one: looked[name][0] for one, name in names.items() if one in replacements}
    # A part that reads what the fit of a layer elsewhere will change puts out something else after it.
    reuse = not any(one.read and one.reached for one in traffic.values())
    try:
        return _refit(model, replacements, names, calibration, traffic, fall_back, reuse=reuse)
    except DifferentError:  # some part does more than compute, and it is not seen what
        return _refit(model, replacements, names, calibration, traffic, fall_back, reuse=False)


def _refit(
    model: nn.Module,
    replacements: Mapping[nn.Module, LowRankLayer],
    names: Mapping[nn.Module, str],
    calibration: Calibration,
    traffic: Mapping[nn.Module, Traffic],
    fall_back: Callable[[nn.Module], None],
    *,
    reuse: bool,
) -> Refitted:
    refitted = Refitted(FollowingNorms(model, calibration.team))
    work = TwoNetworks(model, replacements, calibration, traffic, refitted.norms, reuse=reuse)

    def leave(module: nn.Module, note: str) -> None:
        fall_back(module)
        work.done.add(module)
        refitted.notes[names[module]] = note

    fused = fused_parts(model)
    reasons = {
        one: why_uncalibrated(one) if traffic[one].reached else FUSED_PART if one in fused else NOT_REACHED
        for one in replacements
    }
    for module, why in reasons.items():
        if why:
            leave(module, why)
    steps = sorted((one for one, why in reasons.items() if not why), key=lambda one: traffic[one].order)
    sharing = Sharing(model)
    for place, module in enumerate(progress(steps, "refitting layers", enabled=calibration.show), 1):
        name = names[module]
        bias = module._parameters.get("bias")
        own_bias = bias is not None and not sharing.of_weight(bias, f"{name}.bias")
        moments = work.moments_at(module, steps[place:])
        if not moments.count:  # called with nothing, or where data decides, not at all any more
            leave(module, NO_ROWS)
            continue
        if _unpair_(moments, module):
            refitted.notes[name] = UNLIKE
        if bias is not None and not own_bias:  # it stays, so that the factors need not bring it
            moments.outputs_mean -= working_copy(bias).reshape(moments.outputs_mean.shape)
        centred = own_bias or traffic[module].normed
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
