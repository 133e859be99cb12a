"""What workers that compress have in common: small networks, and what they assert."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from tests.distributed.launch import everywhere
from tests.networks import same, snapshot
from tests.strategies import fill_, randn

# Of 25 positions each, so that calibration reads all of them, and not some drawn for each batch.
IMAGES = randn(40, 3, 5, 5, seed=11, dtype=torch.float32)
ROWS = randn(60, 24, seed=3, dtype=torch.float32)


def convolutions(layers=5):
    """A small convolutional network with norms."""
    modules = []
    for index in range(layers):
        modules += [nn.Conv2d(16 if index else 3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return fill_(nn.Sequential(*modules, nn.Flatten(), nn.Linear(400, 10)), 0).eval()


def assert_same_everywhere(model, report=None):
    """Bit for bit the same model and the same report on all ranks."""
    first, *others = everywhere(({name: value.clone() for name, value in model.state_dict().items()}, str(report)))
    for values, text in others:
        assert list(values) == list(first[0])
        assert all(torch.equal(one, first[0][name]) for name, one in values.items())
        assert text == first[1]


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def raises(kind, *parts):
    """Expect an error of a type, the message of which has some parts."""

    class Expected(contextlib.AbstractContextManager):
        def __exit__(self, raised, error, _):
            assert raised is kind, f"expected {kind.__name__}, got {error!r}"
            for part in parts:
                assert part in str(error), f"expected {part!r} in: {error}"
            return True

    return Expected()


@contextlib.contextmanager
def left_as_it_was(model):
    before = snapshot(model)
    yield
    assert same(before, snapshot(model))
