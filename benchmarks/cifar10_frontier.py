"""What `cifar10.py` measures of a trained network: its accuracy as it is, and smaller by every method and ratio."""

from __future__ import annotations

import copy
import datetime as dt
import platform
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from cifar10_training import BORDER
from frontier_methods import METHODS as FRONTIER_METHODS
from frontier_methods import Method
from torch import nn

import torchsmooth

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed

from testbed.augmentation import augmented
from testbed.cifar import accuracy, normalise

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cifar10_recipes import Run
    from cifar10_results import Line, Results

    from testbed.cifar_splits import Images

CALIBRATION_IMAGES = 1024
_BATCH_SIZE = 128


def _renamed(method: str, label: str, recalibrated: str = "") -> Method:
    return FRONTIER_METHODS[method]._replace(label=label, recalibrated=recalibrated)


def _as_it_is(model: nn.Module, ratios: Sequence[float], _batches: list[torch.Tensor]) -> Iterator[Any]:
    for ratio in ratios:
        yield ratio, (copy.deepcopy(model), sum(parameter.numel() for parameter in model.parameters()))


_DENSE = Method("dense", _as_it_is, "dense + BatchNorm")
METHODS = {
    "svd": _renamed("pivoted", "SVD", "SVD + BatchNorm"),
    "calibration": _renamed("calibration", "SVD + calibration"),
    "structured": _renamed("torch-pruning", "structured", "structured + BatchNorm"),
    "unstructured": _renamed("unstructured", "unstructured", "unstructured + BatchNorm"),
}


def with_images(label: str, images: int) -> str:
    """Name a row by how many images it saw, unless these are the usual ones.

    Args:
        label: what the row is called with ``CALIBRATION_IMAGES``.
        images: how many were used for calibration and BatchNorm.
    """
    return label if images == CALIBRATION_IMAGES else f"{label}, {images:,} images"


def images_of(label: str) -> int:
    """Return how many images a row saw, by its name: the way back from :func:`with_images`."""
    count = re.search(r", ([\d,]+) images$", label)
    return int(count[1].replace(",", "")) if count else CALIBRATION_IMAGES


class Measuring(NamedTuple):
    """On what, by which methods and at which ratios networks are measured.

    Attributes:
        images: to measure the accuracy on.
        split: which those are: ``"test"`` or ``"held_out"``.
        batches: scaled images for calibration and BatchNorm, the same for all methods.
        methods: names in ``METHODS``.
        ratios: fractions of all parameters to remove, ascending.
    """

    images: Images
    split: str
    batches: list[torch.Tensor]
    methods: Sequence[str]
    ratios: Sequence[float]


def calibration_batches(images: Images, count: int = CALIBRATION_IMAGES) -> list[torch.Tensor]:
    """Take the first training images, cropped and mirrored as they are in training, always in the same way.

    Args:
        images: what networks are trained on, on any device.
        count: how many to take.

    Returns:
        Scaled images in batches, on that device.
    """
    chosen = images.pixels[:count].cpu()
    pixels = augmented(chosen, torch.Generator().manual_seed(1), BORDER).to(images.pixels.device)
    return list(normalise(pixels).split(_BATCH_SIZE))


def measure(model: nn.Module, run: Run, measuring: Measuring, results: Results, *, again: bool = False) -> list[Line]:
    """Measure what is missing, and add it to the results.

    Args:
        model: the trained network, in eval mode; it is left as it is.
        run: what it is.
        measuring: how to measure.
        results: what is known; each new number is added as soon as it is there.
        again: whether to measure what is known, too.

    Returns:
        All the lines that were asked for, those of the dense network first.
    """
    (first, *rest) = (_DENSE, *(METHODS[name] for name in measuring.methods))
    bench = _Bench(model, run, measuring, results, again=again)
    lines = list(bench.lines(first, [0.0]))
    bench.dense = lines[0]["accuracy"]
    for method in rest:
        lines += bench.lines(method, measuring.ratios)
    return lines


class _Bench:
    """One network, with what it is measured on."""

    def __init__(self, model: nn.Module, run: Run, measuring: Measuring, results: Results, *, again: bool) -> None:
        self.dense: float | None = None
        self._results, self._again, self._batches = results, again, measuring.batches
        # torch.nn.utils.prune takes no weights in the channels-last format that networks are trained in.
        self._model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        device = next(model.parameters()).device
        self._inputs = normalise(measuring.images.pixels.to(device)).to(memory_format=torch.channels_last)
        self._labels = measuring.images.labels.to(device)
        self._normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        self._total = sum(parameter.numel() for parameter in model.parameters())
        self._seen = sum(map(len, measuring.batches))
        self._facts = asdict(run) | {"split": measuring.split, "images": len(self._labels)}
        self._device = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"

    def lines(self, method: Method, ratios: Sequence[float]) -> Iterator[Line]:
        """Yield the lines of a method at all ratios, measured where they are missing."""
        labels = [with_images(method.label, self._seen) if method.calibrated else method.label]
        if method.recalibrated and self._normed:
            labels.append(with_images(method.recalibrated, self._seen))
        keys = {ratio: [self._facts | {"method": label, "ratio": ratio} for label in labels] for ratio in ratios}
        missing = [
            ratio for ratio in ratios if self._again or any(self._results.get(key) is None for key in keys[ratio])
        ]
        for ratio, smaller in method.compress(self._model, missing, self._batches) if missing else ():
            self._measure(keys[ratio], smaller)
        for key in (key for ratio in ratios for key in keys[ratio]):
            line = self._results.get(key)
            if line is not None:
                yield line

    def _measure(self, keys: Sequence[Line], smaller: tuple[nn.Module, int] | None) -> None:
        for key in keys:
            found: Line = {"reached": None, "accuracy": None, "parameters": None}
            if smaller is not None:
                model, left = smaller
                if key is not keys[0]:
                    torchsmooth.recalibrate_batchnorm_(model, self._batches)
                found = {"reached": 1 - left / self._total, "accuracy": self._accuracy(model), "parameters": left}
            if self.dense is None:
                self.dense = found["accuracy"]
            compared = {"dense": self.dense, "parameters_dense": self._total}
            self._results.add(key | found | compared | self._circumstances())

    def _accuracy(self, model: nn.Module) -> float:
        size = 25 if self._inputs.device.type == "cpu" else 1000  # on a CPU faster than larger ones
        model.to(memory_format=torch.channels_last)  # thin convolutions are twice as fast like this
        return accuracy(model, self._inputs, self._labels, batch_size=size)

    def _circumstances(self) -> Line:
        return {
            "calibration_images": self._seen,
            "device": self._device,
            "torch": torch.__version__,
            "torchsmooth": torchsmooth.__version__,
            "python": platform.python_version(),
            "date": f"{dt.datetime.now(tz=dt.timezone.utc).date()}",
        }
