"""Checkpoints of trainings in which penalties that adapt come and go: they go on as if never interrupted."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.networks import mlp
from tests.strategies import fill_
from tests.training import assert_same_parameters, double_layers, sgd, squares
from torchsmooth import (
    Constrained,
    FirstDerivative,
    NuclearNorm,
    RankTail,
    attach_,
    register_penalty,
    remove_penalties,
    smooth_,
)
from torchsmooth.adaptive import AdaptivePenalty

CONSTRAINT = Constrained(NuclearNorm(), bound=0.5, strength=0.1)
TAIL = RankTail(0.5, 0.05, replan_every=4, refresh_every=2)
few = settings(max_examples=5)


def take(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        squares(model, step).backward()
        optimizer.step()


def attached(*penalties):
    model = double_layers(0, *penalties)
    optimizer = sgd(model.parameters())
    return model, optimizer, attach_(optimizer, model)


@pytest.mark.parametrize("new", [dataclasses.replace(CONSTRAINT, bound=0.7), dataclasses.replace(TAIL, ratio=0.4)])
@pytest.mark.parametrize("old", [(CONSTRAINT,), (TAIL,), (CONSTRAINT, TAIL), (FirstDerivative(0.1),)])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_penalty_that_was_replaced_is_the_one_of_the_handle_at_once(old, new, steps):
    model, optimizer, handle = attached(*old)
    take(model, optimizer, range(steps))
    smooth_(model, new)
    adaptive = {one for one in old if isinstance(one, AdaptivePenalty) and type(one) is not type(new)} | {new}
    state = handle.state_dict()
    assert state["adaptive"].keys() == {repr(one) for one in adaptive}
    for one in adaptive:
        assert handle.adaptation(one) is handle.adaptation(one)

    twin, its_optimizer, its_handle = attached(*old)
    smooth_(twin, new)
    for one, other in ((twin, model), (its_optimizer, optimizer), (its_handle, handle)):
        one.load_state_dict(copy.deepcopy(other.state_dict()))
    for one, its in ((model, optimizer), (twin, its_optimizer)):
        take(one, its, range(steps, steps + 4))
    assert_same_parameters(twin, model, rtol=0.0, atol=0.0)


def test_a_replaced_penalty_can_be_asked_for_at_once():
    _, _, handle = attached(TAIL)
    new = dataclasses.replace(TAIL, ratio=0.4)
    smooth_(handle.model, new)
    assert handle.adaptation(new).plan is not None


@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")  # which torch 2.4 itself uses
@pytest.mark.parametrize("wrapped", [(False, True), (True, False)])
@pytest.mark.parametrize("penalty", [CONSTRAINT, TAIL])
def test_activation_checkpointing_may_be_put_in_and_left_out(penalty, wrapped):
    states, models = [], []
    for one in wrapped:
        model = double_layers(0, penalty)
        if one:
            model[0] = checkpoint_wrapper(model[0])
        optimizer = sgd(model.parameters())
        parts = model, optimizer, attach_(optimizer, model)
        for part, state in zip(parts, states, strict=bool(states)):
            part.load_state_dict(state)
        if not states:
            take(model, optimizer, range(3))
            states = copy.deepcopy([part.state_dict() for part in parts])
        take(model, optimizer, range(3, 6))
        models.append([value.detach() for value in model.parameters()])
    assert all(map(torch.equal, *models))


LAYERS = ("0", "2", "4")


def three_layers(penalty, but=()):
    """Three linear layers, all but some with the penalty."""
    return smooth_(mlp(0, (6, 12, 12, 6)).double(), penalty, lambda _, name: name not in but)


def begun(penalty, but=()):
    model = three_layers(penalty, but)
    optimizer = sgd(model.parameters())
    return model, optimizer, attach_(optimizer, model)


def loaded(penalty, states, removed, *, on_all):
    """Resume, with the penalty on the layers that had it in the end alone, or on all of them, and then removed."""
    every = begun(penalty, () if on_all else removed)
    for one, state in zip(every, copy.deepcopy(states), strict=True):
        one.load_state_dict(state)
    for name in removed if on_all else ():
        remove_penalties(every[0].get_submodule(name))
    return every


@pytest.mark.parametrize("on_all", [False, True])
@pytest.mark.parametrize("penalty", [CONSTRAINT, dataclasses.replace(TAIL, ratio=0.2)])
@few
@given(removed=st.sampled_from(LAYERS), before=st.integers(0, 5), between=st.integers(0, 5))
def test_training_goes_on_after_the_penalty_was_removed_from_a_layer(penalty, on_all, removed, before, between):
    model, optimizer, handle = begun(penalty)
    take(model, optimizer, range(before))
    remove_penalties(model.get_submodule(removed))
    stop = before + between
    take(model, optimizer, range(before, stop))
    states = [one.state_dict() for one in (model, optimizer, handle)]
    again, its_optimizer, its_handle = loaded(penalty, states, [removed], on_all=on_all)
    for one, its in ((model, optimizer), (again, its_optimizer)):
        take(one, its, range(stop, stop + 8))
    assert_same_parameters(again, model, rtol=0.0, atol=0.0)
    assert its_handle.step == handle.step


@pytest.mark.parametrize("penalty", [CONSTRAINT, dataclasses.replace(TAIL, ratio=0.2)])
@few
@given(but=st.sampled_from(LAYERS), steps=st.integers(1, 5))
def test_of_a_state_only_what_still_has_the_penalty_is_loaded(penalty, but, steps):
    model, optimizer, handle = begun(penalty)
    take(model, optimizer, range(steps))
    state = handle.state_dict()
    _, _, fewer = begun(penalty, [but])
    fewer.load_state_dict(state)
    (ours,), (theirs,) = (one["adaptive"].values() for one in (state, fewer.state_dict()))
    for part, values in ours.items():
        expected = (
            {name: one for name, one in values.items() if name != f"{but}.weight"} if type(values) is dict else values
        )
        assert repr(theirs[part]) == repr(expected)


def test_a_ratio_that_the_rest_cannot_reach_is_resumed_by_way_of_all_layers():
    tail, removed = dataclasses.replace(TAIL, ratio=0.6), ["0", "2"]
    model, optimizer, handle = begun(tail)
    take(model, optimizer, range(3))
    for name in removed:
        remove_penalties(model.get_submodule(name))
    take(model, optimizer, range(3, 9))  # a plan was due: the rest goes on as it was planned
    states = [one.state_dict() for one in (model, optimizer, handle)]
    with pytest.raises(
        ValueError, match=r"registered on all of them, attached, given the state, and only then removed"
    ):
        loaded(tail, states, removed, on_all=False)
    again, its_optimizer, _ = loaded(tail, states, removed, on_all=True)
    for one, its in ((model, optimizer), (again, its_optimizer)):
        take(one, its, range(9, 18))
    assert_same_parameters(again, model, rtol=0.0, atol=0.0)


@few
@given(scale=st.floats(2.0, 50.0))
def test_a_bound_is_taken_anew_where_the_penalty_comes_back(scale):
    model, optimizer, handle = begun(CONSTRAINT)
    take(model, optimizer, range(2))
    remove_penalties(model[2])
    take(model, optimizer, range(2, 3))
    with torch.no_grad():
        model[2].weight.mul_(scale)
    norm = torch.linalg.matrix_norm(model[2].weight.detach(), "nuc")
    register_penalty(model[2], "weight", CONSTRAINT)
    take(model, optimizer, range(3, 4))
    (state,) = handle.state_dict()["adaptive"].values()
    torch.testing.assert_close(state["bounds"]["2.weight"], CONSTRAINT.bound * norm)
    assert state["multipliers"]["2.weight"].item() == pytest.approx(CONSTRAINT.strength)


def test_a_state_that_fits_one_penalty_and_not_the_other_changes_neither():
    model = fill_(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), 0)
    smooth_(model, Constrained(NuclearNorm(), 0.5, strength=0.1))
    smooth_(model, RankTail(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = attach_(optimizer, model)
    first = copy.deepcopy(handle.state_dict())
    for _ in range(3):
        optimizer.step()
    before = copy.deepcopy(handle.state_dict())
    wanted = copy.deepcopy(before)
    constraint, tail = wanted["adaptive"].values()
    constraint["multipliers"] = {name: one + 1 for name, one in constraint["multipliers"].items()}
    tail.pop("layers")
    with pytest.raises(ValueError, match="lacks 'layers'"):
        handle.load_state_dict(wanted)
    after = handle.state_dict()["adaptive"][repr(Constrained(NuclearNorm(), 0.5, strength=0.1))]
    assert after["multipliers"] == next(iter(before["adaptive"].values()))["multipliers"]
    assert handle.step == 3 != first["step"]
