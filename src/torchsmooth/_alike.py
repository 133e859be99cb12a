"""Whether the ranks of a process group hold the same model and ask for the same: found out before work is shared."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._checks import check_initialised, check_module
from ._checksum import Outline
from ._whole import check_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ._ranks import Team

_ALONE = "To compress on one rank alone, use plan_compression(model, ...).apply_(model)."


@contextmanager
def prepared_(team: Team, model: nn.Module, arguments: Mapping[str, object]) -> Iterator[None]:
    """Make sure that all ranks work on the same model and for the same arguments; do nothing for a process alone.

    Parameters are compared by their names, shapes, dtypes and checksums, not sent. Buffers become those
    of the first rank: BatchNorm statistics differ in every network that was trained on several ranks, as each has seen
    other data last. After an error, every rank has its own again.

    Args:
        team: the ranks.
        model: the model of this rank.
        arguments: those that every rank should have given alike.

    Raises:
        TypeError: if the model is not a module.
        ValueError: on all ranks, if there is a difference, or one of the models is sharded or wrapped.
    """
    if len(team.numbers) == 1:
        yield
        return
    _refuse_differences(team, {name: repr(value) for name, value in arguments.items()}, _other_argument)
    check_module(model)
    check_initialised(model)
    check_whole(model)
    _refuse_differences(team, {name: Outline.of(one) for name, one in model.named_parameters()}, _other_tensor)
    buffers = dict(model.named_buffers())
    outlines = {name: Outline.of(one) for name, one in buffers.items()}
    _refuse_differences(team, {name: one[:2] for name, one in outlines.items()}, _other_tensor)
    first, *others = team.gather(outlines)
    differing = [one for name, one in buffers.items() if any(there[name] != first[name] for there in others)]
    before, values = ([one.detach().clone() for one in differing] for _ in range(2))
    team.take_((one, 0) for one in values)
    try:
        _write_(differing, values)
        yield
    except BaseException:  # also an interruption from the keyboard
        _write_(differing, before)
        raise


@torch.inference_mode()  # where tensors made in inference mode can be written to, and all others as well
def _write_(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _refuse_differences(team: Team, own: Mapping[str, Any], say: Callable[[str, Any, Any, Any], str]) -> None:
    """Compare what every rank has, by name; the first difference is raised on all ranks."""
    first, *others = team.gather(dict(own))
    for number, theirs in zip(team.numbers[1:], others, strict=True):
        for name in first | theirs:  # in the order of the first rank
            if first.get(name) != theirs.get(name):
                raise ValueError(say(name, first.get(name), theirs.get(name), (team.numbers[0], number)))


def _other_argument(name: str, first: str, other: str, ranks: tuple[int, int]) -> str:
    return (
        f"svd_compress_ got {name}={first} on rank {ranks[0]}, but {name}={other} on rank {ranks[1]}: give every rank "
        f"the same arguments. {_ALONE}"
    )


def _other_tensor(name: str, first: Any, other: Any, ranks: tuple[int, int]) -> str:
    layer, _, own_name = name.rpartition(".")
    where = f"{own_name!r} of layer {layer!r}" if layer else repr(name)
    if first is None or other is None:
        difference = f"only rank {ranks[other is not None]} has {where}"
    elif first[:2] != other[:2]:
        one, two = (f"{entry[1]} of shape {entry[0]}" for entry in (first, other))
        difference = f"{where} is {one} on rank {ranks[0]}, and {two} on rank {ranks[1]}"
    else:
        difference = f"{where} has other values on rank {ranks[1]} than on rank {ranks[0]}"
    return (
        f"the models on the ranks are not the same: {difference}. Load the same checkpoint on every rank, or send one "
        "rank's weights to all: for tensor in model.state_dict().values(): torch.distributed.broadcast(tensor, src=0). "
        f"{_ALONE}"
    )
