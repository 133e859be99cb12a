"""Deriving other ways to run a low-rank layer from its factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from ._execution import Derived
from ._fused_layers import FusedExecution, why_not_fused
from ._layers import KINDS
from ._lowrank_layer import LowRankLayer, TwoFactorLayer
from ._packed import PackedExecution, why_not_packed
from .lowrank_embedding import LowRankEmbedding
from .tucker import TuckerConv2d

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ._matricise import Form, LayerScheme

_PADDED = 8  # numbers of half precision in 16 bytes

# Layers that are run by their own ``forward``, one input to one output. Embeddings look single rows up, for which no
# other way is worth its memory.
_TUNABLE = (TwoFactorLayer, TuckerConv2d)


def is_tunable(module: nn.Module) -> bool:
    """Say whether there is more than one way to run a module."""
    return isinstance(module, _TUNABLE) and not isinstance(module, LowRankEmbedding)


def derive(layer: LowRankLayer, execution: str, example: object = None) -> Derived | None:
    """Derive a module that computes what a layer computes, in another way.

    Args:
        layer: one that :func:`is_tunable`, not quantised; it is not changed.
        execution: one of ``EXECUTIONS``.
        example: an input of the layer, for which weights are packed.

    Returns:
        The module, on the same device, in the same dtype and memory format; None where there is none: at full rank
        there is no pivoted form, a rank may need no padding, or :func:`why_not_fused` or ``why_not_packed`` has a
        reason.

    Raises:
        ValueError: if the factors are no plain parameters, or were made in inference mode.
    """
    if any(map(torch.is_inference, (*layer.parameters(), *layer.buffers()))):
        raise ValueError(
            f"a {type(layer).__name__} made under torch.inference_mode(), where changes leave no trace: build or load "
            "it under torch.no_grad()"
        )
    if execution == "fused":
        return None if why_not_fused(layer) else Derived(execution, FusedExecution(layer).eval(), layer)
    with torch.no_grad():
        dense = layer.to_dense()
        module: Any = dense
        if execution == "padded":
            module = _padded(layer, dense)
        elif execution == "packed":
            module = _packed(layer if layer.form == "factored" else _in_form(layer, dense, "factored"), example)
        elif execution == "packed_dense":
            module = _packed(dense, example)
        elif execution != "dense":
            module = _in_form(layer, dense, cast("Form", execution))
    return None if module is None else Derived(execution, module.eval().requires_grad_(requires_grad=False), layer)


def _packed(module: nn.Module | None, example: Any) -> PackedExecution | None:
    if module is None:
        return None
    children = getattr(module, "factor_children", ())
    # From the input to the output.
    layers: list[Any] = [getattr(module, name) for name in reversed(children)] or [module]
    if why_not_packed(layers, example):
        return None
    try:
        return PackedExecution(layers, example)
    except (AttributeError, RuntimeError):  # a torch, or a processor, without these kernels for this dtype
        return None


def _padded(layer: Any, dense: nn.Module) -> LowRankLayer | None:
    """Add terms of zero until the rank is a multiple of what the hardware computes at once.

    In half precision a matrix whose rows do not begin at multiples of 16 bytes is many times slower on a GPU, whatever
    its size.
    """
    ranks = _sides(layer.rank)
    # A side as long as the whole axis cannot be longer, and is as good as the channels are.
    limits = _largest(layer, dense, "factored")
    wanted = tuple(min(-(-one // _PADDED) * _PADDED, most) for one, most in zip(ranks, limits, strict=True))
    if wanted == ranks:
        return None
    factors: tuple[Tensor, ...] = layer.factors()
    more = [a - b for a, b in zip(wanted, ranks, strict=True)]
    if isinstance(layer.rank, tuple):
        (more_in, more_out), (up, core, down) = more, factors
        padded = F.pad(up, (0, more_out)), F.pad(core, (0, 0, 0, more_in, 0, more_out)), F.pad(down, (0, 0, 0, more_in))
        return _made(layer, dense, "factored", wanted, padded)
    up, down = factors
    return _made(layer, dense, "factored", wanted[0], (F.pad(up, (0, *more)), F.pad(down, (0, 0, 0, *more))))


def _in_form(layer: Any, dense: nn.Module, form: Form) -> LowRankLayer | None:
    ranks, limits = _sides(layer.rank), _largest(layer, dense, form)
    if any(one > most for one, most in zip(ranks, limits, strict=True)):
        return None
    return _made(layer, dense, form, layer.rank, layer.factors())


def _made(layer: Any, dense: nn.Module, form: Form, rank: Any, factors: tuple[Tensor, ...]) -> LowRankLayer:
    made: Any = KINDS[type(dense)].like(dense, rank, _scheme(layer), form)
    made.set_factors_(*factors)
    other: LowRankLayer = made
    return other


def _largest(layer: Any, dense: nn.Module, form: Form) -> tuple[int, ...]:
    layout: Any = KINDS[type(dense)].layouts(dense)[_scheme(layer)]
    return _sides(layout.largest_rank(form))


def _scheme(layer: Any) -> LayerScheme:
    scheme: LayerScheme = getattr(layer, "scheme", "channel")
    return scheme


def _sides(rank: Any) -> tuple[int, ...]:
    return rank if isinstance(rank, tuple) else (rank,)
