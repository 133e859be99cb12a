"""What `inference.py` compares: a model dense, compressed for each target, tuned, and with the layers of peers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peers import PEERS, replaced_
from torch import Tensor, nn
from unreachable import is_unreachable

import torchsmooth
from torchsmooth._derive import derive, is_tunable
from torchsmooth._execution import use_
from torchsmooth._latency import observe_calls
from torchsmooth._lowrank_layer import LowRankLayer
from torchsmooth._macs import count_macs
from torchsmooth._running import as_inputs, observing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from peers import Peer
    from timed_models import Entry

DENSE = "dense"
FOLDED = "BatchNorm folded"  # into the convolutions before, dense or low-rank
EQUAL = "equal ranks"  # beside the targets: what peers are compared at
PACKED = "all dense, weights packed"  # what packing gains without low rank
_LAST = torch.channels_last
_IMAGES = 4  # axes of a batch of them


class Group(NamedTuple):
    """What a model is compressed for.

    Attributes:
        title: of the rows in the table.
        options: of the plan.
        is_timed: whether the plan depends on times, and so on the batch and on the memory format.
        is_folded: whether the compressed model is measured with its norms folded, too.
    """

    title: str
    options: dict[str, Any]
    is_timed: bool = False
    is_folded: bool = False


GROUPS = {
    "params": Group("target params", {}),
    "macs": Group("target macs", {"target": "macs"}, is_folded=True),
    "macs_channel": Group("target macs, scheme channel", {"target": "macs", "scheme": "channel"}, is_folded=True),
    "latency": Group("target latency", {"target": "latency"}, is_timed=True, is_folded=True),
    EQUAL: Group(EQUAL, {"scheme": "channel", "form": "factored"}),
}


@dataclass
class Candidate:
    """A model to be timed, or why there is none.

    Attributes:
        name: what it is.
        model: None if it could not be made.
        inputs: what it is called with.
        fewer: how many times fewer multiply-adds than dense the compressed model takes, before it is tuned.
        problem: why there is no model, or no time.
    """

    name: str
    model: nn.Module | None = None
    inputs: Tensor | None = None
    fewer: float = 1.0
    problem: str = ""

    @property
    def is_dense(self) -> bool:
        """Whether it is one of the two that speed-ups are against."""
        return self.name.startswith(DENSE)

    @property
    def is_folded(self) -> bool:
        """Whether its norms are folded."""
        return FOLDED in self.name


def multiply_adds(model: nn.Module, inputs: Tensor) -> int:
    """Count the multiply-adds of a model, as plans for ``target="macs"`` do."""
    return count_macs(model, as_inputs(inputs))


class Subject:
    """One model in one dtype, and the plans for it.

    Args:
        entry: how to build it.
        device: where it computes.
        dtype: of its weights and inputs.
        ratios: fractions to remove.
    """

    def __init__(self, entry: Entry, device: str, dtype: torch.dtype, ratios: Sequence[float]) -> None:
        self.entry, self.device, self.dtype, self.ratios = entry, device, dtype, ratios
        self.model = entry.model().to(device, dtype)
        self._sample = self.inputs(1)
        self._dense = multiply_adds(self.model, self._sample)
        self._plans: dict[str, dict[float, Any]] = {}

    def inputs(self, batch: int) -> Tensor:
        """Draw a batch."""
        return self.entry.inputs(batch).to(self.device, self.dtype)

    def plans(self, group: str, inputs: Tensor) -> dict[float, Any]:
        """Return the plan for each ratio, or the reason why there is none.

        Times depend on the batch and are measured for each, for images with the channels last: where convolutions are
        faster like this, so is what takes their place, and fewer multiply-adds have to go. Everything else is planned
        once.
        """
        chosen = GROUPS[group]
        key = f"{group} {len(inputs)}" if chosen.is_timed else group
        if key not in self._plans:
            model, given = self._as_run(group, inputs if chosen.is_timed else self._sample)
            options = {"example_inputs": given} if "target" in chosen.options else {}
            self._plans[key] = reachable_plans(model, self.ratios, progress=False, **options, **chosen.options)
        return self._plans[key]

    def _as_run(self, group: str, inputs: Tensor) -> tuple[nn.Module, Tensor]:
        """Copy the dense model, and return it with inputs as a group runs them."""
        if GROUPS[group].is_timed and self.entry.takes_images:
            return _in_channels_last(self.model, inputs)
        return copy.deepcopy(self.model), inputs

    def fewer(self, model: nn.Module) -> float:
        """Return how many times fewer multiply-adds than the dense model another one takes."""
        return self._dense / multiply_adds(model, self._sample)

    def candidates(self, batch: int, ratio: float, groups: Sequence[str], **tuning: Any) -> Iterator[Candidate]:
        """Make what is to be compared at one ratio and one size of the batch; ``tuning`` is for ``tune_``."""
        inputs = self.inputs(batch)
        images = self.entry.takes_images
        yield Candidate(DENSE, copy.deepcopy(self.model), inputs)
        if images:
            yield _channels_last(Candidate(DENSE, self.model, inputs))
        normed = any(isinstance(one, nn.BatchNorm2d) for one in self.model.modules())
        if normed:
            dense = Candidate(f"{FOLDED}, {DENSE}", folded(self.model), inputs)
            yield dense
            yield _channels_last(dense)
        for group in groups:
            name = GROUPS[group].title
            try:
                plan = self.plans(group, inputs)[ratio]
            except ValueError as error:
                plan = str(error)
            if isinstance(plan, str):
                yield Candidate(name, problem=plan)
                continue
            small, given = self._as_run(group, inputs)
            plan.apply_(small, progress=False)
            limit = self.fewer(small)
            one = partial(Candidate, inputs=given, fewer=limit)
            yield one(name, small)
            yield _made(one(f"{name}, tune_"), partial(tuned, small, given, **tuning))
            if group == "params" and self.device == "cpu":
                yield _made(Candidate(PACKED, inputs=given), partial(_packed, small, given))
            if normed and GROUPS[group].is_folded:
                yield _made(one(f"{name}, {FOLDED}, tune_"), partial(_folded_and_tuned, small, given, **tuning))
            if group == EQUAL:
                yield from self._of_peers(small, one, images=images)

    def _of_peers(self, small: nn.Module, one: Callable[..., Candidate], *, images: bool) -> Iterator[Candidate]:
        for name, peer in PEERS.items():
            if peer.missing:
                continue
            candidate = _made(one(f"{EQUAL}, {name}"), partial(_by_peer, small, peer))
            if candidate.model is not None:
                candidate.fewer = self.fewer(candidate.model)
            yield candidate
            if images and candidate.model is not None:
                yield _channels_last(candidate)


def reachable_plans(model: nn.Module, ratios: Sequence[float], **options: Any) -> dict[float, Any]:
    """Plan for each ratio from one decomposition; where one cannot be reached, say why instead.

    Raises:
        ValueError: if planning fails for another reason.
    """
    wanted, found = sorted(ratios), {}
    while wanted:
        plans = _swept(model, wanted, options)
        if isinstance(plans, str):
            failed = next((one for one in wanted if plans.startswith(f"ratio {one} ")), wanted[0])
            reason = plans.removeprefix(f"ratio {failed} ").partition(". ")[0]
            found |= {one: reason for one in wanted if one >= failed}
            wanted = [one for one in wanted if one < failed]
        else:
            return found | dict(zip(wanted, plans, strict=True))
    return found


def _swept(model: nn.Module, ratios: Sequence[float], options: dict[str, Any]) -> list[Any] | str:
    try:
        return torchsmooth.sweep(model, ratios, **options)
    except ValueError as error:
        if not is_unreachable(error):
            raise
        return str(error)


def tuned(model: nn.Module, inputs: Tensor, **tuning: Any) -> nn.Module:
    """Return a tuned copy of a compressed model."""
    model = copy.deepcopy(model)
    torchsmooth.tune_(model, inputs, progress=False, **tuning)
    return model


def _packed(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Return a copy with each low-rank layer merged to a dense weight, and packed where that is possible."""
    model = copy.deepcopy(model)
    if inputs.dim() == _IMAGES:
        model.to(memory_format=_LAST)
    layers = {one: name for name, one in model.named_modules() if isinstance(one, LowRankLayer) and is_tunable(one)}
    with observing(model):
        calls = observe_calls(model, as_inputs(inputs), layers)
        for layer in calls:
            use_(layer, derive(layer, "packed_dense", calls[layer].args[0]) or derive(layer, "dense"))
    return model


def folded(model: nn.Module) -> nn.Module:
    """Return a copy without the norms that can be folded."""
    model = copy.deepcopy(model)
    torchsmooth.fold_batchnorm_(model)
    return model


def _folded_and_tuned(model: nn.Module, inputs: Tensor, **tuning: Any) -> nn.Module:
    return tuned(folded(model), inputs, **tuning)


def _by_peer(small: nn.Module, peer: Peer) -> nn.Module:
    return replaced_(copy.deepcopy(small), peer)


def _made(candidate: Candidate, make: Callable[[], nn.Module]) -> Candidate:
    try:
        candidate.model = make()
    except (ValueError, TypeError, RuntimeError) as error:
        candidate.problem = str(error).splitlines()[0]
    return candidate


def _channels_last(candidate: Candidate) -> Candidate:
    """Copy a candidate, with weights and images whose channels come last."""
    if candidate.model is None or candidate.inputs is None:
        raise ValueError(f"{candidate.name} has no model to copy.")
    model, inputs = _in_channels_last(candidate.model, candidate.inputs)
    return Candidate(f"{candidate.name}, channels_last", model, inputs, candidate.fewer)


def _in_channels_last(model: nn.Module, inputs: Tensor) -> tuple[nn.Module, Tensor]:
    return copy.deepcopy(model).to(memory_format=_LAST), inputs.to(memory_format=_LAST)
