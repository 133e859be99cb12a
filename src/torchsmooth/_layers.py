"""Which layers of a model can be compressed, and how each kind is matricised and rebuilt.

Kinds are looked up by *exact* type. A subclass may use its weight in ways that a low-rank layer would not know
of (``NonDynamicallyQuantizableLinear`` inside ``nn.MultiheadAttention``, a parametrized layer, a sharded one),
so it stays dense, and :func:`find_layers` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

from ._checks import check_initialised, with_article
from ._computed import is_parametrized
from ._lowrank_layer import LowRankLayer
from ._matricise import LAYER_SCHEMES, SCHEMES, Form, LayerScheme, distinct_schemes, matricise
from ._sharing import Sharing
from ._source_layer import way_to_factor, why_not_plain
from ._table import format_rank
from ._tucker_layout import Layout, TuckerLayout
from ._whole import check_whole
from .layer_types import layer_type
from .lowrank import LowRankLinear
from .lowrank_conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .lowrank_embedding import LowRankEmbedding
from .lowrank_transposed import LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d
from .tucker import TuckerConv2d

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ._prices import Work


# What a user may ask for. A weight without two kernel axes has no spatial scheme, one with a 1×1 kernel or a single
# channel in a group no "tucker"; it takes "channel" then.
_OPTIONS: dict[str, tuple[LayerScheme, ...]] = {
    "auto": LAYER_SCHEMES,
    "channel": ("channel",),
    "input": ("input",),
    "spatial": ("spatial", "spatial_transposed"),
    "tucker": ("tucker",),
}
SCHEME_OPTIONS = tuple(_OPTIONS)


class Maker(Protocol):
    """Makes a low-rank layer out of a dense one."""

    def __call__(self, layer: Any, rank: Any, scheme: LayerScheme, form: Form = "factored", /) -> LowRankLayer:
        """Make a layer of a rank, in a scheme and a form."""


def _like_linear(layer: Any, rank: Any, _: LayerScheme, form: Form = "factored") -> LowRankLinear:
    return LowRankLinear.like(layer, rank, form)


def _like_embedding(layer: Any, rank: Any, _: LayerScheme, form: Form = "factored") -> LowRankEmbedding:
    return LowRankEmbedding.like(layer, rank, form)


def _like_conv2d(layer: Any, rank: Any, scheme: LayerScheme, form: Form = "factored") -> LowRankLayer:
    if scheme == "tucker":
        return TuckerConv2d.like(layer, rank, form)
    return LowRankConv2d.like(layer, rank, scheme, form)


@dataclass(frozen=True)
class LayerKind:
    """How one type of layer becomes low-rank; the way back is ``LowRankLayer.to_dense``.

    Attributes:
        shape: the shape that a layer's weight has by its attributes.
        groups: number of groups of a layer.
        like: ``(layer, rank, scheme, form)`` to a low-rank layer whose factors are still to be filled in.
        transposed: whether the weight has its inputs first, ``(in, out / groups, *kernel)``.
        work: at which positions the layer uses each entry of its weight.
        uncalibrated: why the layer is always compressed without data; empty if it can be fitted to it.
    """

    shape: Callable[[Any], tuple[int, ...]]
    groups: Callable[[Any], int]
    like: Maker
    transposed: bool = False
    work: Work = "outputs"
    uncalibrated: str = ""

    def layouts(self, layer: nn.Module, options: Sequence[str] = ("auto",)) -> dict[LayerScheme, Layout]:
        """Return the different shapes of factors that some options allow for a layer's weight, by scheme."""
        shape = tuple(weight_of(layer).shape)
        first_names = distinct_schemes(shape[2:], transposed=self.transposed)
        allowed = {scheme for option in options for scheme in _OPTIONS[option]}
        names = dict.fromkeys(first_names[scheme] for scheme in SCHEMES if scheme in allowed & first_names.keys())
        of_scheme = partial(matricise, shape, groups=self.groups(layer), transposed=self.transposed)
        layouts: dict[LayerScheme, Layout] = {scheme: of_scheme(scheme) for scheme in names}
        possible = "tucker" in allowed and not self.transposed
        tucker = TuckerLayout.of(shape, self.groups(layer)) if possible else None
        if tucker is not None:
            layouts["tucker"] = tucker
        return layouts or {"channel": of_scheme("channel")}


def _like_of(cls: Any) -> Maker:
    def like(layer: Any, rank: Any, scheme: Any, form: Form = "factored") -> LowRankLayer:
        made: LowRankLayer = cls.like(layer, rank, scheme, form)
        return made

    return like


def _groups_of(layer: Any) -> int:
    return int(layer.groups)


def _transposed_kind(cls: Any) -> LayerKind:
    return LayerKind(
        shape=cls.shape_of, groups=_groups_of, like=_like_of(cls), transposed=True, work="inputs",
        uncalibrated="not calibrated: it is a transposed convolution",
    )  # fmt: skip


KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind(shape=LowRankLinear.shape_of, groups=lambda _: 1, like=_like_linear),
    nn.Conv1d: LayerKind(shape=LowRankConv1d.shape_of, groups=_groups_of, like=_like_of(LowRankConv1d)),
    nn.Conv2d: LayerKind(shape=LowRankConv2d.shape_of, groups=_groups_of, like=_like_conv2d),
    nn.Conv3d: LayerKind(shape=LowRankConv3d.shape_of, groups=_groups_of, like=_like_of(LowRankConv3d)),
    nn.ConvTranspose1d: _transposed_kind(LowRankConvTranspose1d),
    nn.ConvTranspose2d: _transposed_kind(LowRankConvTranspose2d),
    nn.ConvTranspose3d: _transposed_kind(LowRankConvTranspose3d),
    nn.Embedding: LayerKind(
        shape=LowRankEmbedding.shape_of,
        groups=lambda _: 1,
        like=_like_embedding,
        transposed=True,
        work="lookups",
        uncalibrated="not calibrated: it looks rows up",
    ),
}


class Origin(NamedTuple):
    """What a plain layer stands for while a model is planned or compressed.

    Attributes:
        type: class name of the layer that is in the model otherwise.
        parameters: entries that it stores of its weight.
    """

    type: str
    parameters: int


class Known(Protocol):
    """What is known of modules of a model beside what they are: an :class:`Expansion`."""

    @property
    def origins(self) -> Mapping[nn.Module, Origin]:
        """For plain layers that stand for another, what that is."""

    @property
    def reasons(self) -> Mapping[nn.Module, str]:
        """For others, why they have to stay as they are."""


class _NothingKnown:
    origins: Mapping[nn.Module, Origin] = MappingProxyType({})
    reasons: Mapping[nn.Module, str] = MappingProxyType({})


@dataclass(frozen=True)
class FoundLayer:
    """A module that holds weights with at least two axes.

    Attributes:
        name: qualified name, the first one if the module has several.
        module: the module.
        type: class name of the layer, as the user knows it.
        parameters: entries of its weight, as they are stored.
        reason: why it cannot be compressed; empty if it can.
    """

    name: str
    module: nn.Module
    type: str
    parameters: int
    reason: str = ""


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the weight parameter of a layer of a known kind."""
    weight = layer._parameters["weight"]
    if weight is None:  # find_layers lets no such layer through
        raise TypeError(f"{type(layer).__name__} has no weight.")
    return weight


def rows_of(layer: nn.Module) -> int:
    """Return of how many rows of its weight a layer looks one up at a time; 1 if it multiplies with all of it."""
    return len(weight_of(layer)) if KINDS[type(layer)].work == "lookups" else 1


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def weights_of(module: nn.Module) -> list[Tensor]:
    """List the parameters with at least two axes that make up one layer, the largest first."""
    # Attention may have biases of the keys and values, of three axes.
    own = [one for name, one in module._parameters.items() if one is not None and not name.startswith("bias")]
    if is_parametrized(module):
        own += module.parametrizations.parameters()  # type: ignore[union-attr]
    if isinstance(module, LowRankLayer):
        own += module.parameters()
    return sorted((one for one in own if one.dim() > 1), key=lambda one: -one.numel())


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of what a user takes for the weight of a layer: of the largest, or that factors stand for."""
    if isinstance(module, LowRankLayer):
        return tuple(module.shape_of(module))
    weights = weights_of(module)
    return tuple(weights[0].shape) if weights else ()


def find_layers(model: nn.Module, known: Known | None = None) -> list[FoundLayer]:
    """List every module that holds a weight, with the reason where it has to stay dense.

    Args:
        model: the model, with composite layers expanded or not.
        known: what is known of its modules.

    Raises:
        ValueError: if a parameter is not initialised, the model is sharded or wrapped, or is itself one single layer.
    """
    known = known or _NothingKnown()
    check_initialised(model)
    check_whole(model)
    if type(model) in KINDS or isinstance(model, LowRankLayer) or layer_type(model) is not None:
        name = type(model).__name__
        way = "to_dense() of the layer" if isinstance(model, LowRankLayer) else ""
        way = f"{way_to_factor(type(model))}(layer, rank)" if type(model) in KINDS else way
        raise ValueError(
            f"the model is itself {with_article(name)}, with no parent in which it could be replaced: "
            f"{f'use {way}, or ' if way else ''}wrap it in a torch.nn.Sequential."
        )
    sharing = Sharing(model)
    return [_found(name, module, known, _reason(name, module, sharing, known)) for name, module in _walk(model)]


def _found(name: str, module: nn.Module, known: Known, reason: str) -> FoundLayer:
    stored = sum(one.numel() for one in weights_of(module))
    origin = known.origins.get(module, Origin(type(module).__name__, stored))
    return FoundLayer(name, module, origin.type, origin.parameters, reason)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with weights, not descending into what is one layer to the user."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if is_parametrized(module):
            inside.update(module.parametrizations.modules())
        if isinstance(module, LowRankLayer):
            inside.update(module.modules())
        if type(module) in KINDS or weights_of(module) or _quantised(module):
            yield name, module


def _quantised(module: nn.Module) -> bool:
    """Tell whether a module of torch.ao keeps a quantised weight, which is no parameter."""
    # In this order: a property of another class may be anything.
    return type(module).__module__.startswith("torch.ao.") and callable(getattr(module, "weight", None))


def _reason(name: str, module: nn.Module, sharing: Sharing, known: Known) -> str:
    """Say why a layer has to stay dense, or return an empty string."""
    if module in known.reasons:
        return known.reasons[module]
    if isinstance(module, LowRankLayer):
        return f"already low-rank (rank {format_rank(module.rank)})"
    if is_parametrized(module):
        return "parametrized (call remove_parametrizations first)"
    if _quantised(module):
        return f"{type(module).__name__} is quantised already (compress first, then quantise)"
    kind = KINDS.get(type(module))
    if kind is None and module._modules:
        return f"these belong to {type(module).__name__} itself, and to no layer in it"
    if kind is None:
        return f"{type(module).__name__} is not supported"
    return (
        why_not_plain(module, kind.shape(module))
        or sharing.of_weight(weight_of(module), f"{name}.weight")
        or sharing.of_module(module)
    )
