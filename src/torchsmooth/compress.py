"""The one line that compresses a model in place, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ._checks import check_module
from ._lowrank_layer import LowRankLayer
from ._sharing import Sharing
from ._swap import swap_, take_over_
from .plan import Allocation, SchemeOption, plan_compression

if TYPE_CHECKING:
    from collections.abc import Callable

    from .report import CompressionReport

__all__ = ["restore_dense_", "svd_compress_"]


def svd_compress_(
    model: nn.Module,
    ratio: float | None = None,
    *,
    max_error: float | None = None,
    scheme: SchemeOption = "auto",
    allocation: Allocation = "budget",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> CompressionReport:
    """Replace the Linear and Conv2d layers of a model by low-rank ones, in place, with no fine-tuning.

    Everything is planned and factored first and swapped last: an error leaves the model bit for bit as it was. Device,
    dtype, memory format, mode, ``requires_grad``, bias parameters and hooks are kept. The weights are new parameters,
    so make the optimizer afterwards if training goes on. Penalties registered on a replaced layer go with it.

    Args:
        model: any model. A layer that cannot be compressed stays dense, and the report says why.
        ratio: fraction of *all* parameters of the model to remove, strictly between 0 and 1: 0.7 leaves 30 %.
        max_error: instead of a ratio: the largest relative error allowed in each layer, strictly between 0 and 1.
        scheme: ``"auto"`` (the best for each layer), ``"channel"``, ``"input"`` or ``"spatial"``.
        allocation: ``"budget"`` (least total error within the ratio) or ``"uniform"`` (each layer keeps the same
            fraction of its own parameters).
        filter_fn: ``filter_fn(module, qualified_name) -> bool``; False leaves a layer dense.

    Returns:
        The report: a table when printed, with one line for every layer.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: as :func:`torchsmooth.plan_compression`, which makes the plan.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> report = torchsmooth.svd_compress_(model, ratio=0.7)
        >>> type(model[0]).__name__, sum(p.numel() for p in model.parameters()) <= 0.3 * report.parameters_before
        ('LowRankLinear', True)

    Source: Runkel et al., "Smooth Model Compression without Fine-Tuning", 2025 (arXiv 2505.24469).
    """
    plan = plan_compression(
        model, ratio, max_error=max_error, scheme=scheme, allocation=allocation, filter_fn=filter_fn
    )
    return plan.apply_(model)


@torch.inference_mode(mode=False)
@torch.no_grad()
def restore_dense_(model: nn.Module) -> nn.Module:
    """Merge every low-rank layer back into an ``nn.Linear`` / ``nn.Conv2d``, in place.

    The result computes what the compressed model computes (to rounding), not what the model computed before. A model
    without low-rank layers is returned as it is.

    Args:
        model: a model that was compressed.

    Returns:
        The model.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if the model is itself a low-rank layer, with no parent to put the merged one in.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = torchsmooth.svd_compress_(model, ratio=0.5)
        >>> type(torchsmooth.restore_dense_(model)[0]).__name__
        'Linear'
    """
    check_module(model)
    if isinstance(model, LowRankLayer):
        raise ValueError(
            f"the model is itself a {type(model).__name__}, with no parent in which it could be replaced: "
            "call its to_linear() or to_conv2d()."
        )
    low_rank = [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLayer)]
    Sharing(model).check_replaceable(low_rank)
    replacements: dict[nn.Module, nn.Module] = {}
    for _, module in low_rank:
        dense = module.to_dense()
        take_over_(dense, module)
        replacements[module] = dense
    swap_(model, replacements)
    return model
