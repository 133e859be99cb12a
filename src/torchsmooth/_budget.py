r"""Ranks for a budget: of parameters, multiply-accumulates or nanoseconds.

Each layer is reduced to its *frontier*: the choices (scheme, form and rank, or dense) that no cheaper choice beats,
from the cheapest to the dense layer. Choosing one point on each frontier such that the errors add up to the
least within a budget is a knapsack; one Lagrange multiplier λ solves its convex relaxation, :math:`\min \sum_l
e_l(i_l) + \lambda c_l(i_l)` layer by layer. λ is bisected to the budget, and what rounding to whole ranks left
over is then filled in greedily.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_BISECTIONS = 100


@dataclass(frozen=True)
class Frontier:
    """The useful choices for one layer.

    Attributes:
        costs: what each choice costs, ``(choices,)`` int64 on the CPU, strictly increasing.
        errors: what is to add up to little, ``(choices,)`` float64 on the CPU, strictly decreasing, of any scale.
        labels: what each choice is, in the caller's numbering, ``(choices,)`` int64.
    """

    costs: Tensor
    errors: Tensor
    labels: Tensor

    @staticmethod
    def of(costs: Tensor, errors: Tensor) -> Frontier:
        """Keep, of all choices, those that no cheaper one equals or beats; ties go to the earlier one."""
        order = torch.argsort(errors, stable=True)
        order = order[torch.argsort(costs[order], stable=True)]
        costs, errors = costs[order], errors[order]
        best_before = torch.cat([errors.new_full((1,), torch.inf), errors.cummin(0).values[:-1]])
        useful = errors < best_before
        return Frontier(costs[useful], errors[useful], order[useful])

    def within(self, cost: int) -> int:
        """Count the choices of at most this cost."""
        return int((self.costs <= cost).sum())


def within_budget(frontiers: Sequence[Frontier], budget: int) -> list[int]:
    """Choose points of small total error whose costs sum to at most ``budget``.

    Args:
        frontiers: one for each layer.
        budget: what the layers may cost together, at least the sum of their cheapest choices.

    Returns:
        An index into each frontier. No single layer can be improved within what the budget leaves over.
    """

    def chosen(multiplier: float) -> list[int]:
        # Costs are integers, which a float would turn into the default dtype: in float16 many are infinite.
        return [int((one.errors + multiplier * one.costs.double()).argmin()) for one in frontiers]

    best = [len(one.costs) - 1 for one in frontiers]
    if _cost(frontiers, best) > budget:
        low, high = _multipliers(frontiers)
        best = [0] * len(frontiers)
        for _ in range(_BISECTIONS):
            middle = low**0.5 * high**0.5
            candidate = chosen(middle)
            if _cost(frontiers, candidate) <= budget:
                best, high = candidate, middle
            else:
                low = middle
    return _fill(frontiers, best, budget)


def uniformly(frontiers: Sequence[Frontier], budget: int) -> list[int]:
    """Let every layer keep the same fraction of its own cost, the largest that fits the budget.

    Args:
        frontiers: one for each layer, the dense layer last.
        budget: what the layers may cost together, at least the sum of their cheapest choices.

    Returns:
        An index into each frontier. What whole ranks leave over of the budget is filled in layer by layer.
    """

    def chosen(fraction: float) -> list[int]:
        indices = []
        for one in frontiers:
            allowed = int(fraction * int(one.costs[-1]))
            indices.append(max(0, one.within(allowed) - 1))
        return indices

    low, high = 0.0, 1.0
    best = [0] * len(frontiers)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        candidate = chosen(middle)
        if _cost(frontiers, candidate) <= budget:
            best, low = candidate, middle
        else:
            high = middle
    return _fill(frontiers, best, budget)


def within_error(frontiers: Sequence[Frontier], max_error: float) -> list[int]:
    """Choose for each layer the cheapest point with a relative error of at most ``max_error``."""
    return [int((one.errors > max_error**2).sum()) for one in frontiers]


def _multipliers(frontiers: Sequence[Frontier]) -> tuple[float, float]:
    """Return the range in which λ decides anything: beyond it every layer is at one end of its frontier."""
    slopes = [-one.errors.diff() / one.costs.diff() for one in frontiers if len(one.costs) > 1]
    smallest = min((float(one.min()) for one in slopes), default=1.0)
    largest = max((float(one.max()) for one in slopes), default=1.0)
    return max(smallest / 2, 1e-300), max(2 * largest, 1e-300)


def _cost(frontiers: Sequence[Frontier], indices: Sequence[int]) -> int:
    return sum(int(one.costs[index]) for one, index in zip(frontiers, indices, strict=True))


def _fill(frontiers: Sequence[Frontier], indices: list[int], budget: int) -> list[int]:
    """Spend what is left of the budget, always where it removes the most error for each parameter."""
    indices = list(indices)
    slack = budget - _cost(frontiers, indices)

    def best_step(layer: int) -> tuple[float, int]:
        one, index = frontiers[layer], indices[layer]
        end = one.within(int(one.costs[index]) + slack)
        if end <= index + 1:
            return 0.0, index
        steps = slice(index + 1, end)
        gains = (one.errors[index] - one.errors[steps]) / (one.costs[steps] - one.costs[index])
        return float(gains.max()), index + 1 + int(gains.argmax())

    steps = [best_step(layer) for layer in range(len(frontiers))]
    while steps:
        layer = max(range(len(steps)), key=lambda one: steps[one][0])
        gain, target = steps[layer]
        if gain <= 0.0:
            break
        costs = frontiers[layer].costs
        spent = int(costs[target] - costs[indices[layer]])
        if spent <= slack:
            slack -= spent
            indices[layer] = target
        # The steps of the other layers may no longer fit; each is found again when its turn comes.
        steps[layer] = best_step(layer)
    return indices
