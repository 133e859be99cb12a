"""Making the low-rank layers of a plan for one model, which is not changed yet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ._checks import check_values
from ._layers import KINDS, FoundLayer, find_layers, weight_of
from ._linalg import LinAlgError, squared_norms, working_copy
from ._lowrank_layer import multiply_out
from ._options import decomposition_work, undecomposed
from ._ranks import ALONE
from ._refit import Refitted, refit
from ._swap import swap_, take_over_
from ._table import format_rank

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from ._calibration import Calibration
    from ._layers import Known
    from ._lowrank_layer import LowRankLayer
    from ._ranks import Team
    from ._undo import Undo
    from .layer_plan import Choice, LayerPlan


class Replacements(NamedTuple):
    """What a plan puts in the place of the layers of a model.

    Attributes:
        layers: the low-rank layer for each module that gets one, with all that it takes over.
        errors: the relative error of each weight, measured, by name.
        refitted: what else a refit to data has found; None without data.
        found: all layers of the model, also those that nothing is put in the place of.
    """

    layers: dict[nn.Module, LowRankLayer]
    errors: dict[str, float]
    refitted: Refitted | None
    found: Sequence[FoundLayer]


def replacements_for(
    layers: Sequence[LayerPlan],
    model: nn.Module,
    known: Known | None = None,
    calibration: Calibration | None = None,
    team: Team = ALONE,
) -> Replacements:
    """Make what a plan puts in the place of the layers of a model, which is not changed.

    Args:
        layers: those of the plan.
        model: the model planned for, or a copy of it with weights of its own; expanded.
        known: what is known of its modules.
        calibration: batches to fit the factors to; without, they are truncated SVDs of the weights, in scheme
            ``"tucker"`` refined higher-order ones.
        team: the ranks, each with the same plan and the same model. Truncations are made by the rank that decomposed
            the weight for the plan; a refit, which goes from layer to layer, by all ranks together, each on its own
            batches.

    Raises:
        ValueError: if the plan does not fit the model, or a weight cannot be decomposed.
    """
    targets = {found.name: found for found in find_layers(model, known)}
    planned = [(layer, layer.choice) for layer in layers if layer.choice is not None]
    if not planned:
        raise ValueError("nothing to compress: every layer of this plan stays dense.")
    modules = {layer.name: _target(layer, targets) for layer, _ in planned}
    chosen = {modules[layer.name]: (layer, choice) for layer, choice in planned}
    replacements: dict[nn.Module, LowRankLayer] = {}
    for module, (_, (scheme, form, rank)) in chosen.items():
        replacements[module] = KINDS[type(module)].like(module, rank, scheme, form)
        take_over_(replacements[module], module)

    def truncate(module: nn.Module) -> None:
        _truncate_(replacements[module], *chosen[module], module)

    def truncate_and_measure(name: str) -> float:
        truncate(modules[name])
        return measured_error(modules[name], replacements[modules[name]])

    if calibration is None:
        owners = _owners(layers, team)
        errors = team.share({name: owners[name] for name in modules}, truncate_and_measure)
        team.take_(
            (tensor, owners[name])
            for name, module in modules.items()
            for tensor in _tensors_of(replacements[module], module)
        )
        return Replacements(replacements, errors, None, list(targets.values()))
    names = {module: name for name, module in modules.items()}
    refitted = refit(model, replacements, names, calibration, truncate)
    # Computed on all ranks alike, but perhaps not to the last bit: they need not be machines of one kind.
    refitted.errors = team.first(lambda: refitted.errors)
    factors = [tensor for module in names for tensor in _tensors_of(replacements[module], module)]
    team.take_((tensor, 0) for tensor in (*factors, *refitted.values))
    errors = team.first(lambda: {name: measured_error(module, replacements[module]) for module, name in names.items()})
    return Replacements(replacements, errors, refitted, list(targets.values()))


def _owners(layers: Iterable[LayerPlan], team: Team) -> dict[str, int]:
    """Divide the layers of a plan as they were when they were decomposed for it."""
    work = {one.name: decomposition_work(each.matricisation for each in one.options.values()) for one in layers}
    return team.divide({one.name: work[one.name] for one in layers if one.options})


def _tensors_of(replacement: LowRankLayer, module: nn.Module) -> list[Tensor]:
    """Return what the replacement of a layer has of its own: not the bias, which is still the model's."""
    tensors = (*replacement.parameters(), *replacement.buffers())
    return [one for one in tensors if one is not module._parameters.get("bias")]


def placed_(model: nn.Module, made: Replacements, undo: Undo) -> None:
    """Put replacements into the model, and write what a refit has found; on any error, all is as before.

    Args:
        model: the model.
        made: what to put there.
        undo: gets what takes it back, before it is done.
    """
    undo.add(swap_, model, {new: old for old, new in made.layers.items()})
    swap_(model, made.layers)
    if made.refitted is not None:
        made.refitted.write_(undo)


def _target(layer: LayerPlan, targets: Mapping[str, FoundLayer]) -> nn.Module:
    found = targets.get(layer.name)
    if found is None:
        raise ValueError(f"the plan has a layer {layer.name!r}, the model does not: was it made for another model?")
    if found.reason:
        raise ValueError(f"layer {layer.name!r} is planned to be compressed, but cannot be: {found.reason}.")
    shape = tuple(weight_of(found.module).shape)
    if (found.type, shape) != (layer.type, layer.shape):
        raise ValueError(
            f"layer {layer.name!r} is planned as {layer.type} of shape {layer.shape}, but the model has "
            f"{found.type} of shape {shape}: was the plan made for another model, or applied to this one already?"
        )
    layouts = KINDS[type(found.module)].layouts(found.module)
    if layer.scheme not in layouts or layouts[layer.scheme] != layer.options[layer.scheme].matricisation:
        raise ValueError(
            f"layer {layer.name!r} is planned for other groups than this model's: was the plan made for another model?"
        )
    if layer.parameters_after >= layer.parameters_before:
        raise ValueError(
            f"layer {layer.name!r} would not get smaller at rank {format_rank(layer.rank)} "
            f"({layer.parameters_before:,} → {layer.parameters_after:,} parameters): lower the rank, or leave it whole "
            "with keep_dense()."
        )
    check_values(weight_of(found.module), layer.name)
    return found.module


def _truncate_(replacement: LowRankLayer, layer: LayerPlan, choice: Choice, module: nn.Module) -> None:
    """Set the factors to the truncation of the weight, decomposed already where the plan was just made."""
    try:
        replacement.truncate_(weight_of(module).detach(), layer.options[choice.scheme].spectrum)
    except LinAlgError as error:
        raise undecomposed(layer.name, error) from error


def measured_error(dense: nn.Module, low_rank: LowRankLayer) -> float:
    """Return ‖W − Ŵ‖_F / ‖W‖_F of a layer and what takes its place, as it is stored."""
    weight = weight_of(dense).detach()
    largest = working_copy(torch.maximum(weight.amax(), -weight.amin()))
    if largest == 0:
        return 0.0
    product = multiply_out(low_rank)
    missed = squared_norms((weight.to(product.dtype) - product).flatten(1), largest)
    return math.sqrt(float(missed) / float(squared_norms(weight.flatten(1), largest)))
