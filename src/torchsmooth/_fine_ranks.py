"""Pairs of ranks between those that a plan chooses from: they take up what it leaves over of a budget.

A layer in scheme ``"tucker"`` has as many pairs as its channels multiplied; of a large layer only some stand on the
frontier that ranks are chosen from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ._tucker_layout import no_more

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from ._tucker_layout import Pair
    from .layer_plan import LayerPlan


class _Step(NamedTuple):
    """A larger pair of ranks for one layer: how much loss it takes away for each unit of its price, and that price."""

    gain: float
    price: int
    rank: Pair


def raise_pairs(layers: Iterable[LayerPlan], slack: int, multiple: int) -> None:
    """Raise pairs of ranks by single steps, always where that takes away the most loss for its price.

    Args:
        layers: plans of layers, of which those in scheme ``"tucker"`` are changed.
        slack: what may be spent, in what the plan counts. Times of pairs that were not measured are not known, so
            under such a target nothing changes.
        multiple: ranks stay multiples of this; 0: of what suits each.
    """
    paired, tables = [], []
    for layer in layers:
        choice = layer.choice
        if choice is not None and isinstance(choice.rank, tuple):
            paired.append(layer)
            tables.append(layer.options[choice.scheme].rounded("losses", choice.form))
    steps = [_best_step(layer, table, slack, multiple) for layer, table in zip(paired, tables, strict=True)]
    while steps:
        index = max(range(len(steps)), key=lambda one: steps[one].gain)
        step = steps[index]
        if step.gain <= 0:
            return
        if step.price <= slack:
            slack -= step.price
            paired[index].rank = step.rank
        # The steps of the other layers may no longer fit; each is found again when its turn comes.
        steps[index] = _best_step(paired[index], tables[index], slack, multiple)


def _best_step(layer: LayerPlan, table: Tensor, slack: int, multiple: int) -> _Step:
    best = _Step(0.0, 0, (0, 0))
    choice, before = layer.choice, layer.cost_after
    if choice is None or before is None:
        return best
    scheme, form = choice.scheme, choice.form
    r_in, r_out = layer.rank
    layout: Any = layer.options[scheme].matricisation
    more_in, more_out = layout.steps(multiple)
    for rank in ((r_in + more_in, r_out), (r_in, r_out + more_out), (r_in + more_in, r_out + more_out)):
        if not no_more(rank, layout.largest_rank(form)) or layout.parameters(rank, form) >= layer.parameters_before:
            continue
        cost = layer.prices.cost(scheme, layout, form, rank)
        if cost is None or not before < cost < layer.prices.dense or cost - before > slack:
            continue
        gain = float(table[r_in, r_out] - table[rank]) / (cost - before)
        best = max(best, _Step(gain, cost - before, rank))
    return best
