"""What has to hold of penalties on two ranks; started by tests/test_distributed_penalties.py."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import io
import itertools
import time
from unittest.mock import patch

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, parametrize

import torchsmooth
from tests.distributed.common import raises
from tests.distributed.launch import everywhere, run_checks
from tests.networks import Tied, mlp
from tests.strategies import fill_, randn
from torchsmooth import (
    Constrained,
    FirstDerivative,
    NuclearNorm,
    NuclearRatio,
    RankTail,
    SecondDerivative,
    attach_,
    penalty_loss,
    register_penalty,
    smooth_,
)

CHECKS = []

PENALTIES = [NuclearNorm(0.02), NuclearRatio(0.03), FirstDerivative(0.02), SecondDerivative(0.01)]
TOKENS = torch.randint(0, 7, (8, 4), generator=torch.Generator().manual_seed(0))
TARGETS = randn(8, 1, seed=1)
PLACES = ("before", "after", "attach")  # of the penalty: before or after the forward pass, or by the optimizer


class Network(nn.Module):
    """Rows that two ranks cannot divide evenly, or not at all; groups, transposed ones, one that is never trained."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6, padding_idx=2)
        self.grouped = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose1d(8, 5, 2)
        self.body = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        self.head = nn.Linear(5, 1)

    def forward(self, tokens):
        x = self.transposed(self.grouped(self.embedding(tokens).mT).tanh())
        return self.head(self.body(x.tanh().mean(-1)))


def network(*penalties):
    """Each layer with the next of the penalties, and the embedding with one more."""
    model = fill_(Network(), 0).double()
    with torch.no_grad():
        model.embedding.weight[2] = 0.0
    turns = itertools.cycle(penalties or PENALTIES)
    layers = [one for one in model.modules() if getattr(one, "weight", None) is not None]
    for layer, penalty in zip([*layers, model.embedding], turns, strict=False):
        register_penalty(layer, "weight", penalty)
    return model


OPTIMIZERS = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02),
}


def half(rows):
    return rows.chunk(2)[dist.get_rank()]


def task(model, rows=TOKENS, targets=TARGETS):
    return (model(rows) - targets).square().mean()


def train(model, optimizer, place, loss=task, steps=10, clip=None):
    """The loop of a user; return the handle, if there is one."""
    handle = attach_(optimizer, model) if place == "attach" else None
    for _ in range(steps):
        optimizer.zero_grad()
        terms = [penalty_loss(model)] if place == "before" else []
        terms.append(loss(model))
        if place == "after":
            terms.append(penalty_loss(model))
        sum(terms).backward()
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return handle


@functools.cache
def alone(name, place="after", clip=None):
    """The network as one process trains it, on the whole batch."""
    model = network()
    train(model, OPTIMIZERS[name](model), place, clip=clip)
    return model


def own_half(model):
    return task(model, half(TOKENS), half(TARGETS))


def gathered(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same_parameters(model, expected, tolerance=1e-9):
    found = {name.removeprefix("module."): gathered(one) for name, one in model.named_parameters()}
    wanted = dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert torch.allclose(found[name], one, rtol=0.0, atol=tolerance), (name, (found[name] - one).abs().max())
    parts = everywhere([one.detach() for one in found.values()])
    assert all(torch.equal(one, other) for one, other in zip(*parts, strict=True))


def fsdp():
    """The module with fully_shard; it moved in torch 2.6."""
    module = importlib.import_module("torch.distributed.fsdp")
    return module if hasattr(module, "fully_shard") else importlib.import_module("torch.distributed._composable.fsdp")


@functools.cache
def mesh(*shape, names=None):
    return init_device_mesh("cpu", shape or (2,), mesh_dim_names=names)


def sharded(model, *, parts=True, **kwargs):
    kwargs.setdefault("mesh", mesh())
    if parts:
        for part in [*model.children()][::3]:
            fsdp().fully_shard(part, **kwargs)
    return fsdp().fully_shard(model, **kwargs)


@CHECKS.append
def ddp_trains_as_one_process():
    for name, make in OPTIMIZERS.items():
        for place in PLACES[name == "adamw" :]:
            model = DistributedDataParallel(network())
            train(model, make(model), place, own_half)
            assert_same_parameters(model.module, alone(name))


@CHECKS.append
def the_options_of_ddp_do_not_matter():
    cases = [
        ("after", {"gradient_as_bucket_view": True}),
        ("attach", {"gradient_as_bucket_view": True}),
        ("before", {"static_graph": True}),
        ("attach", {"static_graph": True}),
        ("after", {"find_unused_parameters": True}),
    ]
    for place, options in cases:
        model = DistributedDataParallel(network(), **options)
        train(model, OPTIMIZERS["momentum"](model), place, own_half)
        assert_same_parameters(model.module, alone("momentum"))


@CHECKS.append
def ddp_counts_once_a_step_under_accumulation():
    model = DistributedDataParallel(network())
    optimizer = OPTIMIZERS["adamw"](model)
    attach_(optimizer, model)
    for _ in range(10):
        optimizer.zero_grad()
        for index, (rows, targets) in enumerate(zip(half(TOKENS).split(2), half(TARGETS).split(2), strict=True)):
            with model.no_sync() if index == 0 else contextlib.nullcontext():
                (task(model, rows, targets) / 2).backward()
        optimizer.step()
    assert_same_parameters(model.module, alone("adamw"))


@CHECKS.append
def a_layer_that_nothing_reaches_is_trained_by_attach():
    model, expected = network(), network()
    for one in (model, expected):
        one.aside = fill_(nn.Linear(4, 4), 1).double()
        smooth_(one.aside, FirstDerivative(0.1))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    train(wrapped, OPTIMIZERS["momentum"](wrapped), "attach", own_half)
    train(expected, OPTIMIZERS["momentum"](expected), "after")
    assert_same_parameters(model, expected)


@CHECKS.append
def fully_shard_trains_as_one_process():
    for name, make in OPTIMIZERS.items():
        for place in PLACES[name == "adamw" :]:
            model = sharded(network(), parts=name == "momentum")
            train(model, make(model), place, own_half)
            assert_same_parameters(model, alone(name))


@CHECKS.append
def it_does_not_matter_what_fully_shard_leaves_gathered():
    for place in PLACES:
        model = sharded(network(), reshard_after_forward=False)
        optimizer = OPTIMIZERS["momentum"](model)
        with torch.no_grad():
            model(TOKENS)  # gathered even before the first penalty, and when the optimizer is attached
        train(model, optimizer, place, own_half)
        assert_same_parameters(model, alone("momentum"))


@CHECKS.append
def attach_sees_parameters_that_stay_gathered_after_the_backward_pass():
    model, expected = sharded(network()), network()
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, expected)]
    attach_(optimizers[0], model)
    attach_(optimizers[1], expected)
    model.set_reshard_after_backward(False)
    own_half(model).backward()
    task(expected).backward()
    for one in optimizers:
        one.step()
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    assert_same_parameters(model, expected)


@CHECKS.append
def gradients_of_shards_accumulate_and_are_clipped():
    for place in ("before", "attach"):
        model = sharded(network())
        train(model, OPTIMIZERS["momentum"](model), place, own_half, clip=0.05)
        assert_same_parameters(model, alone("momentum", place, 0.05))
    model = sharded(network())
    optimizer = OPTIMIZERS["adamw"](model)
    attach_(optimizer, model)
    for _ in range(10):
        optimizer.zero_grad()
        for index, (rows, targets) in enumerate(zip(half(TOKENS).split(2), half(TARGETS).split(2), strict=True)):
            model.set_requires_gradient_sync(index == 1)
            (task(model, rows, targets) / 2).backward()
        optimizer.step()
    assert_same_parameters(model, alone("adamw"))


@CHECKS.append
def tied_weights_count_once():
    def loss(model):
        return model(half(TOKENS) if hasattr(model, "reshard") else TOKENS).square().mean()

    for place in ("after", "attach"):
        model, expected = (smooth_(smooth_(fill_(Tied(), 0).double(), NuclearNorm(0.02)), PENALTIES[2]) for _ in "12")
        sharded(model, parts=False)
        train(model, OPTIMIZERS["momentum"](model), place, loss)
        train(expected, OPTIMIZERS["momentum"](expected), "after", loss)
        assert_same_parameters(model, expected)


@CHECKS.append
def parametrized_weights_are_trained_through_their_parameters():
    def build():
        model = fill_(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), 0).double()
        parametrize.register_parametrization(model[0], "weight", nn.Tanh())
        return smooth_(smooth_(model, FirstDerivative(0.1)), NuclearNorm(0.05))

    rows = randn(8, 6, seed=2)
    for place in ("before", "attach"):
        model, expected = sharded(build()), build()
        train(model, OPTIMIZERS["momentum"](model), place, lambda model: model(half(rows)).square().mean())
        train(expected, OPTIMIZERS["momentum"](expected), "after", lambda model: model(rows).square().mean())
        assert_same_parameters(model, expected)


@CHECKS.append
def the_penalty_is_that_of_the_master_weights():
    policy = fsdp().MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    expected = network().float()
    penalty_loss(expected).backward()
    for place in PLACES:
        model = sharded(network().float(), mp_policy=policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        train(model, optimizer, place, lambda model: 0.0 * model(half(TOKENS)).square().mean(), steps=1)
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert one.grad.dtype == torch.float32
            wanted = torch.zeros_like(other) if other.grad is None else other.grad
            assert torch.allclose(one.grad.full_tensor(), wanted, atol=1e-6), place


@CHECKS.append
def shards_may_be_offloaded_or_divided_along_another_axis():
    tensor = importlib.import_module("torch.distributed.tensor")
    cases = [
        ("attach", {"offload_policy": fsdp().CPUOffloadPolicy(pin_memory=False)}),
        ("before", {"mesh": mesh(1, 2, names=("copies", "shards"))}),
        ("attach", {"mesh": mesh(2, 1, names=("copies", "shards"))}),
    ]
    for place, options in cases:
        model = sharded(network(), **options)
        train(model, OPTIMIZERS["momentum"](model), place, own_half)
        assert_same_parameters(model, alone("momentum"))

    def build():
        return smooth_(
            smooth_(fill_(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), 0).double(), PENALTIES[0]), PENALTIES[2]
        )

    rows = randn(8, 6, seed=2)
    for place in ("before", "attach"):
        model, expected = build(), build()
        sharded(model, shard_placement_fn=lambda one: tensor.Shard(one.dim() - 1))
        train(model, OPTIMIZERS["adamw"](model), place, lambda model: model(half(rows)).square().mean())
        train(expected, OPTIMIZERS["adamw"](expected), "after", lambda model: model(rows).square().mean())
        assert_same_parameters(model, expected)


@CHECKS.append
def tensor_parallel_layers_are_penalised_whole():
    parallel = importlib.import_module("torch.distributed.tensor.parallel")
    rows = randn(8, 6, seed=2)

    def build():
        return smooth_(
            smooth_(fill_(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), 0).double(), PENALTIES[0]),
            PENALTIES[3],
        )

    ways = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}

    def divided(model, shape):
        both = mesh(*shape, names=("data", "tensor"))
        parallel.parallelize_module(model, both["tensor"], ways)
        return sharded(model, mesh=both["data"])

    cases = [
        ("before", rows, lambda model: parallel.parallelize_module(model, mesh(), ways)),
        ("attach", rows, lambda model: parallel.parallelize_module(model, mesh(), ways)),
        ("attach", rows, lambda model: divided(model, (1, 2))),
        ("after", half(rows), lambda model: divided(model, (2, 1))),
    ]
    expected = build()
    train(expected, OPTIMIZERS["momentum"](expected), "after", lambda model: model(rows).square().mean())
    for place, own, wrap in cases:
        model = wrap(build())
        train(model, OPTIMIZERS["momentum"](model), place, lambda model, own=own: model(own).square().mean())
        assert_same_parameters(model, expected)


@CHECKS.append
def replicated_tensors_get_the_gradient_once():
    tensor = importlib.import_module("torch.distributed.tensor")

    def build():
        return smooth_(fill_(nn.Sequential(nn.Linear(6, 4)), 0).double(), NuclearNorm(0.1))

    rows = randn(8, 6, seed=2)
    shards = tensor.distribute_tensor(rows, mesh(), [tensor.Shard(0)])
    for place in PLACES:
        model, expected = tensor.distribute_module(build(), mesh()), build()
        # The gradient that comes back for a replicated weight is a sum over ranks that is yet to be made.
        train(model, OPTIMIZERS["momentum"](model), place, lambda model: model(shards).square().mean().full_tensor())
        train(expected, OPTIMIZERS["momentum"](expected), "after", lambda model: model(rows).square().mean())
        assert_same_parameters(model, expected)


def alive(shape):
    """Count whole weights of a shape, or gradients of them."""
    for _ in range(100):
        found = sum(type(one) is torch.Tensor and one.shape == shape for one in gc.get_objects())
        if not found:
            break
        time.sleep(0.01)  # gloo's own thread lets go of a result some time after it has come
    return found


@CHECKS.append
def one_layer_at_a_time_is_gathered():
    shape = torch.Size((46, 46))  # of nothing else, and even the parts have another
    gathers = []
    whole = torchsmooth._registered.whole

    def counted(tensor):
        gathers.append(alive(shape))
        return whole(tensor)

    for penalty in (*PENALTIES, Constrained(NuclearNorm(), 0.9, 0.1)):
        model = smooth_(sharded(mlp(0, (46,) * 4)), penalty)
        optimizer = OPTIMIZERS["momentum"](model)
        gc.collect()
        gc.freeze()  # or each look at what is alive would go through all of torch
        gathers.clear()
        with patch("torchsmooth._registered.whole", counted):
            if not isinstance(penalty, Constrained):
                value = penalty_loss(model)
                assert gathers == [0] * 3, (penalty, gathers)
                nodes, held = [value.grad_fn], []
                while nodes:
                    node = nodes.pop()
                    held += [one.to_local() for one in getattr(node, "saved_tensors", ()) if one.dim() > 1]
                    nodes += [other for other, _ in node.next_functions if other is not None]
                assert len(held) == 3
                assert all(one.untyped_storage().nbytes() == 4 * 23 * 46 for one in held), "only parts wait"
                value.backward()
                gathers.clear()
            attach_(optimizer, model)
            optimizer.step()
            assert gathers == [0] * 3, (penalty, gathers)
        assert alive(shape) == 0
    gc.unfreeze()


@CHECKS.append
def a_scaled_gradient_gets_a_scaled_penalty():
    expected = network()
    penalty_loss(expected).backward()
    model = sharded(network())
    # As a GradScaler does for optimizers that unscale by themselves, in their step.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.full((), 8.0), torch.zeros(())
    attach_(optimizer, model)
    scaled = []
    optimizer.register_step_pre_hook(lambda *_: scaled.extend(gathered(one.grad).clone() for one in weights))
    weights = [one for one in model.parameters() if one.dim() > 1]
    optimizer.step()
    for one, other in zip(scaled, (one for one in expected.parameters() if one.dim() > 1), strict=True):
        assert torch.allclose(one, 8.0 * other.grad)


@CHECKS.append
def closures_are_completed():
    model, expected = sharded(network()), network()
    losses = []
    for one, loss in ((model, own_half), (expected, task)):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        attach_(optimizer, one)

        def closure(one=one, loss=loss, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(one)
            value.backward()
            return value

        losses.append(optimizer.step(closure))
    # The loss of a rank is that of its half of the batch.
    mean = sum(everywhere(losses[0].item())) / 2
    assert abs(mean - losses[1].item()) < 1e-9
    assert_same_parameters(model, expected)


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
    (tail,) = handle._adaptations.values()
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


if __name__ == "__main__":
    run_checks(CHECKS)
