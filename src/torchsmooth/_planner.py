"""Planning proper: layers that are decomposed and priced, planned at any ratio, wherever they came from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from ._budget import uniformly, within_budget, within_error
from ._fine_ranks import raise_pairs
from ._ranks import ALONE
from ._targets import READ, UNPRICED, WORDS
from ._terms import SUITED
from .plan import CompressionPlan

if TYPE_CHECKING:
    from ._budget import Frontier
    from ._ranks import Team
    from ._terms import Terms
    from .layer_plan import Choice, LayerPlan


@dataclass(frozen=True)
class Filter:
    """What leaves layers out, as errors and plans speak of it.

    Attributes:
        name: what it is called where it was given.
        rule: a sentence on how it says which layers are taken.
    """

    name: str = "filter_fn"
    rule: str = "filter_fn(module, qualified_name) returns True for a layer to compress."

    @property
    def reason(self) -> str:
        """Why a layer stays dense that it left out."""
        return f"left out by {self.name}"


FILTER = Filter()


@dataclass(frozen=True)
class Subject:
    """What is planned for, as errors and plans speak of it.

    Attributes:
        kind: what it is: the class of a model.
        filter: what leaves layers out.
        asked: what the plan says after what was asked for.
    """

    kind: str
    filter: Filter = FILTER
    asked: str = ""


@dataclass(frozen=True)
class Planner:
    """Layers, decomposed and priced once, from which plans for any ratio can be made.

    Attributes:
        subject: what is planned for.
        terms: how.
        layers: every layer, also those that have to stay dense; never changed.
        parameters: those of the whole.
        cost: of the whole, in what the plan counts.
    """

    subject: Subject
    terms: Terms
    layers: list[LayerPlan]
    parameters: int
    cost: int

    def plan(self, ratio: float | None, max_error: float | None = None, team: Team = ALONE) -> CompressionPlan:
        """Make the plan for one ratio or one error bound, both checked; among several ranks, the first one decides."""
        terms, layers = self.terms, [layer.copy() for layer in self.layers]
        for layer, (choice, reason) in zip(
            layers, team.first(lambda: self._choices(layers, ratio, max_error)), strict=True
        ):
            if choice is None:
                layer.keep_dense(reason)
            else:
                layer.choose(choice.scheme, choice.rank, choice.form)
        if max_error is not None:
            asked = f"max_error {max_error}"
        else:
            share = "" if terms.target == "params" else f" of {WORDS[terms.target].share}"
            asked = f"ratio {ratio}{share}" + (", uniform" if terms.allocation == "uniform" else "")
        return CompressionPlan(
            tuple(layers),
            self.parameters,
            asked + self.subject.asked,
            terms.target,
            self.cost if terms.target == "macs" else None,
            self.cost / 1e9 if terms.target == "latency" else None,
        )

    def _choices(
        self, layers: list[LayerPlan], ratio: float | None, max_error: float | None
    ) -> list[tuple[Choice | None, str]]:
        """Make the choices of some layers, and return them, or why there is none."""
        terms = self.terms
        candidates = [layer for layer in layers if layer.options and layer.reason not in UNPRICED]
        what: Literal["losses", "errors"] = "losses" if max_error is None else "errors"
        choices = [layer.choices(what, terms.multiple) for layer in candidates]
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
                within = WORDS[terms.target].budget_reason
                layer.reason = within if max_error is None else "no smaller rank is within max_error"
        if max_error is None and terms.allocation == "budget":
            saved = sum(one.prices.dense - (one.cost_after or 0) for one in candidates)
            raise_pairs(candidates, self._allowed(ratio or 0.0) - (self.cost - saved), terms.multiple)
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
        return (within_budget if self.terms.allocation == "budget" else uniformly)(frontiers, allowed - fixed)

    def _allowed(self, ratio: float) -> int:
        """Return the exact budget."""
        return self.cost - math.ceil(Fraction(str(ratio)) * self.cost)

    def _unreachable(self, ratio: float, least: int, layers: list[LayerPlan]) -> str:
        terms, words, total = self.terms, WORDS[self.terms.target], self.cost
        reachable = 1 - Fraction(least, total)
        digits = next((digits for digits in range(4, 20) if math.floor(reachable * 10**digits)), 4)
        most = math.floor(reachable * 10**digits) / 10**digits
        smallest = "rank 1" if terms.multiple == 1 else f"the smallest multiple of {terms.multiple} as rank"
        if terms.multiple == SUITED:
            smallest = "the smallest rank that suits the hardware (rank_multiple=1 allows smaller ones)"
        text = (
            f"ratio {ratio} cannot be reached: with {smallest} in every layer that can be compressed, {least:,} of "
            f"{total:,} {words.unit} are left"
        )
        if terms.target != "latency":
            text += self._largest_dense(layers)
        else:
            text = (
                f"ratio {ratio} cannot be reached: with the fastest choice in every layer, {least / 1e6:.3g} of "
                f"{total / 1e6:.3g} ms are left"
            )
            if any(layer.type == "Conv2d" for layer in layers):
                text += (
                    ". Convolutions are often faster with the channels last: bring the model and the example inputs "
                    "there by .to(memory_format=torch.channels_last), if they are not"
                )
        return f"{text}. The largest ratio that can be reached is {most}."

    def _largest_dense(self, layers: list[LayerPlan]) -> str:
        """Name what stands most in the way, where that is known; of tied weights each counts all, so no sum is told."""
        if self.terms.target == "params":
            dense = [one for one in layers if not one.options]
        else:  # the others were not seen at work, and cost nothing that is known
            dense = [one for one in layers if one.reason == READ]
        if not dense:
            return ""
        largest = max(dense, key=lambda one: one.prices.dense)
        name = repr(largest.name) if largest.name else "the model itself"
        return f". The largest of the layers that stay dense is {name}, with {largest.prices.dense:,}: {largest.reason}"

    def _none_cheaper(self) -> str:
        terms = self.terms
        if terms.multiple in (1, SUITED) or terms.target == "latency":
            return WORDS[terms.target].none_cheaper
        among = f"no rank that is a multiple of {terms.multiple}"
        return WORDS[terms.target].none_cheaper.replace("no rank", among)

    def _nothing_to_compress(self, layers: list[LayerPlan]) -> str:
        kind, by = self.subject.kind, self.subject.filter
        left_out = sum(one.reason == by.reason for one in layers)
        if left_out:
            which = f"all {left_out} layers"
            if left_out < len(layers):
                which = f"{left_out} of {len(layers)} layers, and the others have to stay dense"
            return f"nothing to compress in this {kind}: {by.name} left out {which}. {by.rule}"
        reasons = [f"{one.name or '(the model)'}: {one.reason or self._none_cheaper()}" for one in layers]
        listed = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")  # noqa: PLR2004
        found = f"none of its {len(layers)} layers can be made smaller ({listed})" if layers else "it has no layers"
        found = f"its only layer cannot be made smaller ({listed})" if len(layers) == 1 else found
        return (
            f"nothing to compress in this {kind}: {found}. "
            "Linear layers, convolutions and embeddings with more than a few channels can be."
        )


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
