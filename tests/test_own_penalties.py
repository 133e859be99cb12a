"""Penalties of a user's own: derived from the library's, told apart, and refused where they return no scalar."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.reference import penalties as reference
from tests.strategies import fill_, seeds
from tests.training import LOOPS
from torchsmooth import (
    Constrained,
    FirstDerivative,
    NuclearNorm,
    attach_,
    penalty_loss,
    register_penalty,
    smooth_,
)
from torchsmooth.adaptive import Adaptation, AdaptivePenalty
from torchsmooth.penalties import Penalty


class Mean:
    """Mixed into a penalty: the same, over the number of entries."""

    def __call__(self, weight, *, groups=1, transposed=False):
        return super().__call__(weight, groups=groups, transposed=transposed) / weight.numel()


def averaged(kind):
    """A class that overrides nothing but the value, with no closed form of its own."""

    def call(self, weight, *, groups=1, transposed=False):
        return kind.__call__(self, weight, groups=groups, transposed=transposed) / weight.numel()

    return type("Averaged", (kind,), {"__call__": call})


WAYS = {
    "class": averaged,
    "dataclass": lambda kind: dataclass(frozen=True)(averaged(kind)),
    "slots": lambda kind: dataclass(frozen=True, slots=True)(averaged(kind)),
    "mixed in": lambda kind: type("Mixed", (Mean, kind), {}),
    "derived again": lambda kind: type("Again", (averaged(kind),), {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LOOPS)
@settings(max_examples=3)
@given(seed=seeds, strength=st.floats(0.1, 2.0))
def test_a_value_that_is_overridden_is_what_counts_everywhere(kind, way, seed, strength):
    layer = fill_(nn.Linear(5, 4, bias=False, dtype=torch.float64), seed)
    penalty = WAYS[way](kind)(strength)
    smooth_(layer, penalty)
    expected = strength * LOOPS[kind](layer.weight) / 20
    assert penalty_loss(layer).item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(strength * penalty(layer.weight), layer.weight)
    torch.testing.assert_close(torch.autograd.grad(penalty_loss(layer), layer.weight)[0], gradient)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    attach_(optimizer, layer)
    assert optimizer.step(lambda: layer.weight.sum() * 0).item() == pytest.approx(expected)
    torch.testing.assert_close(layer.weight.grad, gradient)
    optimizer.zero_grad()
    optimizer.step()
    torch.testing.assert_close(layer.weight.grad, gradient)


def test_a_gradient_that_is_overridden_is_what_attaching_adds():
    class Halved(FirstDerivative):
        def value_and_gradient(self, weight, **layout):
            value, gradient = super().value_and_gradient(weight, **layout)
            return value, gradient / 2

    layer = fill_(nn.Linear(5, 4, bias=False), 0)
    optimizer = torch.optim.SGD(smooth_(layer, Halved(1.0)).parameters(), lr=0.0)
    attach_(optimizer, layer)
    optimizer.step()
    torch.testing.assert_close(layer.weight.grad, FirstDerivative().gradient(layer.weight) / 2)


def test_closed_forms_of_the_library_are_kept():
    assert all(vars(NuclearNorm)[name] is not vars(Penalty)[name] for name in ("value_and_gradient", "total"))
    assert NuclearNorm.gradients is not Penalty.gradients
    assert FirstDerivative.gradient is not Penalty.gradient
    same = type("Same", (NuclearNorm,), {})
    assert same.gradients is NuclearNorm.gradients


@dataclass(frozen=True, slots=True)
class Scaled(NuclearNorm):
    """A dataclass that is made anew by its decorator."""

    scale: float = 0.5

    def __call__(self, weight, *, groups=1, transposed=False):
        return self.scale * NuclearNorm.__call__(self, weight, groups=groups, transposed=transposed)


def test_a_derived_penalty_survives_pickling():
    twin = pickle.loads(pickle.dumps(Scaled(0.3)))
    assert twin == Scaled(0.3)
    weight = fill_(nn.Linear(5, 4), 0).weight
    assert twin.value_and_gradient(weight)[0].item() == pytest.approx(reference.nuclear_norm(weight) / 2)


class Power(Penalty):
    """No dataclass, with an attribute that the equality of its base class does not see."""

    def __init__(self, strength, power):
        super().__init__(strength)
        object.__setattr__(self, "power", power)

    def __call__(self, weight, *, groups=1, transposed=False):
        return weight.abs().pow(self.power).sum()


@dataclass(frozen=True)
class Listed(Penalty):
    """Equal to others, and of no hash."""

    powers: list = field(default_factory=lambda: [2])

    def __call__(self, weight, *, groups=1, transposed=False):
        return sum(weight.abs().pow(power).sum() for power in self.powers)


@pytest.mark.parametrize("make", [Power, lambda strength, power: Listed(strength, [power])])
@given(seed=seeds, powers=st.lists(st.integers(1, 4), min_size=2, max_size=2))
@settings(max_examples=5)
def test_penalties_that_differ_by_more_than_their_equality_sees_are_told_apart(make, seed, powers):
    model = fill_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double(), seed)
    for layer, power in zip(model, powers, strict=True):
        register_penalty(layer, "weight", make(0.5, power))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach_(optimizer, model)
    optimizer.step()
    slow = 0.0
    for layer, power in zip(model, powers, strict=True):
        slow += 0.5 * sum(abs(entry) ** power for entry in layer.weight.flatten().tolist())
        expected = 0.5 * power * layer.weight.detach().abs().pow(power - 1) * layer.weight.detach().sign()
        torch.testing.assert_close(layer.weight.grad, expected)
    assert penalty_loss(model).item() == pytest.approx(slow)


def test_one_penalty_on_a_tied_weight_counts_once_whatever_its_equality():
    model = fill_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0)
    model[1].weight = model[0].weight
    assert penalty_loss(smooth_(model, Power(1.0, 2))).item() == pytest.approx(model[0].weight.square().sum().item())


class Decay(AdaptivePenalty):
    """An adaptive penalty that is no dataclass."""

    def __init__(self, strength, target):
        super().__init__(strength)
        object.__setattr__(self, "target", target)

    def begin(self, model):
        return Decaying(self)


class Named(Decay):
    """The same with a repr that says all."""

    def __repr__(self):
        return f"Named({self.strength}, {self.target})"


class Decaying(Adaptation):
    def __init__(self, penalty):
        self.penalty = penalty

    def advance(self, step):
        pass

    def term(self, name, weight):
        missing = weight.tensor - self.penalty.target
        return missing.square().sum() / 2, missing

    def state_dict(self):
        return {"target": self.penalty.target}

    def load_state_dict(self, state):
        pass


def test_adaptive_penalties_are_told_apart_too():
    model = fill_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for layer, target in zip(model, (1.0, 2.0), strict=True):
        register_penalty(layer, "weight", Named(1.0, target))
    handle = attach_(optimizer, model)
    optimizer.step()
    for layer, target in zip(model, (1.0, 2.0), strict=True):
        torch.testing.assert_close(layer.weight.grad, layer.weight.detach() - target)
    state = handle.state_dict()["adaptive"]
    assert state == {f"Named(1.0, {target})": {"target": target} for target in (1.0, 2.0)}


def test_adaptive_penalties_that_a_checkpoint_could_not_tell_apart_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for layer, target in zip(model, (1.0, 2.0), strict=True):
        register_penalty(layer, "weight", Decay(1.0, target))
    with pytest.raises(ValueError, match=r"have the same repr.*Decay\(strength=1.0\).*frozen dataclasses"):
        attach_(optimizer, model)
    assert not optimizer._optimizer_step_pre_hooks


def square_of_rows(weight):
    return weight.square().sum(1)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (square_of_rows, r"a tensor of shape \(4,\)"),
        (lambda weight: weight.square().sum().reshape(1), r"a tensor of shape \(1,\)"),
        (lambda weight: weight.square().sum().item() * 0 + 0.5, "float 0.5"),
        (lambda weight: None, "None"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda penalty: penalty, Constrained])
def test_a_penalty_that_returns_no_scalar_is_named(value, got, wrap):
    odd = type("Odd", (Penalty,), {"__call__": lambda self, weight, **layout: value(weight)})(1.0)
    model = smooth_(nn.Sequential(nn.Linear(4, 4)), wrap(odd))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_(optimizer, model)
    message = (
        rf"on tensor 'weight' of '0' \(Linear\): the penalty must return a tensor of shape \(\), got {got}: add up"
    )
    evaluations = [optimizer.step, lambda: optimizer.step(model[0].weight.sum)]
    for evaluate in evaluations + ([lambda: penalty_loss(model)] if wrap is not Constrained else []):
        with pytest.raises(TypeError, match=message):
            evaluate()
    assert handle.step == 0
    assert all(one.grad is None for one in model.parameters())


class Held(Constrained):
    """Derived without being a dataclass itself."""


def test_equal_penalties_of_a_derived_class_are_one():
    first, other = fill_(nn.Linear(8, 8), 0), nn.Linear(8, 8)
    other.weight = first.weight
    for layer in (first, other):
        register_penalty(layer, "weight", Scaled(0.1))
    model = nn.Sequential(first, other)
    assert penalty_loss(model).item() == pytest.approx(0.1 * Scaled(0.1)(first.weight).item())
    layers = [register_penalty(fill_(nn.Linear(8, 8), 1), "weight", Held(NuclearNorm())) for _ in range(2)]
    optimizer = torch.optim.SGD(nn.Sequential(*layers).parameters(), 0.1)
    handle = attach_(optimizer, nn.Sequential(*layers))
    assert len(handle.state_dict()["adaptive"]) == 1
    assert handle.adaptation(Held(NuclearNorm()))


class Clamped(FirstDerivative):
    def gradient(self, weight, *, groups=1, transposed=False):
        return super().gradient(weight, groups=groups, transposed=transposed).clamp(-1e-3, 1e-3)


def test_a_gradient_that_is_overridden_is_that_beside_the_value_too():
    weight = fill_(nn.Linear(8, 8), 0).weight
    value, gradient = Clamped(1.0).value_and_gradient(weight)
    assert torch.equal(gradient, Clamped(1.0).gradient(weight))
    assert value.item() == pytest.approx(FirstDerivative(1.0)(weight).item())
