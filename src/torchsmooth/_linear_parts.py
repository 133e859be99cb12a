"""Taking layers that keep raw weights apart into linear layers over the same memory, and putting them together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ._checks import describe, kind_of_tensor, quoted
from ._lowrank_layer import LowRankLayer
from ._source_layer import STATE_HOOKS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# The second is what torch puts into its attention; it differs from the first by name alone.
DENSE_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


def why_not_expandable(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], children: Iterable[str] = (), optional: Iterable[str] = ()
) -> str:
    """Say why a module is more than the raw weights of its type, so that linear layers could not stand in for them.

    Args:
        module: a module of an exact type of torch.
        shapes: the parameters that it must have, with the shapes that its attributes say.
        children: the children that it must have.
        optional: names of parameters that it may have beside them, or None in their places.

    Returns:
        The reason; empty if there is none.
    """
    for name, shape in shapes.items():
        parameter = module._parameters.get(name)
        if parameter is None:
            return f"{name} is not a plain parameter (pruned or weight-normed; remove that first)"
        if type(parameter) is not nn.Parameter or parameter.layout is not torch.strided:
            return f"{name} is {kind_of_tensor(parameter)}"
        if tuple(parameter.shape) != shape:
            return f"{name} is of shape {tuple(parameter.shape)}, but the layer's attributes say {shape}"
    kinds = {(str(parameter.dtype), str(parameter.device)) for parameter in module.parameters()}
    if len(kinds) > 1:
        return f"its parameters are of several kinds: {' and '.join(' on '.join(one) for one in sorted(kinds))}"
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    extras = [
        *(own - shapes.keys() - set(optional)),
        *module._buffers,
        *(module._modules.keys() - set(children)),
    ]
    if extras:
        return f"it has more than its weights and biases: {quoted(extras)}"
    if any(vars(module).get(hooks) for hooks in STATE_HOOKS):
        return "it has state-dict hooks, which expect the keys of the dense layer"
    return "its forward was replaced on this instance" if "forward" in vars(module) else ""


def check_exact_type(module: object, expected: type[nn.Module]) -> None:
    """Refuse what is not exactly of a type of torch: a subclass may use its weights in other ways."""
    if type(module) is not expected:
        raise TypeError(
            f"expected a torch.nn.{expected.__name__} itself, got {describe(module)}: a subclass may use its weights "
            "in ways that linear layers would not know of (a parametrized one: call remove_parametrizations first)."
        )


def rows_of(parameter: nn.Parameter, start: int, stop: int) -> nn.Parameter:
    """Make a parameter over the memory of some rows of another."""
    with torch.inference_mode(parameter.is_inference()):
        return nn.Parameter(parameter.detach()[start:stop], requires_grad=parameter.requires_grad)


def linear_over(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Make a linear layer of parameters that exist; no random number is drawn."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.register_parameter("weight", weight)
    linear.register_parameter("bias", bias)
    return linear


def copy_of(*parameters: nn.Parameter) -> nn.Parameter:
    """Stack parameters to one that owns its memory; it is trainable if any of them is."""
    stacked = torch.cat([one.detach() for one in parameters]).contiguous()
    return nn.Parameter(stacked, requires_grad=any(one.requires_grad for one in parameters))


def dense_parts(
    owner: nn.Module, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[nn.Parameter, nn.Parameter | None]]:
    """Return the weights and biases of children that are to be put together to one layer, or refuse.

    Args:
        owner: a module with linear children.
        shapes: names of the children, with the shapes that their weights must have.

    Returns:
        Weight and bias by name, all of one dtype and on one device.

    Raises:
        ValueError: naming the child that is not an ordinary linear layer, or not like the others.
    """
    parts: dict[str, tuple[nn.Parameter, nn.Parameter | None]] = {}
    name_of_owner = type(owner).__name__
    for name, shape in shapes.items():
        child: Any = owner._modules.get(name)
        way = "restore_dense_ the model first" if isinstance(child, LowRankLayer) else "put a torch.nn.Linear there"
        if type(child) not in DENSE_LINEAR:
            raise ValueError(
                f"child {name!r} of this {name_of_owner} must be a torch.nn.Linear, got {describe(child)}: {way}."
            )
        weight, bias = child._parameters.get("weight"), child._parameters.get("bias")
        if type(weight) is not nn.Parameter or "bias" not in child._parameters:
            raise ValueError(
                f"child {name!r} of this {name_of_owner} has no plain weight or bias (pruned or quantised after the "
                "layer was expanded): remove that first."
            )
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"child {name!r} of this {name_of_owner} has a weight of shape {tuple(weight.shape)}, expected "
                f"{shape}: {way} of that size."
            )
        parts[name] = weight, bias
    places = {name: (weight.dtype, weight.device) for name, (weight, _) in parts.items()}
    first = next(iter(places))
    for name, place in places.items():
        if place != places[first]:
            raise ValueError(
                f"child {name!r} of this {name_of_owner} is of {place[0]} on {place[1]}, but {first!r} of "
                f"{places[first][0]} on {places[first][1]}: bring them together with .to(dtype, device)."
            )
    return parts


def multiplied_out(child: nn.Module, owner: str, name: str) -> Tensor:
    """Return the weight of a linear child, dense or low-rank, as an ordinary tensor."""
    weight = getattr(child, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"child {name!r} of this {owner} is a {type(child).__module__}.{type(child).__name__} without a weight "
            "that could be read (quantised?): leave this layer out there."
        )
    return weight
