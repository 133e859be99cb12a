"""The modules of the CIFAR-10 benchmark, which are no package, and made-up data for them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from testbed.cifar_splits import Images, Splits

if TYPE_CHECKING:
    from types import ModuleType

_FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """Import a module of ``benchmarks/`` by the name that its siblings know it by; skip the test file without it."""
    if str(_FOLDER) not in sys.path:
        sys.path.append(str(_FOLDER))
    pytest.importorskip("benchmarks.pruning_baselines", reason="needs benchmarks/ and the extra `bench`")
    return importlib.import_module(name)


def random_images(count: int, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 10)


def random_splits() -> Splits:
    return Splits(random_images(20, 0), random_images(8, 1), random_images(12, 2), "jpeg")


def small_run(**changes):
    recipes = benchmark("cifar10_recipes")
    fields = {
        "network": "resnet18",
        "width": 4,
        "epochs": 3,
        "recipe": "sgd,batch_size=8,peak_rate=0.05",
        "penalty": "plain",
        "strength": 0.0,
        "seed": 0,
        "data": "jpeg",
        "dtype": "float32",
        "train_images": 20,
    }
    return recipes.Run(**(fields | changes))
