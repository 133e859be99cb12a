"""What may be asked of a plan, whatever it is made for: checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ._checks import check_choice, check_count, check_open_unit, describe, quoted
from ._layers import SCHEME_OPTIONS
from ._matricise import FORMS
from ._targets import TARGETS, WORDS, Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._matricise import Form

Allocation = Literal["budget", "uniform"]
SchemeOption = Literal["auto", "channel", "input", "spatial", "tucker"]
FormOption = Literal["auto", "factored", "pivoted"]

# No weight has a larger rank, and multiples of more would pass the range of int64.
_MOST = 2**31 - 1

# In the place of a number that ranks are multiples of: for each matrix the one that suits the hardware.
SUITED = 0

_FORMS: dict[str, tuple[Form, ...]] = {"auto": FORMS, "factored": ("factored",), "pivoted": ("pivoted",)}


@dataclass(frozen=True)
class Terms:
    """The terms of a plan: what there is to choose from, and what the choice is made by.

    Attributes:
        multiple: what ranks are multiples of, or :data:`SUITED`.
    """

    schemes: tuple[SchemeOption, ...]
    form: FormOption
    allocation: Allocation
    target: Target
    multiple: int
    show: bool | None

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms to choose from.

        Pivots save multiply-accumulates, and moving them takes longer than those did: where these stand for time, they
        are no bargain. A measured time knows that by itself.
        """
        return ("factored",) if self.form == "auto" and self.target == "macs" else _FORMS[self.form]


def checked_terms(
    *,
    scheme: SchemeOption | Sequence[SchemeOption],
    form: FormOption,
    allocation: Allocation,
    target: Target,
    rank_multiple: int | None,
    progress: bool | None,
) -> Terms:
    """Check what a user asks for."""
    schemes = (scheme,) if isinstance(scheme, str) else _listed(scheme)
    for one in schemes:
        check_choice(one, "scheme", SCHEME_OPTIONS)
    check_choice(form, "form", get_args(FormOption))
    check_choice(allocation, "allocation", get_args(Allocation))
    check_choice(target, "target", TARGETS)
    multiple = 1 if target == "params" else SUITED
    if rank_multiple is not None:
        multiple = min(check_count(rank_multiple, "rank_multiple", None, "ranks are multiples of it"), _MOST)
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"progress must be True, False or None, got {describe(progress)}.")
    return Terms(schemes, form, allocation, target, multiple, progress)


def checked_goal(ratio: object, max_error: object, target: Target) -> tuple[float | None, float | None]:
    """Check that there is either a ratio or a largest error, in range."""
    if (ratio is None) == (max_error is None):
        raise ValueError(
            "give either ratio (fraction to remove) or max_error (largest relative error of a layer), "
            f"got ratio={ratio}, max_error={max_error}."
        )
    if ratio is not None:
        return checked_ratio(ratio, "ratio", target), None
    bound = check_open_unit(max_error, "max_error", "the largest relative error of a layer")
    if target != "params":
        raise ValueError(
            f"max_error bounds the error of each layer, whatever that saves, so it cannot be combined with target "
            f"{target!r}: give a ratio, or leave target out."
        )
    return None, bound


def checked_ratio(ratio: object, name: str, target: Target) -> float:
    """Check a ratio; ``name`` is what errors call it."""
    return check_open_unit(ratio, name, f"the fraction of {WORDS[target].share} to remove")


def _listed(scheme: Any) -> tuple[Any, ...]:
    if isinstance(scheme, (list, tuple)):
        if not scheme:
            raise ValueError(
                f"scheme is an empty {type(scheme).__name__}: name at least one of {quoted(SCHEME_OPTIONS)}."
            )
        return tuple(scheme)
    raise TypeError(f"scheme must be a name or a sequence of names, got {describe(scheme)}.")
