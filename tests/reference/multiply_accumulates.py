"""Multiply-accumulates, counted one sum at a time: how many products go into it. Imports nothing from the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def product(rows: int, inner: int, columns: int) -> int:
    """A matrix product: each entry is a sum over what lies between."""
    return sum(inner for _ in range(rows) for _ in range(columns))


def attention(samples: int, heads: int, queries: int, keys: int, features: int, values: int) -> int:
    """A score for each query and key, and for each query a weighted sum of the values, whatever is masked."""
    total = 0
    for _ in range(samples * heads * queries):
        scores = [features for _ in range(keys)]
        sums = [keys for _ in range(values)]
        total += sum(scores) + sum(sums)
    return total


def recurrent(
    kind: str,
    sizes: tuple[int, int],
    lengths: Iterable[int],
    layers: int = 1,
    directions: int = 1,
    projected: int = 0,
) -> int:
    """Step by step: the gates of the input and of the state before, and the projection of the state."""
    features, hidden = sizes
    total, state = 0, projected or hidden
    for length in lengths:
        for layer in range(layers):
            width = features if layer == 0 else directions * state
            for _ in range(directions * length):
                total += sum(width + state for _ in range(GATES[kind] * hidden))
                total += sum(hidden for _ in range(projected))
    return total


def bilinear(rows: int, left: int, right: int, outputs: int) -> int:
    """The vectors from the left times the matrix of each output, and the result times those from the right."""
    return sum(product(1, left, right) + right for _ in range(rows) for _ in range(outputs))


def convolution(
    samples: int, channels: tuple[int, int], groups: int, kernel: Sequence[int], positions: Sequence[int]
) -> int:
    """At each position of the output, of a transposed one of the input, each group of inputs meets its outputs."""
    inside = [channels[0] // groups * (channels[1] // groups) for _ in range(groups)]
    total = samples * sum(inside)
    for size, places in zip(kernel, positions, strict=True):
        total *= size * places
    return total
