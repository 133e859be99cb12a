"""Penalties registered on modules.

The interface is that of ``torch.nn.utils.parametrize``, the mechanism is not: a penalty does not change the weight,
so it needs no change of class, no property and no new state-dict key. A registration is an entry in a plain
dictionary among the attributes of the module. It is copied by ``deepcopy``, travels through ``pickle`` and
``torch.save``, and the weight is looked up by name whenever the penalty is evaluated, never kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ._checks import (
    FLOAT_DTYPES,
    check_filter,
    check_initialised,
    check_module,
    describe,
    is_quantised,
    is_wanted,
    quoted,
)
from ._computed import untouched
from ._registered import ATTRIBUTE, LAYERS, label_of, penalties_of, unwrapped
from .penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["is_penalized", "register_penalty", "remove_penalties", "smooth_"]


def _check_target(module: nn.Module, tensor_name: str, qualified_name: str = "") -> None:
    """Refuse what cannot be penalised, before anything is registered."""
    label = label_of(module, tensor_name, qualified_name)
    tensor = untouched(module, tensor_name)
    if not isinstance(tensor, Tensor):
        there = quoted([name for name, _ in module.named_parameters(recurse=False)]) or "no parameters of its own"
        what = "does not exist" if tensor is None else f"is {describe(tensor)}, not a tensor"
        inside = any(isinstance(one, LAYERS) for one in module.modules() if one is not module)
        way = " Pass the layer that has it, or call smooth_(model, penalty) for all layers." if inside else ""
        raise ValueError(f"{label} {what}: it has {there}.{way}")
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{label} is not initialised yet: run one batch through the module first.")
    if is_quantised(tensor):
        raise ValueError(f"{label} is quantised ({type(tensor).__name__}): penalties are for training, so before that.")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{label} is of {tensor.dtype}; a penalty needs float64, float32, bfloat16 or float16.")
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
    if not isinstance(tensor_name, str):
        raise TypeError(f"tensor_name must be a string, got {describe(tensor_name)}.")
    _check_penalty(penalty)
    owner = unwrapped(module)
    _check_target(owner, tensor_name)
    _register(owner, tensor_name, penalty)
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
    registered = penalties_of(module)
    others = tuple(one for one in registered.get(tensor_name, ()) if type(one) is not type(penalty))
    # A new dictionary each time: copy.copy of a module shares the old one.
    module.__dict__[ATTRIBUTE] = registered | {tensor_name: (*others, penalty)}


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
        return any(penalties_of(inner) for inner in module.modules())
    return tensor_name in penalties_of(unwrapped(module))


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
            inner.__dict__.pop(ATTRIBUTE, None)
        return module
    module, given = unwrapped(module), module
    registered = penalties_of(module)
    if tensor_name not in registered:
        there = ", ".join(repr(name) for name in registered) or "none"
        raise ValueError(f"no penalty is registered on {label_of(module, tensor_name)} (registered there: {there}).")
    remaining = {name: penalties for name, penalties in registered.items() if name != tensor_name}
    if remaining:
        module.__dict__[ATTRIBUTE] = remaining
    else:
        del module.__dict__[ATTRIBUTE]
    return given


def smooth_(
    model: nn.Module,
    penalty: Penalty,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Register a penalty on the weight of every supported layer of a model, in place.

    Supported are Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d and Embedding, their subclasses and parametrized
    versions. Nothing happens until :func:`torchsmooth.penalty_loss` is added to the loss, or
    :func:`torchsmooth.attach_` has been called.

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
    check_filter(filter_fn)
    check_initialised(model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and (filter_fn is None or is_wanted(filter_fn(module, name), name))
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
