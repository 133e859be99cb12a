"""Whenever an interruption from the keyboard comes, a model is as it was, or compressed in whole; never in between."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import torchsmooth
from tests.snapshots import Snapshot
from tests.strategies import fill_, randn
from torchsmooth import load_compressed_, plan_compression, restore_dense_, svd_compress_

if TYPE_CHECKING:
    from collections.abc import Callable

_HOME = str(Path(torchsmooth.__file__).parent)


class Interrupting:
    """Counts the calls of functions of the library, and interrupts one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count = at, 0

    def __call__(self, frame: Any, event: str, arg: object) -> None:
        code = frame.f_code
        # What is raised in a generator expression may be raised while that is thrown away, where nobody sees it.
        if event == "call" and code.co_filename.startswith(_HOME) and not code.co_name.startswith("<gen"):
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt

    def run(self, action: Callable[[], object]) -> bool:
        """Do something, and return whether it came to its end."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            action()
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(before)
        return True


def build() -> nn.Module:
    """Build one of each kind of layer that is put into a model and taken out of it again."""
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(6, 8),
            "attention": nn.MultiheadAttention(8, 2, batch_first=True),
            "cell": nn.GRUCell(6, 4),
            "normed": parametrizations.spectral_norm(nn.Linear(6, 9)),
            "conv": nn.Conv2d(4, 6, 3),
            "spared": nn.MultiheadAttention(4, 2),
            "norm": nn.BatchNorm2d(6),
        }
    )
    return fill_(model, 3)


class Calibrated(nn.Sequential):
    """A network with biases and statistics that are fitted to data."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 5), nn.BatchNorm1d(5))
        fill_(self, 4)


def chosen(_: nn.Module, name: str) -> bool:
    return not name.startswith("spared.")


def _compress(model: nn.Module) -> object:
    return svd_compress_(model, 0.2, filter_fn=chosen, parametrized="merge")


def compressing() -> tuple[nn.Module, Callable[[], object]]:
    model = build()
    return model, lambda: _compress(model)


def planning() -> tuple[nn.Module, Callable[[], object]]:
    model = build()
    return model, lambda: plan_compression(model, 0.2, filter_fn=chosen, parametrized="merge")


class Counting(nn.Sequential):
    """A network that counts its calls, in a buffer and in a list."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.register_buffer("calls", torch.zeros(3))
        self.seen: list[int] = []
        fill_(self, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1  # in place, torch could be interrupted before it knows that it wrote to it
        self.seen.append(len(x))
        return super().forward(x)


def observing() -> tuple[nn.Module, Callable[[], object]]:
    model, rows = Counting(), randn(3, 16, seed=1, dtype=torch.float32)
    return model, lambda: plan_compression(model, 0.2, target="macs", example_inputs=rows, rank_multiple=1)


def measuring() -> tuple[nn.Module, Callable[[], object]]:
    model, rows = Counting(), randn(3, 16, seed=1, dtype=torch.float32)
    return model, lambda: svd_compress_(model, 0.2, target="macs", example_inputs=rows, rank_multiple=1)


def calibrating() -> tuple[nn.Module, Callable[[], object]]:
    model, images = Calibrated(), randn(9, 3, 4, 4, seed=1, dtype=torch.float32)
    return model, lambda: svd_compress_(model, 0.2, calibration=[images], progress=False)


def loading() -> tuple[nn.Module, Callable[[], object]]:
    small, model = build(), build()
    _compress(small)
    return model, lambda: load_compressed_(model, small.state_dict())


def compressing_again() -> tuple[nn.Module, Callable[[], object]]:
    model = build()
    _compress(model)
    return model, lambda: svd_compress_(model, 0.1)


def restoring() -> tuple[nn.Module, Callable[[], object]]:
    model = build()
    _compress(model)
    return model, lambda: restore_dense_(model)


_LOOKING = (planning, observing)
WAYS = {
    one.__name__: one for one in (*_LOOKING, compressing, measuring, calibrating, loading, compressing_again, restoring)
}


def structure(model: nn.Module) -> list[tuple[str, type, tuple[int, ...]]]:
    return [
        *((name, type(module), ()) for name, module in model.named_modules()),
        *((name, type(one), tuple(one.shape)) for name, one in model.named_parameters()),
    ]


@functools.cache
def whole(way: str) -> tuple[int, list[Any]]:
    """Count the calls of something that is not interrupted, and return what the model is like then."""
    for _ in range(2):  # the first time, modules may be imported
        model, action = WAYS[way]()
        total = Interrupting()
        assert total.run(action)
    return total.count, structure(model)


def check(way: str, place: float) -> None:
    """Interrupt at a call: a fraction of all of them, or that many before the end."""
    count, finished = whole(way)
    at = 1 + int(place * (count - 1)) if isinstance(place, float) else count - place
    model, action = WAYS[way]()
    before = Snapshot(model)
    assert not Interrupting(at).run(action)
    difference = before.difference()
    assert not difference or (WAYS[way] not in _LOOKING and structure(model) == finished), difference


@settings(max_examples=8)
@given(st.sampled_from(sorted(WAYS)), st.floats(0, 1, exclude_max=True))
def test_an_interruption_leaves_a_model_as_it_was_or_does_all(way, place):
    check(way, place)


@settings(max_examples=12)
@given(st.sampled_from(sorted(WAYS)), st.integers(0, 60))
def test_an_interruption_near_the_end_leaves_a_model_as_it_was_or_does_all(way, place):
    check(way, place)


@pytest.mark.slow
@pytest.mark.parametrize("way", sorted(WAYS))
def test_any_interruption_leaves_a_model_as_it_was_or_does_all(way):
    count, _ = whole(way)
    for place in (*range(min(count, 250)), *range(250, count, 1 + count // 150)):
        check(way, place)
