"""Argument checks shared by both halves of the library: each raises before anything has changed."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Collection

# The dtypes whose weights can be decomposed and cast back. float8 and complex weights are not among them.
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_SHORT = 60


def describe(value: object) -> str:
    """Name a wrong argument in an error: its type, and its value where that is short."""
    text = repr(value)
    kind = type(value).__name__
    return f"{kind} {text}" if len(text) <= _SHORT else kind


def quoted(names: Collection[str], limit: int = 5) -> str:
    """List names for an error, the first ``limit`` of them and a count of the rest."""
    shown = ", ".join(repr(name) for name in sorted(names)[:limit])
    more = len(names) - limit
    return f"{shown} and {more} more" if more > 0 else shown


def check_real(value: object, name: str) -> float:
    """Return ``value`` as a float; booleans, NaN and infinities are refused."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {describe(value)}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}.")
    return number


def check_open_unit(value: object, name: str, meaning: str) -> float:
    """Return ``value`` as a float strictly between 0 and 1; ``meaning`` tells the reader what it stands for."""
    number = check_real(value, name)
    if not 0.0 < number < 1.0:
        raise ValueError(f"{name} must lie strictly between 0 and 1 ({meaning}), got {number}.")
    return number


def check_choice(value: object, name: str, choices: Collection[str]) -> None:
    """Refuse an option that is not one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {allowed}; got {describe(value)}.")


def check_count(value: object, name: str, most: int | None, why: str) -> int:
    """Return ``value`` as an int from 1 to ``most``, if that is given; ``why`` says what is counted, or bounds it."""
    if isinstance(value, (bool, torch.Tensor)) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} must be an integer, got {describe(value)}.")
    count = value if isinstance(value, int) else value.__index__()
    if most is None and count < 1:
        raise ValueError(f"{name} must be at least 1 ({why}), got {count}.")
    if most is not None and not 1 <= count <= most:
        raise ValueError(f"{name} must lie between 1 and {most} ({why}), got {count}.")
    return count


def check_module(value: object, name: str = "model") -> nn.Module:
    """Refuse what is not an ``nn.Module``."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {describe(value)}.")
    return value


def check_filter(value: object, of: str = "(module, qualified_name)") -> None:
    """Refuse a ``filter_fn`` that cannot be called; ``of`` names its arguments."""
    if value is not None and not callable(value):
        raise TypeError(f"filter_fn must be a function of {of}, got {describe(value)}.")


def check_initialised(model: nn.Module) -> None:
    """Refuse a model with lazy parameters, which have no shape yet."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"parameter {name!r} is not initialised yet (a lazy module): "
                "run one batch through the model first, then call this again."
            )


def check_values(weight: torch.Tensor, layer: str) -> None:
    """Refuse a weight that has no values, or whose values cannot be decomposed."""
    if weight.is_meta:
        raise ValueError(
            f"the weight of layer {layer!r} is on the meta device and has no values: "
            "load the weights first (for instance model.to_empty(device=...), then load_state_dict)."
        )
    if not bool(torch.isfinite(weight.detach()).all()):
        bad = int((~torch.isfinite(weight.detach())).sum())
        raise ValueError(
            f"the weight of layer {layer!r} holds {bad} NaN or infinite values out of {weight.numel()}: "
            "repair it, or leave the layer out with filter_fn."
        )
