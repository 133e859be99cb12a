"""Deriving other ways to run a low-rank layer from its factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from ._execution import Derived
from ._fused_layers import FusedExecution, why_not_fused
from ._layers import KINDS
from ._lowrank_layer import LowRankLayer, TwoFactorLayer
from .lowrank_embedding import LowRankEmbedding
from .tucker import TuckerConv2d

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ._matricise import Form, LayerScheme

PADDED = 8  # numbers of half precision in 16 bytes

# Layers that are run by their own ``forward``, one input to one output. Embeddings look single rows up, for which no
# other way is worth its memory.
_TUNABLE = (TwoFactorLayer, TuckerConv2d)


def is_tunable(module: nn.Module) -> bool:
    """Say whether there is more than one way to run a module."""
    return isinstance(module, _TUNABLE) and not isinstance(module, LowRankEmbedding)


def derive(layer: LowRankLayer, execution: str) -> Derived | None:
    """Derive a module that computes what a layer computes, in another way.

    Args:
        layer: one that :func:`is_tunable`, not quantised; it is not changed.
        execution: one of ``EXECUTIONS``.

    Returns:
        The module, on the same device, in the same dtype and memory format; None where there is none: at full rank
        there is no pivoted form, a rank may need no padding, or :func:`why_not_fused` has a reason.

    Raises:
        ValueError: if the factors are no plain parameters.
    """
    if execution == "fused":
        return None if why_not_fused(layer) else Derived(execution, FusedExecution(layer).eval(), layer)
    with torch.no_grad():
        dense = layer.to_dense()
        module: Any = dense
        if execution == "padded":
            module = _padded(layer, dense)
        elif execution != "dense":
            module = _in_form(layer, dense, cast("Form", execution))
    return None if module is None else Derived(execution, module.eval().requires_grad_(requires_grad=False), layer)


def _padded(layer: Any, dense: nn.Module) -> LowRankLayer | None:
    """Add terms of zero until the rank is a multiple of what the hardware computes at once.

    In half precision a matrix whose rows do not begin at multiples of 16 bytes is many times slower on a GPU, whatever
    its size.
    """
    rank = layer.rank
    ranks = rank if isinstance(rank, tuple) else (rank,)
    wanted = tuple(-(-one // PADDED) * PADDED for one in ranks)
    scheme: LayerScheme = getattr(layer, "scheme", "channel")
    most: Any = KINDS[type(dense)].layouts(dense)[scheme].largest_rank("factored")
    limits = most if isinstance(most, tuple) else (most,)
    # A side as long as the whole axis cannot be longer, and is as good as the channels are.
    wanted = tuple(min(pair) for pair in zip(wanted, limits, strict=True))
    if wanted == ranks:
        return None
    made: Any = KINDS[type(dense)].like(dense, wanted if isinstance(rank, tuple) else wanted[0], scheme, "factored")
    factors: tuple[Tensor, ...] = layer.factors()
    if isinstance(rank, tuple):
        (more_in, more_out), (up, core, down) = (a - b for a, b in zip(wanted, ranks, strict=True)), factors
        factors = (
            F.pad(up, (0, more_out)),
            F.pad(core, (0, 0, 0, more_in, 0, more_out)),
            F.pad(down, (0, 0, 0, more_in)),
        )
    else:
        more, (up, down) = wanted[0] - rank, factors
        factors = F.pad(up, (0, more)), F.pad(down, (0, 0, 0, more))
    made.set_factors_(*factors)
    other: LowRankLayer = made
    return other


def _in_form(layer: Any, dense: nn.Module, form: Form) -> LowRankLayer | None:
    scheme: LayerScheme = getattr(layer, "scheme", "channel")
    layout: Any = KINDS[type(dense)].layouts(dense)[scheme]
    most, rank = layout.largest_rank(form), layer.rank
    fits = rank <= most if isinstance(rank, int) else all(a <= b for a, b in zip(rank, most, strict=True))
    if not fits:
        return None
    made: Any = KINDS[type(dense)].like(dense, rank, scheme, form)
    made.set_factors_(*layer.factors())
    other: LowRankLayer = made
    return other
