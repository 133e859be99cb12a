"""Multiply-accumulates of a model for given inputs: of the whole, and where each layer spends them."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._geometry import Convolution, Transposed
from ._prices import Positions
from ._running import check_not_mapped, given_to, observing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ._counting import Counter
    from ._running import Inputs


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """Count the multiply-accumulates of a model."""
    return _counted(model, inputs).macs


def _counted(model: nn.Module, inputs: Inputs) -> Counter:
    from ._counting import Counter  # noqa: PLC0415 - torch may log that triton is not there

    counter = Counter()
    with observing(model), _no_fused_layers(), counter:
        inputs.run(model)
    return counter


def observe_macs(model: nn.Module, inputs: Inputs, layers: Mapping[str, nn.Module]) -> tuple[int, dict[str, Positions]]:
    """Count the multiply-accumulates of a model, and see at how many positions each layer is evaluated.

    Args:
        model: any model.
        inputs: arguments for it.
        layers: linear layers, convolutions and embeddings of it, by name.

    Returns:
        The count, and the positions of each layer, all calls together; zero for a layer that is never called.

    Warns:
        UserWarning: naming operators of other libraries that the count leaves out.
    """
    found = dict.fromkeys(layers, Positions())

    def note(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        given = given_to(args, kwargs)
        check_not_mapped(name, given)
        found[name] = Positions(*map(sum, zip(found[name], _positions(module, given, output), strict=True)))

    with ExitStack() as stack:
        for name, module in layers.items():
            handle = module.register_forward_hook(partial(note, name), with_kwargs=True)
            stack.callback(handle.remove)
        counter = _counted(model, inputs)
    if counter.passed_by:
        warnings.warn(
            f"no multiply-accumulates of {', '.join(sorted(counter.passed_by))} are counted in this "
            f"{type(model).__name__}: torch knows no formula for that. Give it one by "
            "torch.utils.flop_counter.register_flop_formula, or take the ratio as that of everything else.",
            UserWarning,
            stacklevel=2,
        )
    return counter.macs, found


def _positions(module: nn.Module, given: Tensor, output: Tensor) -> Positions:
    if not isinstance(module, (Convolution, Transposed)):
        rows = output.numel() // output.shape[-1]
        return Positions(rows, rows, rows, rows)
    axes = len(module.kernel_size)
    before, after = given.shape[-axes:], output.shape[-axes:]
    batch = given.numel() // (given.shape[-1 - axes] * math.prod(before))
    inputs, outputs = batch * math.prod(before), batch * math.prod(after)
    if axes != 2:  # noqa: PLR2004 - only of height and width one can go without the other
        return Positions(inputs, inputs, outputs, outputs)
    return Positions(inputs, batch * after[0] * before[1], batch * before[0] * after[1], outputs)


@contextmanager
def _no_fused_layers() -> Iterator[None]:
    """Let nn.TransformerEncoderLayer call its layers, as it does in training; fused, it would pass the counter by."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
