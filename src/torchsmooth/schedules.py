"""How the strength of a penalty changes while a network trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ._checks import check_choice, check_count, check_real

__all__ = ["StrengthSchedule"]

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class StrengthSchedule:
    """A factor on the strength for each step: zero, then rising, then one, and zero again if so wished.

    A function of the step like any other, for ``attach_(..., schedule=...)``; with :func:`torchsmooth.penalty_loss`,
    multiply that with ``schedule(step)``.

    Args:
        total_steps: optimizer steps of the whole training, at least 1.
        shape: how it rises from ``begin`` to ``full``: ``"linear"``; ``"cosine"``, half a cosine wave; or
            ``"constant"``, at once: one from ``begin`` on.
        begin: when it starts to rise, as a fraction of the training, 0 ≤ ``begin`` ≤ 1.
        full: when it reaches one, ``begin`` ≤ ``full`` ≤ 1. Not used by ``"constant"``.
        end: when it falls to zero, ``full`` ≤ ``end`` ≤ 1, for last epochs without the penalty. With 1 it never does.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if one is out of range.

    Example:
        >>> import torchsmooth
        >>> schedule = torchsmooth.StrengthSchedule(1000, begin=0.25, full=0.75)
        >>> [schedule(step) for step in (0, 250, 500, 750, 999)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    total_steps: int
    shape: Shape = "linear"
    begin: float = 0.0
    full: float = 0.5
    end: float = 1.0

    def __post_init__(self) -> None:
        check_count(self.total_steps, "total_steps", None, "optimizer steps of the whole training")
        check_choice(self.shape, "shape", get_args(Shape))
        begin, full, end = (check_real(getattr(self, name), name) for name in ("begin", "full", "end"))
        if self.shape == "constant":
            if not 0.0 <= begin <= end <= 1.0:
                raise ValueError(
                    "begin and end are fractions of the training with 0 ≤ begin ≤ end ≤ 1, got "
                    f"begin={begin}, end={end}."
                )
        elif not 0.0 <= begin <= full <= end <= 1.0:
            default = ""
            if full == type(self).full and 0.0 <= begin <= end <= 1.0:
                default = f" Without a value of its own full is {full}: give one from begin to end, too."
            raise ValueError(
                "begin, full and end are fractions of the training with 0 ≤ begin ≤ full ≤ end ≤ 1, got "
                f"begin={begin}, full={full}, end={end}.{default}"
            )

    def __call__(self, step: int) -> float:
        """Return the factor for a step, counted from zero: a number from 0 to 1."""
        done = step / self.total_steps
        if done < self.begin or (done >= self.end and self.end < 1.0):
            return 0.0
        if self.shape == "constant" or done >= self.full:
            return 1.0
        risen = (done - self.begin) / (self.full - self.begin)
        return risen if self.shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * risen)
