"""``attach_`` to optimizers of all kinds: whose steps take other arguments, and wrappers that pass the steps on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from tests.strategies import seeds
from tests.training import assert_same_parameters, double_layers, sgd, squares, trained
from torchsmooth import attach_, penalty_loss

few = settings(max_examples=4)


def moved(optimizer, rate):
    for group in optimizer.param_groups:
        for one in group["params"]:
            if one.grad is not None:
                one.data.add_(one.grad, alpha=-rate * group["lr"])


class ToldTheEpoch(torch.optim.SGD):
    """Its step has another argument before the closure."""

    def step(self, epoch, closure=None):
        loss = None if closure is None else closure()
        moved(self, 1.0 / (1 + epoch))
        return loss


class Scaled(torch.optim.SGD):
    """Its step takes no closure."""

    def step(self, scale=1.0, model=None):
        moved(self, scale)


class Handed(torch.optim.SGD):
    """Its step hands on whatever it is given."""

    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class Evaluating(torch.optim.SGD):
    """Its step calls its closure by another name."""

    def step(self, scale, loss_of):
        loss = loss_of()
        moved(self, scale)
        return loss


def told(model, step, closure):
    return {
        "epoch": (ToldTheEpoch, (step,), {}, False),
        "epoch by keyword": (ToldTheEpoch, (), {"epoch": step}, False),
        "epoch and closure": (ToldTheEpoch, (step, closure), {}, True),
        "epoch and closure by keyword": (ToldTheEpoch, (step,), {"closure": closure}, True),
        "closure first, by keyword": (ToldTheEpoch, (), {"closure": closure, "epoch": step}, True),
        "epoch and None": (ToldTheEpoch, (step, None), {}, False),
        "scale": (Scaled, (0.5,), {}, False),
        "scale by keyword": (Scaled, (), {"scale": 0.5}, False),
        "the model": (Scaled, (0.5, model), {}, False),
        "nothing handed on": (Handed, (), {}, False),
        "a closure handed on": (Handed, (closure,), {}, True),
        "a closure handed on by keyword": (Handed, (), {"closure": closure}, True),
        "a closure of another name": (Evaluating, (0.5, closure), {}, True),
    }


@pytest.mark.parametrize("how", told(None, 0, None))
@few
@given(seed=seeds)
def test_only_a_closure_is_taken_for_one_whatever_the_step_is_told(how, seed):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    losses = {True: [], False: []}
    models = {attach: double_layers(seed) for attach in (True, False)}
    for attach, model in models.items():
        cls = told(model, 0, None)[how][0]
        optimizer = cls(model.parameters(), lr=0.05)
        handle = attach_(optimizer, model) if attach else None
        for step in range(3):

            def closure(model=model, optimizer=optimizer, step=step, attach=attach):
                optimizer.zero_grad()
                loss = squares(model, step)
                loss = loss if attach else loss + penalty_loss(model)
                loss.backward()
                return loss

            _, args, kwargs, evaluates = told(model, step, closure)[how]
            if not evaluates:
                closure()
            loss = optimizer.step(*args, **kwargs)
            losses[attach].append(None if loss is None else loss.item())
        assert handle is None or handle.step == 3
    assert_same_parameters(models[True], models[False])
    assert losses[True] == [None if loss is None else pytest.approx(loss, rel=1e-9) for loss in losses[False]]


class PassedOn(torch.optim.Optimizer):
    """An optimizer that hands its steps to another one, and never was constructed as one (accelerate has such)."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_optimizer_that_passes_its_steps_on_is_looked_through(layers):
    def wrapped(parameters):
        optimizer = sgd(parameters)
        for _ in range(layers):
            optimizer = PassedOn(optimizer)
        return optimizer

    reference = trained(double_layers(), sgd, attach=True)
    assert_same_parameters(trained(double_layers(), wrapped, attach=True), reference, 0, 0)


class Answering:
    """A wrapper that answers for the optimizer inside, and passes for one of its class, as Lightning's does."""

    def __init__(self, optimizer, *, copied):
        self.inside = optimizer
        self.__class__ = type("Answering", (Answering, type(optimizer)), {})
        if copied:  # as older versions did it
            self.__dict__ |= {name: value for name, value in vars(optimizer).items() if name != "step"}

    @property
    def optimizer(self):
        return self.inside

    def __getattr__(self, name):
        return getattr(self.inside, name)

    def step(self, closure=None):
        return self.inside.step(closure)


class Derived(torch.optim.SGD):
    """Calls the step of the class it was derived from, which torch wraps, too."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Derived])
@pytest.mark.parametrize("copied", [False, True])
@few
@given(seed=seeds)
def test_a_wrapper_that_answers_for_an_optimizer_is_looked_through(kind, copied, seed):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    found = []
    for wrapped in (False, True):
        model = double_layers(seed)
        raw = kind(model.parameters(), lr=0.05)
        optimizer = Answering(raw, copied=copied) if wrapped else raw
        handle = attach_(optimizer, model)
        for step in range(3):
            optimizer.zero_grad()
            squares(model, step).backward()
            optimizer.step()
        assert handle.step == 3
        for again in (raw, optimizer):
            with pytest.raises(ValueError, match=rf"attached to this {kind.__name__} already"):
                attach_(again, model)
        found.append(model)
    assert_same_parameters(*found, 0, 0)


def test_an_optimizer_without_hooks_is_refused():
    model = double_layers()
    for inner in (None, model):
        with pytest.raises(TypeError, match="this PassedOn has no step hooks, and no attribute 'optimizer' that has"):
            attach_(PassedOn(inner), model)
