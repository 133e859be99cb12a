"""Argument checks shared by both halves of the library: each raises before anything has changed."""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# The dtypes whose weights can be decomposed and cast back. float8 and complex weights are not among them.
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_SHORT = 60


def describe(value: object) -> str:
    """Name a wrong argument in an error: its type, and its value where that is short and says more."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind, text = type(value).__name__, repr(value)
    if inspect.isroutine(value):
        return f"{kind} {value.__name__}"
    if len(text) > _SHORT or " at 0x" in text:
        return kind
    return text if text.startswith(kind) else f"{kind} {text}"


def with_article(name: str) -> str:
    """Put "a" or "an" before the name of a class, as it is read aloud."""
    spelled = name[:2].isupper()  # LSTM, but not Linear
    return f"{'an' if name[:1] in ('AEFHILMNORSX' if spelled else 'AEIOaeio') else 'a'} {name}"


def is_quantised(tensor: object) -> bool:
    """Tell whether a tensor is of a type that has its own way back to floating values."""
    return isinstance(tensor, torch.Tensor) and type(tensor).dequantize is not torch.Tensor.dequantize


def kind_of_tensor(tensor: torch.Tensor) -> str:
    """Say what sets a tensor apart from a plain one, and the way out where there is one."""
    if tensor.layout is not torch.strided:
        return f"sparse ({tensor.layout}; to_dense() makes it plain)"
    if tensor.is_quantized or is_quantised(tensor):
        return f"quantised, {with_article(type(tensor).__name__)} (compress first, then quantise)"
    return with_article(type(tensor).__name__)


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
        percent = f": {number:g} % is written {number / 100:g}" if 1.0 < number < 100.0 else ""  # noqa: PLR2004
        raise ValueError(f"{name} must lie strictly between 0 and 1 ({meaning}), got {number}{percent}.")
    return number


def check_choice(value: object, name: str, choices: Collection[str]) -> None:
    """Refuse an option that is not one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        allowed = f"one of {allowed};" if len(choices) > 1 else f"{allowed}, the only choice here;"
        near = difflib.get_close_matches(value.lower(), choices, n=1) if isinstance(value, str) else []
        meant = f": did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{name} must be {allowed} got {describe(value)}{meant}")


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


def checked_path(path: object, name: str) -> Path:
    """Refuse what is not a path."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {describe(path)}.")
    return Path(os.fsdecode(path))


def check_no_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a folder where a file is to be read or written."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder: name the file in it.")


def check_module(value: object, name: str = "model") -> nn.Module:
    """Refuse what is not an ``nn.Module``."""
    if not isinstance(value, nn.Module):
        way = ""
        if isinstance(value, type) and issubclass(value, nn.Module):
            way = ": pass an instance of it"
        elif isinstance(value, Mapping):
            way = ": load a state dict into a model first"
        elif isinstance(value, (list, tuple)) and value and all(isinstance(one, nn.Module) for one in value):
            way = ": put them in a torch.nn.Sequential or ModuleList"
        raise TypeError(f"{name} must be a torch.nn.Module, got {describe(value)}{way}.")
    return value


def check_function(value: object, name: str, of: str, count: int) -> None:
    """Refuse what cannot be called with so many arguments; ``of`` names them."""
    if not callable(value):
        raise TypeError(f"{name} must be a function of {of}, got {describe(value)}.")
    takes = _other_arguments(value, count)
    if takes is not None:
        raise TypeError(f"{name} must be a function of {of}, got {describe(value)}, which takes {takes}.")


def check_filter(value: object, of: str = "(module, qualified_name)") -> None:
    """Refuse a ``filter_fn`` that cannot be called with two arguments; ``of`` names them."""
    if value is not None:
        check_function(value, "filter_fn", of, 2)


def is_wanted(answer: object, name: str) -> bool:
    """Read what a ``filter_fn`` returned for a layer; None is a return that was forgotten.

    Raises:
        TypeError: if it is None.
    """
    if answer is None:
        raise TypeError(
            f"filter_fn returned None for layer {name!r}: return True to take a layer, False to leave it out."
        )
    return bool(answer)


def _other_arguments(function: Callable[..., Any], count: int) -> str | None:
    """List the arguments of a function that cannot be called with so many; None if it can, or does not tell."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*range(count))
    except TypeError:
        return f"({', '.join(signature.parameters)})" if signature.parameters else "no arguments"
    return None


def check_initialised(model: nn.Module) -> None:
    """Refuse a model with lazy parameters, which have no shape yet."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"parameter {name!r} is not initialised yet (a lazy module): "
                "run one batch through the model first, then call this again."
            )


def check_values(weight: torch.Tensor, layer: str | nn.Module) -> None:
    """Refuse a weight that has no values, or whose values cannot be decomposed; a layer alone has no name."""
    named = isinstance(layer, str)
    label = f"layer {layer!r}" if named else f"this {type(layer).__name__}"
    if weight.is_meta:
        raise ValueError(
            f"the weight of {label} is on the meta device and has no values: "
            "load the weights first (for instance model.to_empty(device=...), then load_state_dict)."
        )
    values = weight.detach()
    # NaN and infinity show in the extremes, which are found much faster than each entry is looked at.
    if values.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
        bad = int((~torch.isfinite(weight.detach())).sum())
        raise ValueError(
            f"the weight of {label} holds {bad} NaN or infinite values out of {weight.numel()}: "
            f"repair it{', or leave the layer out with filter_fn' if named else ''}."
        )
