"""Pruning without fine-tuning, by what a user of PyTorch would reach for: the baselines of the benchmarks.

Every function prunes a network in place until a fraction ``ratio`` of *all* of its parameters counts as removed, which
is what ``torchsmooth`` means by the word, and returns the number of parameters that count as left:

* ``zero_weights_``: single weights become zero (``torch.nn.utils.prune.global_unstructured``);
* ``zero_filters_``: whole filters become zero (``torch.nn.utils.prune.ln_structured``);
* ``remove_channels_``: channels are cut out, and all that depends on them (Torch-Pruning).

The first two leave the network as large as it was, and zeros count as removed, in favour of the baseline: storing what
is left would take indices too.
"""

from __future__ import annotations

import bisect
import copy
import math
import warnings
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.utils import prune

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_STEPS = 1000  # shares of filters are tried in steps of 0.1 %


def count_left(model: nn.Module) -> int:
    """Count all parameters, except the zeros in the weights of convolutions and linear layers."""
    zeros = sum(int((layer.weight == 0).sum()) for layer in _layers(model))
    return _count(model) - zeros


def zero_weights_(model: nn.Module, ratio: float) -> int:
    """Set the weights of least magnitude, anywhere in the convolutions and linear layers, to zero.

    Args:
        model: pruned in place; biases and norms are left alone.
        ratio: fraction of all parameters of the model to set to zero, strictly between 0 and 1.

    Returns:
        The number of parameters that are left, zeros not counted.

    Raises:
        ValueError: if the weights are too few for the ratio.
    """
    layers, amount = _layers(model), _parameters_to_remove(model, ratio)
    weights = sum(layer.weight.numel() for layer in layers)
    if amount > weights:
        raise ValueError(f"ratio {ratio} cannot be reached: {amount:,} parameters to remove, but {weights:,} weights.")
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=amount)
    for layer in layers:
        prune.remove(layer, "weight")
    return count_left(model)


def zero_filters_(model: nn.Module, ratio: float) -> int:
    """Set the filters of least Euclidean norm to zero, the same share in every layer but the last.

    Args:
        model: pruned in place; biases, norms and the last layer, whose outputs are the classes, are left alone.
        ratio: fraction of all parameters of the model to set to zero, strictly between 0 and 1. The share of filters
            is the smallest, in steps of 0.1 %, with which that many are zero.

    Returns:
        The number of parameters that are left, zeros not counted.

    Raises:
        ValueError: if the ratio cannot be reached with a filter left in every layer.
    """
    layers, amount = _layers(model)[:-1], _parameters_to_remove(model, ratio)

    def filters(layer: nn.Conv2d | nn.Linear, step: int) -> int:
        return min(round(step / _STEPS * len(layer.weight)), len(layer.weight) - 1)

    def zeros(step: int) -> int:
        return sum(filters(layer, step) * layer.weight[0].numel() for layer in layers)

    step = bisect.bisect_left(range(_STEPS + 1), amount, key=zeros)
    if step > _STEPS:
        raise ValueError(
            f"ratio {ratio} cannot be reached: with one filter left in every layer but the last, {zeros(_STEPS):,} of "
            f"the {amount:,} parameters to remove are zero."
        )
    for layer in layers:
        prune.ln_structured(layer, "weight", filters(layer, step), n=2, dim=0)
        prune.remove(layer, "weight")
    return count_left(model)


def remove_channels_(model: nn.Module, ratio: float, example: Tensor, whole: Sequence[str] = ()) -> int:
    """Cut the channels of least group norm out of the network, with Torch-Pruning.

    Fang et al., "DepGraph: Towards Any Structural Pruning", 2023 (arXiv 2301.12900): channels that depend on each other
    can only go together. The importance of such a channel is the mean of the squared norms of the weights that would
    go, divided by the mean over its group. The least important ones go, wherever in the network they are, in one step.

    The outputs of the network stay. So do channels that are padded with others, as in a shortcut without parameters:
    Torch-Pruning takes padding for an elementwise operation, and would without an error cut out channels that do not
    belong together. In such a residual network only the channels inside the blocks can go.

    Args:
        model: pruned in place; its mode is kept.
        ratio: fraction of all parameters of the model to remove, strictly between 0 and 1. As few channels go as that
            takes.
        example: an input to trace the network with.
        whole: names of more layers whose outputs stay: those that are divided among heads, which Torch-Pruning would
            cut as if they were not.

    Returns:
        The number of parameters that are left.

    Raises:
        ValueError: if the ratio cannot be reached with a channel left in every group.
    """
    most = _count(model) - _parameters_to_remove(model, ratio)
    kept = sorted({*_layers_to_keep(model, example), *whole})
    sizes = _group_sizes(_pruner(copy.deepcopy(model), example, kept))

    def left(number: int) -> int:
        candidate = copy.deepcopy(model)
        _pruner(candidate, example, kept, _share(number, sizes)).step()
        return _count(candidate)

    numbers = range(1, sum(sizes) - len(sizes) + 1)
    index = bisect.bisect_left(numbers, x=True, key=lambda number: left(number) <= most)
    if index == len(numbers):
        raise ValueError(
            f"ratio {ratio} cannot be reached by removing channels: with one left in each of {len(sizes)} groups, "
            f"{left(numbers[-1]) if numbers else _count(model):,} of {_count(model):,} parameters are left. Outputs "
            f"that cannot be cut: {', '.join(kept)}."
        )
    modes = [(module, module.training) for module in model.modules()]
    _pruner(model, example, kept, _share(numbers[index], sizes)).step()
    for module, mode in modes:  # tracing puts the model in eval mode
        module.training = mode
    return _count(model)


# ------------------------------------------------------------------------------------------------------ Torch-Pruning


class _GroupNorm(torch_pruning.importance.GroupMagnitudeImportance):
    """The norms of a group's channels, the largest of them infinite.

    Torch-Pruning leaves a group whole that would lose all of its channels, so that asking for more would remove less.
    With this, its best channel stays instead.
    """

    def __call__(self, group: Any) -> Tensor | None:
        importance: Tensor | None = super().__call__(group)
        if importance is not None:
            importance[importance.argmax()] = math.inf
        return importance


@contextmanager
def _tracing() -> Iterator[None]:
    """Let Torch-Pruning trace a network by autograd."""
    with torch.enable_grad(), warnings.catch_warnings():
        # Parameters outside of any layer, such as those of positions, have their channels last, as it supposes.
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected", category=UserWarning)
        yield


def _pruner(model: nn.Module, example: Tensor, kept: list[str], share: float = 0.0) -> Any:
    """Trace a model and prepare to cut out a share of its channels, but no outputs of the layers to keep."""
    with _tracing():
        return torch_pruning.pruner.BasePruner(
            model,
            _traceable(example),
            importance=_GroupNorm(p=2),
            global_pruning=True,
            pruning_ratio=share,
            ignored_layers=[model.get_submodule(name) for name in kept],
            # The defaults are dictionaries that all pruners share, and fill.
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )


def _share(number: int, sizes: list[int]) -> float:
    """Turn a number of channels into a share that Torch-Pruning turns back into that number.

    It keeps ⌊channels · (1 - share)⌋: half a channel more keeps that clear of rounding.
    """
    return (number - 0.5) / sum(sizes)


def _group_sizes(pruner: Any) -> list[int]:
    """Count the channels of each group that can lose one."""
    groups = pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types)
    sizes = (len(group[0].idxs) // pruner._get_channel_groups(group) for group in groups)
    return [size for size in sizes if size > 1]


def _layers_to_keep(model: nn.Module, example: Tensor) -> list[str]:
    """Name the layers whose outputs are the network's, or are padded with other channels somewhere."""
    model = copy.deepcopy(model)
    with _tracing():
        graph = torch_pruning.DependencyGraph().build_dependency(model, _traceable(example))
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    kept: set[str] = set()
    for group in graph.get_all_groups():
        outputs = [item.dep.target for item in group if graph.is_out_channel_pruning_fn(item.dep.pruning_fn)]
        if any(not node.outputs or _pads_channels(node) for node in outputs):
            kept |= {names[node.module] for node in outputs if node.module in names}
    return sorted(kept)


def _pads_channels(node: Any) -> bool:
    """Tell whether an operation of a graph pads the channels of a batch of images."""
    # The sizes of a padding begin with the last axis: those of the channels are the third pair.
    return "ConstantPadNd" in node.grad_fn.name() and any(node.grad_fn._saved_pad[4:])


def _traceable(example: Tensor) -> tuple[Tensor]:
    """Make the input part of the graph of autograd, so that a frozen first layer is traced too.

    In a tuple, because Torch-Pruning would unpack a tensor along its batch.
    """
    return (example.detach().clone().requires_grad_(),)


# ------------------------------------------------------------------------------------------------------------ counting


def _parameters_to_remove(model: nn.Module, ratio: float) -> int:
    """Turn a ratio into a number of parameters, exactly: 0.55 of 100 are 55, not the 56 of floats."""
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be strictly between 0 and 1, the fraction of parameters to remove; got {ratio}.")
    return math.ceil(Fraction(str(ratio)) * _count(model))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _layers(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """List the convolutions and linear layers in the order of definition, the classifier last."""
    return [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
