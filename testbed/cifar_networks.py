"""The networks that are trained on CIFAR-10 here, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from testbed.cifar import ResNet18
from testbed.cifar_resnet import CifarResNet
from testbed.vgg import Vgg16
from testbed.vision_transformer import VisionTransformer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class Architecture(NamedTuple):
    """How to make a network of some width, which width is usual on a CPU, and what to call it."""

    make: Callable[[int], nn.Module]
    width: int
    title: str


ARCHITECTURES = {
    "resnet18": Architecture(ResNet18, 16, "ResNet-18"),
    "vgg16": Architecture(Vgg16, 16, "VGG-16 with BatchNorm"),
    "resnet20": Architecture(lambda width: CifarResNet(20, width), 16, "CIFAR ResNet-20"),
    "vit_small": Architecture(VisionTransformer, 192, "vision transformer of 6 blocks"),
}
