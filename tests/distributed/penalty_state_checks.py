"""Penalties on two ranks: what adapts and is saved, and what is refused."""

from __future__ import annotations

import copy
import importlib
import io

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import torchsmooth
from tests.distributed.common import raises
from tests.distributed.launch import everywhere
from tests.distributed.training import (
    OPTIMIZERS,
    assert_same_parameters,
    gathered,
    half,
    network,
    own_half,
    sharded,
    task,
    train,
)
from tests.networks import mlp
from tests.strategies import randn
from torchsmooth import (
    Constrained,
    NuclearNorm,
    RankTail,
    attach_,
    penalty_loss,
    smooth_,
)

CHECKS = []


def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_goes_on_from_one_process(wrap, build, loss_of_all, loss_of_half):
    """Ten steps on one process, against five there and five on two ranks, from a checkpoint of the handle."""
    expected = build()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    handle = train(expected, optimizer, "attach", loss_of_all, steps=5)
    state, middle = reloaded(handle.state_dict()), copy.deepcopy(expected)
    model = wrap(build())
    optimizers = torch.optim.SGD(model.parameters(), lr=0.05)
    there = train(model, optimizers, "attach", loss_of_half, steps=5)
    assert_same_parameters(getattr(model, "module", model), middle)
    assert_same_state(there.state_dict(), state)
    there.remove()
    there = attach_(optimizers, model)
    there.load_state_dict(state)
    for _ in range(5):
        for one, step, loss in ((expected, optimizer, loss_of_all), (model, optimizers, loss_of_half)):
            step.zero_grad()
            loss(one).backward()
            step.step()
    assert_same_parameters(getattr(model, "module", model), expected)
    assert_same_state(there.state_dict(), handle.state_dict())
    first, second = everywhere(reloaded(there.state_dict()))
    assert_same_state(first, second, 0.0)
    return there


def assert_same_state(one, other, tolerance=1e-8):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), (one.keys(), other.keys())
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same_state(*pair, tolerance)
    elif isinstance(one, torch.Tensor):
        assert type(one) is type(other) is torch.Tensor
        assert torch.allclose(one, other, rtol=0.0, atol=tolerance), (one, other)
    else:
        assert one == other, (one, other)


@CHECKS.append
def constraints_hold_the_same_on_all_ranks():
    constraint = Constrained(NuclearNorm(), bound=0.6, strength=0.3)
    for wrap in (DistributedDataParallel, sharded):
        handle = assert_goes_on_from_one_process(wrap, lambda: network(constraint), task, own_half)
        multipliers = handle.state_dict()["adaptive"][repr(constraint)]["multipliers"]
        assert any(bool(one > 0) for one in multipliers.values())


def small():
    return smooth_(mlp(0, (16, 16, 16, 8)).double(), RankTail(0.6, 0.1, replan_every=4, refresh_every=2))


@CHECKS.append
def the_tail_is_the_same_on_all_ranks_of_ddp():
    rows = randn(8, 16, seed=4)
    handle = assert_goes_on_from_one_process(
        DistributedDataParallel,
        small,
        lambda model: model(rows).square().mean(),
        lambda model: model(half(rows)).square().mean(),
    )
    ((_, tail),) = handle._adaptations.values()
    first, second = everywhere(str(tail.plan))
    assert first == second


@CHECKS.append
def the_tail_of_a_sharded_model_is_refused():
    model = sharded(small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with raises(ValueError, "RankTail", "sharded", "DistributedDataParallel", "NuclearNorm"):
        attach_(optimizer, model)
    optimizer.step()


@CHECKS.append
def the_state_dict_is_that_of_a_model_without_penalties():
    for wrap in (DistributedDataParallel, sharded):
        model, plain = wrap(network()), wrap(torchsmooth.remove_penalties(network()))
        train(model, OPTIMIZERS["momentum"](model), "attach", own_half, steps=1)
        state, other = model.state_dict(), plain.state_dict()
        assert list(state) == list(other)
        assert all(type(one) is type(other[name]) for name, one in state.items())
        plain.load_state_dict(state)
        assert all(torch.equal(gathered(one), gathered(state[name])) for name, one in plain.state_dict().items())


@CHECKS.append
def flat_parts_of_weights_are_refused():
    kind = importlib.import_module("torch.distributed.fsdp").FullyShardedDataParallel
    flat = kind(smooth_(mlp(), NuclearNorm()), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.SGD(flat.parameters(), lr=0.1)
    attach_(optimizer, flat)
    for call in (lambda: penalty_loss(flat), optimizer.step):
        with raises(ValueError, "NuclearNorm on tensor 'weight'", "(Linear)", "use fully_shard"):
            call()


@CHECKS.append
def an_optimizer_made_before_sharding_is_told_so():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with raises(ValueError, "among the parameters of this SGD", "fully_shard"):
        attach_(optimizer, sharded(model))


@CHECKS.append
def a_weight_that_is_not_finite_is_named_on_all_ranks():
    model = sharded(network(NuclearNorm(0.1)))
    with torch.no_grad():
        model.body[2].weight.to_local().fill_(float("nan" if dist.get_rank() else "inf"))
    with raises(ValueError, "NuclearNorm on tensor 'weight' of 'body.2'", "finite"):
        penalty_loss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_(optimizer, model)
    with raises(ValueError, "NuclearNorm on tensor 'weight' of 'body.2'", "finite"):
        optimizer.step()
