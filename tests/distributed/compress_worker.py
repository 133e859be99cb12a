"""What has to hold of svd_compress_ on two ranks; started by tests/test_distributed_compress.py."""

from __future__ import annotations

import contextlib
import copy
import importlib
import time
from unittest.mock import patch

import torch
from torch import distributed as dist
from torch import nn

import torchsmooth
from tests.distributed.launch import everywhere, run_checks
from tests.networks import mlp, same, small_resnet, snapshot
from tests.strategies import fill_, randn
from torchsmooth import plan_compression, svd_compress_

CHECKS = []

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


@CHECKS.append
def the_result_is_that_of_one_process():
    cases = [
        (small_resnet, {"ratio": 0.6}),
        (convolutions, {"ratio": 0.6, "scheme": "tucker"}),
        (convolutions, {"ratio": 0.5, "scheme": ("channel", "tucker"), "form": "pivoted"}),
        (convolutions, {"ratio": 0.5, "scheme": "spatial", "form": "factored", "allocation": "uniform"}),
        (convolutions, {"max_error": 0.4, "scheme": "channel", "rank_multiple": 2}),
        (convolutions, {"ratio": 0.5, "scheme": "input", "target": "macs", "example_inputs": IMAGES}),
        (lambda: mlp().to(torch.bfloat16), {"ratio": 0.5}),
        (lambda: convolutions().to(memory_format=torch.channels_last), {"ratio": 0.5, "scheme": "channel"}),
    ]
    for build, kwargs in cases:
        model, alone = build(), build()
        report = svd_compress_(model, **kwargs)
        expected = plan_compression(alone, **kwargs).apply_(alone, kwargs.get("example_inputs"))
        assert report.to_dict() == expected.to_dict()
        for one, other in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()
        assert_same_everywhere(model, report)


@CHECKS.append
def each_rank_does_about_half_of_the_decompositions():
    decomposed, truncated = [], []
    options_of, truncate = torchsmooth._workpiece.options_of, torchsmooth._apply._truncate_
    model = mlp(0, (32,) * 9)
    with (
        patch(
            "torchsmooth._workpiece.options_of", lambda *args: (decomposed.append(args[0].name), options_of(*args))[1]
        ),
        patch("torchsmooth._apply._truncate_", lambda *args: (truncated.append(args[1].name), truncate(*args))[1]),
        patch("torchsmooth._spectrum.decompose", lambda *args: calls.append(args) or decompose(*args)),
    ):
        calls, decompose = [], torchsmooth._linalg.decompose
        report = svd_compress_(model, 0.5)
    for own in (decomposed, truncated):
        assert len(own) == 4
        assert sorted(name for there in everywhere(own) for name in there) == sorted(
            layer.name for layer in report.compressed
        )
    assert decomposed == truncated
    assert len(calls) == 4, "what was decomposed for the plan is not decomposed again"


@CHECKS.append
def batches_of_all_ranks_count_as_if_one_process_had_them():
    own = ROWS.split(20)[:2] if dist.get_rank() == 0 else ROWS.split(20)[2:]
    for build, batches, everything in (
        (mlp, own, ROWS.split(20)),
        (mlp, ROWS.split(30), [*ROWS.split(30), *ROWS.split(30)]),
        (convolutions, [IMAGES[dist.get_rank() :: 2]], [IMAGES[::2], IMAGES[1::2]]),
    ):
        model, alone = build(), build()
        report = svd_compress_(model, 0.5, calibration=iter(batches))
        plan = plan_compression(alone, 0.5, calibration=everything)
        expected = plan.apply_(alone, calibration=everything)
        assert_same_everywhere(model, report)
        assert [(one.scheme, one.form, one.rank) for one in report.layers] == [
            (one.scheme, one.form, one.rank) for one in expected.layers
        ]
        for one, other in zip(report.compressed, expected.compressed, strict=True):
            assert abs(one.output_error - other.output_error) < 1e-5, (one, other)
        for one, other in zip(bits(model).values(), bits(alone).values(), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


class Either(nn.Module):
    """Data of one sign goes one way, that of the other another."""

    def __init__(self):
        super().__init__()
        self.body, self.negative, self.positive = nn.Linear(24, 24), nn.Linear(24, 16), nn.Linear(24, 16)
        self.norm = nn.BatchNorm1d(16)
        self.never = nn.Linear(24, 24)
        fill_(self, 0).eval()

    def forward(self, x):
        y = self.body(x)
        return self.norm(self.positive(y)) if x[0, 0] > 0 else self.negative(y)


@CHECKS.append
def a_layer_that_only_one_rank_reaches_is_fitted_on_all():
    rows = (ROWS.abs(), -ROWS.abs())
    model, alone = Either(), Either()
    report = svd_compress_(model, 0.4, calibration=[rows[dist.get_rank()]])
    expected = plan_compression(alone, 0.4, calibration=rows).apply_(alone, calibration=rows)
    assert_same_everywhere(model, report)
    for one, other in zip(report.layers, expected.layers, strict=True):
        assert (one.rank, one.note) == (other.rank, other.note)
        assert abs((one.output_error or 0.0) - (other.output_error or 0.0)) < 1e-6
    assert "never reached" in report["never"].note
    for one, other in zip(bits(model).values(), bits(alone).values(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@CHECKS.append
def the_first_rank_measures_and_decides():
    model = mlp(0, (256, 256, 256, 256))
    turns = iter(range(10_000))

    def times(calls, *_):  # the model takes a second, each layer a third, and every low-rank layer less
        if dist.get_rank():
            raise AssertionError("only the first rank measures")
        if not next(turns):
            return [10**9]
        return [333 * 10**6, *(10**8 + index for index in range(len(calls) - 1))]

    with patch("torchsmooth._latency.median_nanoseconds", times):
        report = svd_compress_(model, 0.3, target="latency", example_inputs=torch.zeros(4, 256))
    assert report.latency_before is not None
    assert report.latency_before > 0
    assert_same_everywhere(model, report)


@CHECKS.append
def a_rank_that_comes_alone_is_told_so_and_can_come_again():
    model = mlp()
    for lonely in (0, 1, 0):
        with patch("torchsmooth._arrival.PATIENCE", 0.3):
            if dist.get_rank() == lonely:
                start = time.monotonic()
                with (
                    left_as_it_was(model),
                    raises(RuntimeError, f"not on rank {1 - lonely}", "if rank == 0", "plan_compression(model, ratio)"),
                ):
                    svd_compress_(model, 0.5)
                assert time.monotonic() - start < 10
        dist.barrier()
    assert_same_everywhere(model, svd_compress_(model, 0.5))


@CHECKS.append
def one_rank_can_compress_alone_on_purpose():
    model = mlp()
    group = dist.new_group([0])
    if dist.get_rank() == 0:
        assert plan_compression(model, 0.5).apply_(model).ratio >= 0.5
        assert len(torchsmooth.sweep(mlp(), [0.3, 0.5])) == 2
        assert svd_compress_(mlp(), 0.5, process_group=group).ratio >= 0.5
    else:
        with raises(ValueError, "this process is not in process_group"):
            svd_compress_(model, 0.5, process_group=group)
    dist.barrier()
    with raises(TypeError, "process_group must be a torch.distributed.ProcessGroup", "got str 'gloo'"):
        svd_compress_(model, 0.5, process_group="gloo")
    both = dist.new_group([0, 1])
    model = mlp()
    assert_same_everywhere(model, svd_compress_(model, 0.5, process_group=both))


@CHECKS.append
def ranks_that_want_different_things_are_told_so():
    rank = dist.get_rank()
    extra = mlp()
    if rank:
        extra.extra = nn.Parameter(torch.zeros(3))
    turned = mlp()
    turned[2].weight.data = turned[2].weight.detach().flip(0) if rank else turned[2].weight.detach()
    cases = [
        (mlp(), {"ratio": 0.5 + 0.1 * rank}, "ratio=0.5 on rank 0, but ratio=0.6 on rank 1"),
        (mlp(), {"ratio": 0.5, "scheme": ("auto", "channel")[rank]}, "scheme='auto' on rank 0, but scheme='channel'"),
        (
            mlp(),
            {"ratio": 0.5, "calibration": [ROWS] if rank else None},
            "calibration=None on rank 0, but calibration=",
        ),
        (mlp(), {"ratio": 0.5, "filter_fn": lambda _, name: rank == 0 or name != "2"}, "layer '2' can be compressed"),
        (mlp(rank), {"ratio": 0.5}, "'weight' of layer '0' has other values on rank 1 than on rank 0. Load the same"),
        (turned, {"ratio": 0.5}, "'weight' of layer '2' has other values on rank 1"),
        (
            mlp(0, (24, 32 + rank, 8)),
            {"ratio": 0.5},
            "is torch.float32 of shape (32, 24) on rank 0, and torch.float32 of",
        ),
        (mlp().to(torch.float64 if rank else torch.float32), {"ratio": 0.5}, "is torch.float32 of shape"),
        (extra, {"ratio": 0.5}, "only rank 1 has 'extra'"),
    ]
    for model, kwargs, message in cases:
        with left_as_it_was(model), raises(ValueError, message):
            svd_compress_(model, **kwargs)


@CHECKS.append
def buffers_become_those_of_the_first_rank_or_stay():
    model = convolutions()
    for norm in (one for one in model.modules() if isinstance(one, nn.BatchNorm2d)):
        norm.running_mean += dist.get_rank()
    before, expected = bits(model), convolutions()
    with left_as_it_was(model), raises(ValueError, "cannot be reached"):
        svd_compress_(model, 0.999)
    svd_compress_(model, 0.5)
    assert_same_everywhere(model)
    plan_compression(expected, 0.5).apply_(expected)
    assert all(torch.equal(one, bits(model)[name]) for name, one in bits(expected).items())
    assert torch.equal(before["1.running_mean"], model[1].running_mean) == (dist.get_rank() == 0)


# Where something breaks, at which call, how, and what kind of error the other rank is told.
FAILURES = [
    ("torchsmooth._workpiece.find_layers", 0, ValueError, {}, ValueError),
    ("torchsmooth._workpiece.options_of", 0, torch.linalg.LinAlgError, {}, RuntimeError),
    ("torchsmooth._spectrum.singular_values", 1, torch.linalg.LinAlgError, {}, ValueError),
    ("torchsmooth._spectrum.factors_in", 1, torch.linalg.LinAlgError, {}, ValueError),
    ("torchsmooth._apply.take_over_", 2, MemoryError, {}, RuntimeError),
    ("torchsmooth._apply.measured_error", 1, KeyboardInterrupt, {}, RuntimeError),
    ("torchsmooth._apply._tensors_of", 0, RuntimeError, {}, RuntimeError),
    ("torchsmooth._swap._put", 0, RuntimeError, {}, RuntimeError),
    ("torchsmooth._swap._put", 3, KeyboardInterrupt, {}, RuntimeError),
    ("torchsmooth.plan._report", 2, RuntimeError, {}, RuntimeError),
    ("torchsmooth._calibration.run", 0, RuntimeError, {"calibration": [IMAGES]}, RuntimeError),
    ("torchsmooth._workpiece.output_losses", 0, torch.linalg.LinAlgError, {"calibration": [IMAGES]}, RuntimeError),
    ("torchsmooth._refit.run", 3, RuntimeError, {"calibration": [IMAGES]}, RuntimeError),
    ("torchsmooth._refit._fit_", 2, torch.linalg.LinAlgError, {"calibration": [IMAGES]}, ValueError),
    ("torchsmooth._refit.Refitted.write_", 0, RuntimeError, {"calibration": [IMAGES]}, RuntimeError),
]


def broken(target, at, error):
    """Let a function fail at its n-th call."""
    place, name = target.rsplit(".", 1)
    try:
        owner = importlib.import_module(place)
    except ModuleNotFoundError:
        place, kind = place.rsplit(".", 1)
        owner = getattr(importlib.import_module(place), kind)
    original, calls = getattr(owner, name), iter(range(10_000))

    def fail(*args, **kwargs):
        if next(calls) == at:
            raise error("injected")
        return original(*args, **kwargs)

    return patch.object(owner, name, fail)


@CHECKS.append
def an_error_on_one_rank_reaches_all_and_changes_no_model():
    for index, (target, at, error, kwargs, told) in enumerate(FAILURES):
        failing = (index + 1) % 2 if at == 0 else index % 2
        model = convolutions()
        model[1].running_mean += dist.get_rank()
        here = dist.get_rank() == failing
        with left_as_it_was(model):
            try:
                with broken(target, at, error) if here else contextlib.nullcontext():
                    svd_compress_(model, 0.6, **kwargs)
            except BaseException as caught:  # noqa: BLE001 - interruptions are among them
                raised = caught
            else:
                raise AssertionError(f"no error for {target}")
        if here:
            assert isinstance(raised, (error, ValueError)), (target, raised)
        else:
            assert type(raised) is told, (target, raised)
            assert f"failed on rank {failing}, so that no rank has compressed its model" in str(raised), (
                target,
                raised,
            )
        assert "injected" in str(raised)
    model = convolutions()
    assert_same_everywhere(model, svd_compress_(model, 0.6))


@CHECKS.append
def what_is_wrong_on_all_ranks_is_said_on_all():
    model = mlp()
    model[2].weight.data[0, 0] = float("nan")
    cases = [
        (model, {"ratio": 0.5}, ValueError, "the weight of layer '2' holds 1 NaN or infinite values"),
        (mlp(), {"ratio": 3}, ValueError, "ratio must lie strictly between 0 and 1"),
        (mlp(), {"ratio": 0.5, "calibration": []}, ValueError, "calibration is empty"),
        (mlp(), {}, ValueError, "give either ratio"),
        (fill_(nn.Linear(8, 8), 0), {"ratio": 0.5}, ValueError, "the model is itself a Linear"),
    ]
    for one, kwargs, kind, message in cases:
        with left_as_it_was(one), raises(kind, message):
            svd_compress_(one, **kwargs)
    with raises(TypeError, "model must be a torch.nn.Module, got str 'model'"):
        svd_compress_("model", 0.5)


@CHECKS.append
def contexts_and_random_states_do_not_matter():
    contexts = [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")]
    expected = mlp()
    svd_compress_(expected, 0.5)
    for seed, context in enumerate(contexts):
        model = mlp()
        torch.manual_seed(seed + dist.get_rank())
        state = torch.get_rng_state()
        with context:
            svd_compress_(model, 0.5)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(one, bits(model)[name]) for name, one in bits(expected).items())
    assert not any(one.is_inference() for one in model.parameters())


@CHECKS.append
def a_model_in_ddp_is_compressed_inside_and_wrapped_anew():
    rows = randn(8, 24, seed=dist.get_rank(), dtype=torch.float32)
    inside = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Linear(24, 24))
    wrapped = nn.parallel.DistributedDataParallel(fill_(inside, 0))
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(rows).square().mean().backward()
        optimizer.step()
    first, second = everywhere(wrapped.module[1].running_mean.clone())
    assert not torch.equal(first, second)
    with (
        left_as_it_was(wrapped),
        raises(ValueError, "wrapped in DistributedDataParallel", "compress the module inside"),
    ):
        svd_compress_(wrapped, 0.5)
    report = svd_compress_(wrapped.module, 0.5)
    assert_same_everywhere(wrapped.module, report)
    wrapped = nn.parallel.DistributedDataParallel(wrapped.module)
    wrapped(rows).square().mean().backward()
    gradients = everywhere([one.grad.clone() for one in wrapped.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert any(bool(one.any()) for one in gradients[0])


@CHECKS.append
def a_sharded_model_is_refused_and_the_way_out_works():
    fsdp = importlib.import_module("torch.distributed.fsdp")
    state = importlib.import_module("torch.distributed.checkpoint.state_dict")
    tensor = importlib.import_module("torch.distributed.tensor")
    fully_shard = getattr(fsdp, "fully_shard", None)
    if fully_shard is None:  # before torch 2.6
        fully_shard = importlib.import_module("torch.distributed._composable.fsdp").fully_shard
    mesh = tensor.init_device_mesh("cpu", (2,))

    def sharded(model):
        fully_shard(model[2], mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model = sharded(mlp())
    before = {name: value.to_local().clone() for name, value in model.state_dict().items()}
    for call in (svd_compress_, plan_compression):
        with raises(ValueError, "parameter 'weight' of layer '0' is sharded (DTensor)", "get_model_state_dict"):
            call(model, 0.5)
    assert all(torch.equal(before[name], value.to_local()) for name, value in model.state_dict().items())
    whole = mlp(1)
    whole.load_state_dict(state.get_model_state_dict(model, options=state.StateDictOptions(full_state_dict=True)))
    report, expected = svd_compress_(whole, 0.5), mlp()
    assert_same_everywhere(whole, report)
    svd_compress_(expected, 0.5)
    again = sharded(copy.deepcopy(whole))
    assert torch.allclose(again(ROWS), expected(ROWS), atol=1e-6)
    with raises(ValueError, "is sharded (DTensor)"):
        svd_compress_(again, 0.5)
    flat = fsdp.FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"), use_orig_params=True)
    with raises(ValueError, "the model is sharded (FullyShardedDataParallel)"):
        svd_compress_(flat, 0.5)


if __name__ == "__main__":
    run_checks(CHECKS)
