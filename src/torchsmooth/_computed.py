"""Layers whose weight is computed from other tensors: by parametrizations, weight_norm, spectral_norm or pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ._random_state import devices_of, random_states_put_back

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

# What the older functions of torch.nn.utils hang on a module: called before each forward pass, they set the weight.
_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


def is_parametrized(module: nn.Module) -> bool:
    """Tell whether tensors of a module itself are parametrized.

    A wrapper may answer for what is inside of it when torch asks for an attribute.
    """
    return "parametrizations" in module._modules and parametrize.is_parametrized(module)


def computing(module: nn.Module) -> str:
    """Say what computes a tensor of a module; empty if nothing does."""
    if is_parametrized(module):
        return "parametrized"
    for hook in _hooks(module).values():
        return "pruned" if isinstance(hook, BasePruningMethod) else "normed"
    return ""


def is_hooked(module: nn.Module, tensor_name: str) -> bool:
    """Tell whether a tensor is computed by a hook before each forward pass, as by the older norms and by pruning."""
    names = (
        hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name for hook in _hooks(module).values()
    )
    return tensor_name in names


def type_of(module: nn.Module) -> type[nn.Module]:
    """Return the type that a module has without parametrizations."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def random_state_kept(module: nn.Module) -> AbstractContextManager[None]:
    """Put the random state of the devices of a module back at the end: functions of users may draw from it."""
    return random_states_put_back(devices_of(module))


@torch.no_grad()
def plain_copy(module: nn.Module) -> nn.Module:
    """Return a layer of the ordinary type that has, as its parameters, what is computed for this one now.

    Parameters that are not computed are the same objects in both. Neither buffers, such as the vectors of
    ``spectral_norm``, nor the random state change.

    Args:
        module: a module of which :func:`computing` says something.

    Raises:
        ValueError: if it cannot be computed, or is not a real tensor.
    """
    try:
        computed = dict(computed_tensors(module))
    except (RuntimeError, TypeError) as error:  # of torch: no kernels for this dtype, device or layout
        raise ValueError(f"{computing(module)}, but what is computed cannot be: {error}") from error
    kind = type_of(module)
    plain = kind.__new__(kind)
    hooks = _hooks(module)
    own = {name: value for name, value in vars(module).items() if name not in computed}
    for name in ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
        kept = {key: hook for key, hook in own[name].items() if key not in hooks and not _of_torch(hook)}
        if len(kept) < len(own[name]):  # otherwise it is the very dictionary, to which handles of the user's refer
            own[name] = type(own[name])(kept)
    sources = {f"{name}{suffix}" for name in computed for suffix in ("_g", "_v", "_u", "_orig", "_mask")}
    sources = sources if hooks else set()
    plain.__dict__.update(own)
    plain._modules = {name: child for name, child in module._modules.items() if name != "parametrizations"}
    plain._buffers = {name: value for name, value in module._buffers.items() if name not in sources}
    rest = {name: value for name, value in module._parameters.items() if name not in sources}
    made: dict[str, nn.Parameter | None] = {}
    for name, value in computed.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            layout = f" of layout {value.layout}" if isinstance(value, Tensor) else ""
            raise ValueError(f"what is computed for {name!r} is a {type(value).__name__}{layout}")
        # A copy: a pruned weight may be the original itself, and what is computed may be expanded.
        own_memory = value.detach().clone(memory_format=torch.preserve_format)
        made[name] = nn.Parameter(own_memory, requires_grad=any(one.requires_grad for one in sources_of(module, name)))
    everything = made | rest
    first = [name for name in ("weight", "bias") if name in everything]
    plain._parameters = {
        name: everything[name] for name in (*first, *(name for name in everything if name not in first))
    }
    return plain


def _hooks(module: nn.Module) -> dict[int, Any]:
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _HOOKS)}


def _of_torch(hook: Any) -> bool:
    """Tell whether a state-dict hook is one of those that torch.nn.utils hangs on what it computes."""
    inside = getattr(hook, "hook", hook)
    where: str = getattr(inside, "__module__", "")
    return where.startswith("torch.nn.utils.")


def sources_of(module: nn.Module, name: str) -> list[nn.Parameter]:
    """Return the parameters that a tensor is computed from, by parametrizations, pruning or the older norms."""
    if is_parametrized(module) and name in module.parametrizations:  # type: ignore[operator]
        return list(module.parametrizations[name].parameters())  # type: ignore[union-attr, index]
    return [one for key, one in module._parameters.items() if one is not None and key.startswith(f"{name}_")]


def computed_tensors(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Compute each tensor, as in eval mode: there power iterations rest, and nothing is dropped.

    What hooks compute is kept in a plain attribute, too, but that is of the last forward pass: the parameters may have
    been loaded or stepped since.
    """
    with random_state_kept(module):
        parametrizations: Any = module.parametrizations if is_parametrized(module) else nn.ModuleDict()
        modes = [(one, one.training) for one in parametrizations.modules()]
        try:
            for one, _ in modes:
                one.training = False
            for name in parametrizations:
                yield name, getattr(module, name)
            for hook in _hooks(module).values():  # they may work on what is parametrized
                if isinstance(hook, WeightNorm):
                    yield hook.name, hook.compute_weight(module)
                elif isinstance(hook, SpectralNorm):
                    yield hook.name, hook.compute_weight(module, do_power_iteration=False)
                else:
                    yield hook._tensor_name, hook.apply_mask(module)
        finally:
            for one, mode in modes:
                one.training = mode


def untouched(module: nn.Module, name: str) -> object:
    """Read a tensor of a module, or None; where that runs code, put back what the code may change.

    What a hook computes before each forward pass is computed here as well: the attribute is of the last one.
    Some parametrizations move their buffers when they are read in training mode (``spectral_norm``), and one may draw
    random numbers. Inside ``parametrize.cached`` the first to read reads for all: the next forward pass will use what
    is computed here, so gradients stay enabled and nothing is put back.
    """
    if is_hooked(module, name):
        return dict(computed_tensors(module))[name]
    if not parametrize.is_parametrized(module, name) or parametrize._cache_enabled:
        return getattr(module, name, None)
    parametrization: Any = module.parametrizations[name]  # type: ignore[index]
    before = [(buffer, buffer.clone()) for buffer in parametrization.buffers()]
    with random_state_kept(parametrization):
        tensor: object = getattr(module, name)
    with torch.no_grad():
        for buffer, value in before:
            # An unchanged one is not written, or a graph that holds it would break.
            if not buffer.is_meta and not torch.equal(buffer, value):
                buffer.copy_(value)
    return tensor
