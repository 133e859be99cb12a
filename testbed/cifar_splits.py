"""CIFAR-10 in three parts: to train on, held out to choose strengths with, and to test; decoded once.

The images come from the JPEG copy of the shared data, or from a folder with the original that torchvision reads. The
held-out part belongs to the training images; it is drawn once and for all, by a seed of its own.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from testbed.cifar import load_images, shared_data
from testbed.torchvision_import import import_torchvision
from torchsmooth._atomic_file import whole_file

JPEG = "jpeg"
HELD_OUT = 5_000
_SEED = 20_250_524  # of the held-out part: never changed, so that it is the same for all networks
_COUNTS = {"train": 50_000, "test": 10_000}


class Images(NamedTuple):
    """Pixels ``(count, 3, 32, 32)`` in uint8, and labels ``(count,)`` in int64."""

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Images:
        """Move both to a device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def first(self, count: int | None) -> Images:
        """Keep the first images; None keeps all."""
        return Images(self.pixels[:count], self.labels[:count])


class Splits(NamedTuple):
    """The three parts, and which copy of CIFAR-10 they come from: ``"jpeg"`` or ``"original"``."""

    train: Images
    held_out: Images
    test: Images
    source: str

    def to(self, device: torch.device | str) -> Splits:
        """Move all images to a device."""
        return Splits(self.train.to(device), self.held_out.to(device), self.test.to(device), self.source)


def load_splits(data: str | Path = JPEG, cache: Path | None = None) -> Splits:
    """Load CIFAR-10 and hold 5,000 of the training images out.

    Args:
        data: ``"jpeg"`` for the copy of the shared data; otherwise the folder that has ``cifar-10-batches-py`` in it,
            as ``torchvision.datasets.CIFAR10`` leaves it.
        cache: folder that keeps the decoded pixels of the JPEG copy, made where it is missing; None keeps nothing.

    Returns:
        The parts, on the CPU.

    Raises:
        FileNotFoundError: if the data is not there; the message says where it was looked for.
    """
    if str(data) == JPEG:
        parts, source = _decoded(cache), JPEG
    else:
        parts, source = {split: _original(Path(data), split) for split in _COUNTS}, "original"
    train, held_out = split_held_out(len(parts["train"].labels), HELD_OUT)
    return Splits(_taken(parts["train"], train), _taken(parts["train"], held_out), parts["test"], source)


def split_held_out(count: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Divide the numbers from 0 to ``count`` - 1 into those to train on and those held out, always the same.

    Args:
        count: how many there are.
        held_out: how many to hold out, fewer than there are.

    Returns:
        Two ascending tensors of int64.

    Raises:
        ValueError: if none would be left on one of the two sides.
    """
    if not 0 < held_out < count:
        raise ValueError(f"held_out must be at least 1 and less than the {count} images, got {held_out}.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))
    return order[held_out:].sort().values, order[:held_out].sort().values


def _taken(images: Images, indices: Tensor) -> Images:
    return Images(images.pixels[indices], images.labels[indices])


def _original(folder: Path, split: str) -> Images:
    """Read the original pixels, which are not compressed, by torchvision."""
    if not (folder / "cifar-10-batches-py").is_dir():
        raise FileNotFoundError(
            f"there is no folder cifar-10-batches-py in {folder}: download it with "
            f"torchvision.datasets.CIFAR10({str(folder)!r}, download=True), or use the JPEG copy."
        )
    import_torchvision()
    from torchvision.datasets import CIFAR10  # noqa: PLC0415 - only for the original

    found = CIFAR10(str(folder), train=split == "train")
    return Images(torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets))


def _decoded(cache: Path | None) -> dict[str, Images]:
    """Decode the JPEG copy, or read what was decoded of the same file before."""
    archive = shared_data() / "cifar10_jpeg.npz"
    if not archive.is_file():
        raise FileNotFoundError(
            f"there is no {archive}: set TORCHSMOOTH_SHARED_DATA to the folder that has it, or use the original images."
        )
    if cache is None:
        return {split: Images(*load_images(split, count)) for split, count in _COUNTS.items()}
    details = archive.stat()
    kept = cache / f"cifar10_jpeg-{details.st_size}-{details.st_mtime_ns}.pt"
    try:
        saved: Any = torch.load(kept, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        saved = None
    if saved is None:
        parts = _decoded(None)
        cache.mkdir(parents=True, exist_ok=True)
        with whole_file(kept) as file:
            torch.save({split: list(images) for split, images in parts.items()}, file)
        return parts
    return {split: Images(*saved[split]) for split in _COUNTS}
