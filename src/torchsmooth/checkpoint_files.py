"""Compressing the checkpoint of a model that is never built: one layer at a time, and in steps that can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ._checkpoint_factors import Workshop
from ._checkpoint_layers import FoundLayers, layers_by_name, layers_of_model
from ._checks import check_filter, check_module, describe
from ._destination import Destination
from ._planner import Filter, Planner, Subject
from ._progress import progress as shown
from ._tensor_entry import Changes
from ._tensor_source import Checkpoint
from ._terms import checked_goal, checked_terms
from ._work_folder import WorkFolder
from .report import CompressionReport, layer_report

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ._checkpoint_layers import CheckpointLayer
    from ._terms import Allocation, FormOption, SchemeOption, Terms
    from .layer_plan import LayerPlan
    from .plan import CompressionPlan

__all__ = ["compress_checkpoint"]

SUBJECT = Subject("checkpoint", Filter(rule="filter_fn(shape, name) returns True for a layer to compress."))


def compress_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    ratio: float | None = None,
    *,
    max_error: float | None = None,
    scheme: SchemeOption | Sequence[SchemeOption] = "auto",
    form: FormOption = "auto",
    allocation: Allocation = "budget",
    rank_multiple: int | None = None,
    filter_fn: Callable[[tuple[int, ...], str], bool] | None = None,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
) -> CompressionReport:
    """Compress a checkpoint file without building the model, for :func:`torchsmooth.load_compressed_` to read.

    The tensors are those that :func:`torchsmooth.svd_compress_` would give a model with these weights, to the last bit
    (without ``model``, unless two layers gain exactly the same by their next rank). Weights are read one at a time, and
    nothing in a file is ever executed. What else a file holds is copied: norms, buffers, tensors of other dtypes, the
    metadata of safetensors; of a training checkpoint with the state dict under ``"state_dict"``, ``"model"`` or
    ``"model_state_dict"`` also the other entries, if they hold no tensors.

    Without ``model``, layers are told by names and shapes: ``NAME.weight`` with two axes is a Linear, with three to
    five a convolution without groups. Names that end like those of embeddings (``wte``, ``embed_tokens``,
    ``position_embeddings``), convolutions with one input channel, and tied weights stay dense. What names and shapes
    cannot tell needs ``model`` or ``filter_fn``: convolutions that are grouped or transposed, embeddings under other
    names, and weights that are used transposed. Attention, recurrent and registered layers stay dense in either case;
    :func:`torchsmooth.svd_compress_` compresses them in a model.

    All is written beside the destination first, in a folder ``.NAME.torchsmooth-partial``, and takes its place in the
    end: a run that is stopped leaves the destination as it was, and the next one with the same arguments goes on where
    the last one stopped. With other arguments, what was decomposed is still used. The folder is removed at the end; it
    may be deleted at any time that nothing runs.

    In memory are at most one layer, up to about eight times in float64, and the singular values of all; in scheme
    ``"tucker"`` also a number for each pair of channels of each convolution. Pickles are mapped from the disk, if they
    were written by torch 1.6 or later.

    Args:
        source: a ``.safetensors`` file; an index (``model.safetensors.index.json``) of several; a folder with one of
            these; or a pickle of tensors that ``torch.save`` wrote.
        destination: a file of the same kind, replaced if it exists. With an index: a folder, or an index in it; files
            there that are not part of a checkpoint stay.
        ratio: fraction to remove of *all* parameters in the checkpoint, strictly between 0 and 1: 0.7 leaves 30 %.
        max_error: instead of a ratio: the largest relative error allowed in each layer, strictly between 0 and 1.
        scheme: ``"auto"``, ``"channel"``, ``"input"``, ``"spatial"`` or ``"tucker"``, or a sequence of those.
        form: ``"auto"``, ``"factored"`` or ``"pivoted"``.
        allocation: ``"budget"`` or ``"uniform"``.
        rank_multiple: only ranks that are multiples of this, at least 1; None: all of them.
        filter_fn: ``filter_fn(shape, name) -> bool``, called for each layer that could be compressed, with the shape of
            its weight and its name; False leaves it dense.
        model: the dense model, if it can be built, also on the meta device (``with torch.device("meta"):``): tells
            exactly what each tensor is. It is not changed.
        device: where weights are decomposed, one at a time.
        progress: whether to show progress; None: on a terminal, when it takes more than two seconds.

    Returns:
        The report, as of :func:`torchsmooth.svd_compress_`.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: as :func:`torchsmooth.svd_compress_`; if a file is broken, holds something that would have to be
            executed, or no state dict; if ``model`` has other tensors; if the destination is of another kind, or the
            source itself; or if the source changes meanwhile. The destination is as it was then.
        OSError: if a file cannot be read or written.
        ImportError: if the package safetensors is needed and missing.

    Example:
        >>> import pathlib, tempfile, torch, torchsmooth
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dense, small = pathlib.Path(folder) / "dense.pt", pathlib.Path(folder) / "small.pt"
        ...     torch.save(build().state_dict(), dense)
        ...     report = torchsmooth.compress_checkpoint(dense, small, ratio=0.7)
        ...     model = torchsmooth.load_compressed_(build(), small)
        >>> report.ratio >= 0.7, type(model[0]).__name__
        (True, 'LowRankLinear')

    Source: as of :func:`torchsmooth.svd_compress_`.
    """
    terms = checked_terms(
        scheme=scheme,
        form=form,
        allocation=allocation,
        target="params",
        rank_multiple=rank_multiple,
        progress=progress,
    )
    goal = checked_goal(ratio, max_error, "params")
    return compressed(source, destination, goal, terms, checked_device(device), filter_fn=filter_fn, model=model)


@torch.inference_mode(mode=False)
@torch.no_grad()
def compressed(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    goal: tuple[float | None, float | None],
    terms: Terms,
    where: torch.device,
    *,
    filter_fn: Callable[[tuple[int, ...], str], bool] | None = None,
    model: nn.Module | None = None,
    subject: Subject = SUBJECT,
) -> CompressionReport:
    """Compress a checkpoint; ``goal`` is the ratio and the largest error, one of them None."""
    checkpoint, found = opened(source, filter_fn, model, subject)
    place = Destination.of(destination, checkpoint)
    workshop = Workshop(checkpoint, found.layers, terms, where)
    layers = [(workshop.name_of(one), one.name, one.parameters, one.aliases) for one in found.layers]
    asked = [*goal, terms.form, terms.allocation, terms.multiple, found.parameters, layers]
    work = WorkFolder(place.work_folder, checkpoint.identity(), asked)

    try:
        with checkpoint.unchanged():
            plan, made = _made(work, workshop, found, terms, goal, subject)
            changes = _changes(work, [one for one in found.layers if one.name in made], made, plan.asked)
            work.write_files(checkpoint, changes, partial(shown, description="Writing files", enabled=terms.show))
        place.commit(work, checkpoint, changes, plan.parameters_after)
    except BaseException:  # also an interruption from the keyboard
        if checkpoint.changed():
            work.remove()  # what was kept may be of either state
        else:
            work.tidy()
        raise
    work.remove()
    return _report(plan, made, {one.name: one.note for one in found.layers})


def opened(
    source: Any,
    filter_fn: Callable[[tuple[int, ...], str], bool] | None,
    model: nn.Module | None = None,
    subject: Subject = SUBJECT,
) -> tuple[Checkpoint, FoundLayers]:
    """Open a checkpoint and find its layers; of the arguments, none is checked yet."""
    if isinstance(source, Mapping):
        raise TypeError(f"source must be a path, got {describe(source)}: save a state dict with torch.save first.")
    if isinstance(source, nn.Module):
        raise TypeError(f"source must be a path, got {describe(source)}: svd_compress_ takes a model.")
    check_filter(filter_fn, "(shape, name)")
    if model is not None:
        check_module(model)
    checkpoint = Checkpoint(source)
    found = layers_by_name(checkpoint) if model is None else layers_of_model(checkpoint, model)
    return checkpoint, found.filtered(filter_fn, subject.filter)


def planner_for(
    workshop: Workshop,
    found: FoundLayers,
    terms: Terms,
    known: Callable[[CheckpointLayer], Mapping[str, Any]],
    subject: Subject,
) -> Planner:
    """Look at one layer after the other; ``known`` returns what :meth:`Workshop.decompose` does."""
    able = [one for one in found.layers if one.dense is not None]
    results = {one.name: known(one) for one in shown(able, "Decomposing layers", enabled=terms.show)}
    plans: list[LayerPlan] = workshop.plans(found.layers, results)
    return Planner(subject, terms, plans, found.parameters, found.parameters)


def checked_device(device: Any) -> torch.device:
    """Refuse what is no device."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch.device or the name of one, got {describe(device)}.") from error
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(found)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return found


def _made(
    work: WorkFolder,
    workshop: Workshop,
    found: FoundLayers,
    terms: Terms,
    goal: tuple[float | None, float | None],
    subject: Subject,
) -> tuple[CompressionPlan, dict[str, dict[str, Any]]]:
    """Plan, and factor what was planned to be; return what there is to say of each low-rank layer, by name."""

    def known(layer: CheckpointLayer) -> Mapping[str, Any]:
        return work.result("spectra", workshop.name_of(layer), lambda: workshop.decompose(layer))

    plan = planner_for(workshop, found, terms, known, subject).plan(*goal)
    choices = {one.name: one.choice for one in plan if one.choice is not None}
    made = {}
    for layer in shown([one for one in found.layers if one.name in choices], "Factoring layers", enabled=terms.show):
        choice = choices[layer.name]
        name = workshop.name_of(layer, *choice)
        result = work.result("factors", name, partial(workshop.factor, layer, choice))
        made[layer.name] = {"bias": result["bias"], "error": result["error"], "result": name}
    return plan, made


def _changes(
    work: WorkFolder, layers: Sequence[CheckpointLayer], made: Mapping[str, Mapping[str, Any]], note: str
) -> Changes:
    """Say what becomes of the weights and biases of layers, under each of their names."""
    factors: dict[str, Callable[[], dict[str, Tensor]]] = {}
    renamed: dict[str, str] = {}
    for layer in layers:
        read: Callable[[], Mapping[str, Tensor]] = partial(_factors, work, made[layer.name]["result"])
        if layer.aliases:  # what is shared stays shared in a pickle
            read = cache(read)
        for name in (layer.name, *layer.aliases):
            factors[f"{name}.weight"] = partial(_tensors, read, name)
            if layer.bias_key is not None:
                renamed[f"{name}.bias"] = f"{name}.{made[layer.name]['bias']}"
    return Changes(factors, renamed, note)


def _factors(work: WorkFolder, name: str) -> Mapping[str, Tensor]:
    found = work.known("factors", name)
    if found is None:
        raise OSError(f"{str(work.path)!r} was changed by somebody else while it was in use: start again.")
    tensors: Mapping[str, Tensor] = found["tensors"]
    return tensors


def _tensors(read: Callable[[], Mapping[str, Tensor]], layer: str) -> dict[str, Tensor]:
    return {f"{layer}.{key}": tensor for key, tensor in read().items()}


def _report(
    plan: CompressionPlan, made: Mapping[str, Mapping[str, Any]], notes: Mapping[str, str]
) -> CompressionReport:
    reports = [
        layer_report(one, float(made[one.name]["error"]), note=notes[one.name])
        if one.name in made
        else layer_report(one, 0.0)
        for one in plan
    ]
    return CompressionReport(tuple(reports), plan.parameters_before, plan.parameters_after, plan.asked)
