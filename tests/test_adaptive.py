"""Penalties that adapt: the multipliers of ``Constrained``, and what an adaptive penalty refuses."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import EVERY_LAYER
from tests.reference import penalties as reference
from tests.strategies import fill_, randn, seeds
from tests.training import LOOPS, double_layers, sgd, squares
from torchsmooth import (
    Constrained,
    FirstDerivative,
    NuclearNorm,
    NuclearRatio,
    SecondDerivative,
    attach_,
    penalty_loss,
    register_penalty,
    remove_penalties,
    smooth_,
)
from torchsmooth.adaptive import Adaptation, AdaptivePenalty

few = settings(max_examples=6)


class Multiplier:
    """λ ← max(0, λ + μ (min(R, R₀) / κ - 1)) with κ = bound · R₀, R₀ being R at the first step, in plain floats."""

    def __init__(self, rate: float, bound: float) -> None:
        self.rate, self.bound = rate, bound
        self.first, self.value = None, 0.0

    def after(self, penalty: float) -> float:
        if self.first is None:
            self.first = penalty
        kappa = self.bound * self.first
        if kappa > 0.0:
            self.value = max(0.0, self.value + self.rate * (min(penalty, self.first) / kappa - 1.0))
        return self.value


def layout_of(module):
    return {"groups": getattr(module, "groups", 1), "transposed": "Transpose" in type(module).__name__}


class Case(NamedTuple):
    model: nn.Module
    optimizer: torch.optim.Optimizer
    handle: object


def attached(model, constraint, lr=0.05, **options):
    optimizer = torch.optim.SGD(smooth_(model, constraint).parameters(), lr=lr)
    return Case(model, optimizer, attach_(optimizer, model, **options))


def multipliers_of(case):
    (state,) = case.handle.state_dict()["adaptive"].values()
    return {name: value.item() for name, value in state["multipliers"].items()}


@pytest.mark.parametrize("kind", LOOPS)
@few
@given(
    seed=seeds,
    layer=st.sampled_from([name for name in EVERY_LAYER if name != "embedding"]),
    bound=st.floats(0.1, 0.9),
    rate=st.floats(0.01, 1.0),
)
def test_multiplier_follows_the_rule_and_scales_the_gradient(kind, seed, layer, bound, rate):
    module = fill_(EVERY_LAYER[layer]().double(), seed)
    constraint = Constrained(kind(123.0), bound, rate)  # its own strength is not used
    case = attached(module, constraint, lr=0.0)
    slow = Multiplier(rate, bound)
    for step in range(5):
        with torch.no_grad():  # any training
            module.weight.mul_(0.7).add_(randn(*module.weight.shape, seed=seed + step), alpha=0.1)
        multiplier = slow.after(LOOPS[kind](module.weight, **layout_of(module)))
        case.optimizer.zero_grad()
        case.optimizer.step()
        assert multipliers_of(case)["weight"] == pytest.approx(multiplier, rel=1e-9, abs=1e-12)
        leaf = module.weight.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(kind()(leaf, **layout_of(module)), leaf)
        torch.testing.assert_close(module.weight.grad, multiplier * gradient, rtol=1e-8, atol=1e-10)


@settings(max_examples=3)
@given(seed=seeds, bound=st.floats(0.3, 0.7))
@pytest.mark.parametrize("kind", [NuclearNorm, FirstDerivative])
def test_bound_is_met_after_training_long_enough(kind, seed, bound):
    x, target = randn(32, 6, seed=seed), randn(32, 5, seed=seed + 1)
    model = fill_(nn.Linear(6, 5).double(), seed)
    first = LOOPS[kind](model.weight)
    case = attached(model, Constrained(kind(), bound, 0.02))
    for _ in range(300):
        case.optimizer.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        case.optimizer.step()
    # The multiplier swings about its rest; the bound is met to a few per cent, or with room to spare.
    assert LOOPS[kind](model.weight) <= 1.1 * bound * first


def test_nothing_is_added_below_the_bound_once_the_multiplier_is_zero():
    model = fill_(nn.Linear(6, 5).double(), 0)
    case = attached(model, Constrained(NuclearNorm(), bound=0.5, strength=1.0), lr=0.0)
    case.optimizer.step()
    assert multipliers_of(case)["weight"] == pytest.approx(1.0)  # at twice the bound
    with torch.no_grad():
        model.weight.mul_(0.3)
    for expected in (0.6, 0.2, 0.0, 0.0):
        case.optimizer.zero_grad()
        case.optimizer.step()
        assert multipliers_of(case)["weight"] == pytest.approx(expected)
        assert bool(model.weight.grad.any()) == (expected > 0.0)


def test_each_weight_has_a_multiplier_and_a_bound_of_its_own():
    model = double_layers(0, Constrained(NuclearNorm(), 0.5, 0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    case = Case(model, optimizer, attach_(optimizer, model))
    optimizer.step()
    with torch.no_grad():
        model[2].weight.mul_(0.1)
    optimizer.step()
    assert multipliers_of(case) == pytest.approx({"0.weight": 0.2, "2.weight": 0.02})


def test_state_dict_round_trip_is_exact():
    constraint = Constrained(NuclearRatio(), 0.8, 0.5)
    case = attached(double_layers(0, constraint), constraint)
    for step in range(3):
        squares(case.model, step).backward()
        case.optimizer.step()
    state = copy.deepcopy(case.handle.state_dict())
    other = attached(double_layers(1, constraint), constraint)
    other.handle.load_state_dict(state)
    (ours,), (theirs,) = (one["adaptive"].values() for one in (state, other.handle.state_dict()))
    for part in ("multipliers", "bounds"):
        assert ours[part].keys() == theirs[part].keys() == {"0.weight", "2.weight"}
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])


def test_closures_move_the_multiplier_once_a_step():
    evaluations = []
    model = fill_(nn.Linear(6, 5).double(), 0)
    smooth_(model, Constrained(NuclearNorm(), 0.5, 0.1))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.0, max_iter=3)
    case = Case(model, optimizer, attach_(optimizer, model))

    def closure():
        optimizer.zero_grad()
        loss = squares(model, 0)
        loss.backward()
        evaluations.append(loss)
        return loss

    for step in range(1, 4):
        seen = len(evaluations)
        value = optimizer.step(closure)
        assert len(evaluations) > seen + 1
        assert multipliers_of(case)["weight"] == pytest.approx(0.1 * step)
        norm = reference.nuclear_norm(model.weight)
        assert value.item() == pytest.approx(squares(model, 0).item() + 0.1 * step * norm)


@pytest.mark.parametrize("every", [1, 3])
def test_multiplier_moves_where_the_penalty_is_evaluated_by_the_steps_since(every):
    model = fill_(nn.Linear(6, 5).double(), 0)
    case = attached(model, Constrained(NuclearNorm(), 0.5, 0.1), lr=0.0, every=every)
    for step in range(7):
        case.optimizer.step()
        assert multipliers_of(case)["weight"] == pytest.approx(0.1 * every * (step // every + 1))


@few
@given(seed=seeds, bound=st.floats(0.3, 0.7), every=st.integers(2, 5))
@pytest.mark.parametrize("kind", [NuclearNorm, FirstDerivative])
def test_bound_is_approached_as_fast_with_fewer_evaluations(kind, seed, bound, every):
    taken = []
    for steps in (1, every):
        model = fill_(nn.Linear(6, 5).double(), seed)
        case = attached(model, Constrained(kind(), bound, 0.001), lr=0.01, every=steps)
        first, taken_now = LOOPS[kind](model.weight), 0
        while LOOPS[kind](model.weight) > bound * first and taken_now < 5000:
            case.optimizer.zero_grad()
            case.optimizer.step()
            taken_now += 1
        taken.append(taken_now)
    assert taken[1] == pytest.approx(taken[0], rel=0.1, abs=2 * every)


def test_bound_is_taken_when_the_penalty_is_first_evaluated():
    model = fill_(nn.Linear(6, 5).double(), 0)
    case = attached(model, Constrained(NuclearNorm(), 0.5, 0.1), lr=0.0, schedule=lambda step: float(step >= 2))
    for _ in range(2):
        case.optimizer.step()
        assert multipliers_of(case) == {}
    with torch.no_grad():
        model.weight.mul_(5.0)
    case.optimizer.step()
    assert multipliers_of(case)["weight"] == pytest.approx(0.1)


@few
@given(seed=seeds, bound=st.floats(0.1, 0.9), rate=st.floats(1e-4, 1.0), growth=st.floats(1.0, 1e6))
@pytest.mark.parametrize("kind", [NuclearNorm, FirstDerivative, SecondDerivative])
def test_a_weight_that_grows_drives_the_multiplier_as_one_that_stays(kind, seed, bound, rate, growth):
    found = []
    for factor in (1.0, growth):
        model = fill_(nn.Linear(6, 5).double(), seed)
        case = attached(model, Constrained(kind(), bound, rate), lr=0.0)
        for _ in range(3):
            case.optimizer.step()
            with torch.no_grad():
                model.weight.mul_(factor)
        found.append(multipliers_of(case)["weight"])
    assert found[0] == pytest.approx(3 * rate * (1 / bound - 1))
    assert found[1] == pytest.approx(found[0])


@settings(max_examples=3)
@given(seed=seeds, size=st.sampled_from([1e-2, 1e-4, 1e-8]))
def test_a_weight_that_began_close_to_zero_is_not_thrown_about(seed, size):
    x, target = randn(32, 6, seed=seed), randn(32, 5, seed=seed + 1)
    losses = {}
    for factor in (1.0, size):
        model = fill_(nn.Linear(6, 5).double(), seed)
        with torch.no_grad():
            model.weight.mul_(factor)
        case = attached(model, Constrained(NuclearNorm(), 0.5, 1e-3))
        for _ in range(100):
            case.optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            case.optimizer.step()
        losses[factor] = loss.item()
    assert losses[size] < 1.5 * losses[1.0]


@pytest.mark.parametrize("kind", LOOPS)
def test_weight_that_was_zero_is_left_alone(kind):
    model = nn.Linear(6, 5)
    nn.init.zeros_(model.weight)
    case = attached(model, Constrained(kind(), 0.5, 0.1))
    for step in range(3):
        squares(model, step).backward()
        before = model.weight.grad.clone()
        case.optimizer.step()
        assert torch.equal(model.weight.grad, before)
        case.optimizer.zero_grad()
    assert multipliers_of(case) == {"weight": 0.0}
    assert model.weight.isfinite().all()


def test_bound_and_multiplier_follow_the_model_to_another_dtype():
    model = fill_(nn.Linear(6, 5).double(), 0)
    case = attached(model, Constrained(NuclearNorm(), 0.5, 0.1), lr=0.0)
    case.optimizer.step()
    model.bfloat16()
    case.optimizer.zero_grad()
    case.optimizer.step()
    assert multipliers_of(case)["weight"] == pytest.approx(0.2, rel=1e-2)
    assert model.weight.grad.dtype == torch.bfloat16


@given(bound=st.floats(0.01, 0.99), strength=st.floats(0.0, 10.0), kind=st.sampled_from(list(LOOPS)))
def test_constraints_are_values(bound, strength, kind):
    constraint = Constrained(kind(), bound, strength)
    twins = (
        copy.deepcopy(constraint),
        pickle.loads(pickle.dumps(constraint)),
        dataclasses.replace(constraint),
        Constrained(penalty=kind(), bound=bound, strength=strength),
    )
    for twin in twins:
        assert twin == constraint
        assert hash(twin) == hash(constraint)
        assert repr(twin) == repr(constraint)
    assert constraint != dataclasses.replace(constraint, bound=bound / 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        constraint.bound = 0.5


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            TypeError,
            r"Constrained needs a penalty such as NuclearNorm\(\) .* got the class NuclearNorm",
            (NuclearNorm,),
        ),
        (TypeError, "Constrained needs a penalty .* got float 0.1", (0.1,)),
        (TypeError, "not adaptive itself, got Constrained", (Constrained(NuclearNorm()),)),
        (ValueError, r"bound must lie strictly between 0 and 1 .* got 0.0", (NuclearNorm(), 0)),
        (ValueError, r"bound must lie strictly between 0 and 1 .* got 1.0", (NuclearNorm(), 1.0)),
        (TypeError, "bound must be a real number, got str 'half'", (NuclearNorm(), "half")),
        (ValueError, "strength of Constrained must be ≥ 0, got -1.0", (NuclearNorm(), 0.5, -1)),
        (ValueError, "strength of Constrained must be finite", (NuclearNorm(), 0.5, float("inf"))),
        (TypeError, "strength of Constrained must be a real number, got None", (NuclearNorm(), 0.5, None)),
    ],
)
def test_wrong_argument_is_named(error, message, arguments):
    with pytest.raises(error, match=message):
        Constrained(*arguments)


def test_penalty_loss_says_that_an_adaptive_penalty_has_to_be_attached():
    model = nn.Sequential(nn.Linear(6, 5))
    smooth_(model, Constrained(NuclearNorm()))
    with pytest.raises(
        ValueError, match=r"Constrained on tensor 'weight' of '0' \(Linear\).*attach_\(optimizer, model"
    ):
        penalty_loss(model)


@dataclass(frozen=True)
class Growing(AdaptivePenalty):
    """An adaptive penalty of a user's own: a weight decay that grows with every evaluation."""

    strength: float = 1.0

    def begin(self, model):
        return Grown(self.strength)


class Grown(Adaptation):
    def __init__(self, strength):
        self.strength, self.factor, self.steps = strength, 0.0, []

    def advance(self, step):
        self.factor += self.strength
        self.steps.append(step)

    def term(self, name, weight):
        tensor = weight.tensor.detach()
        return self.factor * tensor.square().sum() / 2, self.factor * tensor

    def state_dict(self):
        return {"factor": self.factor}

    def load_state_dict(self, state):
        self.factor = state["factor"]


def test_adaptive_penalty_of_a_users_own():
    model = register_penalty(fill_(nn.Linear(6, 5).double(), 0), "weight", Growing(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = attach_(optimizer, model, every=2)
    for step in range(5):
        optimizer.zero_grad()
        optimizer.step()
        if step % 2:
            assert model.weight.grad is None
        else:
            torch.testing.assert_close(model.weight.grad, 2 * 0.5 * (step // 2 + 1) * model.weight.detach())
    assert handle.adaptation(Growing(0.5)).steps == [0, 2, 4]
    assert handle.state_dict() == {"step": 5, "adaptive": {repr(Growing(0.5)): {"factor": 1.5}}}


@few
@given(seed=seeds)
def test_constraint_and_plain_penalty_add_up(seed):
    def gradient(*penalties):
        model = fill_(nn.Linear(6, 5).double(), seed)
        for penalty in penalties:
            smooth_(model, penalty)
        optimizer = sgd(model.parameters())
        attach_(optimizer, model)
        optimizer.step()
        return model.weight.grad

    constraint, penalty = Constrained(NuclearNorm(), 0.5, 0.1), NuclearNorm(0.2)
    torch.testing.assert_close(gradient(constraint, penalty), gradient(constraint) + gradient(penalty))


def test_multipliers_of_removed_constraints_are_forgotten():
    constraint = Constrained(NuclearNorm(), 0.5, 0.1)
    case = attached(fill_(nn.Linear(6, 5).double(), 0), constraint, lr=0.0)
    moves = []
    for step in range(4):
        if step == 2:
            remove_penalties(case.model)
            case.optimizer.step()
            smooth_(case.model, constraint)
        case.optimizer.step()
        moves.append(multipliers_of(case)["weight"])
    assert moves == pytest.approx([0.1, 0.2, 0.1, 0.2])
    assert all(one != other for one, other in pairwise(moves))
