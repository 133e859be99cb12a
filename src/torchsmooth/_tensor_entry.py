"""What a file says of one tensor before it is read, and what is to become of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor


class Entry(NamedTuple):
    """A tensor of a checkpoint, as its file describes it.

    Attributes:
        shape: its shape.
        dtype: its dtype; None for one that torch does not know.
        size: bytes of its values.
        problem: why it is no ordinary tensor in memory; empty for one that is.
        span: the storage, and the bytes of it that it lies over; None where no two tensors share any.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    size: int
    problem: str = ""
    span: tuple[int, int, int] | None = None

    @property
    def floating(self) -> bool:
        """Whether its values are real or complex numbers, as those of parameters are."""
        return self.dtype is not None and (self.dtype.is_floating_point or self.dtype.is_complex)


@dataclass(frozen=True)
class Changes:
    """What becomes of the tensors of a file; the others are kept as they are.

    Attributes:
        factors: for the key of a weight, what reads the tensors in its place, by their keys.
        renamed: new keys by old ones.
        note: what was asked for.
    """

    factors: Mapping[str, Callable[[], dict[str, Tensor]]]
    renamed: Mapping[str, str]
    note: str

    def sizes(self, key: str, entry: Entry) -> dict[str, int]:
        """Return the bytes of what a tensor becomes, by key."""
        if key in self.factors:
            return {new: one.numel() * one.element_size() for new, one in self.factors[key]().items()}
        return {self.renamed.get(key, key): entry.size}
