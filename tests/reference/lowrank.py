"""Slow float64 references for the compression half: plain loops, importing nothing from the library."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def _row_axes(scheme: str, kernel: list[int]) -> tuple[int, ...]:
    everything = tuple(range(len(kernel)))
    return {"channel": (), "input": everything, "spatial": (1,), "spatial_transposed": (0,)}[scheme]


def group_matrices(weight: Tensor, scheme: str, groups: int) -> list[Tensor]:
    """The matrix of each group of a convolution weight, filled entry by entry."""
    total_out, in_channels, *kernel = weight.shape
    out_channels = total_out // groups
    row_axes = _row_axes(scheme, kernel)
    matrices = []
    for group in range(groups):
        rows: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
        for out in range(out_channels):
            for inp in range(in_channels):
                for place in itertools.product(*(range(size) for size in kernel)):
                    row = (out, *(place[axis] for axis in row_axes))
                    column = (inp, *(place[axis] for axis in range(len(kernel)) if axis not in row_axes))
                    rows.setdefault(row, {})[column] = float(weight[(group * out_channels + out, inp, *place)])
        matrices.append(
            torch.tensor(
                [[rows[row][column] for column in sorted(rows[row])] for row in sorted(rows)], dtype=torch.float64
            )
        )
    return matrices


def weight_from_matrices(matrices: list[Tensor], shape: tuple[int, ...], scheme: str) -> Tensor:
    """Undo :func:`group_matrices` entry by entry."""
    total_out, in_channels, *kernel = shape
    out_channels = total_out // len(matrices)
    row_axes = _row_axes(scheme, kernel)
    column_axes = [axis for axis in range(len(kernel)) if axis not in row_axes]
    weight = torch.zeros(shape, dtype=torch.float64)
    for group, matrix in enumerate(matrices):
        rows = itertools.product(range(out_channels), *(range(kernel[axis]) for axis in row_axes))
        for row, (out, *row_place) in enumerate(rows):
            columns = itertools.product(range(in_channels), *(range(kernel[axis]) for axis in column_axes))
            for column, (inp, *column_place) in enumerate(columns):
                place = dict(zip((*row_axes, *column_axes), (*row_place, *column_place), strict=True))
                index = (group * out_channels + out, inp, *(place[axis] for axis in range(len(kernel))))
                weight[index] = matrix[row, column]
    return weight


def outputs_first(weight: Tensor, groups: int) -> Tensor:
    """A weight ``(in, out / groups, *kernel)`` laid out as ``(out, in / groups, *kernel)``, entry by entry."""
    total_in, out_channels, *kernel = weight.shape
    in_channels = total_in // groups
    laid_out = torch.zeros(groups * out_channels, in_channels, *kernel, dtype=weight.dtype)
    for group in range(groups):
        for out in range(out_channels):
            for inp in range(in_channels):
                laid_out[group * out_channels + out, inp] = weight[group * in_channels + inp, out]
    return laid_out


def truncate(matrix: Tensor, rank: int) -> Tensor:
    """The sum of the first ``rank`` singular triples, one at a time."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    result = torch.zeros_like(matrix, dtype=torch.float64)
    for j in range(rank):
        result += values[j] * torch.outer(left[:, j], right[j])
    return result


def truncated_weight(weight: Tensor, scheme: str, groups: int, rank: int) -> Tensor:
    """The weight with each group's matrix truncated to ``rank``."""
    matrices = [truncate(matrix, rank) for matrix in group_matrices(weight.double(), scheme, groups)]
    return weight_from_matrices(matrices, tuple(weight.shape), scheme)


def tail_energy(matrices: list[Tensor], rank: int) -> float:
    """The sum of the squared singular values past ``rank``, over all groups."""
    return sum(float(value) ** 2 for matrix in matrices for value in torch.linalg.svdvals(matrix.double())[rank:])


def least_error_by_search(costs: list[list[int]], errors: list[list[float]], budget: int) -> float:
    """The least total error within a budget, by trying every combination."""
    best = float("inf")
    for choice in itertools.product(*(range(len(one)) for one in costs)):
        if sum(costs[layer][index] for layer, index in enumerate(choice)) <= budget:
            best = min(best, sum(errors[layer][index] for layer, index in enumerate(choice)))
    return best
