"""What `frontier.py` compares: for every method, how it makes a network smaller by each of several ratios."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pruning_baselines import count_left, remove_channels_, zero_filters_, zero_weights_
from torch import nn
from unreachable import is_unreachable

import torchsmooth

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed

from testbed.vision_transformer import Attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Yields a ratio, a network that is smaller by it, and how many parameters are left; None where that cannot be.
_Compressed = "Iterator[tuple[float, tuple[nn.Module, int] | None]]"


class Method(NamedTuple):
    """A way to make a network smaller.

    Attributes:
        label: its row in the table.
        compress: takes a network, ratios in ascending order and the calibration batches, and yields for every ratio a
            smaller network with its number of parameters left, or None if the ratio cannot be reached.
        recalibrated: the row for the same networks with their BatchNorm statistics estimated anew; empty for none.
        exact: whether never less than the ratio may be removed: the library's own promise.
        calibrated: whether the calibration images are used, other than for BatchNorm.
    """

    label: str
    compress: Callable[[nn.Module, Sequence[float], list[torch.Tensor]], Iterator[Any]]
    recalibrated: str = ""
    exact: bool = False
    calibrated: bool = False


def low_rank(label: str, *, calibrated: bool = False, recalibrated: str = "", **options: Any) -> Method:
    """Compress by ``torchsmooth``, all ratios from one decomposition."""

    def compress(model: nn.Module, ratios: Sequence[float], batches: list[torch.Tensor]) -> _Compressed:
        possible = _reachable(model, ratios, options)
        calibration = batches if calibrated else None
        plans = torchsmooth.sweep(model, possible, calibration=calibration, **options) if possible else []
        for ratio, plan in zip(possible, plans, strict=True):
            smaller = copy.deepcopy(model)
            plan.apply_(smaller, calibration=calibration)
            yield ratio, (smaller, sum(parameter.numel() for parameter in smaller.parameters()))
        for ratio in ratios[len(possible) :]:
            yield ratio, None

    return Method(label, compress, recalibrated, exact=True, calibrated=calibrated)


def pruning(label: str, prune_: Callable[[nn.Module, float], int], recalibrated: str) -> Method:
    """Compress by one of the baselines."""

    def compress(model: nn.Module, ratios: Sequence[float], _batches: list[torch.Tensor]) -> _Compressed:
        for ratio in ratios:
            smaller = copy.deepcopy(model)
            try:
                prune_(smaller, ratio)
            except ValueError as error:
                if not is_unreachable(error):
                    raise
                yield ratio, None
            else:
                yield ratio, (smaller, count_left(smaller))

    return Method(label, compress, recalibrated)


def _remove_channels_(model: nn.Module, ratio: float) -> int:
    example = torch.zeros(1, 3, 32, 32, device=next(model.parameters()).device)
    attention = [name for name, module in model.named_modules() if isinstance(module, Attention)]
    whole = [f"{name}.{layer}" for name in attention for layer in ("query", "key", "value")]
    return remove_channels_(model, ratio, example, whole)


def _reachable(model: nn.Module, ratios: Sequence[float], options: dict[str, Any]) -> list[float]:
    """Leave out the ratios that cannot be reached, the largest; data does not change which these are."""
    beyond = itertools.takewhile(lambda ratio: not _can_be_planned(model, ratio, options), reversed(ratios))
    return list(ratios[: len(ratios) - len(list(beyond))])


def _can_be_planned(model: nn.Module, ratio: float, options: dict[str, Any]) -> bool:
    try:
        torchsmooth.plan_compression(model, ratio, **options)
    except ValueError as error:
        if not is_unreachable(error):
            raise
        return False
    return True


METHODS = {
    "uniform": low_rank("uniform ranks, channel", allocation="uniform", scheme="channel", form="factored"),
    "budget": low_rank("global budget, channel", scheme="channel", form="factored"),
    "spatial": low_rank("+ input and spatial", scheme=("channel", "input", "spatial"), form="factored"),
    "tucker": low_rank("+ Tucker-2", form="factored"),
    "pivoted": low_rank("+ pivoted form (the default)", recalibrated="the default + BatchNorm"),
    "calibration": low_rank("the default + calibration", calibrated=True),
    "unstructured": pruning("unstructured pruning", zero_weights_, "unstructured pruning + BatchNorm"),
    "filters": pruning("filter pruning", zero_filters_, "filter pruning + BatchNorm"),
    "torch-pruning": pruning("Torch-Pruning", _remove_channels_, "Torch-Pruning + BatchNorm"),
}
