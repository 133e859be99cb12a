"""Tucker-2 in plain float64 steps, group by group, importing nothing from the library."""

from __future__ import annotations

import torch
from torch import Tensor


def unfolding(tensor: Tensor, axis: int) -> Tensor:
    """The matrix of ``(out, in, kh, kw)`` with the slices along one axis as rows."""
    return torch.stack([one.flatten() for one in tensor.unbind(axis)])


def leading(matrix: Tensor, rank: int) -> Tensor:
    """Projection onto the leading left singular vectors, of all of the space if there are fewer."""
    left = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    return left @ left.T


def hosvd(weight: Tensor, ranks: tuple[int, int], groups: int) -> Tensor:
    """The truncated higher-order SVD of each group, by projecting its weight on either side."""
    parts = []
    for tensor in weight.double().chunk(groups):
        inner, outer = leading(unfolding(tensor, 1), ranks[0]), leading(unfolding(tensor, 0), ranks[1])
        parts.append(torch.einsum("oihw,op,ij->pjhw", tensor, outer, inner))
    return torch.cat(parts)


def multiplied_out(up: Tensor, core: Tensor, down: Tensor, groups: int) -> Tensor:
    """The weight that three convolutions stand for, ``up`` and ``down`` 1×1, group by group."""
    parts = []
    for outer, middle, inner in zip(up.chunk(groups), core.chunk(groups), down.chunk(groups), strict=True):
        parts.append(torch.einsum("oa,abhw,bi->oihw", outer[:, :, 0, 0], middle, inner[:, :, 0, 0]))
    return torch.cat(parts)


def count(shape: tuple[int, ...], groups: int, ranks: tuple[int, int], form: str) -> int:
    """Entries of the three factors."""
    out_channels, in_channels, high, wide = shape
    r_in, r_out = ranks
    saved = r_in**2 + r_out**2 if form == "pivoted" else 0
    return groups * (r_in * in_channels + high * wide * r_in * r_out + r_out * (out_channels // groups) - saved)
