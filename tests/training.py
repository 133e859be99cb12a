"""Two ways to train with penalties, in the loss and attached to the optimizer, which must end at the same point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tests.networks import two_layers
from tests.reference import penalties as reference
from tests.strategies import fill_, randn
from torchsmooth import (
    FirstDerivative,
    NuclearNorm,
    NuclearRatio,
    SecondDerivative,
    attach_,
    penalty_loss,
    register_penalty,
    smooth_,
)
from torchsmooth.penalties import Penalty


@dataclass(frozen=True)
class PowerSum(Penalty):
    """A penalty of a user's own, with nothing but a value: the sum of |w|³."""

    strength: float = 0.05

    def __call__(self, weight, *, groups=1, transposed=False):
        return weight.abs().pow(3).sum()


# What each of them is, in float64 and in loops.
LOOPS = {
    NuclearNorm: reference.nuclear_norm,
    NuclearRatio: reference.nuclear_ratio,
    FirstDerivative: reference.first_derivative,
    SecondDerivative: reference.second_derivative,
}

# One of each type, so that all of them can be registered on one tensor; far from small, so that they are seen.
EVERY_PENALTY = (NuclearNorm(0.05), NuclearRatio(0.3), FirstDerivative(0.03), SecondDerivative(0.02), PowerSum())


def smoothed(model: nn.Module, *penalties: Penalty) -> nn.Module:
    for penalty in penalties or EVERY_PENALTY:
        smooth_(model, penalty)
    return model


def double_layers(seed: int = 0, *penalties: Penalty) -> nn.Sequential:
    """Two linear layers in double precision, with penalties on both, each its own strength."""
    model = smoothed(fill_(two_layers().double(), seed), *penalties)
    if not penalties:
        register_penalty(model[2], "weight", FirstDerivative(0.3))
    return model


def squares(model: nn.Module, step: int) -> torch.Tensor:
    """A loss on a batch of its own for each step, for models of six inputs."""
    like = next(iter(model.parameters()))
    return model(randn(7, 6, seed=1000 + step, dtype=like.dtype)).square().mean()


def pull(model: nn.Module, step: int) -> torch.Tensor:
    """A loss for any model: pulls every parameter to values that change with the step."""
    terms = [
        (parameter - randn(*parameter.shape, seed=step, dtype=parameter.dtype)).square().sum()
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    return torch.stack([term.double() for term in terms]).sum()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def trained(model, make_optimizer=sgd, *, attach, loss=squares, steps=4, **options):
    """Train a model with its penalties attached to the optimizer, or in the loss."""
    optimizer = make_optimizer(model.parameters())
    if attach:
        attach_(optimizer, model, **options)
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(model, step)
        (value if attach else value + penalty_loss(model)).backward()
        optimizer.step()
    return model


def assert_same_parameters(one: nn.Module, other: nn.Module, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    values = dict(other.named_parameters())
    assert [name for name, _ in one.named_parameters()] == list(values)
    for name, value in one.named_parameters():
        torch.testing.assert_close(value, values[name], rtol=rtol, atol=atol, msg=lambda text, name=name: name + text)


def differ(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two ways of training lead apart: otherwise that they agree would say nothing."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return any(not torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
