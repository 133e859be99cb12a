"""Running a model on inputs only to look at it: nothing about it is different afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._checks import describe, with_article
from ._kept_state import KeptState
from ._random_state import devices_of, random_states_put_back, seed_all_
from ._undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

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


def check_not_mapped(layer: str, given: Any) -> None:
    """Refuse an input under ``torch.vmap``: how many there are of it cannot be seen, nor what is in it."""
    if isinstance(given, Tensor) and torch._C._functorch.is_batchedtensor(given):
        raise ValueError(
            f"layer {layer!r} is called under torch.vmap, where its inputs cannot be looked at: compress with "
            "target='params' and without calibration, leave the layer out with filter_fn, or write its batch out."
        )


def given_to(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the input among the arguments of a layer or a norm."""
    return args[0] if args else kwargs["input"]


def outline(value: Any) -> str:
    """Say what a model was called with."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} in {value.dtype} on {value.device}"
    return with_article(type(value).__name__)


@contextmanager
def observing(model: nn.Module, changing: Collection[nn.Module] = ()) -> Iterator[Callable[[int], bool]]:
    """Put a model in eval mode without gradients; put back modes, random state and what it keeps at the end.

    Args:
        model: any model.
        changing: modules of it whose buffers are to be changed.

    Yields:
        What makes runs alike, called with the number of a batch before each: it puts back what the model keeps from one
        call to the next, and random numbers are the same for the same batch. It says whether there was anything to put
        back, which is so if the model has been run and keeps something.
    """
    training = [(module, module.training) for module in model.modules()]

    def put_modes_back_() -> None:
        for module, mode in training:
            module.training = mode

    with _leaving_as_it_is(model, KeptState(model, changing)) as begin, Undo() as undo:
        undo.add(put_modes_back_)
        for module, _ in training:
            module.training = False
        yield begin


@contextmanager
def tracing(model: nn.Module) -> Iterator[None]:
    """Let a model be traced in the modes that it is in, without gradients; put back what that leaves in it."""
    with _leaving_as_it_is(model, KeptState(model, everywhere=True)):
        yield


@contextmanager
def _leaving_as_it_is(model: nn.Module, kept: KeptState) -> Iterator[Callable[[int], bool]]:
    devices = devices_of(model)

    def begin(batch: int) -> bool:
        has_changed = kept.put_back_()
        seed_all_(batch, devices)
        return has_changed

    with Undo() as undo:
        undo.add(kept.put_back_)
        with torch.inference_mode(mode=False), torch.no_grad(), random_states_put_back(devices):
            yield begin
