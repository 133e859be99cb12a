"""What has to hold of svd_compress_ on two ranks; started by tests/test_distributed_compress.py."""

from __future__ import annotations

import copy
import importlib
from unittest.mock import patch

import torch
from torch import distributed as dist
from torch import nn

import torchsmooth
from tests.distributed.common import IMAGES, ROWS, assert_same_everywhere, bits, convolutions, left_as_it_was, raises
from tests.distributed.compress_errors import CHECKS as ERROR_CHECKS
from tests.distributed.launch import everywhere, run_checks
from tests.networks import mlp, small_resnet
from tests.strategies import fill_, randn
from torchsmooth import plan_compression, svd_compress_

CHECKS = [*ERROR_CHECKS]


def other_layers():
    tables = nn.Embedding(40, 12, padding_idx=0), nn.Conv1d(12, 12, 3)
    return fill_(nn.Sequential(*tables, nn.ConvTranspose2d(12, 8, 3, groups=2), nn.ConvTranspose3d(8, 8, 2)), 0)


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
        (other_layers, {"ratio": 0.5}),
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

    def noted(found, *args, **kwargs):
        decomposed.extend(one.name for one in found)
        return options_of(found, *args, **kwargs)

    with (
        patch("torchsmooth._workpiece.options_of", noted),
        patch("torchsmooth._apply._truncate_", lambda *args: (truncated.append(args[1].name), truncate(*args))[1]),
        patch("torchsmooth._spectrum.decompose", lambda *args: calls.append(args) or decompose(*args)),
    ):
        calls, decompose = [], torchsmooth._decompose.decompose
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
    assert "never called" in report["never"].note
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
