"""Recognising a tensor without keeping it: by a number that is the same for the same bits, and else is not.

That two tensors have the same number by chance is about as likely as that two random whole numbers of 64 bits are the
same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A tensor is read in rows of so many words, which share the numbers that places stand for; and so many rows at a time,
# to bound the memory that work on them takes.
_ROW, _CHUNK = 1 << 12, 1 << 6
# Odd numbers of which places become numbers like random ones (those of the generator SplitMix64).
_MIXERS = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64
_WORD = 8  # bytes


class Outline(NamedTuple):
    """What two tensors have in common if they are the same."""

    shape: tuple[int, ...]
    dtype: str
    checksum: int | None

    @staticmethod
    def of(tensor: Tensor) -> Outline:
        """Outline a tensor; the same on every device."""
        return Outline(tuple(tensor.shape), str(tensor.dtype), checksum(tensor))


def checksum(tensor: Tensor) -> int | None:
    """Sum up the bits of a tensor, word by word, each times a number that its place stands for.

    Whole numbers modulo 2⁶⁴: the order of summing does not matter, so that all devices and machines agree. It takes a
    few passes over the tensor, fewer than a decomposition does.

    Args:
        tensor: of any shape, dtype and strides, which do not count; the order of the entries does.

    Returns:
        The sum; None for what has no such bits: sparse, quantised or nested tensors, subclasses, and those on ``meta``.
    """
    plain = type(tensor.data) is Tensor and tensor.layout is torch.strided
    if not plain or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        return None
    entries = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[entries.element_size()]
    bits = entries.detach().contiguous().flatten().view(kind)
    each = _WORD // bits.element_size()
    if bits.stride(0) != 1 or bits.storage_offset() % each:  # a single entry, or off the borders of words
        bits = bits.clone(memory_format=torch.contiguous_format)
    words = bits[: len(bits) - len(bits) % each].view(torch.int64)
    rows = words[: len(words) - len(words) % _ROW].view(-1, _ROW)
    left_over = words[rows.numel() :].unsqueeze(0), bits[each * len(words) :].to(torch.int64).unsqueeze(0)
    parts = [one for one in (*torch.split(rows, _CHUNK), *left_over) if one.numel()]
    # Odd ones, so that none of them hides anything.
    places = torch.arange(1, 1 + _ROW + len(rows) + len(left_over), device=tensor.device) * _MIXERS[0]
    columns, of_rows = (((places ^ (places >> 29)) * _MIXERS[1]) | 1).tensor_split([_ROW])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for several in parts:
        # The upper half is added to the lower one, as a product differs in upper bits only where its factor does.
        sums = ((several + (several >> 32)) * columns[: several.shape[1]]).sum(1)
        total += (sums * of_rows[: len(several)]).sum()
        of_rows = of_rows[len(several) :]
    return int(total)
