"""Which tensors of a checkpoint are the weights of layers: told by their names and shapes, or by the model."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ._checks import FLOAT_DTYPES, is_wanted, quoted, with_article
from ._computed import computing
from ._layers import count_parameters, find_layers, weights_of
from ._lowrank_layer import LowRankLayer
from ._sharing import names_of_modules
from .layer_types import layer_type

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ._planner import Filter
    from ._tensor_entry import Entry
    from ._tensor_source import Checkpoint

_PLAIN: dict[int, Any] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}

# The last part of a name, such as "wte", "embed_tokens", "word_embeddings", "tok_emb", "relative_attention_bias".
_LOOKUP = re.compile(r"(^|_)(emb|embed|embeds|embedding|embeddings)(_|$)|^(wte|wpe|shared|relative_attention_bias)$")

# What nn.MultiheadAttention has beside its out_proj.
_ATTENTION = ("in_proj_weight", "q_proj_weight")

# What a low-rank layer holds.
_FACTORS = ("down", "core", "up")

# What BatchNorm and rotary embeddings keep beside their parameters.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "inv_freq")


@dataclass(frozen=True)
class CheckpointLayer:
    """A weight in a checkpoint, or another tensor with at least two axes.

    Attributes:
        name: of the layer; of the tensor, if it is none.
        key: of the weight.
        type: class name of the layer.
        shape: of the weight.
        parameters: entries of all weights of the layer.
        reason: why it stays dense; empty otherwise.
        dense: a layer like it, on any device, whatever its values; None if it stays dense.
        bias_key: of its bias, where there is one.
        aliases: other names of the same layer in the checkpoint.
        note: what else there is to say of it.
    """

    name: str
    key: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    reason: str = ""
    dense: nn.Module | None = None
    bias_key: str | None = None
    aliases: tuple[str, ...] = ()
    note: str = ""

    def holding(self, weight: Tensor) -> Any:
        """Return a layer like it with a weight, and without a bias, which factors do not depend on."""
        layer = copy.copy(self.dense)
        own = dict.fromkeys(vars(layer)["_parameters"]) | {"weight": nn.Parameter(weight, requires_grad=False)}
        layer.__dict__["_parameters"] = own
        return layer


@dataclass(frozen=True)
class FoundLayers:
    """The layers of a checkpoint, and how many parameters it has in all, shared ones counted once."""

    layers: list[CheckpointLayer]
    parameters: int

    def filtered(self, filter_fn: Callable[[tuple[int, ...], str], bool] | None, by: Filter) -> FoundLayers:
        """Leave layers out for which a function of shape and name says False."""
        if filter_fn is None:
            return self
        kept = [
            one
            if one.dense is None or is_wanted(filter_fn(one.shape, one.name), one.name)
            else replace(one, reason=by.reason, dense=None)
            for one in self.layers
        ]
        return FoundLayers(kept, self.parameters)


def layers_by_name(checkpoint: Checkpoint) -> FoundLayers:
    """Tell layers by names and shapes: ``NAME.weight`` with two axes is a Linear, with three to five a convolution."""
    entries, names = checkpoint.entries, _Names(checkpoint)
    parameters = {key: one for key, one in entries.items() if one.floating and not key.endswith(_BUFFERS)}
    layers = []
    for key in checkpoint.ordered_keys():
        entry = entries[key]
        if len(entry.shape) < 2 or not (key in parameters or key.endswith(".weight")):  # noqa: PLR2004 - a matrix
            continue
        name, count = key.removesuffix(".weight"), math.prod(entry.shape)
        cls = _PLAIN.get(len(entry.shape)) if key.endswith(".weight") else None
        kind = cls.__name__ if cls else "tensor"
        reason = names.factor(key) or names.reason(key) or names.tie(key)
        layer = CheckpointLayer(name, key, kind, entry.shape, count, reason)
        if not layer.reason and cls is not None:
            outputs, inputs, *kernel = entry.shape
            sizes = (inputs, outputs, tuple(kernel)) if kernel else (inputs, outputs)
            dense = cls(*sizes, bias=False, device="meta", dtype=entry.dtype)
            bias_key = f"{name}.bias" if f"{name}.bias" in entries else None
            layer = replace(layer, dense=dense, bias_key=bias_key, note=names.doubt(key))
        layers.append(layer)
    sizes_once = {one.span or key: math.prod(one.shape) for key, one in parameters.items()}
    return FoundLayers(layers, sum(sizes_once.values()))


class _Names:
    """What can be told of the layers of a checkpoint by the names in it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._entries = checkpoint, checkpoint.entries
        self._under: dict[str, list[str]] = {}
        self._storages: dict[int, list[str]] = {}
        self._lookups: list[str] = []
        # Where a file says that it was compressed, or a pivoted layer shows it, all pairs of these names are factors.
        pivoted = any(key.endswith((".merge.order", ".split.order", ".up.order")) for key in self._entries)
        self._compressed = pivoted or checkpoint.compressed
        self._transposed = ""  # a layer that is seen to be stored as (in, out)
        for key, entry in self._entries.items():
            for dot in (place for place, letter in enumerate(key) if letter == "."):
                self._under.setdefault(key[:dot], []).append(key)
            if entry.span is not None:
                self._storages.setdefault(entry.span[0], []).append(key)
            if _is_lookup(key, entry):
                self._lookups.append(key)
            bias = self._bias_of(key)
            if len(entry.shape) == 2 and bias is not None and entry.shape[0] != entry.shape[1] == bias.shape[0]:  # noqa: PLR2004
                self._transposed = self._transposed or key.removesuffix(".weight")

    def factor(self, key: str) -> str:
        """Say of which low-rank layer a weight is a factor; empty if it is none, as far as can be told."""
        whole = self._of_pair(key) if self._compressed else ""
        return f"a factor of {whole!r}, which is low-rank already (compress the dense checkpoint)" if whole else ""

    def doubt(self, key: str) -> str:
        """Say of which layer a weight may be a factor, in a file that does not tell; empty if of none."""
        whole = self._of_pair(key)
        down, up = (self._entries[f"{whole}.{part}.weight"].shape if whole else () for part in ("down", "up"))
        if not whole or len(down) != len(up) or not down[0] == up[1] < min(up[0], down[1]):
            return ""
        return f"a factor of {whole!r}, if this file was compressed before: nothing loads this then, use the dense file"

    def _of_pair(self, key: str) -> str:
        """Return the name that a weight shares with those of all factors of one layer; empty if they are not there."""
        whole, _, part = key.removesuffix(".weight").rpartition(".")
        beside = {f"{whole}.{one}.weight" for one in ("down", "up")}
        is_pair = part in _FACTORS and beside <= self._entries.keys() and f"{whole}.weight" not in self._entries
        return whole if is_pair else ""

    def reason(self, key: str) -> str:
        """Say why a weight has to stay dense; empty for a layer by all that is known."""
        entry, name = self._entries[key], key.removesuffix(".weight")
        if name == key:
            return "its key does not end in .weight"
        if entry.problem or entry.dtype not in FLOAT_DTYPES:
            return entry.problem or f"weight is of {entry.dtype}"
        if 0 in entry.shape:
            return "weight is empty"
        if len(entry.shape) not in _PLAIN:
            return f"weight has {len(entry.shape)} axes"
        if len(entry.shape) > 2 and entry.shape[1] == 1:  # noqa: PLR2004 - a convolution
            return "depthwise, as far as its shape tells (give the model to be sure)"
        if _is_lookup(key, entry):
            return "an embedding by its name (give the model to be sure)"
        if "norm" in _last_word(key):
            return "a norm by its name (give the model to be sure)"
        extras = [one for one in self._under[name] if one not in {key, f"{name}.bias"}]
        if extras:
            return f"there is more than a weight and a bias: {quoted(extras)}"
        return self._reason_by_others(key)

    def _reason_by_others(self, key: str) -> str:
        """Say why a weight has to stay dense by what is beside it."""
        entry, bias, name = self._entries[key], self._bias_of(key), key.removesuffix(".weight")
        parent = name.rpartition(".")[0]
        beside = [f"{parent}.{one}" if parent else one for one in _ATTENTION]
        if name.endswith("out_proj") and any(one in self._entries for one in beside):
            return "part of an nn.MultiheadAttention, which only svd_compress_ compresses"
        if bias is not None and bias.shape != entry.shape[:1]:
            return f"bias is of shape {bias.shape}"
        if self._transposed and bias is not None and entry.shape == bias.shape * 2:
            return f"perhaps stored as (in, out), as {self._transposed!r} is (give the model to be sure)"
        return ""

    def _bias_of(self, key: str) -> Entry | None:
        bias = self._entries.get(f"{key.removesuffix('.weight')}.bias") if key.endswith(".weight") else None
        return bias if bias is None or len(bias.shape) else None

    def tie(self, key: str) -> str:
        """Say with which other tensor a weight is shared, or was before it was saved."""
        entry = self._entries[key]
        if entry.span is not None:
            _, start, end = entry.span
            for other in self._storages[entry.span[0]]:
                span = self._entries[other].span
                if other != key and span is not None and start < span[2] and span[1] < end:
                    return f"weight is shared with {other}"
        for other in self._lookups:
            one = self._entries[other]
            alike = (one.shape, one.dtype) == (entry.shape, entry.dtype)
            if alike and self._checkpoint.equal(key, other):
                return f"weight equals that of {other}, to which it seems to be tied"
        return ""


def _is_lookup(key: str, entry: Entry) -> bool:
    matrix = key.endswith(".weight") and len(entry.shape) == 2  # noqa: PLR2004
    return matrix and _LOOKUP.search(_last_word(key)) is not None


def _last_word(key: str) -> str:
    words = [part for part in key.removesuffix(".weight").split(".") if not part.isdigit()]
    return words[-1].lower() if words else ""


def layers_of_model(checkpoint: Checkpoint, model: nn.Module) -> FoundLayers:
    """Tell layers by the model that was saved; it may be on the meta device.

    Raises:
        ValueError: if the checkpoint has other tensors than the model.
    """
    entries = checkpoint.entries
    found = find_layers(model)
    prefix = _prefix(entries, model)
    _check_fit(entries, model, prefix, checkpoint)
    names = names_of_modules(model)
    layers = []
    for one in found:
        # Of the names of a layer that is in the model more than once, a file may hold but one.
        held = [f"{prefix}{name}" for name in names[one.module] if f"{prefix}{name}.weight" in entries]
        name, *others = held or [f"{prefix}{one.name}"]
        key = f"{name}.weight"
        weights = weights_of(one.module)
        shape = tuple(weights[0].shape) if weights else ()
        reason = _reason_of_module(one.module) or one.reason
        if not reason:
            reason = _reason_of_entry(entries[key])
        layer = CheckpointLayer(name, key, one.type, shape, one.parameters, reason)
        if not reason:
            has_bias = one.module._parameters.get("bias") is not None
            bias_key = f"{name}.bias" if has_bias else None
            layer = replace(layer, dense=one.module, bias_key=bias_key, aliases=tuple(others))
        layers.append(layer)
    return FoundLayers(layers, count_parameters(model))


def _reason_of_module(module: nn.Module) -> str:
    """Say whether a layer has to be written in plain ones first."""
    composite = layer_type(module) is not None or computing(module) or isinstance(module, LowRankLayer)
    return f"only svd_compress_ compresses a {type(module).__name__}" if composite else ""


def _reason_of_entry(entry: Entry) -> str:
    if entry.problem or entry.dtype not in FLOAT_DTYPES:
        return entry.problem or f"weight is of {entry.dtype} in the checkpoint"
    return ""


def _prefix(entries: Iterable[str], model: nn.Module) -> str:
    """Return what a wrapper has put before every key of the checkpoint."""
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in entries) and not all(
            key.startswith(prefix) for key in model.state_dict()
        ):
            return prefix
    return ""


def _check_fit(entries: Mapping[str, Entry], model: nn.Module, prefix: str, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of another model. Of tensors that a model has twice, a file need hold but one."""
    expected = {
        f"{prefix}{key}": value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)
    }
    there: set[Any] = {id(value) for key, value in expected.items() if key in entries}
    missing = [key for key, value in expected.items() if key not in entries and id(value) not in there]
    unexpected = [key for key in entries if key not in expected]
    name = str(checkpoint.path)
    low_rank = [key for key in missing if f"{key.removesuffix('weight')}down.weight" in entries]
    if low_rank:
        raise ValueError(
            f"{name!r} holds layer {low_rank[0].removesuffix('.weight')!r} low-rank already, so that it cannot be "
            "compressed by this model: compress the dense checkpoint, or load it with load_compressed_ and call "
            "svd_compress_."
        )
    if missing or unexpected:
        what, keys = ("lacks", missing) if missing else ("has, unlike the model,", unexpected)
        raise ValueError(
            f"{name!r} {what} {quoted(keys)}: was it saved from {with_article(type(model).__name__)} built like this "
            "one?"
        )
    for key, value in expected.items():
        if key in entries and entries[key].shape != tuple(value.shape):
            raise ValueError(
                f"{name!r} holds {key!r} of shape {entries[key].shape}, but this {type(model).__name__} has "
                f"{tuple(value.shape)}: was it built with other sizes?"
            )
