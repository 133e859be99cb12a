"""The CIFAR-10 ResNets of 20 to 56 layers, and the public weights that lie in ``../shared/data/cifar_resnet``.

He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2. The weights are those of
``akamaster/pytorch_resnet_cifar10``, trained on the original pixels, so on the JPEG copy they score several percent
below what is published for them. Their input is scaled by ``testbed.cifar.normalise_imagenet``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testbed.cifar import BasicBlock, shared_data


class ZeroPaddedShortcut(nn.Module):
    """A shortcut without parameters ("option A"): every second pixel, and zeros for the channels that are missing."""

    def __init__(self, extra_channels: int) -> None:
        super().__init__()
        self.before = extra_channels // 2
        self.after = extra_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Halve the image and pad the channels of ``(batch, channels, height, width)``, on both sides alike."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class CifarResNet(nn.Module):
    """ResNet for 32×32 images and ten classes, of ``depth`` = 6n + 2 layers: three stages of n basic blocks.

    The stages have ``width``, twice and four times as many channels.
    """

    def __init__(self, depth: int, width: int = 16) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"the depth of a CIFAR ResNet must be 6n + 2, as in 20, 32, 44 and 56; got {depth}.")
        super().__init__()
        self.depth = depth
        count = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, count, stride=1)
        self.layer2 = _stage(width, 2 * width, count, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, count, stride=2)
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(batch, 3, 32, 32)`` to logits ``(batch, 10)``."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(in_channels: int, out_channels: int, count: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    if in_channels != out_channels:
        first.short = ZeroPaddedShortcut(out_channels - in_channels)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, stride=1) for _ in range(count - 1)))


def load_cifar_resnet(depth: int) -> CifarResNet:
    """Load one of the public networks: 20, 32, 44 or 56 layers."""
    folder = shared_data() / "cifar_resnet"
    found = sorted(folder.glob(f"resnet{depth}-*.th"))  # the names end in a checksum
    if not found:
        raise FileNotFoundError(f"there is no resnet{depth}-*.th in {folder}.")
    checkpoint = torch.load(found[0], weights_only=True, map_location="cpu")
    model = CifarResNet(depth)
    # They were saved from an nn.DataParallel.
    model.load_state_dict({name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()})
    return model.eval()
