"""Slow references for the penalties: float64, one Python loop for each index, a full SVD for each matrix."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def group_blocks(weight: Tensor, groups: int = 1, *, transposed: bool = False) -> list[Tensor]:
    """Collect, for each group, the entries that join its output channel o to its input channel i, as block[o, i]."""
    per_group, second = weight.shape[0] // groups, weight.shape[1]
    outputs, inputs = (second, per_group) if transposed else (per_group, second)
    blocks = []
    for group in range(groups):
        block = torch.zeros(outputs, inputs, *weight.shape[2:], dtype=torch.float64)
        for o, i in product(range(outputs), range(inputs)):
            # Output o of a group reads its own inputs; a transposed weight is stored by input channel.
            source = weight[group * inputs + i, o] if transposed else weight[group * outputs + o, i]
            block[o, i] = source.detach().to(torch.float64)
        blocks.append(block)
    return blocks


def first_derivative(weight: Tensor, groups: int = 1, *, transposed: bool = False) -> float:
    """Sum (W[o+1, i] - W[o, i])² and (W[o, i+1] - W[o, i])² over all entries of all groups."""
    total = 0.0
    for block in group_blocks(weight, groups, transposed=transposed):
        outputs, inputs = block.shape[:2]
        values = block.reshape(outputs, inputs, -1).tolist()
        for o, i, k in product(range(outputs), range(inputs), range(block[0, 0].numel())):
            if o + 1 < outputs:
                total += (values[o + 1][i][k] - values[o][i][k]) ** 2
            if i + 1 < inputs:
                total += (values[o][i + 1][k] - values[o][i][k]) ** 2
    return total


def second_derivative(weight: Tensor, groups: int = 1, *, transposed: bool = False) -> float:
    """Sum (W[o+2, i] - 2 W[o+1, i] + W[o, i])², and the same along i, over all entries of all groups."""
    total = 0.0
    for block in group_blocks(weight, groups, transposed=transposed):
        outputs, inputs = block.shape[:2]
        values = block.reshape(outputs, inputs, -1).tolist()
        for o, i, k in product(range(outputs), range(inputs), range(block[0, 0].numel())):
            if o + 2 < outputs:
                total += (values[o + 2][i][k] - 2 * values[o + 1][i][k] + values[o][i][k]) ** 2
            if i + 2 < inputs:
                total += (values[o][i + 2][k] - 2 * values[o][i + 1][k] + values[o][i][k]) ** 2
    return total


def _row_and_column(scheme: str, o: int, i: int, position: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if scheme == "channel":
        return (o,), (i, *position)
    if scheme == "input":
        return (o, *position), (i,)
    height, width = position
    if scheme == "spatial":
        return (o, width), (i, height)
    if scheme == "spatial_transposed":
        return (o, height), (i, width)
    raise ValueError(scheme)


def group_matrices(weight: Tensor, scheme: str, groups: int = 1, *, transposed: bool = False) -> list[Tensor]:
    """Place every entry of every group by its row and its column."""
    matrices = []
    for block in group_blocks(weight, groups, transposed=transposed):
        entries = {}
        indices = product(*map(range, block.shape))
        for (o, i, *position), value in zip(indices, block.flatten().tolist(), strict=True):
            entries[_row_and_column(scheme, o, i, tuple(position))] = value
        rows = sorted({row for row, _ in entries})
        columns = sorted({column for _, column in entries})
        listed = [[entries[row, column] for column in columns] for row in rows]
        matrices.append(torch.tensor(listed, dtype=torch.float64))
    return matrices


def nuclear_norm(weight: Tensor, scheme: str = "channel", groups: int = 1, *, transposed: bool = False) -> float:
    """Add up the singular values of every group's matrix, from its full SVD."""
    total = 0.0
    for matrix in group_matrices(weight, scheme, groups, transposed=transposed):
        _, values, _ = torch.linalg.svd(matrix, full_matrices=True)
        for value in values.tolist():
            total += value
    return total


def nuclear_ratio(weight: Tensor, scheme: str = "channel", groups: int = 1, *, transposed: bool = False) -> float:
    """Add up, over the groups, the singular values over the root of the sum of their squares."""
    total = 0.0
    for matrix in group_matrices(weight, scheme, groups, transposed=transposed):
        _, values, _ = torch.linalg.svd(matrix, full_matrices=True)
        size = sum(value**2 for value in values.tolist()) ** 0.5
        total += sum(values.tolist()) / size if size else 0.0
    return total


def spectral_norm(weight: Tensor, scheme: str = "channel", groups: int = 1, *, transposed: bool = False) -> float:
    """Find the largest singular value of any group's matrix: the norm dual to the nuclear norm."""
    largest = 0.0
    for matrix in group_matrices(weight, scheme, groups, transposed=transposed):
        _, values, _ = torch.linalg.svd(matrix, full_matrices=True)
        largest = max(largest, *values.tolist())
    return largest


def inner_product(one: Tensor, other: Tensor) -> float:
    """Add up the products of matching entries in float64."""
    total = 0.0
    for a, b in zip(one.detach().double().flatten().tolist(), other.detach().double().flatten().tolist(), strict=True):
        total += a * b
    return total


def subgradient_defect(
    weight: Tensor, gradient: Tensor, scheme: str = "channel", groups: int = 1, *, transposed: bool = False
) -> float:
    """Say how far a gradient is from being a subgradient of the nuclear norm at a weight; zero if it is one.

    G is a subgradient at W exactly if ‖G‖₂ ≤ 1 and ⟨G, W⟩ = ‖W‖_*; the second is measured relative to ‖W‖_*.
    """
    norm = nuclear_norm(weight, scheme, groups, transposed=transposed)
    pairing = abs(inner_product(gradient, weight) - norm) / (norm or 1.0)
    return max(spectral_norm(gradient, scheme, groups, transposed=transposed) - 1.0, pairing)
