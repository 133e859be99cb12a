"""A model with its composite layers written in plain ones, for as long as it is planned, compressed or loaded.

What is registered in ``layer_types``, what has a computed weight and what is low-rank already gives way to an
equivalent module of plain layers, in the very memory of the original where that is possible. So everything else in the
library has to know plain layers only. In the end each original comes back of which nothing was used.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import check_initialised, describe, kind_of_tensor, with_article
from ._computed import computing, plain_copy, random_state_kept, type_of
from ._layers import KINDS, Origin
from ._linear_parts import DENSE_LINEAR
from ._lowrank_layer import LowRankLayer, memory_format_of
from ._running import note
from ._sharing import Sharing
from ._source_layer import STATE_HOOKS
from ._swap import SOURCE, swap_, take_over_, take_over_hooks_
from ._table import format_rank
from ._undo import Undo
from ._whole import check_whole
from .layer_types import layer_type, layer_type_called, layer_type_of, name_of_type

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class _Place(NamedTuple):
    """An original, and what was put in its place."""

    original: nn.Module
    expanded: nn.Module


class Expansion:
    """What was expanded in one model.

    Attributes:
        undo: takes back what was done to the model; further steps add to it.
        parameters: how many the model has as it is, shared ones counted once.
        origins: for plain layers that stand for one other layer, what that is.
        reasons: for layers that could not be expanded, why.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.undo = Undo()
        self.parameters = _count(model)
        self.origins: dict[nn.Module, Origin] = {}
        self.reasons: dict[nn.Module, str] = {}
        self._stored: dict[nn.Module, int] = {}  # parameters of what an expanded module was in the model
        self._rounds: list[list[_Place]] = []

    def put_in_(self, refusal: Callable[[nn.Module, str], str]) -> None:
        """Put expanded modules in the place of the originals; also of those inside what was expanded already."""
        while composites := self._composites():
            sharing, places = Sharing(self._model), []
            for name, module in composites:
                reason = refusal(module, name)
                if not reason:
                    try:
                        # In the mode that it was made in; leaving inference mode would record gradients.
                        was_inference = any(map(torch.is_inference, module.parameters()))
                        with torch.inference_mode(was_inference), torch.no_grad():
                            expanded = self._expanded(name, module, sharing)
                    except ValueError as error:
                        reason = str(error).rstrip(".")
                    reason = reason or sharing.of_module(module)
                if reason:
                    self.reasons[module] = reason
                else:
                    places.append(_Place(module, expanded))
            self._rounds.append(places)
            swap_(self._model, {one.original: one.expanded for one in places})

    def _composites(self) -> list[tuple[str, nn.Module]]:
        """List what may still be expanded; what is inside of it goes with it, perhaps to have its turn afterwards."""
        found, inside = [], set[nn.Module]()
        for name, module in self._model.named_modules():
            # A bare root has no place.
            if name and module not in inside and module not in self.reasons and _composite(module):
                computed = [one for one in _computed_inside(name, module) if one[1] not in self.reasons]
                found.extend(computed or [(name, module)])
                inside.update(module.modules())
        return found

    def _expanded(self, name: str, module: nn.Module, sharing: Sharing) -> nn.Module:
        """Write one layer in plain ones.

        Raises:
            ValueError: saying why that cannot be done.
        """
        expanded: nn.Module
        if isinstance(module, LowRankLayer):
            expanded, source = module.to_dense(), vars(module).get(SOURCE, "")
            take_over_(expanded, module)
        elif computing(module):
            expanded, source = plain_copy(module), ""
            before, after = _count(module), _count(expanded)
            if before < after and type(expanded) not in KINDS:  # whose count is that of one layer of the plan
                raise ValueError(f"{computing(module)} from {before:,} parameters, of which {after:,} are computed")
        else:
            _check_whole(module, self.reasons)
            known = layer_type(module)
            if known is None:
                raise ValueError(f"{type(module).__name__} is not supported")
            try:
                with random_state_kept(module):
                    made = known.expand(module)
            except Exception as error:
                note(error, f"expanding layer {name!r}, {with_article(type(module).__name__)}")
                raise
            expanded, source = _checked(made, name, module), name_of_type(type(module))
            _settle_flags_(expanded, module)
            _settle_modes_(expanded, module)
            take_over_hooks_(expanded, module)
        _check_untied(name, module, expanded, sharing)
        if source:
            expanded.__dict__[SOURCE] = source
        stored = self._stored.get(module, _count(module))
        if type(expanded) in KINDS:
            others = sum(one.numel() for name, one in expanded.named_parameters() if name != "weight")
            self.origins[expanded] = Origin(type_of(module).__name__, stored - others)
        self._stored[expanded] = stored
        return expanded

    @property
    def originals(self) -> list[nn.Module]:
        """The modules that were expanded."""
        return [one.original for places in self._rounds for one in places]

    def take_out_(self) -> None:
        """Put all originals back, for now or for good."""
        for places in reversed(self._rounds):
            swap_(self._model, {one.expanded: one.original for one in places})

    def put_back_(self) -> None:
        """Expand once more what was taken out."""
        for places in self._rounds:
            swap_(self._model, dict(places))

    def keep_(self, used: Mapping[nn.Module, nn.Module]) -> None:
        """Put back the originals of which nothing was used; what is kept gets memory of its own.

        Args:
            used: layers, with the low-rank ones that were put in their places.
        """
        new = set(used.values())
        for places in reversed(self._rounds):
            unused = {}
            for original, expanded in places:
                if expanded in used:  # of which a bias may be left
                    _settle_memory_(used[expanded], original)
                elif not new.isdisjoint(expanded.modules()):
                    _settle_memory_(expanded, original)
                else:
                    unused[expanded] = original
            swap_(self._model, unused)

    def keep_all_(self) -> None:
        """Give all that was expanded memory of its own."""
        for original, expanded in (one for places in self._rounds for one in places):
            _settle_memory_(expanded, original)

    def finish_(self) -> None:
        """Leave the model as it is now, for good."""
        self.undo.keep()


@contextmanager
def expanded_(model: nn.Module, refusal: Callable[[nn.Module, str], str]) -> Iterator[Expansion]:
    """Expand a model for a while; afterwards it is as before, unless what was made of it is kept.

    Args:
        model: the model.
        refusal: called with each module that could be expanded and its name: says why it is not to be, or nothing.
    """
    check_initialised(model)
    check_whole(model)
    expansion = Expansion(model)
    with expansion.undo as undo:
        undo.add(expansion.take_out_)
        expansion.put_in_(refusal)
        yield expansion


def collapse_(model: nn.Module, undo: Undo) -> None:
    """Write expanded modules as the layers that they stand for again, those inside of others first.

    Args:
        model: a model without low-rank layers.
        undo: gets what takes it back, before it is done.

    Raises:
        TypeError: if a function that is registered returns something else than a module; the layer is named.
        ValueError: if one of them cannot be; the layer is named.
    """
    for name, module in reversed(list(model.named_modules())):
        known = layer_type_called(vars(module).get(SOURCE, ""))
        if not name or known is None or known.collapse is None:
            continue
        try:
            with random_state_kept(module):
                collapsed: object = known.collapse(module)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        if not isinstance(collapsed, nn.Module):
            raise TypeError(
                f"layer {name!r}: collapse, as registered for {vars(module)[SOURCE].rpartition('.')[2]}, must return a "
                f"torch.nn.Module, got {describe(collapsed)}."
            )
        take_over_hooks_(collapsed.train(module.training), module)
        collapsed.__dict__.pop(SOURCE, None)
        undo.add(swap_, model, {collapsed: module})
        swap_(model, {module: collapsed})


def _composite(module: nn.Module) -> bool:
    """Tell whether a module is no plain layer, but one that may be written in plain layers."""
    if isinstance(module, LowRankLayer) or layer_type(module) is not None:
        return True
    if not computing(module):
        return False
    kind = type_of(module)
    return kind in KINDS or layer_type_of(kind) is not None


def _computed_inside(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """List what has to become plain inside of a layer before that can be expanded."""
    inside = module.named_modules(prefix=name) if layer_type(module) is not None else ()
    computed = [(inner, one) for inner, one in inside if one is not module and computing(one)]
    return [(inner, one) for inner, one in computed if type_of(one) in DENSE_LINEAR or _composite(one)]


def _check_whole(module: nn.Module, reasons: Mapping[nn.Module, str]) -> None:
    """Refuse a layer that is more, or other, than its type says."""
    if any(vars(module).get(hooks) for hooks in STATE_HOOKS):
        raise ValueError("it has state-dict hooks, which expect its keys")
    if "forward" in vars(module):
        raise ValueError("its forward was replaced on this instance")
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.layout is not torch.strided:
            raise ValueError(f"its {name} is {kind_of_tensor(parameter)}")
    for child in module.modules():
        if computing(child):
            reason = reasons.get(child)
            what = f"stays: {reason}" if reason else f"is {computing(child)} (remove that first)"
            raise ValueError(f"a {type(child).__name__} inside {what}")


def _checked(expanded: object, name: str, module: nn.Module) -> nn.Module:
    """Refuse what cannot be an expanded layer."""
    if not isinstance(expanded, nn.Module):
        raise TypeError(
            f"layer {name!r}: expand, as registered for {type(module).__name__}, must return a torch.nn.Module, got "
            f"{describe(expanded)}."
        )
    if expanded is module:
        raise ValueError("the function registered for it returned the layer itself")
    own = set(module.modules())
    if any(type(one) is type(module) and one not in own for one in expanded.modules()):
        again = with_article(type(module).__name__)
        raise ValueError(f"the function registered for it returned what has {again} inside again")
    before, after = _count(module), _count(expanded)
    if before != after:
        raise ValueError(f"it has {before:,} parameters, but what it was expanded to has {after:,}")
    return expanded


def _check_untied(name: str, module: nn.Module, expanded: nn.Module, sharing: Sharing) -> None:
    """Refuse a layer that lends memory to another, or to itself, and would come apart from it."""
    kept = set(expanded.parameters())
    for own_name, parameter in module.named_parameters():
        tied = "" if parameter in kept else sharing.of_weight(parameter, f"{name}.{own_name}", name)
        if tied:
            raise ValueError(tied.replace("weight", own_name, 1))


def _settle_modes_(expanded: nn.Module, module: nn.Module) -> None:
    """Put what is new into the mode of the original; children of that have their own."""
    own = set(module.modules())
    for one in expanded.modules():
        if one not in own:
            one.training = module.training


def _settle_flags_(expanded: nn.Module, module: nn.Module) -> None:
    """Let parameters that are views be trained if what they are views of is."""
    trained = {_storage(one): one.requires_grad for one in module.parameters()}
    own = set(module.parameters())
    for parameter in expanded.parameters():
        if parameter not in own:
            parameter.requires_grad_(trained.get(_storage(parameter), True))


def _settle_memory_(expanded: nn.Module, original: nn.Module) -> None:
    """Give parameters that lie in a larger piece of memory, or across it, one of their own."""
    own = set(original.parameters())
    for parameter in set(expanded.parameters()) - own:
        needed = parameter.numel() * parameter.element_size()
        if parameter.untyped_storage().nbytes() > needed or not _in_order(parameter):
            with torch.inference_mode(parameter.is_inference()):  # what is cloned in another mode could not be trained
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _in_order(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=memory_format_of(tensor))


def _count(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def _storage(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()


def refuse_low_rank(module: nn.Module, why: str) -> str:
    """Say that a layer is low-rank already, and why it stays so."""
    return f"already low-rank (rank {format_rank(module.rank)}); {why}" if isinstance(module, LowRankLayer) else ""
