"""A model laid open for planning: decomposed and priced once, then planned at any ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, get_args

from ._budget import uniformly, within_budget, within_error
from ._calibration import Calibration, grouped_weight, width_of
from ._checks import check_choice, check_count, check_filter, check_values, describe
from ._computed import computing
from ._expansion import refuse_low_rank
from ._fine_ranks import raise_pairs
from ._layers import KINDS, SCHEME_OPTIONS, FoundLayer, find_layers, weight_of, weights_of
from ._lowrank_layer import LowRankLayer
from ._matricise import FORMS
from ._objective import importances
from ._options import bases_kept, decomposition_work, options_of, output_losses
from ._prices import ParameterPrices
from ._ranks import ALONE
from ._targets import NOT_REACHED, TARGETS, WORDS, Target, needed_inputs, price_
from .layer_plan import LayerPlan
from .plan import CompressionPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from ._budget import Frontier
    from ._expansion import Expansion
    from ._matricise import Form, LayerScheme
    from ._ranks import Team
    from ._running import Inputs
    from ._tucker_layout import Layout
    from .layer_plan import Choice, Option

Allocation = Literal["budget", "uniform"]
SchemeOption = Literal["auto", "channel", "input", "spatial", "tucker"]
FormOption = Literal["auto", "factored", "pivoted"]
Computed = Literal["keep", "merge"]

_FORMS: dict[str, tuple[Form, ...]] = {"auto": FORMS, "factored": ("factored",), "pivoted": ("pivoted",)}
_FILTERED = "left out by filter_fn"


@dataclass(frozen=True)
class Request:
    """What was asked for, checked, and who works on it."""

    schemes: tuple[SchemeOption, ...]
    form: FormOption
    allocation: Allocation
    target: Target
    inputs: Inputs | None
    multiple: int
    filter_fn: Callable[[nn.Module, str], bool] | None
    show: bool | None
    calibration: Calibration | None
    team: Team
    parametrized: Computed

    @classmethod
    def of(
        cls,
        *,
        scheme: SchemeOption | Sequence[SchemeOption],
        form: FormOption,
        allocation: Allocation,
        target: Target,
        example_inputs: Any,
        rank_multiple: int,
        filter_fn: Callable[[nn.Module, str], bool] | None,
        progress: bool | None,
        calibration: Any,
        parametrized: Computed = "keep",
        team: Team = ALONE,
    ) -> Request:
        """Check what a user asks for."""
        schemes = (scheme,) if isinstance(scheme, str) else _listed(scheme)
        for one in schemes:
            check_choice(one, "scheme", SCHEME_OPTIONS)
        check_choice(form, "form", get_args(FormOption))
        check_choice(allocation, "allocation", get_args(Allocation))
        check_choice(target, "target", TARGETS)
        check_choice(parametrized, "parametrized", get_args(Computed))
        check_filter(filter_fn)
        multiple = check_count(rank_multiple, "rank_multiple", 2**31 - 1, "ranks are multiples of it")
        if progress is not None and not isinstance(progress, bool):
            raise TypeError(f"progress must be True, False or None, got {describe(progress)}.")
        inputs = needed_inputs(target, example_inputs)
        show = team.shown(progress)
        kept = Calibration.of(calibration, show, team)
        return cls(schemes, form, allocation, target, inputs, multiple, filter_fn, show, kept, team, parametrized)

    def refusal(self, module: nn.Module, name: str) -> str:
        """Say why a composite layer is not to be written in plain ones; empty if it is."""
        if self.filter_fn is not None and not self.filter_fn(module, name):
            return _FILTERED
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
    """

    def __init__(self, model: nn.Module, request: Request, expansion: Expansion) -> None:
        self.model, self.request = model, request
        found = [_unless_filtered(one, request.filter_fn, expansion) for one in find_layers(model, expansion)]
        self.parameters = expansion.parameters
        weights = {one.name: weight_of(one.module) for one in found if not one.reason}
        for name, weight in weights.items():
            check_values(weight, name)
        importance = dict(zip(weights, importances(list(weights.values())), strict=True))
        able = {one.name: one for one in found if not one.reason}
        layouts = {name: _layouts(one, request.schemes) for name, one in able.items()}
        kept = bases_kept(layouts)
        options = request.team.share(
            request.team.divide({name: decomposition_work(several) for name, several in layouts.items()}),
            lambda name: options_of(able[name], request.schemes, importance[name], keep_bases=name in kept),
            "Decomposing layers",
            show=request.show,
        )
        self.layers = [_layer_plan(one, request, options.get(one.name, {})) for one in found]
        if request.calibration is not None:
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
        request, layers = self.request, [layer.copy() for layer in self.layers]
        for layer, (choice, reason) in zip(
            layers, request.team.first(lambda: self._choices(layers, ratio, max_error)), strict=True
        ):
            if choice is None:
                layer.keep_dense(reason)
            else:
                layer.choose(choice.scheme, choice.rank, choice.form)
        if max_error is not None:
            asked = f"max_error {max_error}"
        else:
            share = "" if request.target == "params" else f" of {WORDS[request.target].share}"
            asked = f"ratio {ratio}{share}" + (", uniform" if request.allocation == "uniform" else "")
        return CompressionPlan(
            tuple(layers),
            self.parameters,
            asked + ("" if request.calibration is None else ", calibrated"),
            request.target,
            self.cost if request.target == "macs" else None,
            self.cost / 1e9 if request.target == "latency" else None,
        )

    def _choices(
        self, layers: list[LayerPlan], ratio: float | None, max_error: float | None
    ) -> list[tuple[Choice | None, str]]:
        """Make the choices of some layers, and return them, or why there is none."""
        request = self.request
        candidates = [layer for layer in layers if layer.options and layer.reason != NOT_REACHED]
        what: Literal["losses", "errors"] = "losses" if max_error is None else "errors"
        choices = [layer.choices(what, request.multiple) for layer in candidates]
        frontiers = [frontier for frontier, _ in choices]
        shrinkable = [len(frontier.costs) > 1 or meanings[int(frontier.labels[0])] for frontier, meanings in choices]
        if not any(shrinkable):
            raise ValueError(self._nothing_to_compress(layers))
        if max_error is not None:
            indices = within_error(frontiers, max_error)
        else:
            indices = self._within(ratio or 0.0, layers, candidates, frontiers)
        for layer, (frontier, meanings), index, able in zip(candidates, choices, indices, shrinkable, strict=True):
            choice = meanings[int(frontier.labels[index])]
            if choice is not None:
                layer.choose(choice.scheme, choice.rank, choice.form)
            elif not able:
                layer.reason = self._none_cheaper()
            else:
                within = WORDS[request.target].budget_reason
                layer.reason = within if max_error is None else "no smaller rank is within max_error"
        if max_error is None and request.allocation == "budget":
            saved = sum(one.prices.dense - (one.cost_after or 0) for one in candidates)
            raise_pairs(candidates, self._allowed(ratio or 0.0) - (self.cost - saved), request.multiple)
        if max_error is not None and all(layer.choice is None for layer in layers):
            raise ValueError(_nothing_within(max_error, candidates, choices))
        return [(layer.choice, layer.reason) for layer in layers]

    def _within(
        self, ratio: float, layers: list[LayerPlan], candidates: list[LayerPlan], frontiers: list[Frontier]
    ) -> list[int]:
        fixed = self.cost - sum(layer.prices.dense for layer in candidates)
        least = fixed + sum(int(one.costs[0]) for one in frontiers)
        allowed = self._allowed(ratio)
        if allowed < least:
            raise ValueError(self._unreachable(ratio, least, layers))
        return (within_budget if self.request.allocation == "budget" else uniformly)(frontiers, allowed - fixed)

    def _allowed(self, ratio: float) -> int:
        """Return the exact budget."""
        return self.cost - math.ceil(Fraction(str(ratio)) * self.cost)

    def _unreachable(self, ratio: float, least: int, layers: list[LayerPlan]) -> str:
        request, words, total = self.request, WORDS[self.request.target], self.cost
        reachable = 1 - Fraction(least, total)
        digits = next((digits for digits in range(4, 20) if math.floor(reachable * 10**digits)), 4)
        most = math.floor(reachable * 10**digits) / 10**digits
        smallest = "rank 1" if request.multiple == 1 else f"the smallest multiple of {request.multiple} as rank"
        text = (
            f"ratio {ratio} cannot be reached: with {smallest} in every layer that can be compressed, {least:,} of "
            f"{total:,} {words.unit} are left"
        )
        if request.target == "params":
            dense = sorted((one for one in layers if not one.options), key=lambda one: -one.parameters_before)
            text += f" ({sum(one.parameters_before for one in dense):,} of them in layers that stay dense"
            if dense:
                text += f", above all {dense[0].name or 'the model itself'!r}: {dense[0].reason}"
            text += "; the rest in factors, biases and norms)"
        elif request.target == "latency":
            text = (
                f"ratio {ratio} cannot be reached: with the fastest choice in every layer, {least / 1e6:.3g} of "
                f"{total / 1e6:.3g} ms are left"
            )
        return f"{text}. The largest ratio that can be reached is {most}."

    def _none_cheaper(self) -> str:
        request = self.request
        if request.multiple == 1 or request.target == "latency":
            return WORDS[request.target].none_cheaper
        among = f"no rank that is a multiple of {request.multiple}"
        return WORDS[request.target].none_cheaper.replace("no rank", among)

    def _nothing_to_compress(self, layers: list[LayerPlan]) -> str:
        kind = type(self.model).__name__
        left_out = sum(one.reason == _FILTERED for one in layers)
        if left_out:
            return (
                f"nothing to compress in this {kind}: filter_fn left out {left_out} layers and the others "
                "have to stay dense. filter_fn(module, qualified_name) returns True for a layer to compress."
            )
        reasons = [f"{one.name or '(the model)'}: {one.reason or self._none_cheaper()}" for one in layers]
        listed = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")  # noqa: PLR2004
        found = f"none of its {len(layers)} layers can be made smaller ({listed})" if layers else "it has no layers"
        return (
            f"nothing to compress in this {kind}: {found}. "
            "Linear layers, convolutions and embeddings with more than a few channels can be."
        )


def _listed(scheme: Any) -> tuple[Any, ...]:
    if isinstance(scheme, (list, tuple)):
        if not scheme:
            raise ValueError(f"scheme is an empty {type(scheme).__name__}: name at least one of {SCHEME_OPTIONS}.")
        return tuple(scheme)
    raise TypeError(f"scheme must be a name or a sequence of names, got {describe(scheme)}.")


def _unless_filtered(
    found: FoundLayer, filter_fn: Callable[[nn.Module, str], bool] | None, expansion: Expansion
) -> FoundLayer:
    if found.reason or filter_fn is None or found.module in expansion.origins:  # those were asked for before
        return found
    return found if filter_fn(found.module, found.name) else replace(found, reason=_FILTERED)


def _layouts(found: FoundLayer, schemes: Sequence[str]) -> list[Layout]:
    return list(KINDS[type(found.module)].layouts(found.module, schemes).values())


def _layer_plan(found: FoundLayer, request: Request, options: Mapping[LayerScheme, Option]) -> LayerPlan:
    module, forms = found.module, _FORMS[request.form]
    weights = weights_of(module)
    shape = tuple(weights[0].shape) if weights else ()
    plan = LayerPlan(found.name, found.type, shape, options, found.reason, forms=forms)
    plan.parameters_before = found.parameters
    plan.prices = ParameterPrices(found.parameters)
    return plan


def _nothing_within(
    max_error: float, candidates: list[LayerPlan], choices: list[tuple[Frontier, list[Choice | None]]]
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
