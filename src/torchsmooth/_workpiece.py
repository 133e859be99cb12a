"""A model laid open for planning: decomposed and priced once, then planned at any ratio."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ._calibration import Calibration, grouped_weight, width_of
from ._checks import check_filter, check_values
from ._layers import KINDS, FoundLayer, count_parameters, find_layers, weight_of, weights_of
from ._objective import importances
from ._options import decomposition_work, options_of, output_losses
from ._planner import FILTERED, Planner, Subject
from ._ranks import ALONE
from ._targets import Target, needed_inputs, price_
from ._terms import Terms, checked_terms
from .layer_plan import LayerPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from ._matricise import LayerScheme
    from ._ranks import Team
    from ._running import Inputs
    from .layer_plan import Option
    from .plan import CompressionPlan


@dataclass(frozen=True)
class Request(Terms):
    """What was asked for, checked, and who works on it."""

    inputs: Inputs | None
    filter_fn: Callable[[nn.Module, str], bool] | None
    calibration: Calibration | None
    team: Team

    @classmethod
    def of(
        cls,
        *,
        target: Target,
        example_inputs: Any,
        filter_fn: Callable[[nn.Module, str], bool] | None,
        progress: bool | None,
        calibration: Any,
        team: Team = ALONE,
        **options: Any,
    ) -> Request:
        """Check what a user asks for; ``options`` are the other arguments of :func:`checked_terms`."""
        terms = checked_terms(target=target, progress=progress, **options)
        check_filter(filter_fn)
        inputs = needed_inputs(target, example_inputs)
        show = team.shown(progress)
        kept = Calibration.of(calibration, show, team)
        return cls(**vars(terms) | {"show": show}, inputs=inputs, filter_fn=filter_fn, calibration=kept, team=team)


class Workpiece:
    """A model, decomposed and priced, from which plans for any ratio can be made.

    Among several ranks, layers are decomposed by one rank each, and the first one decides: it prices and it plans.

    Args:
        model: the model.
        request: what was asked for.
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        self.model, self.request = model, request
        found = [_unless_filtered(one, request.filter_fn) for one in find_layers(model)]
        self.parameters = count_parameters(model)
        weights = {one.name: weight_of(one.module) for one in found if not one.reason}
        for name, weight in weights.items():
            check_values(weight, name)
        importance = dict(zip(weights, importances(list(weights.values())), strict=True))
        able = {one.name: one for one in found if not one.reason}
        options = request.team.share(
            request.team.divide({name: _work(one, request.schemes) for name, one in able.items()}),
            lambda name: options_of(able[name], request.schemes, importance[name]),
            "Decomposing layers",
            show=request.show,
        )
        self.layers = [_layer_plan(one, request, options.get(one.name, {})) for one in found]
        if request.calibration is not None:
            self._calibrate(request.calibration, {one.name: one.module for one in found}, importance)
        self.cost = request.team.first(
            lambda: price_(
                model,
                request.target,
                request.inputs,
                {one.name: (one, able[one.name].module) for one in self.layers if one.options},
                multiple=request.multiple,
                show=request.show,
            )
        )

    def _calibrate(
        self, calibration: Calibration, modules: Mapping[str, nn.Module], importance: Mapping[str, float]
    ) -> None:
        """Weigh ranks by the error at the output, where the data comes."""
        layers = {layer.name: layer for layer in self.layers if layer.options}

        def weigh(name: str) -> dict[LayerScheme, Tensor]:
            traffic, moments = seen.pop(name)  # freed when it has served
            module = modules[name]
            inner = moments.inner(centred=traffic.normed or module._parameters.get("bias") is not None)
            return output_losses(layers[name].options, name, grouped_weight(module), inner, importance[name])

        for seen in calibration.look(self.model, {name: modules[name] for name in layers}, moments=True):
            # What takes longest is the root of a moment.
            work = {name: width_of(modules[name]) ** 3 for name, (_, moments) in seen.items() if moments.count}
            owners = self.request.team.divide(work)
            for name, losses in self.request.team.share(owners, weigh).items():
                options = layers[name].options
                layers[name].options = {scheme: replace(one, losses=losses[scheme]) for scheme, one in options.items()}

    def plan(self, ratio: float | None, max_error: float | None = None) -> CompressionPlan:
        """Make the plan for one ratio or one error bound, both checked."""
        request, kind = self.request, type(self.model).__name__
        subject = Subject(kind, asked="" if request.calibration is None else ", calibrated")
        return Planner(subject, request, self.layers, self.parameters, self.cost).plan(ratio, max_error, request.team)


def _unless_filtered(found: FoundLayer, filter_fn: Callable[[nn.Module, str], bool] | None) -> FoundLayer:
    if not found.reason and filter_fn is not None and not filter_fn(found.module, found.name):
        return FoundLayer(found.name, found.module, FILTERED)
    return found


def _work(found: FoundLayer, schemes: Sequence[str]) -> int:
    return decomposition_work(KINDS[type(found.module)].layouts(found.module, schemes).values())


def _layer_plan(found: FoundLayer, request: Request, options: Mapping[LayerScheme, Option]) -> LayerPlan:
    module, forms = found.module, request.forms
    kind = type(module).__name__
    if found.reason:
        weights = weights_of(module)
        plan = LayerPlan(found.name, kind, tuple(weights[0].shape) if weights else (), {}, found.reason, forms=forms)
        plan.parameters_before = sum(one.numel() for one in weights)
        return plan
    return LayerPlan(found.name, kind, tuple(weight_of(module).shape), options, forms=forms)
