"""The models that time is measured on, with weights whose spectra decay as those of trained networks do.

Random weights have flat spectra, on which a plan takes one layer whole and leaves the next almost nothing. So the
random weights are scaled along both of their channel axes by a power law, and turned. Where trained weights of the
size are at hand, those are used.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed

from testbed.checkpoints import load_network
from testbed.cifar import ResNet18
from testbed.llama import LlamaBlock
from testbed.torchvision_import import import_torchvision

if TYPE_CHECKING:
    from collections.abc import Callable

EXPONENT = 0.7  # at 70 % the errors of a ResNet-18 lie between those of `plain` and of `nuclear_1e-3` in resnet18_w16
ABOUT_WEIGHTS = (
    f"Random weights, each channel axis scaled by j^−{EXPONENT} and turned, so that spectra decay as those of trained "
    "networks do; `resnet18_w16/plain` and `cifar_resnet/56` are trained."
)
_LARGEST_ROTATION = 4096  # axes that are longer are scaled and not turned: that would take minutes
_TOKENS = 128


@dataclass(frozen=True)
class Entry:
    """How to build a model, and the shape of one sample of its input."""

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    trained: bool = False

    @property
    def takes_images(self) -> bool:
        """Whether there are channels that may come last."""
        return len(self.sample) == 3

    def model(self) -> nn.Module:
        """Build the model in eval mode, always the same.

        Raises:
            ValueError: if its trained weights are not there.
        """
        torch.manual_seed(0)
        model = self.build().eval()
        return model if self.trained else decay_spectra_(model, EXPONENT)

    def inputs(self, batch: int) -> Tensor:
        """Draw a batch of inputs."""
        return torch.randn(batch, *self.sample, generator=torch.Generator().manual_seed(1))


def _torchvision(name: str, **options: object) -> nn.Module:
    model: nn.Module = import_torchvision().models.get_model(name, weights=None, **options)
    return model


def linear_stack(dim: int, hidden: int) -> nn.Sequential:
    """Build the seven linear layers of a block of Llama, as a list to compress; it cannot be run."""
    sizes = [(dim, dim)] * 4 + [(dim, hidden)] * 2 + [(hidden, dim)]
    return nn.Sequential(*(nn.Linear(inside, outside, bias=False) for inside, outside in sizes))


MODELS: dict[str, Entry] = {
    "resnet18_cifar": Entry(partial(ResNet18, 64), (3, 32, 32)),
    "resnet18_w16/plain": Entry(lambda: load_network("resnet18_w16/plain").model, (3, 32, 32), trained=True),
    "cifar_resnet/56": Entry(lambda: load_network("cifar_resnet/56").model, (3, 32, 32), trained=True),
    "resnet18_32": Entry(partial(_torchvision, "resnet18", num_classes=10), (3, 32, 32)),
    "resnet18_224": Entry(partial(_torchvision, "resnet18"), (3, 224, 224)),
    "resnet50_32": Entry(partial(_torchvision, "resnet50", num_classes=10), (3, 32, 32)),
    "resnet50_224": Entry(partial(_torchvision, "resnet50"), (3, 224, 224)),
    "vgg16_224": Entry(partial(_torchvision, "vgg16"), (3, 224, 224)),
    "vit_b_16_224": Entry(partial(_torchvision, "vit_b_16"), (3, 224, 224)),
    "llama_block_1024": Entry(partial(LlamaBlock, 1024, 2816, 16), (_TOKENS, 1024)),
    "llama_block_4096": Entry(partial(LlamaBlock, 4096, 11008, 32), (_TOKENS, 4096)),
}

# To compress, and not to run.
LARGE: dict[str, Entry] = {
    "vit_l_16_224": Entry(partial(_torchvision, "vit_l_16"), (3, 224, 224)),
    "llama_linears_quarter": Entry(partial(linear_stack, 1024, 2752), (1024,)),
    "llama_linears": Entry(partial(linear_stack, 4096, 11008), (4096,)),
}


@torch.no_grad()
def decay_spectra_(model: nn.Module, exponent: float) -> nn.Module:
    """Let the singular values of each weight decay, and keep the norm of each.

    The j-th of the directions along each channel axis is scaled by ``j ** -exponent``; the directions are random ones
    that depend on nothing but the length of the axis and on which of the two it is.

    Args:
        model: any model; parameters with fewer than two axes, or with an axis of channels of length one, stay.
        exponent: zero leaves the spectra as they are.

    Returns:
        The model itself.
    """
    turns: dict[tuple[int, int], Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and min(parameter.shape[:2]) > 1:
            parts = parameter.chunk(3) if name.endswith("in_proj_weight") else (parameter,)
            for part in parts:
                part.copy_(_decayed(part, exponent, turns))
    return model


def _decayed(weight: Tensor, exponent: float, turns: dict[tuple[int, int], Tensor]) -> Tensor:
    scaled = weight
    for axis in (0, 1):
        size = scaled.shape[axis]
        factors = torch.arange(1, size + 1, dtype=scaled.dtype) ** -exponent
        scaled = scaled.movedim(axis, -1) * factors
        if size <= _LARGEST_ROTATION:
            if (size, axis) not in turns:
                turns[size, axis] = _turn(size, axis)
            scaled = scaled @ turns[size, axis].to(scaled.dtype).T
        scaled = scaled.movedim(-1, axis)
    return scaled * (weight.norm() / scaled.norm().clamp_min(torch.finfo(scaled.dtype).tiny))


def _turn(size: int, seed: int) -> Tensor:
    """Draw an orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    orthogonal: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return orthogonal
