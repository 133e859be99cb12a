"""Batches of inputs, as a DataLoader gives them: what they may be, and how a model is run on one."""

from __future__ import annotations

import copy
import operator
from collections import UserDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import describe
from ._running import note, outline
from ._traffic import tensors_in

if TYPE_CHECKING:
    from torch import nn


def check_batches(batches: object, name: str) -> None:
    """Refuse what cannot be a collection of batches: one tensor would be taken for as many batches as it has rows."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must be an iterable of inputs, such as [inputs] or a DataLoader, got {describe(batches)}."
        )


def collect(batches: Iterable[Any], name: str) -> list[Any]:
    """Keep the inputs of all batches, so that they can be gone over again; labels are dropped.

    The random state of the CPU is as before afterwards: a loader draws from it, even one that does not shuffle.
    """
    check_batches(batches, name)
    kept: list[Any] = []
    states: list[list[tuple[Tensor, int]]] = []
    with torch.random.fork_rng(devices=[]):
        for batch in batches:
            kept.append(check_batch(batch))
            states.append(_state(kept[-1]))
    for place, (batch, before) in enumerate(zip(kept, states, strict=True)):
        now = _state(batch)
        if [(id(one), version) for one, version in now] != [(id(one), version) for one, version in before]:
            raise ValueError(
                f"{name}: batch {place} was written to after it was given, so that it holds another one by now: yield "
                "a tensor of its own for each, for instance batch.clone()."
            )
    if not kept:
        raise ValueError(f"{name} is empty: pass at least one batch (an iterator can be used up only once).")
    return kept


def check_batch(batch: Any) -> Any:
    """Return the input of a batch: the tensor, the first element of a tuple or list, or the dict."""
    if isinstance(batch, (tuple, list)) and batch:
        return batch[0]
    if isinstance(batch, (Tensor, Mapping)):
        return batch
    raise TypeError(
        f"a batch must be a tensor, a tuple or list that begins with the input, or a dict; got {describe(batch)}."
    )


def _state(batch: Any) -> list[tuple[Tensor, int]]:
    """Return the tensors in a batch, each with what changes when it is written to."""
    found = list(tensors_in(batch))
    if not all(map(operator.is_, found, tensors_in(batch))):  # a mapping that makes them anew whenever it is asked
        return []
    return [(one, 0 if one.is_inference() else one._version) for one in found]


def run(model: nn.Module, batch: Any) -> Any:
    """Call a model with what :func:`check_batch` returns, or copies: a model that begins in place would change it."""
    try:
        if isinstance(batch, Mapping):
            return model(**{name: _copy(value) for name, value in batch.items()})
        return model(_copy(batch))
    except Exception as error:
        note(error, f"calling the model with the input of a batch: {outline(batch)}")
        raise


def _copy(value: Any) -> Any:
    """Copy tensors, and the lists, tuples and dictionaries that hold them; anything else is handed on."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (list, dict, UserDict)):
        places = enumerate(value) if isinstance(value, list) else value.items()
        copies = [(place, _copy(one)) for place, one in places]
        try:
            twin: Any = copy.copy(value)
            for place, one in copies:
                twin[place] = one
        except Exception:  # noqa: BLE001 - whatever a class of the user's raises that refuses to be copied, or written to
            return value
        return twin
    if type(value) is tuple:
        return tuple(map(_copy, value))
    make = getattr(value, "_make", None) if isinstance(value, tuple) else None  # of named ones
    return value if make is None else make(map(_copy, value))
