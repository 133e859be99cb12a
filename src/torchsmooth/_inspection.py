"""What can be known of a checkpoint before it is compressed: its layers, and what each ratio would cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ._checkpoint_factors import Workshop
from ._table import format_shape, format_share, format_table
from .checkpoint_files import planner_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ._checkpoint_layers import FoundLayers
    from ._planner import Planner, Subject
    from ._tensor_source import Checkpoint
    from ._terms import Terms
    from .layer_plan import LayerPlan
    from .plan import CompressionPlan


@dataclass(frozen=True)
class LayerView:
    """What one layer is like.

    Attributes:
        name: its name.
        type: class name, as far as it is known.
        shape: of its weight.
        parameters: entries of its weight.
        effective_rank: exp of the entropy of its singular values, scheme ``"channel"`` if that was asked for; None if
            it has to stay dense.
        full_rank: the rank from which on nothing is lost.
        reason: why it has to stay dense; empty otherwise.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    effective_rank: float | None
    full_rank: int | None
    reason: str


@dataclass(frozen=True)
class RatioView:
    """What one ratio would cost.

    Attributes:
        ratio: the fraction of all parameters that is removed.
        parameters: what is left.
        relative_error: √(Σ‖W − Ŵ‖² / Σ‖W‖²) over all layers that can be compressed.
        worst_layer: the layer with the largest relative error of its own.
        worst_error: that error.
        problem: why the ratio cannot be reached; the others are None then.
    """

    ratio: float
    parameters: int | None = None
    relative_error: float | None = None
    worst_layer: str | None = None
    worst_error: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Inspection:
    """The layers of a checkpoint, and the ratios that were tried."""

    file: str
    parameters: int
    layers: list[LayerView]
    ratios: list[RatioView]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain dictionaries, lists and numbers, ready for JSON."""
        layers = [vars(one) | {"shape": list(one.shape)} for one in self.layers]
        content = {"file": self.file, "parameters": self.parameters}
        return {**content, "layers": layers, "ratios": [vars(one) for one in self.ratios]}

    def __str__(self) -> str:
        layers = [
            (
                one.name,
                one.type,
                format_shape(one.shape),
                f"{one.parameters:,}",
                "–" if one.effective_rank is None else f"{one.effective_rank:.1f} / {one.full_rank}",
                f"dense: {one.reason}" if one.reason else "",
            )
            for one in self.layers
        ]
        header = ("layer", "type", "shape", "parameters", "effective rank", "note")
        able = sum(not one.reason for one in self.layers)
        total = f"{self.parameters:,} parameters, {able} of {len(layers)} layers can be compressed"
        return "\n".join([format_table(header, layers, right=(3, 4)), total, "", self._ratio_table()])

    def _ratio_table(self) -> str:
        rows = []
        for one in self.ratios:
            if one.parameters is None or one.worst_error is None:
                rows.append((f"{one.ratio}", "–", "–", "–", one.problem))
            else:
                left = f"{one.parameters:,} ({format_share(one.parameters, self.parameters)})"
                worst = f"{one.worst_error:.4f} in {one.worst_layer}"
                rows.append((f"{one.ratio}", left, f"{one.relative_error:.4f}", worst, ""))
        header = ("ratio", "parameters left", "rel. error", "largest in a layer", "note")
        return format_table(header, rows, right=(0, 1, 2))


def inspect(
    checkpoint: Checkpoint,
    found: FoundLayers,
    terms: Terms,
    ratios: Sequence[float],
    device: torch.device,
    subject: Subject,
) -> Inspection:
    """Decompose every layer of a checkpoint that can be, one at a time, and plan for some ratios."""
    workshop = Workshop(checkpoint, found.layers, terms, device)
    planner = planner_for(workshop, found, terms, workshop.decompose, subject)
    layers = [_layer_view(one) for one in planner.layers]
    views = [_ratio_view(planner, ratio) for ratio in ratios]
    return Inspection(str(checkpoint.path), found.parameters, layers, views)


def _layer_view(layer: LayerPlan) -> LayerView:
    effective, full = None, None
    option = layer.options.get("channel") or next(iter(layer.options.values()), None)
    if option is not None and isinstance(option.matricisation.full_rank, int):
        effective, full = effective_rank(option.errors), option.matricisation.full_rank
    return LayerView(layer.name, layer.type, layer.shape, layer.parameters_before, effective, full, layer.reason)


def effective_rank(errors: Tensor) -> float:
    """Return how many directions a weight uses: exp of the entropy of the singular values, divided by their sum.

    Args:
        errors: the squared relative error of every rank, ``(full_rank + 1,)``: their steps are the squares.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    values = (errors[:-1] - errors[1:]).clamp_min(0).sqrt()
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def _ratio_view(planner: Planner, ratio: float) -> RatioView:
    try:
        plan = planner.plan(ratio)
    except ValueError as error:
        return RatioView(ratio, problem=str(error))
    worst = max(plan, key=lambda one: one.relative_error)
    return RatioView(ratio, plan.parameters_after, _whole_error(plan), worst.name, worst.relative_error)


def _whole_error(plan: CompressionPlan) -> float:
    lost, whole = 0.0, 0.0
    for layer in plan:
        if layer.options:
            norm = float(next(iter(layer.options.values())).losses.flatten()[0])  # of rank zero: all is lost
            whole += norm
            lost += norm * layer.relative_error**2
    return math.sqrt(lost / whole) if whole else 0.0
