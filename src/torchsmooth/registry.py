"""Penalties registered on modules, and their sum.

The interface is that of ``torch.nn.utils.parametrize``, the mechanism is not: a penalty does not change the weight,
so it needs no change of class, no property and no new state-dict key. A registration is an entry in a plain
dictionary among the attributes of the module. It is copied by ``deepcopy``, travels through ``pickle`` and
``torch.save``, and the weight is looked up by name whenever the penalty is evaluated, never kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._checks import check_initialised, check_module, describe
from .penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["is_penalized", "penalty_loss", "register_penalty", "remove_penalties", "smooth_"]

_ATTRIBUTE = "_torchsmooth_penalties"

# Layers whose weight `smooth_` finds by itself, and their subclasses (a parametrized layer is one).
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Embedding, *_CONVOLUTIONS, *_TRANSPOSED)


def _penalties_of(module: nn.Module) -> dict[str, tuple[Penalty, ...]]:
    penalties: dict[str, tuple[Penalty, ...]] = module.__dict__.get(_ATTRIBUTE, {})
    return penalties


def _label(module: nn.Module, tensor_name: str, qualified_name: str = "") -> str:
    owner = f"{qualified_name!r} ({type(module).__name__})" if qualified_name else type(module).__name__
    return f"tensor {tensor_name!r} of {owner}"


def _check_target(module: nn.Module, tensor_name: str, qualified_name: str = "") -> None:
    """Refuse what cannot be penalised, before anything is registered."""
    label = _label(module, tensor_name, qualified_name)
    tensor = getattr(module, tensor_name, None)
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{label} is {describe(tensor)}; a penalty needs a parameter or a parametrized tensor of at least two axes."
        )
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{label} is not initialised yet: run one batch through the module first.")
    if not tensor.is_floating_point():
        raise TypeError(f"{label} is of dtype {tensor.dtype}; a penalty needs a real floating dtype.")
    if tensor.dim() < 2:  # noqa: PLR2004 - the two channel axes
        raise ValueError(
            f"{label} has shape {tuple(tensor.shape)}; a penalty acts along an output and an input channel axis "
            "and needs at least two."
        )


def register_penalty(module: nn.Module, tensor_name: str, penalty: Penalty) -> nn.Module:
    """Register a penalty on one tensor of a module.

    Penalties of different types on one tensor add up; one of the same type is replaced, so a notebook cell
    can be run again. The state dict, the class and the forward pass of the module stay as they were.

    Args:
        module: the module that owns the tensor.
        tensor_name: name of a parameter (or parametrized tensor) with at least two axes, real floating dtype. It is
            read as ``(out, in / groups, *kernel)``; for the ``ConvTranspose`` layers as ``(in, out / groups,
            *kernel)``.
        penalty: for instance ``NuclearNorm(1e-3)``.

    Returns:
        The module.

    Raises:
        TypeError: if an argument is of a wrong type, or the tensor is not floating.
        ValueError: if there is no such tensor, or it has fewer than two axes.

    Example:
        >>> import torch, torchsmooth
        >>> layer = torchsmooth.register_penalty(torch.nn.Linear(4, 3), "weight", torchsmooth.NuclearNorm(1e-3))
        >>> torchsmooth.is_penalized(layer, "weight")
        True

    Source: the interface of ``torch.nn.utils.parametrize.register_parametrization``.
    """
    check_module(module, "module")
    _check_penalty(penalty)
    if not isinstance(tensor_name, str):
        raise TypeError(f"tensor_name must be a string, got {describe(tensor_name)}.")
    _check_target(module, tensor_name)
    _register(module, tensor_name, penalty)
    return module


def _check_penalty(penalty: object) -> None:
    if isinstance(penalty, type) and issubclass(penalty, Penalty):
        raise TypeError(f"penalty must be an instance: write {penalty.__name__}(), not {penalty.__name__}.")
    if not isinstance(penalty, Penalty):
        raise TypeError(
            "penalty must be NuclearNorm(...), FirstDerivative(...), SecondDerivative(...) or another "
            f"torchsmooth.penalties.Penalty, got {describe(penalty)}."
        )


def _register(module: nn.Module, tensor_name: str, penalty: Penalty) -> None:
    registered = _penalties_of(module)
    others = tuple(one for one in registered.get(tensor_name, ()) if type(one) is not type(penalty))
    # A new dictionary each time: copy.copy of a module shares the old one.
    module.__dict__[_ATTRIBUTE] = registered | {tensor_name: (*others, penalty)}


def is_penalized(module: nn.Module, tensor_name: str | None = None) -> bool:
    """Tell whether a penalty is registered.

    Args:
        module: any module.
        tensor_name: a tensor of that very module; None asks for any tensor of it or of the modules inside it.

    Returns:
        True if so.

    Raises:
        TypeError: if ``module`` is not a module.

    Example:
        >>> import torch, torchsmooth
        >>> torchsmooth.is_penalized(torch.nn.Linear(4, 3))
        False

    Source: the interface of ``torch.nn.utils.parametrize.is_parametrized``.
    """
    check_module(module, "module")
    if tensor_name is None:
        return any(_penalties_of(inner) for inner in module.modules())
    return tensor_name in _penalties_of(module)


def remove_penalties(module: nn.Module, tensor_name: str | None = None) -> nn.Module:
    """Remove registered penalties; nothing else about the module changes.

    Args:
        module: any module.
        tensor_name: a tensor of that very module; None removes all penalties from it and from the modules inside
            it, which undoes :func:`smooth_`.

    Returns:
        The module.

    Raises:
        TypeError: if ``module`` is not a module.
        ValueError: if a name is given and no penalty is registered under it.

    Example:
        >>> import torch, torchsmooth
        >>> model = torchsmooth.smooth_(torch.nn.Sequential(torch.nn.Linear(4, 3)), torchsmooth.NuclearNorm())
        >>> torchsmooth.is_penalized(torchsmooth.remove_penalties(model))
        False

    Source: the interface of ``torch.nn.utils.parametrize.remove_parametrizations``.
    """
    check_module(module, "module")
    if tensor_name is None:
        for inner in module.modules():
            inner.__dict__.pop(_ATTRIBUTE, None)
        return module
    registered = _penalties_of(module)
    if tensor_name not in registered:
        there = ", ".join(repr(name) for name in registered) or "none"
        raise ValueError(f"no penalty is registered on {_label(module, tensor_name)} (registered there: {there}).")
    remaining = {name: penalties for name, penalties in registered.items() if name != tensor_name}
    if remaining:
        module.__dict__[_ATTRIBUTE] = remaining
    else:
        del module.__dict__[_ATTRIBUTE]
    return module


def smooth_(
    model: nn.Module,
    penalty: Penalty,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Register a penalty on the weight of every supported layer of a model, in place.

    Supported are Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d and Embedding, their subclasses and parametrized
    versions. The model must be passed to :func:`penalty_loss` in the training loop; nothing else changes.

    Args:
        model: the model to train.
        penalty: for instance ``NuclearNorm(1e-3)``.
        filter_fn: ``filter_fn(module, qualified_name) -> bool``, called for each supported layer; False leaves it out.

    Returns:
        The model.

    Raises:
        TypeError: if an argument is of a wrong type, or a weight is not floating.
        ValueError: if a weight is not initialised, or no layer was found.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> model = torchsmooth.smooth_(model, torchsmooth.FirstDerivative(1e-4))
        >>> torchsmooth.is_penalized(model[0], "weight")
        True

    Source: Runkel et al., "Smooth Model Compression without Fine-Tuning", 2025 (arXiv 2505.24469).
    """
    check_module(model)
    _check_penalty(penalty)
    check_initialised(model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and (filter_fn is None or filter_fn(module, name))
    ]
    if not found:
        left_out = " that filter_fn keeps" if filter_fn is not None else ""
        raise ValueError(
            f"{type(model).__name__} has no Linear, Conv, ConvTranspose or Embedding layer{left_out}: "
            "use register_penalty(module, tensor_name, penalty) for other weights."
        )
    for name, module in found:
        _check_target(module, "weight", name)
    for _, module in found:
        _register(module, "weight", penalty)
    return model


def penalty_loss(model: nn.Module) -> Tensor:
    """Add up strength × penalty over everything registered in a model.

    Add it to the loss of each step. A weight that is shared between layers counts once for each different penalty.
    The row of an Embedding's ``padding_idx``, which is never trained, is left out.

    Args:
        model: a module; wrapped (DistributedDataParallel, torch.compile) or not.

    Returns:
        A differentiable scalar, in float32 or the wider dtype of the weights, on the device of the first penalised
        weight. With nothing registered: zero, on the device of the model's first parameter.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if a penalty cannot be evaluated; the layer is named.

    Example:
        >>> import torch, torchsmooth
        >>> layer = torch.nn.Linear(4, 3)
        >>> with torch.no_grad():
        ...     _ = layer.weight.fill_(1.0)
        >>> model = torchsmooth.smooth_(torch.nn.Sequential(layer), torchsmooth.FirstDerivative(0.1))
        >>> torchsmooth.penalty_loss(model).item()  # constant along the channels
        0.0

    Source: Runkel et al., "Smooth Model Compression without Fine-Tuning", 2025 (arXiv 2505.24469).
    """
    check_module(model)
    total: Tensor | None = None
    # Maps id to tensor too, so that the id of a freshly computed (parametrized) tensor is not given out again.
    counted: dict[tuple[int, Penalty], Tensor] = {}
    for name, module in model.named_modules():
        for tensor_name, penalties in _penalties_of(module).items():
            tensor = getattr(module, tensor_name)
            for penalty in penalties:
                key = (id(tensor), penalty)
                if penalty.strength == 0.0 or key in counted:
                    continue
                counted[key] = tensor
                term = penalty.strength * _evaluate(penalty, module, tensor_name, tensor, name)
                total = term if total is None else total + term.to(total.device)
    if total is not None:
        return total
    anywhere = next(model.parameters(), None)
    return torch.zeros((), dtype=torch.float32, device="cpu" if anywhere is None else anywhere.device)


def _evaluate(penalty: Penalty, module: nn.Module, tensor_name: str, tensor: Tensor, qualified_name: str) -> Tensor:
    groups, transposed = 1, False
    if tensor_name == "weight":
        if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
            groups, transposed = module.groups, isinstance(module, _TRANSPOSED)
        elif isinstance(module, nn.Embedding) and module.padding_idx is not None:
            row = module.padding_idx
            tensor = torch.cat([tensor[:row], tensor[row + 1 :]])
    try:
        return penalty(tensor, groups=groups, transposed=transposed)
    except (TypeError, ValueError) as error:
        label = _label(module, tensor_name, qualified_name)
        raise type(error)(f"{type(penalty).__name__} on {label}: {error}") from error
