"""CIFAR-10 and the trained networks that lie beside a checkout, in ``../shared/data``.

The images are a JPEG copy of CIFAR-10 (quality 75): networks score a little lower on it than on the original
pixels. The folder can also be named by the environment variable ``TORCHSMOOTH_SHARED_DATA``. Nothing of it is
part of the repository.
"""

from __future__ import annotations

import io
import os
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

# Of the recipe that trained the networks in resnet18_w16, in units of 0 … 255.
_PIXEL_MEAN = (125.3, 123.0, 113.9)
_PIXEL_DEVIATION = (63.0, 62.1, 66.7)

# Of ImageNet, in units of 0 … 1: the networks in cifar_resnet were trained with these.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


def shared_data() -> Path:
    """Return the folder of the shared data; it may not exist."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("TORCHSMOOTH_SHARED_DATA", beside))


def load_images(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Decode the first images of a split.

    Args:
        split: ``"train"`` or ``"test"``.
        count: how many.

    Returns:
        Pixels ``(count, 3, 32, 32)`` in uint8, and labels ``(count,)`` in int64.
    """
    from PIL import Image  # noqa: PLC0415 - only this function needs it

    with np.load(shared_data() / "cifar10_jpeg.npz") as data:
        encoded, offsets = data[f"{split}_jpeg"], data[f"{split}_offsets"]
        labels = torch.from_numpy(data[f"{split}_labels"][:count].astype(np.int64))
        images = [
            np.asarray(Image.open(io.BytesIO(encoded[start:end].tobytes())).convert("RGB"))
            for start, end in pairwise(offsets[: count + 1])
        ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels


def normalise(pixels: Tensor) -> Tensor:
    """Scale uint8 pixels as the networks in ``resnet18_w16`` expect them."""
    return _standardise(pixels.float(), _PIXEL_MEAN, _PIXEL_DEVIATION)


def normalise_imagenet(pixels: Tensor) -> Tensor:
    """Scale uint8 pixels as the networks in ``cifar_resnet`` expect them: by ImageNet's mean and deviation."""
    return _standardise(pixels.float() / 255, _IMAGENET_MEAN, _IMAGENET_DEVIATION)


def _standardise(images: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Subtract a mean from each of the three channels and divide by a deviation."""
    shift, scale = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mean, deviation))
    return (images - shift) / scale


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Return the share of correct labels, in percent, in eval mode."""
    model.eval()
    correct = sum(
        int((model(images).argmax(1) == wanted).sum())
        for images, wanted in zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
    )
    return 100 * correct / len(labels)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.short = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``(batch, in_channels, height, width)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.short(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32×32 images: a 3×3 stem and eight basic blocks of ``width`` to 8 · ``width`` channels."""

    def __init__(self, width: int = 16, blocks: Sequence[int] = (2, 2, 2, 2), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                layers.append(BasicBlock(channels, width << stage, stride))
                channels = width << stage
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(batch, 3, 32, 32)`` to logits ``(batch, classes)``."""
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def load_resnet18(name: str) -> ResNet18:
    """Load one of the trained networks of ``resnet18_w16``: ``plain``, ``nuclear_1e-3``, ``tail_80``."""
    model = ResNet18(width=16)
    state = torch.load(shared_data() / "resnet18_w16" / f"{name}.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(state)
    return model.eval()
