"""BatchNorm statistics that follow a network while it is compressed layer by layer.

A norm should do to the compressed network's values what it did to the dense network's. Both run on the same batches;
with the means and variances that each feeds the norm, the running statistics are moved such that what comes out has the
mean and the variance that it had in the dense network. Estimating them anew instead would also bring in what the
batches, being few, have of their own.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._linalg import clamped, working_copy
from ._ranks import ALONE
from ._running import given_to

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ._ranks import Team


@dataclass(frozen=True)
class Spread:
    """Mean and variance of each channel over ``count`` values, in float64."""

    count: int
    mean: Tensor
    variance: Tensor

    @staticmethod
    def of(values: Tensor) -> Spread:
        """Look at the input ``(batch, channels, ...)`` of a norm; of an empty one, mean and variance mean nothing."""
        rows = working_copy(values).transpose(0, 1).flatten(1)
        mean = rows.mean(1)
        return Spread(rows.shape[1], mean, (rows - mean.unsqueeze(1)).square().mean(1))

    def to(self, device: torch.device | str) -> Spread:
        """Return the same on a device."""
        return Spread(self.count, self.mean.to(device), self.variance.to(device))

    def merged(self, other: Spread | None) -> Spread:
        """Return what both together have, by the rule of Chan, Golub and LeVeque."""
        if other is None or not other.count:
            return self
        if not self.count:
            return other
        count = self.count + other.count
        share = other.count / count
        step = other.mean - self.mean
        variance = (1 - share) * self.variance + share * other.variance + share * (1 - share) * step.square()
        return Spread(count, self.mean + share * step, variance)


Norm: TypeAlias = _BatchNorm
# What a batch looks like at norms, call by call.
Seen: TypeAlias = dict[Norm, list[Spread]]


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers that have running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


def affine_of(norm: Any, cast: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return what a norm in eval mode multiplies each channel by, and what it adds, as ``cast`` has its tensors."""
    scale = (cast(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * cast(norm.weight)
    shift = -cast(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + cast(norm.bias)


class FollowingNorms:
    """The statistics of the norms of a compressed network, found in the order in which the norms are reached.

    Args:
        model: the dense network; nothing of it is changed.
        team: the ranks that run batches of their own through it.

    Attributes:
        names: the qualified name of each of the norms.
    """

    def __init__(self, model: nn.Module, team: Team = ALONE) -> None:
        self._team = team
        self.names = {norm: name for name, norm in norms_of(model).items()}
        self._norms = list(self.names)
        self._dense = {norm: (_buffer(norm, "mean"), _buffer(norm, "var")) for norm in self._norms}
        # Statistics of the compressed network; those of norms it has not yet come to are still the dense network's.
        self._statistics = {norm: (mean.clone(), variance.clone()) for norm, (mean, variance) in self._dense.items()}
        self._settled: set[_BatchNorm] = set()
        self._totals: dict[_BatchNorm, tuple[Spread, Spread]] = {}

    @property
    def unsettled(self) -> list[_BatchNorm]:
        """Norms that the compressed network has not come to."""
        return [norm for norm in self._norms if norm not in self._settled]

    @contextmanager
    def watching_dense(self) -> Iterator[Seen]:
        """Note what a batch looks like in the dense network, at each call of norms that are not settled."""
        seen: Seen = {}

        def note(norm: Any, args: Any, kwargs: Any) -> None:
            seen.setdefault(norm, []).append(Spread.of(given_to(args, kwargs)))

        with _hooked(self.unsettled, note):
            yield seen

    @contextmanager
    def in_place(self, seen: Seen, finding: Sequence[_BatchNorm]) -> Iterator[None]:
        """Let the model's norms use the statistics of the compressed network, and find some of them.

        While they are found for the first time, each batch is matched by itself, so that what comes behind a norm is
        about right. Settled ones are found again with all statistics as they are.

        Args:
            seen: what the same batch looks like in the dense network.
            finding: norms whose statistics are to be found.
        """
        met: dict[_BatchNorm, int] = {}

        def match(norm: Any, args: Any, kwargs: Any) -> None:
            call = met.get(norm, 0)
            met[norm] = call + 1
            dense = seen.get(norm, [])
            if call >= len(dense):  # the two networks have gone different ways
                return
            here = Spread.of(given_to(args, kwargs))
            if norm not in self._settled:
                self._set(norm, dense[call], here)
            totals = self._totals.get(norm)
            self._totals[norm] = dense[call].merged(totals and totals[0]), here.merged(totals and totals[1])

        kept = [(norm, dict(norm._buffers)) for norm in self._norms]
        try:
            for norm in self._norms:
                norm._buffers["running_mean"], norm._buffers["running_var"] = self._statistics[norm]
            with _hooked(finding, match):
                yield
        finally:
            for norm, buffers in kept:
                norm._buffers.update(buffers)

    def settle(self) -> bool:
        """Fix the statistics of the norms that the batches have passed by now, on any rank.

        Returns:
            Whether they are others than those with which the last batch ran, on any rank.

        Raises:
            ValueError: if they come out NaN or infinite.
        """
        has_moved = False
        for norm, (dense, here) in self._united().items():
            before = [one.clone() for one in self._statistics[norm]]
            self._set(norm, dense, here)
            has_moved = has_moved or not all(map(torch.equal, before, self._statistics[norm]))
            if not all(bool(one.isfinite().all()) for one in self._statistics[norm]):
                raise ValueError(
                    f"calibration brings NaN or infinite values to BatchNorm layer {self.names[norm]!r}: look at the "
                    "inputs, and at the layers before it."
                )
            self._settled.add(norm)
        self._totals = {}
        return any(self._team.gather(has_moved))

    def _united(self) -> dict[_BatchNorm, tuple[Spread, Spread]]:
        """Return what the dense and the compressed network feed the norms, on all ranks together."""
        if len(self._team.numbers) == 1:
            return self._totals
        united: dict[_BatchNorm, tuple[Spread, Spread]] = {}
        own = {place: self._totals[norm] for place, norm in enumerate(self._norms) if norm in self._totals}
        for there in self._team.gather({place: tuple(one.to("cpu") for one in pair) for place, pair in own.items()}):
            for place, (dense, here) in there.items():
                earlier = united.get(self._norms[place])
                united[self._norms[place]] = (
                    dense.merged(earlier and earlier[0]),
                    here.merged(earlier and earlier[1]),
                )
        return {norm: united[norm] for norm in self._norms if norm in united}

    def statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Return the buffers of the model's norms that are settled, and what they hold in the compressed network."""
        return [
            pair
            for norm in self._norms
            if norm in self._settled
            for pair in zip(self._dense[norm], self._statistics[norm], strict=True)
        ]

    def _set(self, norm: _BatchNorm, dense: Spread, here: Spread) -> None:
        if not dense.count or not here.count:
            return
        mean, variance = (working_copy(one) for one in self._dense[norm])
        dense, here = dense.to(mean.device), here.to(mean.device)
        eps = float(norm.eps)
        # A channel that was constant in the dense network says nothing about its scale.
        known = dense.variance > torch.finfo(torch.float64).eps * (dense.mean.square() + 1e-300)
        scale = torch.where(known, here.variance / torch.where(known, dense.variance, 1.0), 1.0)
        # No variance below zero: a channel that hardly varies any more is not blown up further than eps allows.
        scale = torch.maximum(scale, eps / (variance + eps).clamp_min(torch.finfo(torch.float64).tiny))
        # Written such that a norm whose input is as before keeps its statistics bit for bit.
        new_variance = (variance * scale + eps * (scale - 1)).clamp_min(0)
        new_mean = mean * scale.sqrt() + (here.mean - dense.mean * scale.sqrt())
        for target, values in zip(self._statistics[norm], (new_mean, new_variance), strict=True):
            target.copy_(clamped(values, target.dtype))


@contextmanager
def _hooked(norms: Sequence[_BatchNorm], hook: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _buffer(norm: nn.Module, kind: str) -> Tensor:
    buffer = norm._buffers[f"running_{kind}"]
    if buffer is None:  # norms_of lets no such norm through
        raise TypeError(f"{type(norm).__name__} has no running statistics.")
    return buffer
