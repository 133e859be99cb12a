"""The weights of a model as they are looked at: found, named, and read without changing anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ._checks import FLOAT_DTYPES, describe, is_quantised, is_wanted, kind_of_tensor
from ._computed import untouched
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
    weight = untouched(module, "weight")
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
