"""What is planned for one layer: its choices, which of them was taken, and how to change that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from ._budget import Frontier
from ._checks import check_choice, check_count, describe
from ._matricise import FORMS
from ._prices import ParameterPrices
from ._tucker_layout import TuckerLayout, as_rank, no_more

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ._matricise import Form, LayerScheme
    from ._prices import Prices
    from ._spectrum import Decomposition
    from ._tucker_layout import Layout, Rank

__all__ = ["LayerPlan", "Option"]


class Choice(NamedTuple):
    """A way to store a layer."""

    scheme: LayerScheme
    form: Form
    rank: Rank


@dataclass(frozen=True)
class Option:
    """One scheme for one layer.

    Attributes:
        matricisation: its shape.
        errors: squared relative error of the truncation to each rank, ``(full_rank + 1,)`` float64 on the CPU, one at
            rank zero; all zero for a zero weight. In scheme ``"tucker"``, of every pair,
            ``(full_in + 1, full_out + 1)``.
        losses: what a plan adds up over the layers, for each rank; of any scale, the same for all layers.
        roundoff: unit roundoff of the weight's dtype: what casting the factors adds.
        spacing: half the distance between the smallest numbers of that dtype, over the root mean square of the weight:
            what casting adds to that in the pivoted form, which keeps rows of the size of the weight's.
        spectrum: the decomposition, shared by all plans that were made of it; None if it is not known.
    """

    matricisation: Layout
    errors: Tensor
    losses: Tensor
    roundoff: float = 0.0
    spacing: float = 0.0
    spectrum: Decomposition | None = None

    def rounded(self, what: Literal["errors", "losses"], form: Form) -> Tensor:
        """Return errors or losses with what casting the factors of a form adds, relative to those of rank zero."""
        values = self.errors if what == "errors" else self.losses
        added = self.roundoff**2 + (self.spacing**2 if form == "pivoted" else 0.0)
        squared = added * self.matricisation.amplification(form)
        return values + values.flatten()[0] * squared

    def at(self, what: Literal["errors", "losses"], form: Form, ranks: Tensor) -> Tensor:
        """Return the same for some ranks, ``(n,)`` or ``(n, 2)``."""
        return self.rounded(what, form)[ranks if ranks.dim() == 1 else ranks.unbind(1)]


# Whatever else is set on a layer's plan is a mistake that would change nothing.
_CHOICES = ("rank", "scheme", "form")
_KEPT = ("name", "type", "shape", "reason", "parameters_before", "options", "forms", "prices", "_choice")


class LayerPlan:
    """What is planned for one layer; ``rank``, ``scheme`` and ``form`` can be set, any other name is refused.

    Attributes:
        name: qualified name in the model.
        type: class name.
        shape: shape of the weight.
        parameters_before: entries of the weight.
        options: the schemes it can be stored in, with the error of each rank; empty if it cannot be compressed.
        forms: the forms that were asked for.
        prices: what its choices cost, in what the plan counts.
        reason: why it stays dense; empty otherwise.
    """

    def __init__(
        self,
        name: str,
        type_name: str,
        shape: tuple[int, ...],
        options: Mapping[LayerScheme, Option],
        reason: str = "",
        *,
        forms: Sequence[Form] = FORMS,
    ) -> None:
        self.name, self.type, self.shape, self.reason = name, type_name, shape, reason
        self.parameters_before = math.prod(shape)
        self.options, self.forms = options, tuple(forms)
        self.prices: Prices = ParameterPrices(self.parameters_before)
        self._choice: Choice | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in (*_CHOICES, *_KEPT):
            raise AttributeError(
                f"{name!r} of layer {self.name!r} cannot be set: its rank, scheme and form can be, and keep_dense() "
                "leaves it whole."
            )
        super().__setattr__(name, value)

    def copy(self) -> LayerPlan:
        """Return a plan of its own for the same layer, from the same decomposition."""
        other = LayerPlan(self.name, self.type, self.shape, self.options, self.reason, forms=self.forms)
        other.parameters_before, other.prices, other._choice = self.parameters_before, self.prices, self._choice
        return other

    @property
    def rank(self) -> Any:
        """Rank to keep in each group, 1 … ``full_rank``; None for a layer that stays dense.

        In scheme ``"tucker"`` it is a pair ``(r_in, r_out)``; one number stands for both. Setting it keeps scheme and
        form, the form only where it has that rank. On a dense layer it also chooses: ``"tucker"`` for a pair, otherwise
        of the others the scheme with the least error at that rank, and the pivoted form if that was asked for.

        Raises:
            TypeError: if it is set to something else than an integer, or a pair of them in scheme ``"tucker"``.
            ValueError: if it is set out of range, or on a layer that cannot be compressed.
        """
        return None if self._choice is None else self._choice.rank

    @rank.setter
    def rank(self, rank: Any) -> None:
        if rank is None:
            raise TypeError(f"rank of layer {self.name!r} must be an integer, got None: keep_dense() leaves it whole.")
        if self._choice is None:
            scheme = self._best_scheme(rank)
            wanted: Form = "pivoted" if "pivoted" in self.forms else "factored"
        else:  # where it exists, the pivoted form is always the smaller one
            scheme, wanted = self._choice.scheme, self._choice.form
            if isinstance(rank, (tuple, list)) and scheme != "tucker":
                raise TypeError(
                    f"rank of layer {self.name!r} must be an integer in scheme {scheme!r}, got {describe(rank)}"
                    + (f": use choose('tucker', {rank})." if "tucker" in self.options else ".")
                )
        layout = self.options[scheme].matricisation
        kept = layout.checked(rank, f"rank of layer {self.name!r}", scheme, "factored")
        self.choose(scheme, kept, self._possible(scheme, kept, wanted))

    @property
    def scheme(self) -> LayerScheme | None:
        """The matricisation; None for a layer that stays dense.

        Raises:
            ValueError: if it is set to a scheme that was not planned for, or the rank does not exist in it.
        """
        return None if self._choice is None else self._choice.scheme

    @scheme.setter
    def scheme(self, scheme: LayerScheme) -> None:
        choice = self._require_choice("scheme")
        check_choice(scheme, f"scheme of layer {self.name!r}", tuple(self.options))
        layout, name = self.options[scheme].matricisation, f"rank of layer {self.name!r}"
        if isinstance(choice.rank, tuple) and scheme != choice.scheme:
            raise ValueError(
                f"layer {self.name!r} has a pair of ranks, {choice.rank}, of which scheme {scheme!r} has but one: use "
                "choose(scheme, rank)."
            )
        if (
            isinstance(layout, TuckerLayout)
            and not isinstance(choice.rank, tuple)
            and choice.rank > min(layout.full_rank)
        ):
            raise ValueError(
                f"layer {self.name!r} has rank {choice.rank}, more than one of the full ranks {layout.full_rank} of "
                "scheme 'tucker': use choose(scheme, rank)."
            )
        rank = layout.checked(choice.rank, name, scheme, "factored")
        self.choose(scheme, rank, self._possible(scheme, rank, choice.form))

    @property
    def form(self) -> str:
        """How it will be stored: ``"factored"``, ``"pivoted"`` or ``"dense"``.

        Raises:
            ValueError: if it is set to anything but the first two, on a layer that stays dense, or to ``"pivoted"`` at
                full rank, where that form does not exist.
        """
        return "dense" if self._choice is None else self._choice.form

    @form.setter
    def form(self, form: Form) -> None:
        choice = self._require_choice("form")
        self.choose(choice.scheme, choice.rank, form)

    @property
    def choice(self) -> Choice | None:
        """Scheme, form and rank; None for a layer that stays dense."""
        return self._choice

    @property
    def full_rank(self) -> Any:
        """The rank or ranks from which on nothing is lost, in the chosen scheme; None for a layer that stays dense."""
        return None if self._choice is None else self.options[self._choice.scheme].matricisation.full_rank

    @property
    def parameters_after(self) -> int:
        """Entries of the factors, or of the weight if it stays dense."""
        if self._choice is None:
            return self.parameters_before
        scheme, form, rank = self._choice
        return int(self.options[scheme].matricisation.parameters(rank, form))

    @property
    def cost_after(self) -> int | None:
        """What it will cost, in what the plan counts; None if that was not measured for this choice."""
        if self._choice is None:
            return self.prices.dense
        scheme, form, rank = self._choice
        return self.prices.cost(scheme, self.options[scheme].matricisation, form, rank)

    @property
    def relative_error(self) -> float:
        """‖W − Ŵ‖_F / ‖W‖_F that the singular values and the rounding of the dtype predict; 0 if it stays dense."""
        if self._choice is None:
            return 0.0
        scheme, form, rank = self._choice
        return math.sqrt(float(self.options[scheme].rounded("errors", form)[rank]))

    def keep_dense(self, reason: str = "kept dense by the user") -> None:
        """Leave this layer as it is.

        Args:
            reason: what the report will say.
        """
        self._choice, self.reason = None, reason

    def choose(self, scheme: LayerScheme, rank: Rank, form: Form = "factored") -> None:
        """Set scheme, rank and form together.

        Args:
            scheme: one of ``options``.
            rank: 1 … the full rank of that scheme; in the pivoted form one less. In scheme ``"tucker"`` a pair
                ``(r_in, r_out)``, or one number for both.
            form: ``"factored"`` or ``"pivoted"``.

        Raises:
            TypeError: if the rank is not an integer.
            ValueError: if the scheme, the form or the rank is not among those, or the layer cannot be compressed.
        """
        check_choice(scheme, f"scheme of layer {self.name!r}", tuple(self._require_options()))
        if form == "dense":  # type: ignore[comparison-overlap]
            raise ValueError(f"form of layer {self.name!r} cannot be set to 'dense': keep_dense() leaves it whole.")
        check_choice(form, f"form of layer {self.name!r}", FORMS)
        rank = self.options[scheme].matricisation.checked(rank, f"rank of layer {self.name!r}", scheme, form)
        self._choice, self.reason = Choice(scheme, form, rank), ""

    def choices(self, what: Literal["errors", "losses"], multiple: int = 1) -> tuple[Frontier, list[Choice | None]]:
        """Return the useful choices, smaller and cheaper than dense, then dense, and what the frontier's labels mean.

        Args:
            what: what decides which choices are useful.
            multiple: only ranks that are multiples of this; 0: of what suits each.
        """
        meanings: list[Choice | None] = []
        costs, losses = [], []
        for form in self.forms:
            for scheme, one in self.options.items():
                ranks, prices = self.prices.table(scheme, one.matricisation, form, multiple)
                smaller = one.matricisation.parameters(ranks, form) < self.parameters_before
                ranks, prices = (values[smaller & (prices < self.prices.dense)] for values in (ranks, prices))
                best = Frontier.of(prices, one.at(what, form, ranks))  # of the pairs of ranks, most are of no use
                meanings += [Choice(scheme, form, as_rank(entry)) for entry in ranks[best.labels].tolist()]
                costs.append(best.costs)
                losses.append(best.errors)
        meanings.append(None)
        costs.append(torch.tensor([self.prices.dense], device="cpu"))
        losses.append(torch.zeros(1, dtype=torch.float64, device="cpu"))
        return Frontier.of(torch.cat(costs), torch.cat(losses)), meanings

    def _best_scheme(self, rank: Any) -> LayerScheme:
        options = self._require_options()
        plain = {name: one for name, one in options.items() if name != "tucker"}
        if isinstance(rank, (tuple, list)) and "tucker" not in options:
            raise TypeError(
                f"rank of layer {self.name!r} must be an integer, got {describe(rank)}: a pair belongs to scheme "
                "'tucker', which this layer was not planned for."
            )
        if not plain or isinstance(rank, (tuple, list)):
            return "tucker"
        most = max(one.matricisation.full_rank for one in plain.values())
        rank = check_count(rank, f"rank of layer {self.name!r}", most, "the full rank; keep_dense() leaves it whole")
        fitting = {name: one for name, one in plain.items() if rank <= one.matricisation.full_rank}
        return min(fitting, key=lambda name: float(fitting[name].errors[rank]))

    def _possible(self, scheme: LayerScheme, rank: Rank, form: Form) -> Form:
        return form if no_more(rank, self.options[scheme].matricisation.largest_rank(form)) else "factored"

    def _require_options(self) -> Mapping[LayerScheme, Option]:
        if not self.options:
            raise ValueError(f"layer {self.name!r} cannot be compressed: {self.reason}.")
        return self.options

    def _require_choice(self, what: str) -> Choice:
        if self._choice is None:
            self._require_options()
            raise ValueError(f"layer {self.name!r} stays dense: set its rank first, then the {what}.")
        return self._choice

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerPlan):
            return NotImplemented
        return (self.name, self.type, self.shape, self._choice) == (other.name, other.type, other.shape, other._choice)

    __hash__ = None  # type: ignore[assignment]  # it can be edited

    def __repr__(self) -> str:
        return f"LayerPlan({self.name!r}, scheme={self.scheme!r}, form={self.form!r}, rank={self.rank})"
