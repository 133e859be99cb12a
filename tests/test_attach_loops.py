"""``attach_`` inside training loops: closures, scaled, accumulated and clipped gradients, k-th steps, schedules."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from tests.strategies import fill_, seeds
from tests.training import assert_same_parameters, double_layers, pull, sgd, squares, trained
from torchsmooth import FirstDerivative, NuclearNorm, StrengthSchedule, attach_, penalty_loss, register_penalty, smooth_

few = settings(max_examples=4)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_penalties_count_once_a_step_under_gradient_accumulation(micro_batches):
    attached, reference = double_layers(), double_layers()
    for model in (attached, reference):
        optimizer = sgd(model.parameters())
        handle = attach_(optimizer, model) if model is attached else None
        for step in range(3):
            optimizer.zero_grad()
            for part in range(micro_batches):
                (squares(model, 10 * step + part) / micro_batches).backward()
            if handle is None:
                penalty_loss(model).backward()
            optimizer.step()
        assert handle is None or handle.step == 3
    assert_same_parameters(attached, reference)


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_only_gradients_of_the_data_are_clipped(clip):
    attached, reference = double_layers(), double_layers()
    for model in (attached, reference):
        optimizer = sgd(model.parameters())
        if model is attached:
            attach_(optimizer, model)
        for step in range(3):
            optimizer.zero_grad()
            squares(model, step).backward()
            clip(model.parameters(), 0.01)
            if model is reference:
                penalty_loss(model).backward()
            optimizer.step()
    assert_same_parameters(attached, reference)


def fused_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True)


def fused_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("make_optimizer", [sgd, fused_sgd, fused_adamw])
def test_scaled_gradients_meet_the_penalties_at_their_own_scale(make_optimizer, clipped):
    attached, reference = double_layers(), double_layers()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for model in (attached, reference):
        optimizer = make_optimizer(model.parameters())
        if model is attached:
            attach_(optimizer, model)
        for step in range(4):
            optimizer.zero_grad()
            if model is reference:
                squares(model, step).backward()
            else:
                scaler.scale(squares(model, step)).backward()
            if clipped:
                if model is attached:
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            if model is reference:
                penalty_loss(model).backward()
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    assert scaler.get_scale() == 4096.0
    assert_same_parameters(attached, reference)


@pytest.mark.parametrize("make_optimizer", [sgd, fused_sgd, fused_adamw])
def test_step_that_the_scaler_skips_changes_nothing(make_optimizer):
    attached, reference = double_layers(), double_layers()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    # Fused optimizers skip by themselves: they are stepped, but must not move. (Not at the first step: the momentum of
    # torch's fused SGD is not there yet then, and comes to hold what was in its memory.)
    infinite = 1
    for model in (attached, reference):
        optimizer = make_optimizer(model.parameters())
        if model is attached:
            attach_(optimizer, model)
        for step in range(4):
            optimizer.zero_grad()
            if model is reference and step != infinite:
                (squares(model, step) + penalty_loss(model)).backward()
                optimizer.step()
            elif model is attached:
                before = copy.deepcopy(model)
                scaler.scale(squares(model, step)).backward()
                if step == infinite:
                    model[0].weight.grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
                if step == infinite:
                    assert_same_parameters(model, before, rtol=0.0, atol=0.0)
    assert scaler.get_scale() == 512.0
    assert_same_parameters(attached, reference)


def test_disabled_scaler_changes_nothing():
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model, reference = double_layers(), trained(double_layers(), attach=True, steps=1)
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    scaler.scale(squares(model, 0)).backward()
    scaler.step(optimizer)
    assert_same_parameters(model, reference, rtol=0.0, atol=0.0)


def test_autocast_around_the_step_changes_nothing():
    model, reference = double_layers().float(), double_layers().float()
    for one in (model, reference):
        optimizer = sgd(one.parameters())
        attach_(optimizer, one)
        with torch.autocast("cpu", torch.bfloat16, enabled=one is model):
            optimizer.step()
    assert_same_parameters(model, reference, rtol=0.0, atol=0.0)


def by_closure(model, optimizer, *, attach, how, steps=3):
    """Train with closures; return the losses that the steps return."""
    losses = []
    for step in range(steps):

        def closure(step=step):
            optimizer.zero_grad()
            loss = squares(model, step)
            loss = loss if attach else loss + penalty_loss(model)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure=closure) if how == "keyword" else optimizer.step(closure))
    return [loss.item() for loss in losses]


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)


def lbfgs_with_line_search(parameters):
    return torch.optim.LBFGS(parameters, max_iter=4, line_search_fn="strong_wolfe")


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("make_optimizer", [sgd, lbfgs, lbfgs_with_line_search])
def test_closures_are_completed_with_value_and_gradient(make_optimizer, how):
    attached, reference = double_layers(), double_layers()
    optimizers = [make_optimizer(model.parameters()) for model in (attached, reference)]
    handle = attach_(optimizers[0], attached)
    losses = by_closure(attached, optimizers[0], attach=True, how=how)
    assert losses == pytest.approx(by_closure(reference, optimizers[1], attach=False, how=how), rel=1e-9)
    assert_same_parameters(attached, reference, rtol=1e-6, atol=1e-8)
    assert handle.step == 3


@pytest.mark.parametrize("result", [None, 2.5])
def test_closure_may_return_nothing_or_a_number(result):
    model = double_layers()
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    value = penalty_loss(model).item()

    def closure():
        optimizer.zero_grad()
        squares(model, 0).backward()
        return result

    returned = optimizer.step(closure)
    assert returned is None if result is None else returned.item() == pytest.approx(2.5 + value)
    assert_same_parameters(model, trained(double_layers(), attach=False, steps=1))


@pytest.mark.parametrize("call", [lambda one: one.step(None), lambda one: one.step(closure=None)])
def test_closure_of_none_is_none(call):
    model = double_layers()
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    squares(model, 0).backward()
    assert call(optimizer) is None
    assert_same_parameters(model, trained(double_layers(), attach=False, steps=1))


def test_closure_of_a_step_without_penalties_is_left_as_it_is():
    model = double_layers()
    optimizer = sgd(model.parameters())
    attach_(optimizer, model, schedule=lambda step: 0.0)
    losses = by_closure(model, optimizer, attach=True, how="keyword", steps=1)
    assert losses == [squares(double_layers(), 0).item()]


def test_learning_rate_scheduler_may_wrap_the_step():
    model, reference = double_layers(), double_layers()
    for one in (model, reference):
        optimizer = sgd(one.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        if one is model:
            attach_(optimizer, one)
        for step in range(3):
            optimizer.zero_grad()
            (squares(one, step) + (penalty_loss(one) if one is reference else 0.0)).backward()
            optimizer.step()
            scheduler.step()
    assert_same_parameters(model, reference)


def weighted(factors, make_optimizer=sgd):
    """Train with the penalties in the loss, at each step with a factor of its own."""
    model = double_layers()
    optimizer = make_optimizer(model.parameters())
    for step, factor in enumerate(factors):
        optimizer.zero_grad()
        # Where the factor is zero, nothing is added at all.
        (squares(model, step) + (factor * penalty_loss(model) if factor else 0.0)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("make_optimizer", [sgd, lambda parameters: torch.optim.AdamW(parameters, lr=0.01)])
@few
@given(every=st.integers(1, 4))
def test_every_kth_step_has_k_times_the_strength_and_the_others_none(make_optimizer, every):
    model = trained(double_layers(), make_optimizer, attach=True, every=every, steps=6)
    factors = [every if step % every == 0 else 0 for step in range(6)]
    assert_same_parameters(model, weighted(factors, make_optimizer))


@few
@given(factors=st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=5, max_size=5), every=st.integers(1, 2))
def test_schedule_is_a_factor_on_every_strength(factors, every):
    seen = []

    def schedule(step):
        seen.append(step)
        return factors[step]

    model = trained(double_layers(), attach=True, every=every, schedule=schedule, steps=5)
    assert seen == list(range(0, 5, every))
    assert_same_parameters(model, weighted([every * factors[step] * (step % every == 0) for step in range(5)]))


def test_schedule_of_the_library_counts_from_step_zero():
    schedule = StrengthSchedule(5, begin=0.2, full=0.6)
    model = trained(double_layers(), attach=True, schedule=schedule, steps=5)
    assert_same_parameters(model, weighted([schedule(step) for step in range(5)]))


@few
@given(seed=seeds)
def test_step_without_a_gradient_of_the_data_is_one_of_the_penalties(seed):
    model = register_penalty(nn.Linear(6, 5).double(), "weight", FirstDerivative(0.01))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attach_(optimizer, model)
    pull(model, seed)
    before = penalty_loss(model).item()
    bias = model.bias.clone()
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step()
    assert penalty_loss(model).item() < before
    assert torch.equal(model.bias, bias)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_step_without_gradients_recorded_reaches_what_a_tensor_is_computed_from(recorded):
    layer = parametrizations.weight_norm(fill_(nn.Linear(8, 8, bias=False), 0))
    smooth_(layer, NuclearNorm(0.1))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    attach_(optimizer, layer)
    before = [one.detach().clone() for one in layer.parameters()]
    with torch.set_grad_enabled(recorded):
        optimizer.step()
    for one, other in zip(before, layer.parameters(), strict=True):
        assert not torch.equal(one, other)


@pytest.mark.parametrize(("every", "factor"), [(1, 1.0), (2, 1.0), (1, 3.0), (2, 0.5)])
def test_the_loss_of_a_closure_has_the_penalty_with_its_factor(every, factor):
    layer = smooth_(fill_(nn.Linear(8, 8, bias=False), 0), NuclearNorm(0.1))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    attach_(optimizer, layer, every=every, schedule=lambda step: factor)
    expected = 1.0 + every * factor * float(penalty_loss(layer).detach())
    loss = optimizer.step(lambda: (0 * layer.weight).sum() + 1.0)
    assert float(loss.detach()) == pytest.approx(expected)
