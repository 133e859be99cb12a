"""Loading the state dict of a compressed model into a freshly built dense one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._backup import Backup
from ._checks import check_initialised, check_module, describe, is_quantised, quoted, with_article
from ._expansion import expanded_
from ._layers import KINDS, LayerKind, find_layers, weight_of
from ._lowrank_layer import LowRankLayer
from ._matricise import FORMS, Form, Matricisation
from ._swap import swap_, take_over_
from ._tensor_source import Checkpoint
from ._tucker_layout import Layout, TuckerLayout

if TYPE_CHECKING:
    from ._expansion import Expansion
    from ._pivoted_modules import Ordered

__all__ = ["load_compressed_"]

# What only a low-rank layer has. "order" is there in the pivoted form, in one of three places.
_PARTS = ("down.weight", "core.weight", "up.weight", "merge.order", "split.order", "up.order")

# Where torch.ao keeps quantised weights, and what torch.optim.swa_utils.AveragedModel keeps beside the model's keys.
_PACKED, _AVERAGED = "._packed_params", "n_averaged"


@torch.no_grad()
def load_compressed_(model: nn.Module, state_dict: Mapping[str, Any] | str | os.PathLike[str]) -> nn.Module:
    """Rebuild the low-rank layers that a state dict was saved from, in place, and load it strictly.

    The structure is read off the shapes of the tensors, and the pivots off the integers that are saved beside them;
    nothing else has to be saved. Tensors are cast to the dtype and device of the model, as ``load_state_dict`` does. On
    any error the model is as it was before; for that, it needs memory for a second copy of what stays dense while it
    loads.

    Args:
        model: a model built like the one that was compressed, dense (or already of the right structure).
        state_dict: ``compressed.state_dict()``, or the path of a file that holds it: what ``torch.save`` wrote, a
            ``.safetensors`` file, an index of several, or a folder with one of these. Nothing in it is executed. A
            file may hold a tied tensor under one of its names only.

    Returns:
        The model.

    Raises:
        TypeError: if an argument is of a wrong type, or the state dict holds other things than tensors.
        ValueError: if keys are missing, unexpected, contradict each other or have shapes that do not fit; they are
            named; if a file is broken or holds more than tensors.
        OSError: if a file cannot be read.
        ImportError: if it is a ``.safetensors`` file and that package is missing.

    Example:
        >>> import torch, torchsmooth
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> small = build()
        >>> report = torchsmooth.svd_compress_(small, ratio=0.7)
        >>> again = torchsmooth.load_compressed_(build(), small.state_dict())
        >>> x = torch.ones(1, 64)
        >>> torch.equal(small(x), again(x))
        True

    Source: the behaviour of ``torch.nn.Module.load_state_dict(strict=True)``.
    """
    check_module(model)
    check_initialised(model)
    if isinstance(state_dict, (str, os.PathLike)):
        state_dict = Checkpoint(state_dict).state_for(model)
    _check_state_dict(state_dict)
    on_meta = [name for name, one in (*model.named_parameters(), *model.named_buffers()) if one.is_meta]
    if on_meta:
        raise ValueError(
            f"the model has tensors on the meta device ({quoted(on_meta)}), which cannot hold values: "
            "call model.to_empty(device=...) first."
        )
    with expanded_(model, partial(_not_needed, state_dict)) as expansion:
        replacements = _replacements(model, state_dict, expansion)
        expansion.keep_all_()
        expansion.undo.add(Backup(model, replacements).restore_)
        expansion.undo.add(swap_, model, {new: old for old, new in replacements.items()})
        swap_(model, replacements)
        try:
            model.load_state_dict(state_dict, strict=True)
        except RuntimeError as error:
            swap_(model, {new: old for old, new in replacements.items()})
            hint = _hint(model, state_dict)
            raise ValueError(f"the state dict does not fit this model{hint}: {error}") from error
        expansion.finish_()
    return model


_AS_IT_IS = "the state dict has it as it is"


def _not_needed(state_dict: Mapping[str, Any], module: nn.Module, name: str) -> str:
    """Say that a composite layer needs not be written in plain ones to be loaded; empty if it does."""
    keys = {f"{name}.{key}" for key in module.state_dict()}
    expanded = not isinstance(module, LowRankLayer) and keys - state_dict.keys()
    return "" if expanded and any(key.startswith(f"{name}.") for key in state_dict.keys() - keys) else _AS_IT_IS


def _replacements(model: nn.Module, state_dict: Mapping[str, Any], expansion: Expansion) -> dict[nn.Module, nn.Module]:
    """Make a low-rank layer for every dense one of which a state dict holds factors."""
    if isinstance(model, LowRankLayer):
        return {}
    if type(model) in KINDS:
        if {"down.weight", "up.weight"} & state_dict.keys():
            kind_name = "TuckerConv2d" if "core.weight" in state_dict else f"LowRank{type(model).__name__}"
            raise ValueError(
                f"the model is itself {with_article(type(model).__name__)}, with no parent in which it could be "
                f"replaced: build the low-rank layer with {kind_name}.like and call its load_state_dict."
            )
        return {}
    replacements: dict[nn.Module, nn.Module] = {}
    for found in find_layers(model, expansion):
        kind = KINDS.get(type(found.module))
        if kind is not None and {f"{found.name}.{part}" for part in _PARTS} & state_dict.keys():
            if found.reason:
                raise ValueError(
                    f"layer {found.name!r} is low-rank in the state dict, but has to stay dense in this model: "
                    f"{found.reason}. Build the model as the one that was compressed."
                )
            with torch.inference_mode(mode=False):
                low_rank = _structure(found.name, found.module, kind, state_dict)
            take_over_(low_rank, found.module)
            replacements[found.module] = low_rank
    return replacements


def _check_state_dict(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        way = ": pass its state_dict()" if isinstance(state_dict, nn.Module) else ""
        raise TypeError(f"state_dict must be a mapping from names to tensors, got {describe(state_dict)}{way}.")
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise TypeError(f"state_dict must have strings for keys, got {describe(key)}.")
        if isinstance(value, Tensor) or key.endswith("_extra_state"):
            continue
        if isinstance(value, Mapping) or key.endswith((".weight", ".bias")):  # the rest is for torch to judge
            nested = " (a whole checkpoint? pass that entry of it)" if isinstance(value, Mapping) else ""
            raise TypeError(
                f"state_dict must hold tensors, but {key!r} is {with_article(type(value).__name__)}{nested}."
            )


def _structure(name: str, module: nn.Module, kind: LayerKind, state_dict: Mapping[str, Any]) -> LowRankLayer:
    """Make the low-rank layer whose factors a state dict holds for one dense layer."""
    keys = {part: f"{name}.{part}.weight" for part in ("down", "up")}
    missing = [key for key in keys.values() if key not in state_dict]
    if missing:
        there = next(key for key in (f"{name}.{part}" for part in _PARTS) if key in state_dict)
        raise ValueError(
            f"the state dict holds {there!r} but not {missing[0]!r}{_quantised(state_dict)}: half of layer {name!r} is "
            "missing."
        )
    if f"{name}.weight" in state_dict:
        raise ValueError(
            f"the state dict holds layer {name!r} twice, dense ({name + '.weight'!r}) and low-rank "
            f"({keys['down']!r}): only one of the two can be meant."
        )
    core = f"{name}.core.weight"
    if core in state_dict:
        keys["core"] = core
    shapes = {part: tuple(state_dict[key].shape) for part, key in keys.items()}
    up, down = shapes["up"], shapes["down"]
    for form, (scheme, layout) in itertools.product(FORMS, kind.layouts(module).items()):
        rank = _rank(layout, form, shapes)
        if rank is not None:
            layer = kind.like(module, rank, scheme, form)
            for child, ordered in layer.orders().items():
                _check_order(name, f"{name}.{child}.order", ordered, state_dict)
            return layer
    points = {shape[2:] for shape in shapes.values()} == {(1, 1)}
    if points and "core" not in shapes and weight_of(module).shape[2:] != (1, 1):
        raise ValueError(
            f"the state dict holds two 1×1 factors for layer {name!r}, whose kernel is larger, but not {core!r}: a "
            "third of the layer is missing."
        )
    between = f", {core!r} of shape {shapes['core']}" if "core" in shapes else ""
    raise ValueError(
        f"{keys['down']!r} of shape {down}{between} and {keys['up']!r} of shape {up} are no factors of the weight of "
        f"layer {name!r}, which has shape {tuple(weight_of(module).shape)} in this model: was it built with other "
        "sizes?"
    )


def _rank(layout: Layout, form: Form, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Return the rank at which a layout has factors of these shapes; None if at none."""
    up, down, core = shapes["up"], shapes["down"], shapes.get("core")
    if isinstance(layout, Matricisation):
        rank = layout.rank_of(up)
        fits = core is None and 1 <= rank <= layout.largest_rank(form)
        return rank if fits and layout.layer_shapes(rank, form) == (up, down) else None
    if core is None or len(core) != 4 or not isinstance(layout, TuckerLayout):  # noqa: PLR2004 - a convolution
        return None
    pair, most = (core[1], up[1] if len(up) > 1 else 0), layout.largest_rank(form)
    fits = 1 <= pair[0] <= most[0] and 1 <= pair[1] <= most[1]
    return pair if fits and layout.layer_shapes(pair, form) == (up, core, down) else None


def _check_order(name: str, key: str, ordered: Ordered, state_dict: Mapping[str, Any]) -> None:
    if key not in state_dict:
        raise ValueError(
            f"the state dict holds layer {name!r} in the pivoted form, with {name + '.up.weight'!r} of shape "
            f"{tuple(state_dict[name + '.up.weight'].shape)}, but not {key!r}: part of the layer is missing."
        )
    problem = ordered.why_not(state_dict[key])
    if problem:
        raise ValueError(f"{key!r} is no order of pivots for layer {name!r}: {problem}.")


def _hint(model: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """Recognise the usual mistakes: quantised tensors, and a prefix that a wrapper has put before every key."""
    quantised = _quantised(state_dict)
    if quantised:
        return quantised
    for prefix in ("module.", "_orig_mod."):
        for wrapped, whose, way in (
            (state_dict, "its keys", f"strip it, or save model.{prefix}state_dict()"),
            (model.state_dict(), "the model's keys", f"load into model.{prefix.rstrip('.')}"),
        ):
            keys = wrapped.keys() - {_AVERAGED}
            if keys and all(key.startswith(prefix) for key in keys):
                return f" ({whose} start with {prefix!r}, the prefix of a wrapper: {way})"
    return ""


def _quantised(state_dict: Mapping[str, Any]) -> str:
    """Recognise the tensors of torchao and the packed weights of torch.ao; empty without any."""
    for key, value in state_dict.items():
        if is_quantised(value) or _PACKED in key:
            what = f"a quantised {type(value).__name__}" if is_quantised(value) else "a packed, quantised weight"
            return f" ({key!r} is {what}: save the state dict before quantising, and quantise after loading)"
    return ""
