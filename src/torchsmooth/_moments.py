"""Second moments of what goes into a layer and comes out of it, seen as the weight's matrix sees them.

A convolution multiplies its weight ``(out, in · kernel)`` with patches of its input. Up to :data:`POSITIONS` patches
of each example are read, at positions drawn by a generator of their own: neighbours say much the same.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._geometry import ANY_CONVOLUTION, each, zeros_around
from ._linalg import working_copy

if TYPE_CHECKING:
    from ._geometry import Convolution
    from ._ranks import Team

POSITIONS = 32
# Of the mean, in units of its rounding: what varies by less is the same each time, computed for other numbers of rows.
_UNITS = 16
# Of the square of the mean, at least: the mean itself is rounded.
_CONSTANT = 1e-28


class Moments:
    """Means and centred second moments of pairs of rows, gathered batch by batch in float64.

    One pass, and memory of ``groups · n · (n + m)`` numbers whatever the number of rows, beside the rows of one batch.
    Batches are merged by the rule of Chan, Golub and LeVeque, which subtracts means before it squares: a large mean
    costs no digits.

    Attributes:
        count: rows so far; the moments exist from the first row on.
    """

    def __init__(self) -> None:
        self.count = 0
        self.inputs_mean: Tensor
        self.outputs_mean: Tensor
        self._inner: Tensor
        self._cross: Tensor
        self._energy: Tensor
        self._constant = _CONSTANT

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in rows ``(groups, rows, n)`` of inputs and ``(groups, rows, m)`` of outputs."""
        # In half precision what is computed anew mostly rounds to the same, and much that does vary is as small.
        unit = min(torch.finfo(inputs.dtype).eps, torch.finfo(torch.float32).eps)
        self._constant = max(self._constant, (_UNITS * unit) ** 2)
        inputs, outputs = working_copy(inputs), working_copy(outputs)
        rows = inputs.shape[1]
        if not rows:
            return
        inputs_mean, outputs_mean = inputs.mean(1), outputs.mean(1)
        inputs, outputs = inputs - inputs_mean.unsqueeze(1), outputs - outputs_mean.unsqueeze(1)
        if not self.count:
            self.inputs_mean, self.outputs_mean = inputs_mean, outputs_mean
            self._inner, self._cross = inputs.mT @ inputs, outputs.mT @ inputs
            self._energy = outputs.square().sum(1)
        else:
            share = rows / (self.count + rows)
            weight = self.count * share
            inputs_step, outputs_step = inputs_mean - self.inputs_mean, outputs_mean - self.outputs_mean
            across = inputs_step.unsqueeze(1)
            # In place, since a moment may be what takes the most memory.
            self._inner.baddbmm_(inputs.mT, inputs).baddbmm_(inputs_step.unsqueeze(2), across, alpha=weight)
            self._cross.baddbmm_(outputs.mT, inputs).baddbmm_(outputs_step.unsqueeze(2), across, alpha=weight)
            self._energy += outputs.square().sum(1) + weight * outputs_step.square()
            self.inputs_mean += share * inputs_step
            self.outputs_mean += share * outputs_step
        self.count += rows

    def unite(self, team: Team, device: torch.device) -> None:
        """Take in the rows of the other ranks, as if they had been added here.

        Args:
            team: the ranks; each has some rows, or none.
            device: where a rank without rows keeps the moments.
        """
        shapes = (self.inputs_mean.shape, self.outputs_mean.shape) if self.count else None
        everywhere = team.gather((self.count, shapes, self._constant))
        total = sum(count for count, *_ in everywhere)
        self._constant = max(constant for *_, constant in everywhere)
        if len(everywhere) == 1 or not total:
            return
        if not self.count:
            (groups, wide), (_, high) = next(one for _, one, _ in everywhere if one is not None)
            empty = torch.zeros(groups, 1, 0, dtype=torch.float64, device=device)
            self.inputs_mean, self.outputs_mean = (empty.new_zeros(groups, size) for size in (wide, high))
            self._inner, self._cross = empty.new_zeros(groups, wide, wide), empty.new_zeros(groups, high, wide)
            self._energy = empty.new_zeros(groups, high)
        own = self.inputs_mean, self.outputs_mean
        self.inputs_mean, self.outputs_mean = (one * (self.count / total) for one in own)
        team.sum_([self.inputs_mean, self.outputs_mean])
        # As for batches: each rank's moments about its own mean, and those of its mean about that of all.
        inputs_step, outputs_step = own[0] - self.inputs_mean, own[1] - self.outputs_mean
        across = inputs_step.unsqueeze(1)
        self._inner.baddbmm_(inputs_step.unsqueeze(2), across, alpha=self.count)
        self._cross.baddbmm_(outputs_step.unsqueeze(2), across, alpha=self.count)
        self._energy += self.count * outputs_step.square()
        team.sum_([self._inner, self._cross, self._energy])
        self.count = total

    def likeness(self, weight: Tensor) -> float:
        """Return how the outputs go with those that a weight ``(groups, m, n)`` gives for the inputs: a correlation.

        Where either do not vary, nothing speaks against it: 1.
        """
        inputs, outputs = self._vary()
        own = ((weight @ self._inner) * weight * inputs).sum()
        together = (self._cross * weight * (inputs & outputs)).sum()
        product = float(own * (self._energy * outputs[..., 0]).sum())
        return float(together) / math.sqrt(product) if product > 0 else 1.0

    def map_(self, weight: Tensor, bias: Tensor | None) -> None:
        """Let the outputs be those that a weight ``(groups, m, n)`` and a bias ``(groups, m)`` give for the inputs."""
        self._cross = weight @ self._inner
        self._energy = (self._cross * weight).sum(-1)
        self.outputs_mean = (weight @ self.inputs_mean.unsqueeze(-1)).squeeze(-1)
        if bias is not None:
            self.outputs_mean = self.outputs_mean + bias

    def inner(self, *, centred: bool) -> Tensor:
        """Return E[x xᵀ] ``(groups, n, n)``, of the deviations from the mean if ``centred``; zero if none vary."""
        mean = self.inputs_mean
        inner = self._inner / self.count
        if centred:
            return inner * self._vary()[0]
        return inner + mean.unsqueeze(2) * mean.unsqueeze(1)

    def cross(self, *, centred: bool) -> Tensor:
        """Return E[y xᵀ] ``(groups, m, n)``, of the deviations if ``centred``; zero if either do not vary."""
        cross = self._cross / self.count
        if centred:
            inputs, outputs = self._vary()
            return cross * (inputs & outputs)
        return cross + self.outputs_mean.unsqueeze(2) * self.inputs_mean.unsqueeze(1)

    def energy(self, *, centred: bool) -> float:
        """Return E[‖y‖²], all groups together, of the deviations if ``centred``; zero if none vary."""
        energy = self._energy / self.count
        return float((energy * self._vary()[1][..., 0] if centred else energy + self.outputs_mean.square()).sum())

    def _vary(self) -> tuple[Tensor, Tensor]:
        """Say whether inputs and outputs vary by more than rounding, for each group: ``(groups, 1, 1)`` both."""
        inner = self._inner.diagonal(dim1=-2, dim2=-1).sum(-1) / self.count
        energy = self._energy.sum(-1) / self.count
        varying = (
            spread > self._constant * mean.square().sum(-1)
            for spread, mean in ((inner, self.inputs_mean), (energy, self.outputs_mean))
        )
        inputs, outputs = (one[:, None, None] for one in varying)
        return inputs, outputs


def check_moments(name: str, *moments: Tensor) -> None:
    """Refuse moments of a layer that are not finite; the message names the layer."""
    if not all(bool(one.isfinite().all()) for one in moments):
        raise ValueError(
            f"calibration brings NaN or infinite values to layer {name!r}: look at the inputs, and at the layers "
            "before it."
        )


def drawn_positions(examples: int, positions: int, seed: int) -> Tensor:
    """Draw different positions for each example, ``(examples, at most POSITIONS)``, on the CPU; all, if there are few.

    The same arguments give the same positions; the global random state is not touched.
    """
    if positions <= POSITIONS:
        return torch.arange(positions, device="cpu").expand(examples, positions)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    # In a dtype of its own: in another one, the generator draws other numbers.
    drawn = torch.rand(examples, positions, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.topk(POSITIONS, dim=1).indices


def input_rows(layer: nn.Module, given: Tensor, seed: int) -> Tensor:
    """Return what the weight's matrix is multiplied with, ``(groups, rows, in / groups · kernel)``.

    Args:
        layer: a Linear or a convolution.
        given: its input.
        seed: of the positions; :func:`output_rows` with the same seed gives the outputs of the same rows.
    """
    if not isinstance(layer, ANY_CONVOLUTION):
        return _drawn(_sequences(given), seed).unsqueeze(0)
    axes = len(layer.kernel_size)
    given = _padded(layer, given if given.dim() == axes + 2 else given.unsqueeze(0))
    steps, apart = each(layer.stride, axes), each(layer.dilation, axes)
    sizes = [
        (whole - gap * (size - 1) - 1) // step + 1
        for whole, size, step, gap in zip(given.shape[2:], layer.kernel_size, steps, apart, strict=True)
    ]
    places = drawn_positions(len(given), math.prod(sizes), seed).to(given.device)
    example = torch.arange(len(given), device=given.device)
    index = [example.reshape(-1, *[1] * (axes + 1))]  # (examples, positions, *kernel)
    for axis in range(axes):
        inner = math.prod(sizes[axis + 1 :])
        corner = places // inner % sizes[axis] * steps[axis]
        reach = apart[axis] * torch.arange(layer.kernel_size[axis], device=given.device)
        along = [1] * axes
        along[axis] = len(reach)
        index.append(corner.reshape(*corner.shape, *[1] * axes) + reach.reshape(along))
    patches = given.movedim(1, -1)[tuple(index)]  # (examples, positions, *kernel, channels)
    return _by_group(patches.flatten(0, 1).movedim(-1, 1).flatten(1), layer.groups)


def output_rows(layer: nn.Module, output: Tensor, seed: int) -> Tensor:
    """Return what comes out of the rows of :func:`input_rows`, ``(groups, rows, out / groups)``."""
    if not isinstance(layer, ANY_CONVOLUTION):
        return _drawn(_sequences(output), seed).unsqueeze(0)
    output = output if output.dim() == len(layer.kernel_size) + 2 else output.unsqueeze(0)
    return _by_group(_drawn(output.flatten(2).transpose(1, 2), seed), layer.groups)


def _padded(layer: Convolution, given: Tensor) -> Tensor:
    """Pad an input as the layer does."""
    if layer.padding_mode != "zeros":
        return F.pad(given, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    return F.pad(given, [size for pair in reversed(zeros_around(layer)) for size in pair])


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """Split the channels of rows ``(rows, groups · channels)`` by group."""
    return rows.reshape(len(rows), groups, rows.shape[1] // groups).transpose(0, 1)


def _sequences(values: Tensor) -> Tensor:
    """See the input of a linear layer as ``(examples, positions, features)``."""
    if values.dim() < 2:  # noqa: PLR2004 - one vector
        return values.reshape(1, 1, -1)
    return values.flatten(1, -2) if values.dim() > 2 else values.unsqueeze(1)  # noqa: PLR2004 - one row an example


def _drawn(sequences: Tensor, seed: int) -> Tensor:
    """Return the rows ``(examples · positions drawn, features)`` of sequences."""
    places: Any = drawn_positions(len(sequences), sequences.shape[1], seed).to(sequences.device)
    example = torch.arange(len(sequences), device=sequences.device)[:, None]
    return sequences[example, places].flatten(0, 1)
