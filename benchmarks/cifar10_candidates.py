"""The penalties that `cifar10.py` compares, with the strengths to try."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torchsmooth

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchsmooth.penalties import Penalty

PENALTIES = ("plain", "nuclear", "first", "second", "tail_70", "tail_90")

# The strengths that --choose-strength tries, from the weakest to the strongest; without it the middle one is taken.
_GRIDS = {
    "plain": (0.0,),
    "nuclear": (1e-4, 3e-4, 1e-3),
    "first": (3e-5, 1e-4, 3e-4),
    "second": (1e-5, 3e-5, 1e-4),
}
_TAIL_GRID = (5e-3, 1e-2, 2e-2)
_TAIL_GRID_BEYOND_80 = (1e-2, 2e-2, 5e-2)

# When a tail's strength starts to rise, and is all there: what the tail will be is not known when the training begins.
_RAMP = (0.15, 0.75)

_KINDS = {
    "nuclear": torchsmooth.NuclearNorm,
    "first": torchsmooth.FirstDerivative,
    "second": torchsmooth.SecondDerivative,
}
_TITLES = {"plain": "none", "nuclear": "nuclear norm", "first": "first derivative", "second": "second derivative"}


@dataclass(frozen=True)
class Candidate:
    """A penalty by name, with its strength.

    Args:
        penalty: ``"plain"``, ``"nuclear"``, ``"first"``, ``"second"``; or ``"tail_NN"``: ``RankTail`` at NN %.
        strength: the factor in front; zero for ``"plain"``.
    """

    penalty: str
    strength: float

    @property
    def ratio(self) -> float | None:
        """The ratio that a tail is for; None for the others."""
        return int(self.penalty[-2:]) / 100 if _is_tail(self.penalty) else None

    @property
    def title(self) -> str:
        """What to call it in a table."""
        if self.penalty == "plain":
            return _TITLES["plain"]
        name = _TITLES.get(self.penalty, f"tail at −{self.penalty[-2:]} %")
        return f"{name}, {self.strength:g}"

    def make(self) -> Penalty | None:
        """Describe the penalty; None for ``"plain"``."""
        if self.penalty == "plain":
            return None
        if self.ratio is not None:
            return torchsmooth.RankTail(self.ratio, self.strength)
        return _KINDS[self.penalty](self.strength)

    def schedule(self, steps: int) -> torchsmooth.StrengthSchedule | None:
        """Return the schedule of the strength over a training of so many steps; None where it is constant."""
        return torchsmooth.StrengthSchedule(steps, begin=_RAMP[0], full=_RAMP[1]) if self.ratio is not None else None


def expanded(names: Iterable[str]) -> list[str]:
    """Check names of penalties; ``"tail"`` alone stands for the tails of the default.

    Raises:
        ValueError: if there is no such penalty.
    """
    found: list[str] = []
    for name in names:
        if name == "tail":
            found += [one for one in PENALTIES if _is_tail(one)]
        elif name in _GRIDS or _is_tail(name):
            found.append(name)
        else:
            raise ValueError(
                f"a penalty is one of {', '.join(_GRIDS)}, tail, or tail_NN with the two digits of a ratio in percent, "
                f"got {name!r}."
            )
    return list(dict.fromkeys(found))


def strengths(penalty: str) -> Sequence[float]:
    """Return the strengths to try, ascending."""
    if _is_tail(penalty):
        return _TAIL_GRID_BEYOND_80 if penalty > "tail_80" else _TAIL_GRID
    return _GRIDS[penalty]


def usual_strength(penalty: str) -> float:
    """Return the strength that is taken where none was chosen."""
    grid = strengths(penalty)
    return grid[len(grid) // 2]


def _is_tail(name: str) -> bool:
    return re.fullmatch(r"tail_(0[1-9]|[1-9]\d)", name) is not None
