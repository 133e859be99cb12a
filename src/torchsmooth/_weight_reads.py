"""Which layers a model asks for their weight itself, beside calling them: a low-rank layer multiplies out for each."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._undo import Undo

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn


class _Watched(dict[str, Any]):
    """The parameters of a layer, which note whose attribute ``weight`` is asked for by others than the layer itself."""

    def __init__(self, layer: nn.Module, reads: Counter[nn.Module]) -> None:
        super().__init__(layer._parameters)
        self._layer, self._reads = layer, reads

    def __getitem__(self, name: str) -> Any:
        # What looks into the dictionary itself, as functional_call does, would look for the factors of another layer.
        lookup = sys._getframe(1)
        asking = lookup.f_back if lookup.f_code.co_name == "__getattr__" else None
        if name == "weight" and asking is not None and asking.f_locals.get("self") is not self._layer:
            self._reads[self._layer] += 1
        return super().__getitem__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # copies are the model's, and nobody watches them


@contextmanager
def watching_weights(layers: Iterable[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """Count how often layers are asked for their attribute ``weight`` by anything but their own methods.

    No class is changed, and a layer that is run elsewhere meanwhile does what it always does.

    Args:
        layers: layers of known kinds.

    Yields:
        How often each was asked, so far.
    """
    reads: Counter[nn.Module] = Counter()
    with Undo() as undo:
        for layer in layers:
            undo.add(vars(layer).__setitem__, "_parameters", layer._parameters)
            vars(layer)["_parameters"] = _Watched(layer, reads)
        yield reads
