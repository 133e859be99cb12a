"""The steps of an optimizer: which object takes them, and how often one is under way."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.optim import Optimizer


def stepping(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that takes the steps, where the one at hand only passes them on, as accelerate's does.

    Raises:
        TypeError: if there is none.
    """
    inner: object = optimizer
    while isinstance(inner, torch.optim.Optimizer):
        within = getattr(inner, "optimizer", None)
        # One that called the constructor of its base class has hooks of its own. A wrapper may answer with those of
        # what is within, or hold the same ones, as Lightning's does; the steps under way are not the wrapper's.
        hooks = _hooks_of(inner)
        if hooks is not None and (within is inner or _hooks_of(within) is not hooks):
            return inner
        inner = within
    raise TypeError(
        f"this {type(optimizer).__name__} has no step hooks, and no attribute 'optimizer' that has: attach the "
        "torch.optim.Optimizer that takes its steps."
    )


def _hooks_of(optimizer: object) -> object:
    return getattr(optimizer, "_optimizer_step_pre_hooks", None)


def steps_under_way(optimizer: Optimizer) -> int:
    """Count the calls of an optimizer's ``step``, each in the wrapper that torch puts around it, on the stack."""
    count, frame = 0, sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if "profile_name" in frame.f_code.co_varnames and frame.f_locals.get("self") is optimizer:
            count += 1
    return count
