"""Random module trees: recipes that hypothesis draws and shrinks, from which the same model can be built again."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import nn

from tests.strategies import fill_, seeds
from tests.twists import TWISTS

if TYPE_CHECKING:
    from collections.abc import Callable

# Among them the names that the library itself gives to children and tensors, and those of wrappers.
KEYS = (
    *("a", "0", "down", "up", "weight", "merge", "core", "order", "_orig_mod", "module"),
    *(" ", "é ∂", "q_proj", "bias_k", "parametrizations_", "layer", "'", "\n"),
)


class Custom(nn.Module):
    """Children, parameters of its own and plain attributes."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 2))
        self.scale = nn.Parameter(torch.tensor(2.0))
        for number, child in enumerate(children):
            self.add_module(f"part{number}", child)
        self.register_buffer("nothing", None)
        self.register_buffer("steps", torch.tensor(3), persistent=False)
        self.settings = {"names": [1, "two"], "space": SimpleNamespace(value=functools.partial(print, 1))}


class Delegating(nn.Module):
    """Answers for what it does not have itself with what its child has, as wrappers of models do."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.inner = children[0] if children else nn.ReLU()
        self.rest = nn.ModuleList(children[1:])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Sealed(nn.Module):
    """Refuses new attributes once it is built; its properties cannot be read."""

    __slots__ = ("extra",)

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(children)
        self.extra = 1
        self.sealed = True

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("sealed"):
            raise AttributeError(name)
        super().__setattr__(name, value)

    @property
    def weight(self) -> torch.Tensor:
        raise RuntimeError("not now")


def _keyed(*children: nn.Module, start: int = 0) -> nn.ModuleDict:
    keys = [KEYS[(start + number) % len(KEYS)] for number in range(len(children))]
    made = nn.ModuleDict()
    for key, child in zip(keys, children, strict=True):
        if not hasattr(made, key):
            made[key] = child
    return made


CONTAINERS: dict[str, Callable[..., nn.Module]] = {
    "sequential": nn.Sequential,
    "list": lambda *children: nn.ModuleList(children),
    "custom": Custom,
    "delegating": Delegating,
    "sealed": Sealed,
} | {f"dict{start}": functools.partial(_keyed, start=start) for start in range(0, len(KEYS), 3)}


def _flags(number: int, *names: str) -> dict[str, bool]:
    return {name: bool(number >> place & 1) for place, name in enumerate(names)}


def _conv(kind: str, axes: int) -> Callable[[int, int, int], nn.Module]:
    def build(one: int, other: int, bits: int) -> nn.Module:
        groups = 1 + (bits >> 1 & 1)
        kernel = (1 + (bits >> 2 & 1) * 2, 1 + (bits >> 3 & 1), 2)[:axes]
        return getattr(nn, f"{kind}{axes}d")(one * groups, other * groups, kernel, groups=groups, bias=bool(bits & 1))

    return build


def _attention(one: int, _: int, bits: int) -> nn.Module:
    chosen = _flags(bits, "bias", "add_bias_kv", "add_zero_attn", "batch_first")
    sizes = {"kdim": one + 1} if bits >> 4 & 1 else {}
    return nn.MultiheadAttention(2 * one, 2, **chosen, **sizes, dropout=0.1 * (bits >> 5 & 1))


def _recurrent(kind: str) -> Callable[[int, int, int], nn.Module]:
    def build(one: int, other: int, bits: int) -> nn.Module:
        more = {"proj_size": 1} if kind == "LSTM" and bits >> 4 & 1 and other > 1 else {}
        layers = 1 + (bits >> 3 & 1)
        return getattr(nn, kind)(one, other, layers, **_flags(bits, "bias", "batch_first", "bidirectional"), **more)

    return build


def _cell(kind: str) -> Callable[[int, int, int], nn.Module]:
    return lambda one, other, bits: getattr(nn, kind)(one, other, bias=bool(bits & 1))


def _embedding(one: int, other: int, bits: int) -> nn.Module:
    padding = one - 1 if bits & 1 else None
    chosen = _flags(bits >> 1, "scale_grad_by_freq", "sparse")
    return nn.Embedding(one, other, padding, max_norm=1.0 if bits >> 3 & 1 else None, **chosen)


def _encoder(one: int, other: int, bits: int) -> nn.Module:
    return nn.TransformerEncoderLayer(2 * one, 2, other, **_flags(bits, "batch_first", "norm_first", "bias"))


LAYERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "linear": lambda one, other, bits: nn.Linear(one, other, bias=bool(bits & 1)),
    **{f"{kind}{axes}": _conv(kind, axes) for kind in ("Conv", "ConvTranspose") for axes in (1, 2, 3)},
    "embedding": _embedding,
    "attention": _attention,
    **{kind: _recurrent(kind) for kind in ("RNN", "LSTM", "GRU")},
    **{kind: _cell(kind) for kind in ("RNNCell", "LSTMCell", "GRUCell")},
    "encoder": _encoder,
    "relu": lambda *_: nn.ReLU(),
    "batch_norm": lambda one, _, bits: nn.BatchNorm2d(one, **_flags(bits, "affine", "track_running_stats")),
    "layer_norm": lambda one, other, _: nn.LayerNorm((one, other)),
    "bilinear": lambda one, other, _: nn.Bilinear(one, other, 2),
    "bag": lambda one, other, _: nn.EmbeddingBag(one, other),
}


@dataclass(frozen=True)
class Layer:
    """A layer: its kind, two sizes, and bits that choose its options."""

    kind: str
    one: int
    other: int
    bits: int

    def build(self, seed: int) -> nn.Module:
        return fill_(LAYERS[self.kind](self.one, self.other, self.bits), seed)


@dataclass(frozen=True)
class Container:
    """A container and what it contains."""

    kind: str
    children: tuple[Any, ...]

    def build(self, seed: int) -> nn.Module:
        return CONTAINERS[self.kind](*[child.build(seed + 100 * n) for n, child in enumerate(self.children)])


def _place(model: nn.Module, number: int) -> nn.Module:
    """Choose a module: mostly one with parameters of its own."""
    modules = [module for name, module in model.named_modules() if "parametrizations" not in name.split(".")]
    holding = [one for one in modules if any(value is not None for value in one._parameters.values())]
    among = holding if number % 4 and holding else modules
    return among[number // 4 % len(among)]


@dataclass(frozen=True)
class Recipe:
    """A tree, and what is done to it after it is built: a name, two places in it, and a number."""

    tree: Container
    twists: tuple[tuple[str, int, int, int], ...]
    seed: int

    def build(self) -> nn.Module:
        """Build the model: every time the same."""
        with torch.random.fork_rng(devices=[]):  # spectral_norm draws vectors
            torch.manual_seed(self.seed)
            model = self.tree.build(self.seed)
            for name, one, other, number in self.twists:
                with contextlib.suppress(Exception):  # not all of them are possible everywhere
                    TWISTS[name](model, _place(model, one), _place(model, other), number)
        return model

    def has(self, *names: str) -> bool:
        """Tell whether one of some twists is done to it."""
        return any(name in names for name, *_ in self.twists)


_layers = st.builds(
    Layer, st.sampled_from(sorted(LAYERS)), st.integers(2, 8), st.integers(1, 9), st.integers(0, 63)
) | st.builds(Layer, st.just("linear"), st.sampled_from([4, 9]), st.sampled_from([4, 9]), st.integers(0, 1))

_trees = st.recursive(
    st.builds(Container, st.sampled_from(sorted(CONTAINERS)), st.lists(_layers, min_size=1, max_size=3).map(tuple)),
    lambda inner: st.builds(
        Container,
        st.sampled_from(sorted(CONTAINERS)),
        st.lists(inner | _layers, min_size=1, max_size=3).map(tuple),
    ),
    max_leaves=4,
)

_places = st.integers(1, 60)


def recipes(most: int = 5) -> st.SearchStrategy[Recipe]:
    """Draw recipes with a number of twists at most."""
    twists = st.tuples(st.sampled_from(sorted(TWISTS)), _places, _places, st.integers(0, 7))
    return st.builds(Recipe, _trees, st.lists(twists, max_size=most).map(tuple), seeds)
