"""Running a model on inputs only to look at it: nothing about it is different afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._checks import describe

if TYPE_CHECKING:
    from torch import nn


class Inputs(NamedTuple):
    """Arguments of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, model: nn.Module) -> Any:
        """Call a model with them."""
        return model(*self.args, **self.kwargs)


def as_inputs(example_inputs: Any) -> Inputs:
    """Read example inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, tuple):
        return Inputs(example_inputs, {})
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return Inputs((), example_inputs)
    raise TypeError(
        "example_inputs must be a tensor, a tuple of positional arguments, or a dict of keyword arguments; "
        f"got {describe(example_inputs)}."
    )


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients; put back modes and random state at the end."""
    training = [(module, module.training) for module in model.modules()]
    devices = sorted({one.device.index for one in model.parameters() if one.device.type == "cuda"})
    try:
        for module, _ in training:
            module.training = False
        with torch.inference_mode(mode=False), torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in training:
            module.training = mode
