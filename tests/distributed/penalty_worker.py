"""What has to hold of penalties on two ranks; started by tests/test_distributed_penalties.py."""

from __future__ import annotations

import contextlib
import gc
import importlib
import time
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import torchsmooth
from tests.distributed import penalty_state_checks
from tests.distributed.launch import everywhere, run_checks
from tests.distributed.training import (
    OPTIMIZERS,
    PENALTIES,
    PLACES,
    TARGETS,
    TOKENS,
    alone,
    assert_same_parameters,
    fsdp,
    gathered,
    half,
    mesh,
    network,
    own_half,
    sharded,
    task,
    train,
)
from tests.networks import Tied, mlp
from tests.strategies import fill_, randn
from torchsmooth import (
    Constrained,
    FirstDerivative,
    NuclearNorm,
    attach_,
    penalty_loss,
    smooth_,
)

CHECKS = []


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


CHECKS += penalty_state_checks.CHECKS

if __name__ == "__main__":
    run_checks(CHECKS)
