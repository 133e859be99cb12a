"""Slow float64 references for what calibration data brings: loops over rows, importing nothing from the library."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def moments(inputs: Tensor, outputs: Tensor, *, centred: bool) -> tuple[Tensor, Tensor, float]:
    """E[x xᵀ], E[y xᵀ] and E[‖y‖²] of rows ``(rows, n)`` and ``(rows, m)``: means first, then a second pass."""
    inputs, outputs = inputs.double(), outputs.double()
    if centred:
        inputs, outputs = inputs - inputs.mean(0), outputs - outputs.mean(0)
    inner = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    cross = torch.zeros(outputs.shape[1], inputs.shape[1], dtype=torch.float64)
    energy = 0.0
    for x, y in zip(inputs, outputs, strict=True):
        inner += torch.outer(x, x)
        cross += torch.outer(y, x)
        energy += float(y @ y)
    return inner / len(inputs), cross / len(inputs), energy / len(inputs)


def patches(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, images: Tensor) -> Tensor:
    """What each output of a convolution is made of: ``(images, positions, groups, in / groups · kernel)``."""
    reach = [apart * (size - 1) for apart, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "same":
        sides = [(whole // 2, whole - whole // 2) for whole in reach]
    elif conv.padding == "valid":
        sides = [(0, 0)] * len(reach)
    else:
        sides = [(size, size) for size in conv.padding]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(images, [size for pair in reversed(sides) for size in pair], mode=mode)
    starts = [range(0, padded.shape[2 + axis] - reach[axis], conv.stride[axis]) for axis in range(len(reach))]
    found = []
    for image in padded:
        rows = []
        for corner in itertools.product(*starts):
            window = [
                slice(first, first + far + 1, apart)
                for first, far, apart in zip(corner, reach, conv.dilation, strict=True)
            ]
            rows.append(image[(slice(None), *window)].reshape(conv.groups, -1))
        found.append(torch.stack(rows))
    return torch.stack(found)


def output_error(inputs: Tensor, wanted: Tensor, approximation: Tensor) -> float:
    """The mean over rows x of ‖(W − Ŵ) x‖², group by group: rows ``(groups, rows, n)``, weights ``(groups, m, n)``."""
    total = 0.0
    for group, rows in enumerate(inputs):
        for x in rows:
            total += float((wanted[group] @ x - approximation[group] @ x).square().sum())
    return total / inputs.shape[1]


def optimal_error(inputs: Tensor, wanted: Tensor, rank: int) -> float:
    """The least :func:`output_error` of any weights of a rank: Eckart–Young for the outputs themselves."""
    total = 0.0
    for rows, weight in zip(inputs, wanted, strict=True):
        total += float(torch.linalg.svdvals(weight @ rows.T)[rank:].square().sum())
    return total / inputs.shape[1]


def whitened_truncation(weight: Tensor, inner: Tensor, rank: int) -> Tensor:
    """The best weight of a rank in the metric of an invertible moment: truncate W L, L Lᵀ = C, and undo L."""
    triangle = torch.linalg.cholesky(inner)
    left, values, right = torch.linalg.svd(weight @ triangle, full_matrices=False)
    kept = (left[:, :rank] * values[:rank]) @ right[:rank]
    return torch.linalg.solve_triangular(triangle, kept, upper=False, left=False)


def reduced_rank_regression(inputs: Tensor, outputs: Tensor, rank: int) -> Tensor:
    """The weight of a rank with the least Σ‖y − W x‖² over rows ``(rows, n)`` and ``(rows, m)``.

    The least squares solution, projected onto the principal directions of what it fits.
    """
    solution = torch.linalg.lstsq(inputs, outputs).solution
    directions = torch.linalg.svd(inputs @ solution, full_matrices=False).Vh[:rank]
    return (solution @ directions.T @ directions).T


def seen_by_up(down: Tensor, kernel: tuple[int, ...], down_axes: tuple[int, ...], channels: int) -> Tensor:
    """What the second layer sees of a patch, one group: ``(rank · positions of its kernel, channels · kernel)``.

    Args:
        down: ``(rank, channels · kernel axes of down)``, those of one group.
        kernel: sizes of all kernel axes.
        down_axes: those that ``down`` sums over.
        channels: input channels of the group.
    """
    up_axes = [axis for axis in range(len(kernel)) if axis not in down_axes]
    split = down.reshape(len(down), channels, *(kernel[axis] for axis in down_axes))
    rows = []
    for one in split:
        for position in itertools.product(*(range(kernel[axis]) for axis in up_axes)):
            row = torch.zeros(channels, *kernel, dtype=torch.float64)
            for place in itertools.product(*(range(size) for size in kernel)):
                if tuple(place[axis] for axis in up_axes) == position:
                    for channel in range(channels):
                        row[(channel, *place)] = one[(channel, *(place[axis] for axis in down_axes))]
            rows.append(row.flatten())
    return torch.stack(rows)
