"""The random states that a model may draw from without being given a generator: torch's, Python's and NumPy's."""

from __future__ import annotations

import pickle
import random
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """All of them, as they were when this was made.

    Attributes:
        torch: of the CPU, and of CUDA devices.
        python: of the module ``random``.
        numpy: of ``numpy.random``, if that has been imported.
    """

    torch: tuple[Tensor, ...]
    python: Any
    numpy: bytes

    @classmethod
    def now(cls, devices: Sequence[int]) -> RandomState:
        """Look at them; ``devices`` are indices of the CUDA devices that count."""
        numpy = _numpy_random()
        return cls(
            tuple(one.get_state() for one in _generators(devices)),
            random.getstate(),
            b"" if numpy is None else pickle.dumps(numpy.get_state(legacy=False)),
        )

    def is_as(self, other: RandomState) -> bool:
        """Say whether nothing was drawn between two looks at the same devices."""
        return (
            self.python == other.python
            and self.numpy == other.numpy
            and all(torch.equal(one, another) for one, another in zip(self.torch, other.torch, strict=True))
        )


def seed_all_(seed: int, devices: Sequence[int]) -> None:
    """Seed all of them; ``devices`` are indices of the CUDA devices that count."""
    for generator in _generators(devices):
        generator.manual_seed(seed)
    random.seed(seed)
    numpy = _numpy_random()
    if numpy is not None:
        numpy.seed(seed)


@contextmanager
def random_states_put_back(devices: Sequence[int]) -> Iterator[None]:
    """Put all of them back at the end; ``devices`` are indices of the CUDA devices that count."""
    python, numpy = random.getstate(), _numpy_random()
    state = None if numpy is None else numpy.get_state(legacy=False)
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(state)


def devices_of(module: nn.Module) -> list[int]:
    """Return the indices of the CUDA devices that the parameters of a module lie on."""
    return sorted({one.device.index for one in module.parameters() if one.is_cuda})


def _generators(devices: Sequence[int]) -> list[torch.Generator]:
    return [torch.default_generator, *(torch.cuda.default_generators[one] for one in devices)]


def _numpy_random() -> Any:
    return sys.modules.get("numpy.random")
