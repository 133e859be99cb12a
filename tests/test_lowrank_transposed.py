"""LowRankConvTranspose1d/2d/3d against the dense layers, alone and through the whole compression."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torchsmooth
from tests.networks import same, snapshot
from tests.reference.lowrank import group_matrices, outputs_first, tail_energy, truncated_weight
from tests.strategies import fill_, randn, seeds, small_convolutions
from torchsmooth import (
    CompressionPlan,
    LowRankConvTranspose2d,
    RankTail,
    attach_,
    load_compressed_,
    plan_compression,
    restore_dense_,
    smooth_,
    svd_compress_,
)

AXES = pytest.mark.parametrize("axes", [1, 2, 3])
SCHEMES = ("channel", "input")
FORMS = ("factored", "pivoted")


def low_rank(conv, rank, scheme="channel", form="factored"):
    axes = conv.weight.dim() - 2
    make = getattr(getattr(torchsmooth, f"LowRankConvTranspose{axes}d"), f"from_conv_transpose{axes}d")
    return make(conv, rank, scheme, form)


def merged(layer):
    return getattr(layer, f"to_conv_transpose{layer.kernel_axes}d")()


def norm(tensor):
    return float(tensor.detach().double().norm())


def matrices(conv, scheme):
    return group_matrices(outputs_first(conv.weight.detach(), conv.groups), scheme, conv.groups)


def truncated(conv, scheme, rank):
    """The dense layer with the matrix of each group truncated: entries are found by loops."""
    weight = truncated_weight(outputs_first(conv.weight.detach(), conv.groups), scheme, conv.groups, rank)
    other = copy.deepcopy(conv)
    inside, outside = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    with torch.no_grad():
        for inp in range(conv.in_channels):
            for out in range(outside):
                other.weight[inp, out] = weight[inp // inside * outside + out, inp % inside]
    return other


@AXES
@settings(max_examples=15)
@given(data=st.data(), scheme=st.sampled_from(SCHEMES))
def test_a_transposed_convolution_is_reproduced_at_full_rank(axes, data, scheme):
    conv, inputs = data.draw(small_convolutions(axes, transposed=True))
    layer = low_rank(conv, min(matrices(conv, scheme)[0].shape), scheme)
    expected = conv(inputs)
    assert layer(inputs).shape == expected.shape
    assert torch.allclose(layer(inputs), expected, atol=1e-11)
    assert torch.allclose(layer.weight, conv.weight, atol=1e-12)


@AXES
@settings(max_examples=20)
@given(data=st.data(), scheme=st.sampled_from(SCHEMES), form=st.sampled_from(FORMS))
def test_at_every_rank_it_is_the_layer_with_the_truncated_weight(axes, data, scheme, form):
    conv, inputs = data.draw(small_convolutions(axes, transposed=True))
    full = min(matrices(conv, scheme)[0].shape)
    assume(form == "factored" or full > 1)
    rank = data.draw(st.integers(1, full if form == "factored" else full - 1))
    layer, exact = low_rank(conv, rank, scheme, form), truncated(conv, scheme, rank)
    assert torch.allclose(layer(inputs), exact(inputs), atol=1e-10)
    assert torch.allclose(layer.weight, exact.weight, atol=1e-11)
    dense = merged(layer)
    assert repr(dense) == repr(conv)
    assert torch.allclose(dense(inputs), exact(inputs), atol=1e-10)
    error = norm(conv.weight - layer.weight) ** 2
    assert error == pytest.approx(tail_energy(matrices(conv, scheme), rank), abs=1e-10)


@AXES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_output_size_may_be_asked_for(axes, scheme, form):
    kind = getattr(nn, f"ConvTranspose{axes}d")
    conv = fill_(kind(4, 6, 3, stride=3, padding=1, groups=2), 0).double()
    layer, dense = low_rank(conv, 1, scheme, form), truncated(conv, scheme, 1)
    inputs = randn(2, 4, *range(2, 2 + axes), seed=0)
    least = dense(inputs).shape[2:]
    for more in (0, 1, 2):
        size = [one + more for one in least]
        for asked in (size, [2, 6, *size]):
            assert layer(inputs, asked).shape[2:] == torch.Size(size)
            assert torch.allclose(layer(inputs, output_size=asked), dense(inputs, output_size=asked), atol=1e-11)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(inputs, [one + 3 for one in least])


@AXES
@pytest.mark.parametrize("form", FORMS)
def test_the_parts_are_ordinary_layers_of_the_announced_sizes(axes, form):
    large, small = getattr(nn, f"ConvTranspose{axes}d"), getattr(nn, f"Conv{axes}d")
    conv = large(6, 8, 3, stride=2, output_padding=1, dilation=2, groups=2)
    fewer = 2 if form == "pivoted" else 0
    layer = low_rank(conv, 2, "channel", form)
    assert (type(layer.down), type(layer.up)) == (large, small)
    assert layer.down.weight.shape == (6, 2, *[3] * axes)
    assert layer.up.weight.shape == (8 - 2 * fewer, 2, *[1] * axes)
    layer = low_rank(conv, 2, "input", form)
    assert (type(layer.down), type(layer.up)) == (small, large)
    assert layer.down.weight.shape == (4, 3 - fewer, *[1] * axes)
    assert layer.up.weight.shape == (4, 4, *[3] * axes)
    for name in ("stride", "output_padding", "dilation", "padding", "groups"):
        assert getattr(layer.up, name) == getattr(layer, name) == getattr(conv, name)
    assert low_rank(large(4, 4, 1, stride=2), 2, "input", form).scheme == "channel"


@AXES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_flag_is_kept(axes, form, dtype):
    kind = getattr(nn, f"ConvTranspose{axes}d")
    conv = fill_(kind(4, 6, 3, 2, 1, 1, 2), 0).to(dtype).eval().requires_grad_(False)
    conv.bias.requires_grad_(True)
    inputs = randn(2, 4, *[4] * axes, seed=1).to(dtype)
    for scheme in SCHEMES:
        layer = low_rank(conv, 1, scheme, form)
        assert {one.dtype for one in layer.parameters()} == {dtype}
        assert [name for name, one in layer.named_parameters() if one.requires_grad] == [
            "merge.bias" if (scheme, form) == ("channel", "pivoted") else "up.bias"
        ]
        assert not any(module.training for module in layer.modules())
        output, expected = layer(inputs), merged(layer)(inputs)
        assert output.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        assert norm(output - expected) <= tolerance * norm(expected)
        assert [one.requires_grad for one in merged(layer).parameters()] == [False, True]
    without = kind(4, 6, 2, bias=False)
    assert low_rank(without, 2, "channel", form).bias is merged(low_rank(without, 2, "input", form)).bias is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("axes", [2, 3])
def test_channels_last_is_kept_there_and_back(axes, scheme, form):
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[axes]
    conv = getattr(nn, f"ConvTranspose{axes}d")(4, 6, 2).to(memory_format=last)
    layer = low_rank(conv, 3, scheme, form)
    # On one thread, torch's own convolution of kernel size 1 loses it for fewer examples.
    inputs = randn(16, 4, *[3] * axes, seed=0, dtype=torch.float32).to(memory_format=last)
    for one in (layer.down.weight, layer.up.weight, layer(inputs), merged(layer).weight):
        assert one.is_contiguous(memory_format=last)
    plain = low_rank(conv.to(memory_format=torch.contiguous_format), 3, scheme, form)
    assert all(one.is_contiguous() for one in (*plain.parameters(), merged(plain).weight))
    assert torch.allclose(plain(inputs.contiguous()), layer(inputs), atol=1e-5)


@AXES
def test_layers_survive_copies_compilers_and_training(axes):
    kind = getattr(nn, f"ConvTranspose{axes}d")
    inputs = randn(2, 4, *[4] * axes, seed=0, dtype=torch.float32)
    for scheme, form in (("channel", "factored"), ("input", "pivoted"), ("channel", "pivoted")):
        layer = low_rank(fill_(kind(4, 6, 3, stride=2), 0), 2, scheme, form)
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.fx.symbolic_trace(layer)]
        copies.append(torch.export.export(layer, (inputs,)).module())
        for again in copies:
            assert torch.allclose(again(inputs), layer(inputs), atol=1e-6)
        layer(inputs).square().sum().backward()
        assert all(norm(one.grad) > 0 for one in layer.parameters())


def test_layers_can_be_built_without_a_dense_one():
    layer = LowRankConvTranspose2d(4, 6, (3, 2), 2, stride=(1, 2), output_padding=(0, 1), dtype=torch.float64)
    inputs = torch.zeros(1, 4, 5, 5, dtype=torch.float64)
    assert layer(inputs).shape == merged(layer)(inputs).shape == (1, 6, 7, 11)
    assert layer.extra_repr() == (
        "4, 6, kernel_size=(3, 2), stride=(1, 2), output_padding=(0, 1), rank=2, scheme=channel, bias=True"
    )


class Autoencoder(nn.Module):
    """One transposed convolution of each number of axes, grouped and not, among ordinary layers."""

    def __init__(self, seed):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(2, 12, 3, stride=2, padding=1), nn.ReLU())
        self.decoder = nn.Sequential(nn.ConvTranspose2d(12, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 1))
        self.line = nn.ConvTranspose1d(8, 12, 5, stride=3, groups=2)
        self.block = nn.ConvTranspose3d(8, 4, 2, bias=False)
        fill_(self, seed).eval()

    def forward(self, images):
        images = self.decoder(self.encoder(images))
        return self.line(images.flatten(2)).sum() + self.block(images.unsqueeze(2))


IMAGES = randn(3, 2, 8, 6, seed=0, dtype=torch.float32)


def counted(model, *inputs):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*inputs)
    return counter.get_total_flops() // 2


@settings(max_examples=6)
@given(seeds, st.floats(0.2, 0.7), st.sampled_from(["auto", *FORMS]))
def test_models_are_compressed_saved_loaded_and_restored(seed, ratio, form):
    model = Autoencoder(seed)
    before, dense = sum(one.numel() for one in model.parameters()), copy.deepcopy(model)
    plan = plan_compression(model, ratio, form=form)
    again = CompressionPlan.from_json(plan.to_json())
    assert (again, again.to_json()) == (plan, plan.to_json())
    report = again.apply_(model)
    assert sum(one.numel() for one in model.parameters()) == report.parameters_after <= (1 - ratio) * before
    for layer in report.layers:
        assert layer.shape == dense.get_submodule(layer.name).weight.shape
        exact, found = (one.get_submodule(layer.name).weight for one in (dense, model))
        assert layer.relative_error == pytest.approx(norm(exact - found) / norm(exact), abs=1e-6)
    loaded = load_compressed_(Autoencoder(seed + 1), model.state_dict())
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert repr(loaded) == repr(model)
    assert repr(restore_dense_(loaded)) == repr(dense)
    assert torch.allclose(loaded(IMAGES), model(IMAGES), atol=1e-3)


@settings(max_examples=40)
@given(st.data(), st.sampled_from(SCHEMES), st.sampled_from(FORMS), seeds)
def test_structure_is_read_off_the_shapes_even_where_sizes_coincide(data, scheme, form, seed):
    groups, inside, outside, axes = (data.draw(st.integers(1, most)) for most in (2, 4, 4, 3))
    kernel = data.draw(st.tuples(*[st.integers(1, 3)] * axes))

    def build(own_seed):
        kind = getattr(nn, f"ConvTranspose{axes}d")
        return fill_(nn.Sequential(kind(groups * inside, groups * outside, kernel, groups=groups)), own_seed)

    model = build(seed)
    full = min(matrices(model[0], scheme)[0].shape)
    assume(form == "factored" or full > 1)
    model[0] = low_rank(model[0], data.draw(st.integers(1, full if form == "factored" else full - 1)), scheme, form)
    again = load_compressed_(build(seed + 1), model.state_dict())
    assert repr(again) == repr(model)
    inputs = randn(1, groups * inside, *[3] * axes, seed=seed, dtype=torch.float32)
    assert torch.equal(again(inputs), model(inputs))


def test_only_schemes_that_exist_are_planned():
    for scheme in ("auto", "spatial", "tucker", "input", ("spatial", "input")):
        plan = plan_compression(Autoencoder(0), 0.2, scheme=scheme)
        expected = {"auto": ["channel", "input"], ("spatial", "input"): ["input"], "input": ["input"]}
        assert list(plan["decoder.0"].options) == expected.get(scheme, ["channel"])
        assert list(plan["decoder.2"].options) == ["channel"]


@pytest.mark.parametrize("form", FORMS)
def test_every_choice_is_priced_exactly(form):
    plan = plan_compression(Autoencoder(0), 0.2, target="macs", example_inputs=IMAGES)
    assert plan.macs_before == counted(Autoencoder(0), IMAGES)
    for scheme in SCHEMES:
        for layer in plan:
            layer.keep_dense()
            option = layer.options.get(scheme)
            ranks = option.matricisation.few(form, 1, 2) if option else []
            if ranks:
                layer.choose(scheme, ranks[0], form)
        model = Autoencoder(0)
        read = CompressionPlan.from_json(plan.to_json())
        assert read.macs_after == plan.macs_after
        assert read.apply_(model, IMAGES).macs_after == plan.macs_after == counted(model, IMAGES)


def test_a_budget_of_multiply_accumulates_or_time_is_kept(monkeypatch):
    model = Autoencoder(0)
    report = svd_compress_(model, 0.4, target="macs", example_inputs=IMAGES)
    assert report.macs_after == counted(model, IMAGES) <= 0.6 * report.macs_before
    assert any(layer.type.startswith("ConvTranspose") for layer in report.compressed)

    def fake(call, device, repeats):
        owner = call.func.__self__
        return 1e-6 * sum(one.numel() for one in (owner if isinstance(owner, nn.Module) else call.args[0]).parameters())

    monkeypatch.setattr("torchsmooth._timing.seconds", fake)
    report = svd_compress_(Autoencoder(0), 0.3, target="latency", example_inputs=IMAGES)
    assert report.latency_after <= 0.7 * report.latency_before


def test_with_data_they_are_compressed_without_it_and_the_report_says_so():
    model, blind = Autoencoder(0), Autoencoder(0)
    plan = plan_compression(model, 0.6, scheme="channel", calibration=[IMAGES])
    report = plan.apply_(model, calibration=[IMAGES, -IMAGES])
    plan.apply_(blind)
    transposed = [layer for layer in report.compressed if layer.type.startswith("ConvTranspose")]
    assert len(transposed) > 1
    for layer in transposed:
        assert layer.note == "not calibrated: it is a transposed convolution"
        assert layer.output_error is None
        assert torch.equal(model.get_submodule(layer.name).weight, blind.get_submodule(layer.name).weight)
    assert not torch.equal(model.decoder[1].running_mean, blind.decoder[1].running_mean)


def test_bias_hooks_and_notes_stay_with_the_layer():
    model = Autoencoder(0)
    bias, calls = model.decoder[0].bias, []
    model.decoder[0].register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    model.decoder[0].note = "mine"
    svd_compress_(model, 0.5, form="pivoted")
    assert model.decoder[0].bias is bias
    model(IMAGES)
    restore_dense_(model)
    assert model.decoder[0].bias is bias
    assert model.decoder[0].note == "mine"
    model(IMAGES)
    assert calls == [LowRankConvTranspose2d, nn.ConvTranspose2d]


def test_a_tail_is_penalised_of_what_the_plan_will_cut():
    model = smooth_(Autoencoder(0), RankTail(0.4, 1.0, scheme="channel"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = plan_compression(model, 0.4, scheme="channel")
    attach_(optimizer, model)
    optimizer.step()  # no gradients but those of the penalty: what is cut goes, and nothing else
    cut = [layer.name for layer in before if layer.rank is not None]
    assert any(name.startswith(("decoder", "line", "block")) for name in cut)
    after = plan_compression(model, 0.4, scheme="channel")
    for name in cut:
        option = after[name].options["channel"]
        assert float(option.errors[before[name].rank]) < 1e-9


def with_value(module, value):
    with torch.no_grad():
        module.weight[0, 0] = value
    return module


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: low_rank(nn.ConvTranspose2d(4, 4, 3), 5),
            ValueError,
            "between 1 and 4 .the full rank of scheme 'chan",
        ),
        (lambda: low_rank(nn.ConvTranspose1d(4, 6, 2), 4, "input", "pivoted"), ValueError, "between 1 and 3 .one less"),
        (lambda: low_rank(nn.ConvTranspose3d(4, 6, 2), "2"), TypeError, "rank must be an integer, got str '2'"),
        (lambda: low_rank(nn.ConvTranspose2d(4, 4, 3), 2, "spatial"), ValueError, "one of 'channel', 'input'; got str"),
        (lambda: low_rank(nn.ConvTranspose2d(4, 4, 3, groups=4), 1, "channel", "pivoted"), ValueError, "at least two"),
        (lambda: LowRankConvTranspose2d(4, 4, 3, 2, padding="same"), ValueError, "got str 'same': only ordinary conv"),
        (
            lambda: LowRankConvTranspose2d(4, 4, 3, 2, padding_mode="reflect"),
            ValueError,
            "padding_mode must be 'zeros', the only choice here",
        ),
        (lambda: LowRankConvTranspose2d(4, 4, (3, 3, 3), 2), ValueError, r"a number or a pair, got tuple \(3, 3, 3\)"),
        (
            lambda: LowRankConvTranspose2d.from_conv_transpose2d(nn.Conv2d(4, 4, 3), 2),
            TypeError,
            "expected a torch.nn.ConvTranspose2d, got Conv2d.* Use LowRankConv2d.from_conv2d for that",
        ),
        (
            lambda: torchsmooth.LowRankLinear.from_linear(nn.ConvTranspose1d(4, 4, 3), 2),
            TypeError,
            "Use LowRankConvTranspose1d.from_conv_transpose1d for that",
        ),
        (
            lambda: low_rank(with_value(nn.ConvTranspose1d(2, 2, 1), torch.nan), 1),
            ValueError,
            "holds 1 NaN or infinite",
        ),
        (
            lambda: svd_compress_(nn.ConvTranspose3d(4, 4, 3), 0.5),
            ValueError,
            r"itself a ConvTranspose3d.* use LowRankConvTranspose3d.from_conv_transpose3d\(layer, rank\), or wrap",
        ),
    ],
)
def test_bad_input_is_named_with_the_way_out(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("other", "loading", "applying"),
    [
        (
            lambda: nn.ConvTranspose2d(12, 8, 3, 2, 1),
            r"no factors of the weight of layer 'decoder.0', which has shape \(12, 8, 3, 3\)",
            r"planned as ConvTranspose2d of shape \(12, 8, 4, 4\), but the model has ConvTranspose2d of shape",
        ),
        (
            lambda: nn.ConvTranspose2d(12, 16, 4, 2, 1, groups=2),
            "no factors of the weight of layer 'decoder.0'",
            "layer 'decoder.0' is planned for other groups",
        ),
        (
            lambda: nn.Conv2d(8, 12, 4, 2, 1),
            "no factors of the weight of layer 'decoder.0'",
            "planned as ConvTranspose2d of shape .* but the model has Conv2d of shape",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(other, loading, applying):
    small, model = Autoencoder(0), Autoencoder(1)
    plan = plan_compression(small, 0.4)
    plan.apply_(small)
    model.decoder[0] = other()
    before = snapshot(model)
    with pytest.raises(ValueError, match=loading):
        load_compressed_(model, small.state_dict())
    with pytest.raises(ValueError, match=applying):
        plan.apply_(model)
    assert same(before, snapshot(model))


def test_half_of_a_layer_is_not_loaded():
    small, model = Autoencoder(0), Autoencoder(1)
    svd_compress_(small, 0.4)
    before, state = snapshot(model), small.state_dict()
    del state["decoder.0.down.weight"]
    with pytest.raises(ValueError, match="half of layer 'decoder.0' is missing"):
        load_compressed_(model, state)
    assert same(before, snapshot(model))
