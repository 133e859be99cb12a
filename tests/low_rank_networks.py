"""Compressed networks for what is done with a model afterwards: every scheme and form in one, and two that people use.

Each is in eval mode, with a batch of three inputs.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from tests.networks import small_resnet
from tests.strategies import fill_, randn
from torchsmooth import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear, TuckerConv2d, svd_compress_
from torchsmooth._matricise import FORMS, SCHEMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# For what Inductor does: it runs a C++ compiler, and imports modules that use what torch itself calls deprecated.
_SKIP = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler (g++, or $CXX)")
_IGNORE = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


def needs_compiler(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs Inductor."""
    return _SKIP(_IGNORE(test))


def every_form() -> nn.Sequential:
    """Stack a low-rank layer of every type, scheme and form; inputs ``(batch, 8, 6, 7)``."""
    planes: list[nn.Module] = []
    lines: list[nn.Module] = [nn.Flatten(2)]
    flat: list[nn.Module] = [nn.AdaptiveAvgPool1d(4), nn.Flatten(1)]
    for form in FORMS:
        conv = fill_(nn.Conv2d(8, 8, 3, padding=1), 1)
        planes += [LowRankConv2d.from_conv2d(conv, 3, scheme, form) for scheme in SCHEMES]
        planes += [TuckerConv2d.from_conv2d(conv, (3, 4), form), nn.ReLU()]
        grouped = fill_(nn.Conv2d(8, 8, 3, padding="same", groups=2, padding_mode="circular", bias=False), 2)
        planes += [LowRankConv2d.from_conv2d(grouped, 2, "channel", form)]
        line = fill_(nn.Conv1d(8, 8, 3, padding=1), 3)
        lines += [LowRankConv1d.from_conv1d(line, 3, scheme, form) for scheme in ("channel", "input")]
        flat += [LowRankLinear.from_linear(fill_(nn.Linear(32, 32), 4), 8, form)]
    volume = fill_(nn.Conv3d(1, 2, 3, padding=1, bias=False), 5)
    solid = [nn.Unflatten(1, (1, 8)), LowRankConv3d.from_conv3d(volume, 1), nn.Flatten(1, 2), nn.Conv2d(16, 8, 1)]
    return nn.Sequential(*planes, *solid[:3], fill_(solid[3], 6), *lines, *flat).eval()


def resnet() -> nn.Module:
    """Compress a residual network; inputs ``(batch, 3, 16, 16)``."""
    model = small_resnet()
    svd_compress_(model, 0.5)
    return model


def encoder() -> nn.Module:
    """Compress a transformer encoder; inputs ``(batch, 7, 32)``."""
    layer = nn.TransformerEncoderLayer(32, 4, 128, batch_first=True, dropout=0.0)
    model = fill_(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 7).eval()
    svd_compress_(model, 0.3, rank_multiple=4)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "every_form": (every_form, lambda: randn(3, 8, 6, 7, seed=9, dtype=torch.float32)),
    "resnet": (resnet, lambda: randn(3, 3, 16, 16, seed=9, dtype=torch.float32)),
    "encoder": (encoder, lambda: randn(3, 7, 32, seed=9, dtype=torch.float32)),
}


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference between entries."""
    return float((one - other).detach().abs().max())


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Build a network by its name, with a batch of inputs for it."""
    build, inputs = NETWORKS[name]
    return build(), inputs()
