"""Slow references for what is said of a spectrum: float64, full SVDs, one Python loop for each sum."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tests.reference import penalties

if TYPE_CHECKING:
    from fractions import Fraction


def singular_values(weight: Tensor, scheme: str, groups: int = 1, *, transposed: bool = False) -> list[list[float]]:
    """List the singular values of every group, from its full SVD."""
    matrices = penalties.group_matrices(weight, scheme, groups, transposed=transposed)
    return [torch.linalg.svd(matrix, full_matrices=True)[1].tolist() for matrix in matrices]


def together(values: list[list[float]]) -> list[float]:
    """Take the j-th singular values of all groups as one, √(Σ_g σ_gj²)."""
    return [math.hypot(*(group[j] for group in values)) for j in range(len(values[0]))]


def effective_rank(values: list[list[float]]) -> float:
    """Exponential of the entropy of the singular values over their sum."""
    pooled = together(values)
    total = math.fsum(pooled)
    entropy = 0.0
    for value in pooled:
        share = value / total if total else 0.0
        if share > 0:
            entropy -= share * math.log(share)
    return math.exp(entropy) if total else 0.0


def stable_rank(values: list[list[float]]) -> float:
    """Sum of the squares over the largest square."""
    pooled = together(values)
    return math.fsum((value / pooled[0]) ** 2 for value in pooled) if pooled[0] else 0.0


def rank_at(ratio: Fraction, rows: int, columns: int) -> int:
    """Count up while one more rank still leaves so many fewer parameters."""
    rank = 0
    while (rank + 1) * (rows + columns) <= (1 - ratio) * rows * columns:
        rank += 1
    return rank


def kept(weight: Tensor, scheme: str, rank: int, groups: int = 1, *, transposed: bool = False) -> float:
    """Truncate every group, and compare what is left with the weight, entry by entry."""
    lost = whole = 0.0
    for matrix in penalties.group_matrices(weight, scheme, groups, transposed=transposed):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        truncated = (left[:, :rank] * values[:rank]) @ right[:rank]
        for entry, other in zip(matrix.flatten().tolist(), truncated.flatten().tolist(), strict=True):
            lost += (entry - other) ** 2
            whole += entry**2
    return 1 - lost / whole if whole else 1.0


def roughness(weight: Tensor, groups: int = 1, *, transposed: bool = False) -> tuple[float, float]:
    """Squared first and second differences over the squared norm."""
    norm = math.fsum(entry**2 for entry in weight.detach().double().flatten().tolist())
    functions = (penalties.first_derivative, penalties.second_derivative)
    first, second = (one(weight, groups, transposed=transposed) / norm if norm else 0.0 for one in functions)
    return first, second
