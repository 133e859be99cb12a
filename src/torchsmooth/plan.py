"""Plans for whole models: which layer gets which scheme, form and rank, decided without touching the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from ._budget import uniformly, within_budget, within_error
from ._checks import check_choice, check_filter, check_module, check_open_unit, check_values, quoted
from ._layers import KINDS, SCHEME_OPTIONS, FoundLayer, count_parameters, find_layers, weight_of, weights_of
from ._linalg import LinAlgError, relative_tail_energies, singular_values, working_copy
from ._lowrank_layer import multiply_out
from ._swap import swap_, take_over_
from .layer_plan import LayerPlan, Option
from .report import CompressionReport, LayerReport, layer_table, totals_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ._budget import Frontier
    from ._lowrank_layer import LowRankLayer
    from ._matricise import Scheme

__all__ = ["CompressionPlan", "plan_compression"]

Allocation = Literal["budget", "uniform"]
SchemeOption = Literal["auto", "channel", "input", "spatial"]

_FILTERED = "left out by filter_fn"
_BUDGET_REASON = "worth its parameters in this budget"


@dataclass(frozen=True)
class CompressionPlan:
    """A plan for a whole model; ``print`` shows a table. It holds no weights, and layers can be edited by name.

    Attributes:
        layers: one entry for every module with a weight, also for those that stay dense.
        parameters_before: all parameters of the model, shared ones counted once.
        asked: what was asked for, in words.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> plan = torchsmooth.plan_compression(model, ratio=0.5)
        >>> plan["0"].rank = 8
        >>> report = plan.apply_(model)
        >>> report["0"].rank, model[0].down.weight.shape
        (8, torch.Size([8, 64]))
    """

    layers: tuple[LayerPlan, ...]
    parameters_before: int
    asked: str

    @property
    def parameters_after(self) -> int:
        """All parameters of the model that comes out."""
        return self.parameters_before - sum(one.parameters_before - one.parameters_after for one in self.layers)

    @property
    def ratio(self) -> float:
        """Fraction of the parameters that is removed."""
        return 1 - self.parameters_after / self.parameters_before

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r} in this plan; it has {quoted([one.name for one in self.layers])}.")

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        totals = totals_line(self.parameters_before, self.parameters_after, self.asked)
        return f"{layer_table(self.layers)}\n{totals}, planned"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain dictionaries, lists and numbers, ready for JSON."""
        fields = ("name", "type", "scheme", "form", "rank", "full_rank", "parameters_before", "parameters_after")
        return {
            "asked": self.asked,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "ratio": self.ratio,
            "layers": [
                {field: getattr(one, field) for field in fields}
                | {"shape": list(one.shape), "relative_error": one.relative_error, "reason": one.reason}
                for one in self.layers
            ],
        }

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def apply_(self, model: nn.Module) -> CompressionReport:
        """Compress a model as planned, in place: the model planned for, or a copy of it with weights of its own.

        Args:
            model: a model with the layers of the plan, dense, under the same names.

        Returns:
            The report.

        Raises:
            TypeError: if ``model`` is not a module.
            ValueError: if a layer is missing, of another type or shape, cannot be compressed or would grow, or
                its weight holds NaN or infinite values. The model is unchanged then.
        """
        check_module(model)
        targets = {found.name: found for found in find_layers(model)}
        planned = [layer for layer in self.layers if layer.scheme is not None]
        if not planned:
            raise ValueError("nothing to compress: every layer of this plan stays dense.")
        modules = {layer.name: _target(layer, targets) for layer in planned}
        before = count_parameters(model)
        replacements: dict[nn.Module, nn.Module] = {}
        errors: dict[str, float] = {}
        for layer in planned:
            module = modules[layer.name]
            replacement = _factorise(layer, module)
            errors[layer.name] = _measured_error(module, replacement)
            take_over_(replacement, module)
            replacements[module] = replacement
        swap_(model, replacements)
        return CompressionReport(
            layers=tuple(_report(layer, errors.get(layer.name, 0.0)) for layer in self.layers),
            parameters_before=before,
            parameters_after=count_parameters(model),
            asked=self.asked,
        )


def _target(layer: LayerPlan, targets: Mapping[str, FoundLayer]) -> nn.Module:
    found = targets.get(layer.name)
    if found is None:
        raise ValueError(f"the plan has a layer {layer.name!r}, the model does not: was it made for another model?")
    if found.reason:
        raise ValueError(f"layer {layer.name!r} is planned to be compressed, but cannot be: {found.reason}.")
    shape = tuple(weight_of(found.module).shape)
    if (type(found.module).__name__, shape) != (layer.type, layer.shape):
        raise ValueError(
            f"layer {layer.name!r} is planned as {layer.type} of shape {layer.shape}, but the model has "
            f"{type(found.module).__name__} of shape {shape}: was the plan made for another model?"
        )
    layouts = KINDS[type(found.module)].matricisations(found.module)
    if layer.scheme not in layouts or layouts[layer.scheme] != layer.options[layer.scheme].matricisation:
        raise ValueError(
            f"layer {layer.name!r} is planned for other groups than this model's: was the plan made for another model?"
        )
    if layer.parameters_after >= layer.parameters_before:
        raise ValueError(
            f"layer {layer.name!r} would not get smaller at rank {layer.rank} ({layer.parameters_before:,} → "
            f"{layer.parameters_after:,} parameters): lower the rank, or leave it whole with keep_dense()."
        )
    check_values(weight_of(found.module), layer.name)
    return found.module


def _factorise(layer: LayerPlan, module: nn.Module) -> LowRankLayer:
    if layer.rank is None or layer.scheme is None:  # only planned layers come here
        raise ValueError(f"layer {layer.name!r} has no rank.")
    try:
        return KINDS[type(module)].factorise(module, layer.rank, layer.scheme)
    except LinAlgError as error:
        raise ValueError(
            f"the weight of layer {layer.name!r} could not be decomposed ({error}): leave it out with filter_fn."
        ) from error


def _measured_error(dense: nn.Module, low_rank: LowRankLayer) -> float:
    weight = working_copy(weight_of(dense))
    largest = float(weight.abs().max())
    if largest == 0:
        return 0.0
    # Divided first, or the squares of very large and very small entries would leave the range of float64.
    difference = weight / largest - multiply_out(low_rank).to(weight) / largest
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(weight / largest))


def _report(layer: LayerPlan, error: float) -> LayerReport:
    return LayerReport(
        name=layer.name,
        type=layer.type,
        shape=layer.shape,
        scheme=layer.scheme,
        form=layer.form,
        rank=layer.rank,
        full_rank=layer.full_rank,
        parameters_before=layer.parameters_before,
        parameters_after=layer.parameters_after,
        relative_error=error,
        reason=layer.reason,
    )


@torch.no_grad()
def plan_compression(
    model: nn.Module,
    ratio: float | None = None,
    *,
    max_error: float | None = None,
    scheme: SchemeOption = "auto",
    allocation: Allocation = "budget",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> CompressionPlan:
    r"""Decide which layer gets which scheme and rank, without touching the model.

    With a ratio, ranks are chosen for the whole model at once, for a small sum over the layers of the squared relative
    error :math:`\lVert W - \hat W\rVert_F^2 / \lVert W\rVert_F^2` within the budget of parameters: one Lagrange
    multiplier, bisected, then what is left over is filled in. The budget is exact: never more than ``1 - ratio`` of the
    model's parameters, and as close below as one more singular triple allows.
    A layer that would not get smaller stays dense.

    Args:
        model: any model; its Linear and Conv2d layers are planned, everything else is listed with a reason.
        ratio: fraction of *all* parameters of the model to remove, strictly between 0 and 1: 0.7 leaves 30 %.
        max_error: instead of a ratio: the largest relative error allowed in each layer, strictly between 0 and 1.
        scheme: ``"channel"``, ``"input"``, ``"spatial"`` (the better of its two orientations), or ``"auto"``: the
            best of all for each layer. Linear layers and 1×1 convolutions have only one.
        allocation: ``"budget"`` as above, or ``"uniform"``: each layer keeps the same fraction of its own parameters.
        filter_fn: ``filter_fn(module, qualified_name) -> bool``, called for each layer that could be compressed; False
            leaves it dense.

    Returns:
        A plan that can be printed, edited and applied.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: if an argument is out of range, both or neither of ``ratio`` and ``max_error`` are given, the
            ratio cannot be reached (the message names the largest that can), a weight holds NaN or infinite values,
            is sharded or not initialised, or there is nothing to compress.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> plan = torchsmooth.plan_compression(model, ratio=0.7)
        >>> plan.parameters_after <= 0.3 * plan.parameters_before
        True

    Source: one Lagrange multiplier for ranks under a budget: BALF, 2025 (arXiv 2509.25136); the bisection and the
    objective here are the library's own.
    """
    check_module(model)
    check_choice(scheme, "scheme", SCHEME_OPTIONS)
    check_choice(allocation, "allocation", get_args(Allocation))
    if (ratio is None) == (max_error is None):
        raise ValueError(
            "give either ratio (fraction of the parameters to remove) or max_error (largest relative error of a "
            f"layer), got ratio={ratio}, max_error={max_error}."
        )
    if ratio is not None:
        ratio = check_open_unit(ratio, "ratio", "the fraction of the model's parameters to remove")
    else:
        max_error = check_open_unit(max_error, "max_error", "the largest relative error of a layer")
    check_filter(filter_fn)

    layers = [_layer_plan(found, scheme, filter_fn) for found in find_layers(model)]
    total = count_parameters(model)
    candidates = [layer for layer in layers if layer.options]
    choices = [layer.choices() for layer in candidates]
    frontiers = [frontier for frontier, _ in choices]
    shrinkable = [len(frontier.costs) > 1 or meanings[int(frontier.labels[0])] for frontier, meanings in choices]
    if not any(shrinkable):
        raise ValueError(_nothing_to_compress(model, layers))
    if ratio is not None:
        fixed = total - sum(layer.parameters_before for layer in candidates)
        _check_reachable(ratio, total, fixed + sum(int(one.costs[0]) for one in frontiers), layers)
        budget = total - math.ceil(Fraction(str(ratio)) * total) - fixed
        indices = (within_budget if allocation == "budget" else uniformly)(frontiers, budget)
        asked = f"ratio {ratio}" + (", uniform" if allocation == "uniform" else "")
    else:
        indices = within_error(frontiers, max_error or 0.0)
        asked = f"max_error {max_error}"
    for layer, (frontier, meanings), index, can_shrink in zip(candidates, choices, indices, shrinkable, strict=True):
        meaning = meanings[int(frontier.labels[index])]
        if meaning is not None:
            layer.choose(*meaning)
        elif not can_shrink:
            layer.reason = "no rank makes it smaller"
        else:
            layer.reason = _BUDGET_REASON if ratio is not None else "no smaller rank is within max_error"
    plan = CompressionPlan(tuple(layers), total, asked)
    if plan.parameters_after == total:
        raise ValueError(_nothing_within(max_error or 0.0, candidates, choices))
    return plan


def _layer_plan(
    found: FoundLayer, scheme: SchemeOption, filter_fn: Callable[[nn.Module, str], bool] | None
) -> LayerPlan:
    module, reason = found.module, found.reason
    if not reason and filter_fn is not None and not filter_fn(module, found.name):
        reason = _FILTERED
    if reason:
        weights = weights_of(module)
        shape = tuple(weights[0].shape) if weights else ()
        plan = LayerPlan(found.name, type(module).__name__, shape, {}, reason)
        plan.parameters_before = sum(one.numel() for one in weights)
        return plan
    weight = weight_of(module)
    check_values(weight, found.name)
    options: dict[Scheme, Option] = {}
    for name, layout in KINDS[type(module)].matricisations(module, scheme).items():
        try:
            values = singular_values(layout.to_matrices(weight))
        except LinAlgError as error:
            raise ValueError(
                f"the weight of layer {found.name!r} could not be decomposed ({error}): leave it out with filter_fn."
            ) from error
        errors = relative_tail_energies(values)
        # What casting the factors will add: measured to be a little under the unit roundoff, and independent.
        roundoff = torch.finfo(weight.dtype).eps / 2
        options[name] = Option(layout, errors + roundoff**2 * (errors[0] > 0))
    return LayerPlan(found.name, type(module).__name__, tuple(weight.shape), options)


def _check_reachable(ratio: float, total: int, least: int, layers: list[LayerPlan]) -> None:
    if total - math.ceil(Fraction(str(ratio)) * total) >= least:
        return
    reachable = 1 - Fraction(least, total)
    digits = next(digits for digits in range(4, 20) if math.floor(reachable * 10**digits))
    most = math.floor(reachable * 10**digits) / 10**digits
    dense = sorted((one for one in layers if not one.options), key=lambda one: -one.parameters_before)
    kept = f"{sum(one.parameters_before for one in dense):,} of them in layers that stay dense"
    if dense:
        kept += f", above all {dense[0].name or 'the model itself'!r}: {dense[0].reason}"
    raise ValueError(
        f"ratio {ratio} cannot be reached: with rank 1 in every layer that can be compressed, {least:,} of {total:,} "
        f"parameters are left ({kept}; the rest in factors, biases and norms). "
        f"The largest ratio that can be reached is {most}."
    )


def _nothing_to_compress(model: nn.Module, layers: list[LayerPlan]) -> str:
    left_out = sum(one.reason == _FILTERED for one in layers)
    if left_out:
        return (
            f"nothing to compress in this {type(model).__name__}: filter_fn left out {left_out} layers and the others "
            "have to stay dense. filter_fn(module, qualified_name) returns True for a layer to compress."
        )
    reasons = [f"{one.name or '(the model)'}: {one.reason or 'no rank makes it smaller'}" for one in layers]
    listed = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")  # noqa: PLR2004
    found = f"none of its {len(layers)} layers can be made smaller ({listed})" if layers else "it has no layers"
    return (
        f"nothing to compress in this {type(model).__name__}: {found}. "
        "Linear and Conv2d layers with more than a few channels can be."
    )


def _nothing_within(
    max_error: float,
    candidates: list[LayerPlan],
    choices: list[tuple[Frontier, list[tuple[Scheme, int] | None]]],
) -> str:
    least, name = min(
        (math.sqrt(float(frontier.errors[-2])), layer.name)
        for layer, (frontier, _) in zip(candidates, choices, strict=True)
        if len(frontier.costs) > 1
    )
    return (
        f"nothing to compress: no layer can be made smaller within max_error={max_error}. "
        f"The layer that comes closest is {name!r}, with a relative error of {least:.4g}."
    )
