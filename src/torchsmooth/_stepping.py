"""The steps of an optimizer: which object takes them, what they are called with, and how often one is under way."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

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


def closure_among(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int | str, Callable[[], Any]] | None:
    """Find the closure among the arguments of a step.

    Args:
        optimizer: whose ``step`` is called, maybe one with arguments of its own, such as the epoch.
        args: positional arguments, the optimizer itself first.
        kwargs: keyword arguments.

    Returns:
        The place among ``args``, or the name among ``kwargs``, and the function there: of the parameter ``closure``,
        or where the step has none of this name, of the first function. None if there is no function.
    """
    names = _parameters_of_step(optimizer)
    given: dict[int | str, Any] = dict(enumerate(args[1:], 1)) | kwargs
    if "closure" in names:
        given = {place: given[place] for place in (names.index("closure"), "closure") if place in given}
    # A model can be called, too.
    found = (place for place, one in given.items() if callable(one) and not isinstance(one, nn.Module))
    place = next(found, None)
    return None if place is None else (place, given[place])


def _parameters_of_step(optimizer: Optimizer) -> list[str]:
    try:
        return list(inspect.signature(type(optimizer).step).parameters)
    except (TypeError, ValueError):  # not every callable tells
        return []
