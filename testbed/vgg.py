"""VGG-16 for 32×32 images, with BatchNorm.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015, configuration D. As
usual for images of this size, one linear layer stands in the place of the three, which would have most of the weights.
"""

from __future__ import annotations

from torch import Tensor, nn

_STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # channels, in units of the width, and convolutions


class Vgg16(nn.Module):
    """Thirteen 3×3 convolutions of ``width`` to 8 · ``width`` channels in five stages, and a linear layer."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for factor, count in _STAGES:
            for _ in range(count):
                layers += [nn.Conv2d(channels, factor * width, 3, padding=1, bias=False)]
                channels = factor * width
                layers += [nn.BatchNorm2d(channels), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(batch, 3, 32, 32)`` to logits ``(batch, classes)``."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits
