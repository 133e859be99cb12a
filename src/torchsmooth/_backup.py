"""What loading a state dict writes, kept so that it can be put back: loading writes what fits before it raises."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Collection


class Backup:
    """The tensors and the extra state of a model, by value and by identity.

    Args:
        model: the model that is about to be loaded.
        replaced: layers that will not be in it then; their weights are not copied.
    """

    def __init__(self, model: nn.Module, replaced: Collection[nn.Module]) -> None:
        self._owned: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                self._owned.append((own, dict(own)))
                for name, tensor in own.items():
                    if tensor is not None and not (module in replaced and name == "weight"):
                        self._values[id(tensor)] = (tensor, tensor.clone())
        self._extras = [
            (module, copy.deepcopy(module.get_extra_state()))
            for module in model.modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]

    def restore_(self) -> None:
        """Put everything back: the same tensor objects under the same names, holding the same values."""
        for live, entries in self._owned:
            live.clear()
            live.update(entries)
        for tensor, before in self._values.values():
            # Unchanged ones are left alone: an expanded buffer, for one, cannot be written to.
            if not _same(tensor, before):
                # A layout that takes no copy at all (sparse, nested) cannot have been written to by the load either.
                with contextlib.suppress(RuntimeError):
                    tensor.copy_(before)
        for module, state in self._extras:
            module.set_extra_state(state)


def _same(one: Tensor, other: Tensor) -> bool:
    """Compare bit for bit, so that NaN equals NaN and zero is not minus zero; False where that cannot be done."""
    if type(one.data) is not Tensor or one.layout is not torch.strided or one.is_quantized or one.is_nested:
        return False
    plain = (tensor.detach().resolve_conj().resolve_neg().contiguous().flatten() for tensor in (one, other))
    return torch.equal(*(tensor.view(torch.uint8) for tensor in plain))
