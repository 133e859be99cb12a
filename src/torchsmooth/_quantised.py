"""Weights that a quantiser has replaced: tensors of integers that stand for floating values, such as torchao's.

``torchao.quantization.quantize_`` keeps the layers and swaps the weights of the children ``down`` and ``up`` for a
subclass of Tensor. Such a factor can be read, not written. Known by what it can do, so that torchao is never imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._checks import is_quantised

if TYPE_CHECKING:
    from torch import Tensor


def dequantised(tensor: Tensor) -> Tensor:
    """Return the floating values that a quantised tensor stands for, any other tensor as it is."""
    return tensor.dequantize() if is_quantised(tensor) else tensor
