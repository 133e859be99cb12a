"""The one line that compresses a model in place, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ._alike import prepared_
from ._checks import check_module, with_article
from ._expansion import collapse_
from ._lowrank_layer import LowRankLayer
from ._ranks import team_of
from ._sharing import Sharing
from ._swap import SOURCE, swap_, take_over_
from ._undo import Undo
from ._workpiece import Request
from .planning import planned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch.distributed import ProcessGroup

    from ._targets import Target
    from ._terms import Allocation, FormOption, SchemeOption
    from ._workpiece import Computed
    from .report import CompressionReport

__all__ = ["restore_dense_", "svd_compress_"]


@torch.inference_mode(mode=False)
@torch.no_grad()
def svd_compress_(
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
    process_group: ProcessGroup | None = None,
) -> CompressionReport:
    """Replace linear layers, convolutions and embeddings of a model by low-rank ones, in place, with no fine-tuning.

    Everything is planned and factored first and swapped last: an error leaves the model bit for bit as it was. Device,
    dtype, memory format, mode, ``requires_grad``, bias parameters and hooks are kept. The weights are new parameters,
    so make the optimizer afterwards if training goes on. Penalties registered on a replaced layer go with it. Layers
    that are low-rank already are compressed further where that helps: the ratio is of the parameters that are there.

    Where ``torch.distributed`` is initialised, every rank calls this with the same model and the same arguments, and
    all get the same model, to the last bit, and the same report. Each rank decomposes some of the layers; the first one
    plans, and measures if ``target`` asks for it. The calibration batches of all ranks count together, as if one
    process had them all: give each rank its own, or all of them the same. Buffers that differ, such as BatchNorm
    statistics after training with DistributedDataParallel, become those of the first rank. If one rank fails, all raise
    and none is changed. A rank waits two minutes for the others to come; to compress on one rank alone, use
    ``plan_compression(model, ratio).apply_(model)``, which talks to nobody. Of a model in DistributedDataParallel,
    compress ``.module`` and wrap that anew, since the old wrapper reduces the old parameters. A sharded model has to be
    gathered first.

    Args:
        model: any model. A layer that cannot be compressed stays dense, and the report says why.
        ratio: fraction to remove of *all* parameters of the model (or of what ``target`` says), strictly between 0 and
            1: 0.7 leaves 30 %.
        max_error: instead of a ratio: the largest relative error allowed in the weight of each layer, strictly between
            0 and 1. With ``calibration`` that is before the refit, which brings the output closer and may move the
            weight further than that.
        scheme: ``"auto"`` (the best for each layer), ``"channel"``, ``"input"``, ``"spatial"`` or ``"tucker"``, or a
            sequence of those to choose from.
        form: ``"auto"`` (the better for each layer), ``"factored"`` or ``"pivoted"`` (fewer parameters at equal rank).
        allocation: ``"budget"`` (least total error within the ratio) or ``"uniform"`` (each layer keeps the same
            fraction of its own cost).
        target: what the ratio is a fraction of: ``"params"``, ``"macs"`` or ``"latency"``. The last two are counted or
            measured before and after, and reported.
        example_inputs: for the last two alone: a tensor, a tuple of positional arguments or a dict of keyword
            arguments, on the device of the model.
        rank_multiple: only ranks that are multiples of this, at least 1; None: all of them for target ``"params"``,
            those that suit the hardware for the others.
        filter_fn: ``filter_fn(module, qualified_name) -> bool``; False leaves a layer dense.
        calibration: a few unlabelled batches on the device of the model, such as a list of 8 tensors of 128 images, or
            a DataLoader: tensors; tuples or lists, of which the first element is the input; or dicts of keyword
            arguments. Ranks are then weighed by the squared relative error at each layer's output on this data, times
            ‖W‖² (with ``max_error`` the weights alone decide), and factors, biases and BatchNorm statistics are fitted
            to it in closed form, layer after layer; no gradients. A layer that the data never reaches or with inputs
            wider than 8,192, a transposed convolution and an embedding are compressed without, and the report says so.
            The batches are kept in memory meanwhile, second moments in float64 of at most 1 GiB, or of one layer, and
            up to 2 GiB of outputs of layers.
        parametrized: layers whose weight is computed (``torch.nn.utils.parametrize``, weight_norm, spectral_norm,
            pruning masks): ``"keep"`` leaves them as they are, ``"merge"`` compresses what is computed now, and
            removes what computed it; where that saves nothing, the layer stays as it is.
        progress: whether to show progress; None: on a terminal, when it takes more than two seconds.
        process_group: the ranks that share the work, if not those of the default process group. Without an initialised
            ``torch.distributed``, this process does everything.

    Returns:
        The report: a table when printed, with one line for every layer.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: as :func:`torchsmooth.plan_compression`, which makes the plan; if models or arguments differ among
            the ranks, or this process is not in the group; whatever another rank raises as one of these two.
        RuntimeError: if another rank does not come, or fails for another reason.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> report = torchsmooth.svd_compress_(model, ratio=0.7)
        >>> type(model[0]).__name__, sum(p.numel() for p in model.parameters()) <= 0.3 * report.parameters_before
        ('LowRankLinear', True)

    With data:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> batches = torch.randn(4, 100, 64, generator=torch.Generator().manual_seed(0))
        >>> report = torchsmooth.svd_compress_(model, ratio=0.7, calibration=list(batches))
        >>> report["0"].output_error < report["0"].relative_error
        True

    Source: Runkel et al., "Smooth Model Compression without Fine-Tuning", 2025 (arXiv 2505.24469). Whitening by the
    second moment of the inputs: Chen et al., "DRONE: Data-aware Low-rank Compression for Large NLP Models", 2021.
    Fitting one layer after the other to the dense network's outputs: Zhang et al., "Accelerating Very Deep
    Convolutional Networks for Classification and Detection", 2016.
    """
    team = team_of(process_group, model)
    with team:
        alike = {
            "ratio": ratio,
            "max_error": max_error,
            "scheme": scheme,
            "form": form,
            "allocation": allocation,
            "target": target,
            "rank_multiple": rank_multiple,
            "parametrized": parametrized,
            "calibration": "batches" if calibration is not None else None,
        }
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
            team=team,
        )
        with prepared_(team, model, alike):
            plan = planned(model, ratio, max_error, request)
            return plan._apply_(model, request.inputs, request.calibration, team)


@torch.inference_mode(mode=False)
@torch.no_grad()
def restore_dense_(model: nn.Module) -> nn.Module:
    """Merge every low-rank layer back into the ordinary layer that it stands for, in place.

    The result computes what the compressed model computes (to rounding), not what the model computed before. A model
    without low-rank layers is returned as it is.

    Args:
        model: a model that was compressed.

    Returns:
        The model.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if the model is itself a low-rank layer, with no parent to put the merged one in, or a layer cannot
            be merged; it is named.

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
            f"the model is itself {with_article(type(model).__name__)}, with no parent in which it could be replaced: "
            "call its to_dense()."
        )
    low_rank = [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLayer)]
    expanded = [(name, module) for name, module in model.named_modules() if SOURCE in vars(module)]
    Sharing(model).check_replaceable([*low_rank, *expanded])
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in low_rank:
        try:
            dense = module.to_dense()
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        take_over_(dense, module)
        replacements[module] = dense
    with Undo() as undo:
        undo.add(swap_, model, {new: old for old, new in replacements.items()})
        swap_(model, replacements)
        collapse_(model, undo)
        undo.keep()
    return model
