"""The counter of torch, with formulas for the operators that it passes by: no count depends on which kernel runs.

Importing this file imports torch's counter, which may log that triton is not there: import it where it is needed.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    # From what an operator was given, with shapes in the place of tensors, and the shape of what it returned.
    Formula = Callable[[Sequence[Any], Any], int]

# Libraries of operators that are all known, here or to torch, or are no products.
_KNOWN = ("aten", "prim", "prims", "torchsmooth")


class Counter(FlopCounterMode):
    """Counts multiply-accumulates while it is entered.

    Attributes:
        passed_by: operators that were given two matrices or more, and for which there is no formula.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_formulas())
        # Older releases register the overloads of an operator, and look for the operator.
        for one, formula in [*self.flop_registry.items()]:
            if isinstance(one, torch._ops.OpOverload):
                self.flop_registry.setdefault(one._overloadpacket, formula)
        self.mod_tracker: Any = _Everywhere()
        self.passed_by: set[str] = set()

    @property
    def macs(self) -> int:
        """How many there were, each of which torch counts as two operations."""
        return int(self.get_total_flops()) // 2

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if func_packet not in self.flop_registry and _may_multiply(func_packet, [*args, *kwargs.values()]):
            self.passed_by.add(str(func_packet))
        return super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]


class _Everywhere:
    """Takes the place of what tells torch's counter in which module it is.

    That fails on models which hand a view of a parameter to a module: made without gradients, it says that it requires
    one, and has no function for it.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _may_multiply(operator: Any, given: Sequence[Any]) -> bool:
    if str(operator).partition(".")[0] in _KNOWN:
        return False
    matrices = [one for one in given if isinstance(one, Tensor) and one.is_floating_point() and one.dim() > 1]
    return len(matrices) > 1


def _formulas() -> dict[Any, Callable[..., int]]:
    """Return the operators that this release of torch has, each with its formula as torch's counter calls it."""
    found: dict[Any, Callable[..., int]] = {}
    for formula, names in _NAMES.items():
        for name in names.split():
            library, _, operator = name.rpartition(".")
            packet = getattr(getattr(torch.ops, library or "aten"), operator, None)
            if packet is not None:
                found[packet] = partial(_operations, formula)
    return found


def _operations(formula: Formula, *given: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * formula(given, out_shape)


def _times(*sizes: Any) -> int:
    return int(math.prod(sizes))


def _attention(given: Sequence[Any], _: Any) -> int:
    """Count both products whole, also what a mask hides, as where they are two matrix products."""
    query, key, value = given[:3]
    return _times(*query[:-1], key[-2], query[-1] + value[-1])


def _recurrent(given: Any, weights: Sequence[Any]) -> int:
    """Count each weight once for each step of each sequence; packed sequences have no others."""
    return _times(*given[:-1], sum(_times(*one) for one in weights if len(one) > 1))


def _recurrent_layers(given: Sequence[Any], _: Any) -> int:
    return _recurrent(given[0], given[1])


def _recurrent_layers_after_states(given: Sequence[Any], _: Any) -> int:
    return _recurrent(given[0], given[2])


def _recurrent_layer(given: Sequence[Any], _: Any) -> int:
    return _recurrent(given[0], given[1:3])


def _bilinear(given: Sequence[Any], _: Any) -> int:
    """Count ``(first @ weight) @ second``; nothing but a bilinear layer calls this operator."""
    first, (outputs, left, right) = given[:2]
    return _times(*first[:-1], outputs, left + 1, right)


def _product(given: Sequence[Any], output: Any) -> int:
    return _times(*output, given[0][-1])


def _added_product(given: Sequence[Any], output: Any) -> int:
    return _product(given[1:], output)


def _added_products(given: Sequence[Any], _: Any) -> int:
    return _times(*given[1], given[2][-1])


def _grouped_product(given: Sequence[Any], _: Any) -> int:
    """Count groups of rows, of columns or of what lies between; of two batches, a product for each pair."""
    left, right = given[:2]
    pairs = left[0] if len(left) == len(right) == 3 else 1  # noqa: PLR2004 - a batch of matrices
    return _times(pairs, *left[-2:], right[-1])


def _convolution_time_first(given: Sequence[Any], output: Any) -> int:
    return _times(*output, *given[1][:-1])


def _low_rank(given: Sequence[Any], output: Any) -> int:
    """Count both factors at each position of the output: the second one is 1×1."""
    _, down, up = given[:3]
    return _times(*output) // int(up[0]) * (_times(*down) + _times(*up))


# Releases of torch differ in what they have of these, and in what their own counters know.
_NAMES: dict[Formula, str] = {
    _attention: (
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps"
    ),
    _recurrent_layer: "mkldnn_rnn_layer",
    _recurrent_layers: "_cudnn_rnn miopen_rnn",
    _recurrent_layers_after_states: "_lstm_mps",
    _bilinear: "_trilinear",
    _product: "mv dot vdot mkldnn_linear _int_mm _weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu",
    _added_product: "addmv _addmm_activation",
    _added_products: "addbmm",
    _grouped_product: "_grouped_mm _scaled_grouped_mm",
    _convolution_time_first: "conv_tbc",
    _low_rank: "torchsmooth.low_rank_linear torchsmooth.low_rank_conv2d",
}
