"""svd_compress_ and restore_dense_: what must be kept, and that errors change nothing."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchsmooth
from tests.networks import Shared, Tied, mlp, same, small_resnet, snapshot
from tests.strategies import fill_, randn, seeds
from torchsmooth import LowRankConv2d, LowRankLinear, plan_compression, restore_dense_, svd_compress_

IMAGES = randn(2, 3, 16, 16, seed=11, dtype=torch.float32)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("allocation", ["budget", "uniform"])
@settings(max_examples=12)
@given(st.floats(0.05, 0.85), seeds, st.sampled_from([mlp, small_resnet]))
def test_the_model_that_comes_out_has_the_parameters_asked_for(allocation, ratio, seed, build):
    model = build(seed)
    before = parameters(model)
    report = svd_compress_(model, ratio, allocation=allocation)
    assert parameters(model) == report.parameters_after <= (1 - ratio) * before
    assert report.parameters_before == before
    assert report.ratio == pytest.approx(1 - parameters(model) / before)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"form": "factored"},
        {"form": "pivoted", "scheme": "channel"},
        {"rank_multiple": 4, "progress": False},
        {"target": "macs", "example_inputs": IMAGES},
        {"target": "macs", "example_inputs": (IMAGES,), "allocation": "uniform"},
        {"filter_fn": lambda module, name: name != "fc"},
    ],
)
def test_the_one_line_does_what_plan_and_apply_do(kwargs):
    model, other = small_resnet(), small_resnet()
    plan = plan_compression(other, 0.4, **kwargs)
    report = svd_compress_(model, 0.4, **kwargs)
    assert report.to_dict() == plan.apply_(other, kwargs.get("example_inputs")).to_dict()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert (report.macs_before is None) == ("target" not in kwargs)


@settings(max_examples=10)
@given(seeds, st.floats(0.1, 0.85))
def test_no_layer_grows_and_none_is_missing_from_the_report(seed, ratio):
    model = small_resnet(seed)
    names = [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    report = svd_compress_(model, ratio)
    assert [layer.name for layer in report.layers] == names
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        low_rank = isinstance(module, (LowRankLinear, LowRankConv2d))
        assert low_rank == (layer.scheme is not None) == (layer.reason == "")
        if low_rank:
            after = module.down.weight.numel() + module.up.weight.numel()
            assert (layer.rank, layer.parameters_after) == (module.rank, after)
            assert layer.parameters_after < layer.parameters_before
        else:
            assert layer.parameters_after == layer.parameters_before == module.weight.numel()


@settings(max_examples=10)
@given(seeds)
def test_reported_errors_are_measured_on_the_factors(seed):
    model = small_resnet(seed)
    dense = copy.deepcopy(model)
    for layer in svd_compress_(model, 0.7).compressed:
        weight, low_rank = (one.get_submodule(layer.name).weight.detach().double() for one in (dense, model))
        error = (weight - low_rank).norm() / weight.norm()
        assert layer.relative_error == pytest.approx(float(error), abs=1e-6)


@settings(max_examples=20)
@given(seeds)
def test_half_precision_stays_half_and_reports_its_rounding(seed):
    for dtype in (torch.bfloat16, torch.float16):
        model = mlp(seed).to(dtype)
        planned = plan_compression(model, 0.5)
        report = svd_compress_(model, 0.5)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        for layer, plan in zip(report.layers, planned, strict=True):
            assert plan.relative_error - 1e-3 <= layer.relative_error <= plan.relative_error + 2e-2


@pytest.mark.parametrize("build", [mlp, small_resnet])
def test_an_exact_low_rank_network_computes_the_same(build):
    model = build()
    for module in model.modules():  # make every weight a multiple of its first filter
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            factors = torch.linspace(0.5, 2.0, len(module.weight))
            with torch.no_grad():
                module.weight.copy_(torch.einsum("o,i...->oi...", factors, module.weight[0]))
    inputs = IMAGES if build is small_resnet else randn(3, 24, seed=1, dtype=torch.float32)
    expected = model(inputs).detach()
    report = svd_compress_(model, 0.6)
    assert max(layer.relative_error for layer in report.layers) < 1e-6
    assert torch.allclose(model(inputs), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@settings(max_examples=8)
@given(seeds, st.floats(0.2, 0.8))
def test_restoring_gives_the_dense_architecture_with_the_compressed_function(seed, ratio):
    model = small_resnet(seed)
    architecture = [(name, type(module)) for name, module in model.named_modules()]
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    biases = {name: id(parameter) for name, parameter in model.named_parameters() if parameter.dim() == 1}
    svd_compress_(model, ratio)
    expected = model(IMAGES).detach()
    assert restore_dense_(model) is model
    assert [(name, type(module)) for name, module in model.named_modules()] == architecture
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert {name: id(parameter) for name, parameter in model.named_parameters() if parameter.dim() == 1} == biases
    assert torch.allclose(model(IMAGES), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@settings(max_examples=8)
@given(seeds, st.floats(0.2, 0.8))
def test_compressing_a_restored_model_to_the_same_plan_changes_nothing_more(seed, ratio):
    model = small_resnet(seed)
    plan = plan_compression(model, ratio)
    plan.apply_(model)
    low_rank = (LowRankLinear, LowRankConv2d)
    expected = {name: one.weight.detach() for name, one in model.named_modules() if isinstance(one, low_rank)}
    again = plan.apply_(restore_dense_(model))
    for name, weight in expected.items():
        assert again[name].relative_error < 1e-6
        assert torch.allclose(model.get_submodule(name).weight, weight, atol=1e-5 * float(weight.abs().max()))


def test_restoring_a_dense_model_does_nothing():
    model = mlp()
    before = snapshot(model)
    restore_dense_(restore_dense_(model))
    assert same(before, snapshot(model))


def test_modes_flags_and_formats_are_kept_layer_by_layer():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)).to(memory_format=torch.channels_last)
    model[0].eval().requires_grad_(False)
    svd_compress_(model, 0.5)
    frozen, trained = model
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(module.training for module in trained.modules())
    assert all(parameter.requires_grad for parameter in trained.parameters())
    for parameter in model.parameters():
        assert parameter.dim() < 4 or parameter.is_contiguous(memory_format=torch.channels_last)


def test_hooks_and_their_handles_go_on_working_there_and_back():
    model = mlp(0, (32, 32, 32))
    calls = []
    handles = [
        model[0].register_forward_hook(lambda module, inputs, output: calls.append(("after", type(module)))),
        model[0].register_forward_pre_hook(lambda module, inputs: calls.append(("before", type(module)))),
        model[0].register_full_backward_hook(lambda module, gradients, outputs: calls.append(("back", type(module)))),
    ]
    inputs = randn(2, 32, seed=0, dtype=torch.float32).requires_grad_()
    for change, kind in (
        (lambda: svd_compress_(model, 0.5), LowRankLinear),
        (lambda: restore_dense_(model), nn.Linear),
    ):
        change()
        calls.clear()
        model(inputs).sum().backward()
        assert calls == [("before", kind), ("after", kind), ("back", kind)]
    for handle in handles:
        handle.remove()
    calls.clear()
    model(inputs).sum().backward()
    assert calls == []


def test_attributes_of_the_users_own_stay_with_the_layer():
    model = mlp(0, (32, 32, 32))
    model[0].tag = "first"
    model[0].in_features_doubled = 64
    svd_compress_(model, 0.5)
    assert (model[0].tag, model[0].in_features_doubled) == ("first", 64)
    restore_dense_(model)
    assert (model[0].tag, model[0].in_features_doubled) == ("first", 64)
    assert not {"rank", "matricisation"} & vars(model[0]).keys()


def test_bias_parameters_stay_the_same_objects():
    model = mlp(0, (32, 32, 32))
    model[2].bias = model[0].bias
    svd_compress_(model, 0.5)
    assert model[0].up.bias is model[2].up.bias
    restore_dense_(model)
    assert model[0].bias is model[2].bias


def test_a_shared_module_is_replaced_once_and_everywhere():
    model = fill_(Shared(), 0)
    report = svd_compress_(model, 0.3)
    assert isinstance(model.first, LowRankLinear)
    assert model.first is model.body[0] is model.again["ab"]
    assert parameters(model) == report.parameters_after
    restore_dense_(model)
    assert model.first is model.body[0] is model.again["ab"]
    assert isinstance(model.first, nn.Linear)


def test_tied_weights_stay_tied():
    model = fill_(Tied(), 0)
    svd_compress_(model, 0.1)
    assert model.head.weight is model.embedding.weight
    assert model.body[0].weight is model.body[1].weight
    assert isinstance(model.body[2], LowRankLinear)
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 40)


def test_penalties_go_with_the_layers_they_were_on():
    model = torchsmooth.smooth_(mlp(0, (64, 64, 64)), torchsmooth.NuclearNorm(1e-3))
    svd_compress_(model, 0.3, filter_fn=lambda module, name: name == "0")
    assert not torchsmooth.is_penalized(model[0])
    assert torchsmooth.is_penalized(model[2])
    assert float(torchsmooth.penalty_loss(model).detach()) > 0


def test_compression_does_not_depend_on_the_global_random_state():
    models = [mlp(3), mlp(3)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        svd_compress_(model, 0.5)
        assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_compression_works_inside_the_contexts_users_have_around_it():
    for context in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ):
        model, expected = mlp(3), mlp(3)
        svd_compress_(expected, 0.5)
        with context:
            svd_compress_(model, 0.5)
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("mode", [False, True])
def test_a_compressed_model_can_be_trained(mode):
    model = mlp(0)
    with torch.inference_mode(mode):
        svd_compress_(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inputs, targets = randn(32, 24, seed=1, dtype=torch.float32), randn(32, 8, seed=2, dtype=torch.float32)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kwargs", [{"ratio": 0.6}, {"max_error": 0.5}, {"ratio": 0.6, "allocation": "uniform"}])
def test_reports_print_and_serialise(kwargs):
    model = small_resnet()
    report = svd_compress_(model, **kwargs)
    text = str(report)
    assert f"{report.parameters_before:,} → {report.parameters_after:,} parameters" in text
    for layer in report.layers:
        (line,) = [one for one in text.splitlines() if one.startswith(layer.name + " ")]
        assert "×".join(map(str, layer.shape)) in line
        if layer.scheme:
            for cell in (layer.scheme, f"{layer.rank} / {layer.full_rank}", f"→ {layer.parameters_after:,}"):
                assert cell in line
        else:
            assert f"dense: {layer.reason}" in line
    data = json.loads(json.dumps(report.to_dict()))
    assert data["parameters_after"] == parameters(model)
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in report.layers]
    with pytest.raises(KeyError, match="no layer 'nope'"):
        report["nope"]


FAILURES = {
    "ratio": (None, {"ratio": 0.9999}, ValueError),
    "argument": (None, {"ratio": 0.5, "scheme": "row"}, ValueError),
    "spectrum": ("torchsmooth._spectrum.singular_values", {"ratio": 0.8}, RuntimeError),
    "factors": ("torchsmooth._spectrum.factors_in", {"ratio": 0.8}, RuntimeError),
    "take_over": ("torchsmooth._apply.take_over_", {"ratio": 0.8}, RuntimeError),
    "swap": ("torchsmooth._swap._put", {"ratio": 0.8}, RuntimeError),
    "interrupt": ("torchsmooth._swap._put", {"ratio": 0.8}, KeyboardInterrupt),
}


def break_after(monkeypatch, target, calls, error):
    """Let a function of the library fail at its n-th call."""
    module, name = target.rsplit(".", 1)
    import importlib

    original = getattr(importlib.import_module(module), name)
    count = iter(range(10_000))

    def broken(*args, **kwargs):
        if next(count) == calls:
            raise error("injected")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, broken)


@pytest.mark.parametrize("calls", [0, 1, 4])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_anywhere_leaves_the_model_bit_for_bit_as_it_was(failure, calls, monkeypatch):
    target, kwargs, error = FAILURES[failure]
    model = small_resnet()
    model.fc.register_forward_hook(lambda module, inputs, output: None)
    before = snapshot(model)
    if target:
        break_after(monkeypatch, target, calls, error)
    with pytest.raises(error):
        svd_compress_(model, **kwargs)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("calls", [0, 3])
def test_a_failure_while_restoring_changes_nothing(calls, monkeypatch):
    model = small_resnet()
    svd_compress_(model, 0.6)
    before = snapshot(model)
    break_after(monkeypatch, "torchsmooth._swap._put", calls, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        restore_dense_(model)
    assert same(before, snapshot(model))


def test_a_decomposition_that_does_not_converge_names_the_layer(monkeypatch):
    error = torch.linalg.LinAlgError
    break_after(monkeypatch, "torchsmooth._spectrum.decompose", 0, error)
    with pytest.raises(ValueError, match=r"layer '0' could not be decomposed .injected.: leave it out with filter_fn"):
        svd_compress_(mlp(), 0.5)
    break_after(monkeypatch, "torchsmooth._spectrum.factors_in", 0, error)
    with pytest.raises(ValueError, match=r"layer '[024]' could not be decomposed"):
        svd_compress_(mlp(), 0.5)


@settings(max_examples=10)
@given(seeds)
def test_an_error_in_filter_fn_reaches_the_user(seed):
    model = mlp(seed)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        svd_compress_(model, 0.5, filter_fn=lambda module, name: 1 / 0)
    assert same(before, snapshot(model))


def test_a_bare_low_rank_layer_is_told_its_own_way_back():
    layer = LowRankLinear.from_linear(nn.Linear(8, 8), 2)
    with pytest.raises(ValueError, match=r"itself a LowRankLinear.*call its to_dense\(\)"):
        restore_dense_(layer)
    with pytest.raises(ValueError, match=r"itself a LowRankLinear"):
        svd_compress_(layer, 0.5)


def test_a_sharded_weight_is_refused_with_the_way_out(tmp_path):
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = mlp()
        mesh = init_device_mesh("cpu", (1,))
        model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ValueError, match=r"parameter 'weight' of layer '2' is sharded .*before fully_shard"):
            svd_compress_(model, 0.5)
    finally:
        torch.distributed.destroy_process_group()
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(("sizes", "ratio"), [((10, 10, 10), 0.2), ((10, 10, 10), 0.1), ((25, 25, 25), 0.1)])
def test_a_budget_that_is_met_exactly_is_no_less_in_the_report(sizes, ratio):
    model = nn.Sequential(*(nn.Linear(*pair, bias=False) for pair in pairwise(sizes)))
    plan = plan_compression(model, ratio)
    report = svd_compress_(model, ratio)
    assert report.ratio >= ratio
    assert plan.ratio >= ratio
    assert report.to_dict()["ratio"] >= ratio
