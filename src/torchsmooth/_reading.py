"""The weights of a model as they are looked at: found, named, and read without changing anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._checks import FLOAT_DTYPES, describe, is_quantised, is_wanted, kind_of_tensor
from ._computed import computed_tensors, is_hooked, random_state_kept
from ._registered import LAYERS, name_of

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class FoundWeight:
    """A layer whose weight is looked at, and the other names under which the model uses that weight."""

    name: str
    module: nn.Module
    tied: list[str] = field(default_factory=list)


def find_weights(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None) -> list[FoundWeight]:
    """List the layers that ``smooth_`` supports, in the order of ``named_modules``, each weight once."""
    found: dict[int, FoundWeight] = {}
    kept: dict[nn.Module, bool] = {}
    for wrapped_name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, LAYERS):
            continue
        name = name_of(wrapped_name, "")
        if module not in kept:
            kept[module] = filter_fn is None or is_wanted(filter_fn(module, name), name)
        if not kept[module]:
            continue
        # A weight that is computed when it is read is a new tensor each time: only parameters have an identity.
        weight = module._parameters.get("weight")
        key = id(module if weight is None else weight)
        if key in found:
            found[key].tied.append(name)
        else:
            found[key] = FoundWeight(name, module)
    return list(found.values())


def geometry_of(module: nn.Module) -> tuple[int, bool]:
    """Return the groups of a layer, and whether its weight is laid out ``(in, out / groups, *kernel)``.

    Convolutions say both themselves, those of torch and the low-rank ones by the same names. A table of vectors has no
    groups: its rows are shown as rows, whatever a low-rank one says of its layout.
    """
    groups, transposed = getattr(module, "groups", None), getattr(module, "transposed", None)
    return (groups, transposed) if type(groups) is int and isinstance(transposed, bool) else (1, False)


def read_weight(module: nn.Module, label: str) -> Tensor:
    """Return the weight of a layer, detached, after making sure that it is one that has channels.

    Args:
        module: any module with a tensor ``weight`` of at least two axes.
        label: what errors call the layer.

    Raises:
        TypeError: if the weight is not of a real floating dtype.
        ValueError: if there is none, or it is not initialised, of fewer than two axes, or sharded.
    """
    weight = _untouched(module)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{label} must have a tensor as its weight, got {describe(weight)}: leave it out.")
    check_weight(weight, f"the weight of {label}")
    return weight.detach()


def check_weight(weight: Tensor, what: str) -> None:
    """Refuse a tensor that is not the whole weight of a layer with channels."""
    if nn.parameter.is_lazy(weight):
        raise ValueError(f"{what} is not initialised yet (a lazy module): run one batch through the model first.")
    if is_quantised(weight):
        raise ValueError(f"{what} must be a plain tensor, got one that is {kind_of_tensor(weight)}: leave it out.")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{what} must be of float64, float32, bfloat16 or float16, got {weight.dtype}: leave it out.")
    if weight.dim() < 2:  # noqa: PLR2004 - the two channel axes
        raise ValueError(
            f"{what} must have an output and an input channel axis, got shape {tuple(weight.shape)}: leave it out; "
            "where sharding has flattened the parameters, gather them first."
        )
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            f"{what} must be whole, got a sharded one ({type(weight).__name__}): gather the parameters first, on every "
            "process (model.unshard()), or look at a gathered copy of the model."
        )


def _untouched(module: nn.Module) -> object:
    """Read ``module.weight``; where that runs code, put back what the code may change.

    What a hook computes before each forward pass is computed here as well: the attribute is of the last one.
    Some parametrizations move their buffers when they are read in training mode (``spectral_norm``), and one may draw
    random numbers. Inside ``parametrize.cached`` the first to read reads for all: the next forward pass will use what
    is computed here, so gradients stay enabled and nothing is put back.
    """
    if is_hooked(module, "weight"):
        return dict(computed_tensors(module))["weight"]
    if not parametrize.is_parametrized(module, "weight") or parametrize._cache_enabled:
        return getattr(module, "weight", None)
    parametrization: Any = module.parametrizations["weight"]  # type: ignore[index]
    before = [(buffer, buffer.clone()) for buffer in parametrization.buffers()]
    with random_state_kept(parametrization):
        weight: object = module.weight
    with torch.no_grad():
        for buffer, value in before:
            if not torch.equal(buffer, value):  # an unchanged one is not written, or a graph that holds it would break
                buffer.copy_(value)
    return weight
