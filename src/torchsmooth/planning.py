"""Deciding which layer gets which scheme, form and rank, without touching the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ._checks import check_module, describe
from ._expansion import expanded_
from ._terms import checked_goal, checked_ratio
from ._workpiece import Request, Workpiece

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from ._targets import Target
    from ._terms import Allocation, FormOption, SchemeOption
    from ._workpiece import Computed
    from .plan import CompressionPlan

__all__ = ["plan_compression", "sweep"]


@torch.inference_mode(mode=False)
@torch.no_grad()
def plan_compression(
    model: nn.Module,
    ratio: float | None = None,
    *,
    max_error: float | None = None,
    scheme: SchemeOption | Sequence[SchemeOption] = "auto",
    form: FormOption = "auto",
    allocation: Allocation = "budget",
    target: Target = "params",
    example_inputs: Any = None,
    rank_multiple: int | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    calibration: Iterable[Any] | None = None,
    parametrized: Computed = "keep",
    progress: bool | None = None,
) -> CompressionPlan:
    r"""Decide which layer gets which scheme, form and rank, without touching the model.

    With a ratio, ranks are chosen for the whole model at once, for a small sum over the layers of the squared error
    :math:`\lVert W - \hat W\rVert_F^2` within the budget: one Lagrange multiplier, bisected, then what is left over is
    filled in. The budget is exact: never more than ``1 - ratio`` of the model's parameters, and as close below as one
    more singular triple allows. A layer that would not get smaller stays dense.

    Args:
        model: any model; its linear layers, convolutions and embeddings are planned, everything else is listed with a
            reason.
        ratio: fraction to remove of *all* parameters of the model (or of what ``target`` says), strictly between 0 and
            1: 0.7 leaves 30 %.
        max_error: instead of a ratio: the largest relative error allowed in the weight of each layer, strictly between
            0 and 1.
        scheme: ``"channel"``, ``"input"``, ``"spatial"`` (the better of its two orientations), ``"tucker"`` (three
            layers, with a pair of ranks), or ``"auto"``: the best of all for each layer. A sequence, such as
            ``("channel", "spatial")``, leaves the choice among its members. Linear layers and 1×1 convolutions have
            only one.
        form: ``"factored"``, two whole factors; ``"pivoted"``, which saves rank × rank of their entries; or
            ``"auto"``: the better of the two for each layer, and for target ``"macs"`` always factored, as pivots save
            multiply-accumulates but no time.
        allocation: ``"budget"`` as above, or ``"uniform"``: each layer keeps the same fraction of its own cost.
        target: what the ratio is a fraction of: ``"params"``; ``"macs"``, the multiply-accumulates for the example
            inputs, counted exactly, attention and recurrent layers included (operators of other libraries are left out,
            with a warning); or ``"latency"``, the time they take on the model's device, measured for each layer at a
            few ranks, alone, without gradients in eval mode.
        example_inputs: for the last two alone: a tensor, a tuple of positional arguments or a dict of keyword
            arguments, on the device of the model. The model is run on them and comes out as it was.
        rank_multiple: only ranks that are multiples of this are considered, at least 1. None: all of them for
            ``"params"``; for the other targets multiples of 16, which hardware computes at once, or for matrices of a
            full rank below 64 of 8, 4 or 1.
        filter_fn: ``filter_fn(module, qualified_name) -> bool``, called for each layer that could be compressed; False
            leaves it dense.
        calibration: a few unlabelled batches, as for :func:`torchsmooth.svd_compress_`: ranks are weighed by the
            squared relative error at each layer's output on this data, times :math:`\lVert W\rVert^2` as without data;
            with ``max_error`` they are not looked at, as the weights alone decide. Give them to ``apply_`` too, which
            fits the factors to them.
        parametrized: layers whose weight is computed (``torch.nn.utils.parametrize``, weight_norm, spectral_norm,
            pruning masks): ``"keep"`` leaves them as they are, ``"merge"`` compresses what is computed now, and
            removes what computed it; where that saves nothing, the layer stays as it is.
        progress: whether to show progress; None: on a terminal, when it takes more than two seconds.

    Returns:
        A plan that can be printed, edited, saved and applied.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: if an argument is out of range, both or neither of ``ratio`` and ``max_error`` are given,
            ``max_error`` is given with another target than parameters, example inputs are missing, or given for
            parameters, the ratio cannot be reached (the message names the largest that can), a weight holds NaN or
            infinite values, is sharded or not initialised, or there is nothing to compress.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> plan = torchsmooth.plan_compression(model, ratio=0.7)
        >>> plan.parameters_after <= 0.3 * plan.parameters_before
        True
        >>> plan = torchsmooth.plan_compression(model, 0.5, target="macs", example_inputs=torch.zeros(8, 64))
        >>> plan.macs_before, plan.macs_after <= 32768
        (65536, True)

    Source: one Lagrange multiplier for ranks under a budget: BALF, 2025 (arXiv 2509.25136); the bisection and the
    objective here are the library's own.
    """
    request = Request.of(
        scheme=scheme,
        form=form,
        allocation=allocation,
        target=target,
        example_inputs=example_inputs,
        rank_multiple=rank_multiple,
        filter_fn=filter_fn,
        calibration=calibration,
        parametrized=parametrized,
        progress=progress,
    )
    return planned(model, ratio, max_error, request)


def planned(model: nn.Module, ratio: float | None, max_error: float | None, request: Request) -> CompressionPlan:
    """Make a plan; of the arguments, the first three are not checked yet."""
    check_module(model)
    ratio, max_error = checked_goal(ratio, max_error, request.target)
    with expanded_(model, request.refusal) as expansion:
        return Workpiece(model, request, expansion, weighed=max_error is None).plan(ratio, max_error)


@torch.inference_mode(mode=False)
@torch.no_grad()
def sweep(
    model: nn.Module,
    ratios: Iterable[float],
    *,
    scheme: SchemeOption | Sequence[SchemeOption] = "auto",
    form: FormOption = "auto",
    allocation: Allocation = "budget",
    target: Target = "params",
    example_inputs: Any = None,
    rank_multiple: int | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    calibration: Iterable[Any] | None = None,
    parametrized: Computed = "keep",
    progress: bool | None = None,
) -> list[CompressionPlan]:
    """Make the plans for many ratios from one decomposition.

    Each plan is what :func:`torchsmooth.plan_compression` makes for its ratio alone. No layer is decomposed twice,
    neither for planning nor when any of the plans is applied to the model or to copies of it, except that scheme
    ``"tucker"`` refines its bases for the ranks that are applied.

    Args:
        model: as for :func:`torchsmooth.plan_compression`, like everything else.
        ratios: fractions to remove, each strictly between 0 and 1.
        scheme: ``"auto"``, ``"channel"``, ``"input"``, ``"spatial"`` or ``"tucker"``, or a sequence of those.
        form: ``"auto"``, ``"factored"`` or ``"pivoted"``.
        allocation: ``"budget"`` or ``"uniform"``.
        target: ``"params"``, ``"macs"`` or ``"latency"``.
        example_inputs: inputs to measure with, for the last two alone.
        rank_multiple: only ranks that are multiples of this, at least 1; None as for ``plan_compression``.
        filter_fn: ``filter_fn(module, qualified_name) -> bool``; False leaves a layer dense.
        calibration: a few unlabelled batches, to weigh ranks by the relative error at each layer's output.
        parametrized: layers whose weight is computed (``torch.nn.utils.parametrize``, weight_norm, spectral_norm,
            pruning masks): ``"keep"`` leaves them as they are, ``"merge"`` compresses what is computed now, and
            removes what computed it; where that saves nothing, the layer stays as it is.
        progress: whether to show progress; None: on a terminal, when it takes more than two seconds.

    Returns:
        The plans, in the order of the ratios.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: as :func:`torchsmooth.plan_compression`, also if any one of the ratios cannot be reached, or there
            are none.

    Example:
        >>> import copy, torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> plans = torchsmooth.sweep(model, [0.3, 0.5, 0.7])
        >>> small = [copy.deepcopy(model) for plan in plans]
        >>> [plan.apply_(one).ratio >= ratio for plan, one, ratio in zip(plans, small, [0.3, 0.5, 0.7])]
        [True, True, True]
    """
    check_module(model)
    if isinstance(ratios, (str, bytes, dict)) or not isinstance(ratios, Iterable):
        raise TypeError(f"ratios must be a list of fractions such as [0.5, 0.7], got {describe(ratios)}.")
    request = Request.of(
        scheme=scheme,
        form=form,
        allocation=allocation,
        target=target,
        example_inputs=example_inputs,
        rank_multiple=rank_multiple,
        filter_fn=filter_fn,
        calibration=calibration,
        parametrized=parametrized,
        progress=progress,
    )
    wanted = [checked_ratio(one, f"ratios[{index}]", target) for index, one in enumerate(ratios)]
    if not wanted:
        raise ValueError("ratios is empty: give at least one fraction to remove, such as [0.5, 0.7].")
    with expanded_(model, request.refusal) as expansion:
        workpiece = Workpiece(model, request, expansion)
        return [workpiece.plan(one) for one in wanted]
