"""Taking back what was done to a model, also where an interruption from the keyboard comes at a bad moment."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Undo(ExitStack):
    """Steps that take back what was done, run in reverse order at the end of a ``with`` statement, unless kept.

    A step is added *before* what it takes back is done, so it must do no harm where there is nothing to take back. It
    is run twice: if an interruption ends the first run, the second one still leaves nothing half taken back.
    """

    def add(self, step: Callable[..., object], *args: object) -> None:
        """Add a step, to be called with some arguments."""
        for _ in range(2):
            self.callback(step, *args)

    def keep(self) -> None:
        """Leave all as it is now: no step is run."""
        self.pop_all()
