"""Running a model on inputs only to look at it: nothing about it is different afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._checks import describe, with_article

if TYPE_CHECKING:
    from torch import nn


class Inputs(NamedTuple):
    """Arguments of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, model: nn.Module) -> Any:
        """Call a model with them."""
        try:
            return model(*self.args, **self.kwargs)
        except Exception as error:
            given = [*map(outline, self.args), *(f"{name}: {outline(one)}" for name, one in self.kwargs.items())]
            note(error, f"calling the model with example_inputs: {', '.join(given)}")
            raise


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


def note(error: Exception, doing: str) -> None:
    """Add to an error of the user's own code what the library was doing; its type and message stay.

    Python 3.10 has no notes on errors: there it stays quite as it is.
    """
    if hasattr(error, "add_note"):
        error.add_note(f"torchsmooth was {doing}.")


def outline(value: Any) -> str:
    """Say what a model was called with."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} in {value.dtype} on {value.device}"
    return with_article(type(value).__name__)


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
