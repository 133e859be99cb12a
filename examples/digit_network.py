"""A small residual network on scikit-learn's digits, and its training: what the examples have in common.

The data are 1,797 grey images of 8×8 pixels, so nothing is downloaded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import torchsmooth

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchsmooth.penalties import Penalty

WIDTHS = (16, 16, 32, 32, 64, 64)  # output channels of the residual blocks
BATCH_SIZE = 64  # divides the number of training images: BatchNorm never sees a batch of a few
PENALTIES = {
    "nuclear": torchsmooth.NuclearNorm,
    "first": torchsmooth.FirstDerivative,
    "second": torchsmooth.SecondDerivative,
}
# Chosen on the validation images (`digits.py --split validation`): the strongest that keep the dense accuracy on par.
STRENGTHS = {"nuclear": 2e-2, "first": 1e-2, "second": 1e-2}


# --------------------------------------------------------------------------------------------------- data and network


class Images(NamedTuple):
    """Images of shape (number, 1, 8, 8) and their labels, 0 to 9."""

    pixels: Tensor
    labels: Tensor


def load_images() -> dict[str, Images]:
    """Load the digits in a fixed stratified split: 896 to train on, 300 for validation, 601 for the test."""
    digits = load_digits()
    pixels = (torch.from_numpy(digits.images).float().unsqueeze(1) - 4.9) / 6.0  # mean and deviation of the pixels
    labels = torch.from_numpy(digits.target)
    train, rest = train_test_split(range(len(labels)), train_size=896, random_state=0, stratify=labels)
    validation, test = train_test_split(rest, train_size=300, random_state=0, stratify=labels[rest])
    parts = {"train": train, "validation": validation, "test": test}
    return {name: Images(pixels[indices], labels[indices]) for name, indices in parts.items()}


def shift_randomly(pixels: Tensor) -> Tensor:
    """Shift each image by -1, 0 or 1 pixels in both directions; background comes in at the border."""
    number, _, height, width = pixels.shape
    padded = F.pad(pixels, (1, 1, 1, 1), value=pixels.min().item())
    rows = torch.arange(height) + torch.randint(0, 3, (number, 1))
    columns = torch.arange(width) + torch.randint(0, 3, (number, 1))
    return padded[torch.arange(number)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


class ResidualBlock(nn.Module):
    """Two convolutions, each with a BatchNorm, beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Transform a batch of feature maps."""
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class DigitNetwork(nn.Module):
    """A residual network of one stem convolution, six blocks and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]))
        self.blocks = nn.Sequential()
        for channels_in, channels_out in zip((WIDTHS[0], *WIDTHS[:-1]), WIDTHS, strict=True):
            stride = 1 if channels_in == channels_out else 2
            self.blocks.append(ResidualBlock(channels_in, channels_out, stride))
        self.fc = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        return self.fc(self.blocks(torch.relu(self.stem(x))).mean(dim=(2, 3)))


# ------------------------------------------------------------------------------------------------------------ training


def train(
    images: Images, epochs: int, seed: int, penalty: Penalty | None, after_epoch: Callable[[DigitNetwork], object]
) -> DigitNetwork:
    """Train a network; the two calls of `torchsmooth` are all that smooth training adds."""
    torch.manual_seed(seed)
    model = DigitNetwork()
    if penalty is not None:
        torchsmooth.smooth_(model, penalty)
    steps = epochs * math.ceil(len(images.labels) / BATCH_SIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images.labels)).split(BATCH_SIZE):
            logits = model(shift_randomly(images.pixels[batch]))
            # Zero for the plain network, where nothing is registered.
            loss = F.cross_entropy(logits, images.labels[batch]) + torchsmooth.penalty_loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        after_epoch(model)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the percentage of images that the model labels correctly."""
    return 100 * (model(images.pixels).argmax(dim=1) == images.labels).float().mean().item()
