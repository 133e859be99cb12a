"""A model laid open for planning: decomposed and priced once, then planned at any ratio."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from ._calibration import Calibration, grouped_weight, width_of
from ._checks import check_choice, check_filter, check_values, is_wanted
from ._computed import computing
from ._expansion import refuse_low_rank
from ._layers import KINDS, FoundLayer, find_layers, rows_of, shape_of, weight_of
from ._lowrank_layer import LowRankLayer
from ._objective import importances
from ._options import alike, bases_kept, decomposition_work, options_of, output_losses
from ._planner import FILTER, Filter, Planner, Subject
from ._prices import ParameterPrices
from ._ranks import ALONE
from ._targets import Target, needed_inputs, price_
from ._terms import Terms, checked_terms
from .layer_plan import LayerPlan
from .report import BEFORE_REFIT, RANKS_CALIBRATED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from ._expansion import Expansion
    from ._matricise import LayerScheme
    from ._ranks import Team
    from ._running import Inputs
    from ._tucker_layout import Layout
    from .layer_plan import Option
    from .plan import CompressionPlan

Computed = Literal["keep", "merge"]


@dataclass(frozen=True)
class Request(Terms):
    """What was asked for, checked, and who works on it."""

    inputs: Inputs | None
    filter_fn: Callable[[nn.Module, str], bool] | None
    calibration: Calibration | None
    team: Team
    parametrized: Computed
    left_out: Filter = FILTER

    @classmethod
    def of(
        cls,
        *,
        target: Target,
        example_inputs: Any,
        filter_fn: Callable[[nn.Module, str], bool] | None,
        progress: bool | None,
        calibration: Any,
        parametrized: Computed = "keep",
        team: Team = ALONE,
        left_out: Filter = FILTER,
        **options: Any,
    ) -> Request:
        """Check what a user asks for; ``options`` are the other arguments of :func:`checked_terms`."""
        terms = checked_terms(target=target, progress=progress, **options)
        check_choice(parametrized, "parametrized", get_args(Computed))
        check_filter(filter_fn)
        inputs = needed_inputs(target, example_inputs)
        show = team.shown(progress)
        kept = Calibration.of(calibration, show, team)
        own = {"inputs": inputs, "filter_fn": filter_fn, "calibration": kept, "team": team}
        return cls(**vars(terms) | {"show": show} | own, parametrized=parametrized, left_out=left_out)

    def refusal(self, module: nn.Module, name: str) -> str:
        """Say why a composite layer is not to be written in plain ones; empty if it is."""
        if self.filter_fn is not None and not is_wanted(self.filter_fn(module, name), name):
            return self.left_out.reason
        computed = computing(module)
        if computed and self.parametrized == "keep":
            return f"{computed} (parametrized='merge' compresses what is computed)"
        if isinstance(module, LowRankLayer) and self.target != "params":
            return refuse_low_rank(module, f"target {self.target!r} compresses no layer twice: restore_dense_ it first")
        return ""


class Workpiece:
    """A model, decomposed and priced, from which plans for any ratio can be made.

    Among several ranks, layers are decomposed by one rank each, and the first one decides: it prices and it plans.

    Args:
        model: the model, expanded.
        request: what was asked for.
        expansion: what was expanded in it.
        weighed: whether calibration data, where there is any, weighs the ranks; a bound on errors does not ask for it.
    """

    def __init__(self, model: nn.Module, request: Request, expansion: Expansion, *, weighed: bool = True) -> None:
        self.model, self.request = model, request
        found = [_unless_filtered(one, request, expansion) for one in find_layers(model, expansion)]
        self.parameters = expansion.parameters
        weights = {one.name: weight_of(one.module) for one in found if not one.reason}
        for name, weight in weights.items():
            check_values(weight, name)
        able = {one.name: one for one in found if not one.reason}
        rows = [rows_of(one.module) for one in able.values()]
        importance = dict(zip(weights, importances(list(weights.values()), rows), strict=True))
        layouts = {name: _layouts(one, request.schemes) for name, one in able.items()}
        kept = bases_kept(layouts)
        owners = request.team.divide({name: decomposition_work(several) for name, several in layouts.items()})
        together = alike(able, kept, owners)
        ready: dict[str, dict[LayerScheme, Option]] = {}

        def decompose(name: str) -> dict[LayerScheme, Option]:
            if name not in ready:
                names = together[name]
                layers, factors = [able[one] for one in names], [importance[one] for one in names]
                found = options_of(layers, request.schemes, factors, keep_bases=name in kept)
                ready.update(zip(names, found, strict=True))
            return ready.pop(name)

        options = request.team.share(owners, decompose, "Decomposing layers", show=request.show)
        self.layers = [_layer_plan(one, request, options.get(one.name, {})) for one in found]
        if request.calibration is not None and weighed:
            self._calibrate(request.calibration, {one.name: one.module for one in found}, importance)
        self.cost = request.team.first(
            lambda: price_(
                model,
                self.parameters,
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
        """Weigh ranks by the relative error at the output, where the data comes; layers weigh as they do without."""
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
            shared = self.request.team.share(owners, weigh, "Weighing ranks", show=self.request.show)
            for name, losses in shared.items():
                options = layers[name].options
                layers[name].options = {scheme: replace(one, losses=losses[scheme]) for scheme, one in options.items()}

    def plan(self, ratio: float | None, max_error: float | None = None) -> CompressionPlan:
        """Make the plan for one ratio or one error bound, both checked."""
        request, kind = self.request, type(self.model).__name__
        calibrated = RANKS_CALIBRATED if max_error is None else BEFORE_REFIT
        subject = Subject(kind, request.left_out, asked="" if request.calibration is None else calibrated)
        return Planner(subject, request, self.layers, self.parameters, self.cost).plan(ratio, max_error, request.team)


def _unless_filtered(found: FoundLayer, request: Request, expansion: Expansion) -> FoundLayer:
    filter_fn = request.filter_fn
    if found.reason or filter_fn is None or found.module in expansion.origins:  # those were asked for before
        return found
    wanted = is_wanted(filter_fn(found.module, found.name), found.name)
    return found if wanted else replace(found, reason=request.left_out.reason)


def _layouts(found: FoundLayer, schemes: Sequence[str]) -> list[Layout]:
    return list(KINDS[type(found.module)].layouts(found.module, schemes).values())


def _layer_plan(found: FoundLayer, request: Request, options: Mapping[LayerScheme, Option]) -> LayerPlan:
    plan = LayerPlan(found.name, found.type, shape_of(found.module), options, found.reason, forms=request.forms)
    plan.parameters_before = found.parameters
    plan.prices = ParameterPrices(found.parameters)
    return plan
