"""LowRankConv1d and LowRankConv3d against the dense layers, alone and through the whole compression."""

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
from tests.reference import calibration as reference
from tests.reference.lowrank import group_matrices, tail_energy, truncated_weight
from tests.strategies import fill_, randn, seeds, small_convolutions
from torchsmooth import load_compressed_, plan_compression, restore_dense_, svd_compress_
from torchsmooth._moments import drawn_positions, input_rows, output_rows

# torch says so of the dense convolution as well.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
AXES = pytest.mark.parametrize("axes", [1, 3])
SCHEMES = ("channel", "input")


def low_rank(conv, rank, scheme="channel", form="factored"):
    axes = conv.weight.dim() - 2
    make = getattr(getattr(torchsmooth, f"LowRankConv{axes}d"), f"from_conv{axes}d")
    return make(conv, rank, scheme, form)


def merged(layer):
    return getattr(layer, f"to_conv{layer.kernel_axes}d")()


def norm(tensor):
    return float(tensor.detach().double().norm())


def matrices(conv, scheme):
    return group_matrices(conv.weight.detach(), scheme, conv.groups)


def with_weight(conv, weight):
    other = copy.deepcopy(conv)
    with torch.no_grad():
        other.weight.copy_(weight)
    return other


@AXES
@settings(max_examples=20)
@given(data=st.data(), scheme=st.sampled_from(SCHEMES))
def test_a_convolution_is_reproduced_at_full_rank(axes, data, scheme):
    conv, inputs = data.draw(small_convolutions(axes))
    layer = low_rank(conv, min(matrices(conv, scheme)[0].shape), scheme)
    assert layer(inputs).shape == conv(inputs).shape
    assert torch.allclose(layer(inputs), conv(inputs), atol=1e-11)
    assert torch.allclose(layer.weight, conv.weight, atol=1e-12)


@AXES
@settings(max_examples=20)
@given(data=st.data(), scheme=st.sampled_from(SCHEMES), form=st.sampled_from(["factored", "pivoted"]))
def test_at_every_rank_it_is_convolution_with_the_truncated_weight(axes, data, scheme, form):
    conv, inputs = data.draw(small_convolutions(axes))
    full = min(matrices(conv, scheme)[0].shape)
    assume(form == "factored" or full > 1)
    rank = data.draw(st.integers(1, full if form == "factored" else full - 1))
    layer = low_rank(conv, rank, scheme, form)
    truncated = truncated_weight(conv.weight.detach(), scheme, conv.groups, rank)
    expected = with_weight(conv, truncated)(inputs)
    assert torch.allclose(layer(inputs), expected, atol=1e-10)
    assert torch.allclose(layer.weight, truncated, atol=1e-11)
    dense = merged(layer)
    assert repr(dense) == repr(conv)
    assert torch.allclose(dense(inputs), expected, atol=1e-10)
    error = norm(conv.weight - layer.weight) ** 2
    assert error == pytest.approx(tail_energy(matrices(conv, scheme), rank), abs=1e-10)


@AXES
@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_flag_is_kept(axes, form, dtype):
    kind = getattr(nn, f"Conv{axes}d")
    conv = fill_(kind(4, 6, 2, 2, 1, 2, 2, padding_mode="circular"), 0).to(dtype).eval().requires_grad_(False)
    conv.bias.requires_grad_(True)
    inputs = randn(2, 4, *[5] * axes, seed=1).to(dtype)
    for scheme in SCHEMES:
        layer = low_rank(conv, 1, scheme, form)
        assert {one.dtype for one in layer.parameters()} == {dtype}
        assert [name for name, one in layer.named_parameters() if one.requires_grad] == [
            "merge.bias" if (scheme, form) == ("channel", "pivoted") else "up.bias"
        ]
        assert not any(module.training for module in layer.modules())
        output, expected = layer(inputs), merged(layer)(inputs)
        assert output.dtype == dtype
        assert norm(output - expected) <= {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[
            dtype
        ] * norm(expected)
    without = kind(4, 6, 2, bias=False)
    assert low_rank(without, 2, "channel", form).bias is merged(low_rank(without, 2, "input", form)).bias is None


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_channels_last_is_kept_there_and_back(scheme, form):
    conv = nn.Conv3d(4, 6, 2).to(memory_format=torch.channels_last_3d)
    layer = low_rank(conv, 3, scheme, form)
    # On one thread, torch's own convolution of kernel size 1 loses it for fewer examples.
    inputs = randn(16, 4, 3, 4, 5, seed=0, dtype=torch.float32).to(memory_format=torch.channels_last_3d)
    for one in (layer.down.weight, layer.up.weight, layer(inputs), layer.to_conv3d().weight):
        assert one.is_contiguous(memory_format=torch.channels_last_3d)
    plain = low_rank(conv.to(memory_format=torch.contiguous_format), 3, scheme, form)
    assert all(one.is_contiguous() for one in (*plain.parameters(), plain.to_conv3d().weight))
    assert torch.allclose(plain(inputs.contiguous()), layer(inputs), atol=1e-5)


@AXES
def test_the_parts_are_ordinary_layers_that_travel(axes):
    kind = getattr(nn, f"Conv{axes}d")
    for scheme in SCHEMES:
        layer = low_rank(fill_(kind(4, 6, 3, padding=1), 0), 2, scheme)
        assert type(layer.down) is type(layer.up) is kind
        inputs = randn(1, 4, *[4] * axes, seed=0, dtype=torch.float32)
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(again(inputs), layer(inputs))
    assert layer.extra_repr().endswith("rank=2, scheme=input, bias=True")


class Mixed(nn.Module):
    """Sound and volumes: one convolution of each, of sizes that can be compressed, and one of kernel size 1."""

    def __init__(self, seed):
        super().__init__()
        self.sound = nn.Sequential(nn.Conv1d(6, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 12, 3, stride=2, groups=2))
        self.point = nn.Conv1d(12, 12, 1)
        self.volume = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 2, dilation=(1, 2, 1)))
        fill_(self, seed)

    def forward(self, sound, volume):
        return self.point(self.sound(sound)).sum() + self.volume(volume)


INPUTS = (randn(3, 6, 14, seed=0, dtype=torch.float32), randn(2, 2, 4, 5, 3, seed=1, dtype=torch.float32))


def counted(model, inputs):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*inputs)
    return counter.get_total_flops() // 2


@settings(max_examples=5)
@given(seeds, st.floats(0.2, 0.7), st.sampled_from(["auto", "factored", "pivoted"]))
def test_models_are_compressed_saved_loaded_and_restored(seed, ratio, form):
    model = Mixed(seed)
    before, dense = sum(one.numel() for one in model.parameters()), copy.deepcopy(model)
    plan = plan_compression(model, ratio, form=form)
    assert torchsmooth.CompressionPlan.from_json(plan.to_json()) == plan
    report = plan.apply_(model)
    assert sum(one.numel() for one in model.parameters()) == report.parameters_after <= (1 - ratio) * before
    assert {one.scheme for one in report.layers} <= {None, "channel", "input"}
    for layer in report.compressed:
        exact, found = (one.get_submodule(layer.name).weight for one in (dense, model))
        assert layer.relative_error == pytest.approx(norm(exact - found) / norm(exact), abs=1e-6)
    again = load_compressed_(Mixed(seed + 1), model.state_dict())
    assert torch.equal(again(*INPUTS), model(*INPUTS))
    assert repr(again) == repr(model)
    assert repr(restore_dense_(again)) == repr(dense)
    assert torch.allclose(again(*INPUTS), model(*INPUTS), atol=1e-3)


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_every_choice_is_priced_exactly(form):
    plan = plan_compression(Mixed(0), 0.2, target="macs", example_inputs=INPUTS)
    assert plan.macs_before == counted(Mixed(0), INPUTS)
    for scheme in SCHEMES:
        for layer in plan:
            layer.keep_dense()
            option = layer.options.get(scheme)
            ranks = option.matricisation.few(form, 1, 2) if option else []
            if ranks:
                layer.choose(scheme, ranks[0], form)
        model = Mixed(0)
        assert plan.apply_(model, INPUTS).macs_after == plan.macs_after == counted(model, INPUTS)


@AXES
@settings(max_examples=20)
@given(data=st.data())
def test_rows_are_the_patches_that_outputs_are_made_of(axes, data):
    conv, inputs = data.draw(small_convolutions(axes))
    conv.bias = None
    patches = reference.patches(conv, inputs)
    places = drawn_positions(len(inputs), patches.shape[1], 0)
    drawn = torch.cat([patches[example, one] for example, one in enumerate(places)])
    rows = input_rows(conv, inputs, 0)
    assert torch.equal(rows, drawn.transpose(0, 1))
    outputs = rows @ conv.weight.detach().reshape(conv.groups, -1, rows.shape[-1]).mT
    assert torch.allclose(output_rows(conv, conv(inputs).detach(), 0), outputs, atol=1e-12)


def test_calibration_lessens_the_error_at_the_output():
    batches = [(INPUTS[0] * scale, INPUTS[1] * scale) for scale in (1.0, -0.5)]
    wrapped = lambda: Wrapped(Mixed(3))  # noqa: E731
    blind, seeing = wrapped(), wrapped()
    plan = plan_compression(blind, 0.5)
    plan.apply_(blind)
    report = plan.apply_(seeing, calibration=[(batch,) for batch in batches])
    assert all(one.output_error is not None and not one.note for one in report.compressed)
    expected = [wrapped()(batch) for batch in batches]
    errors = [
        sum(norm(model(batch) - wanted) ** 2 for batch, wanted in zip(batches, expected, strict=True))
        for model in (blind, seeing)
    ]
    assert errors[1] < errors[0]


class Wrapped(nn.Module):
    """A model of two inputs as one of a pair."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pair):
        return self.model(*pair)


def with_value(module, value):
    with torch.no_grad():
        module.weight[0, 0] = value
    return module


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: low_rank(nn.Conv1d(4, 4, 3), 5), ValueError, "between 1 and 4 .the full rank of scheme 'channel' in"),
        (lambda: low_rank(nn.Conv3d(4, 6, 2), 5, "input"), ValueError, "between 1 and 4 .the full rank of scheme 'in"),
        (lambda: low_rank(nn.Conv3d(4, 6, 2), 4, "input", "pivoted"), ValueError, "between 1 and 3 .one less than the"),
        (lambda: low_rank(nn.Conv1d(4, 4, 3), 2.5), TypeError, "rank must be an integer, got float 2.5"),
        (
            lambda: low_rank(nn.Conv1d(4, 4, 3), 2, "spatial"),
            ValueError,
            "one of 'channel', 'input'; got str 'spatial'",
        ),
        (lambda: low_rank(nn.Conv3d(4, 4, 3), 2, "tucker"), ValueError, "one of 'channel', 'input'; got str 'tucker'"),
        (
            lambda: torchsmooth.LowRankConv1d(4, 4, (3, 3), 2),
            ValueError,
            r"a number or a tuple of one, got tuple \(3, 3",
        ),
        (lambda: torchsmooth.LowRankConv3d(4, 4, (3, 3), 2), ValueError, r"a number or a triple, got tuple \(3, 3\)"),
        (
            lambda: torchsmooth.LowRankConv1d.from_conv1d(nn.Conv2d(4, 4, 3), 2),
            TypeError,
            "expected a torch.nn.Conv1d, .* Use LowRankConv2d.from_conv2d for that",
        ),
        (
            lambda: torchsmooth.LowRankConv3d.from_conv3d(nn.ConvTranspose3d(4, 4, 3), 2),
            TypeError,
            "Use LowRankConvTranspose3d.from_conv_transpose3d for that",
        ),
        (
            lambda: low_rank(with_value(nn.Conv1d(2, 2, 1), torch.nan), 1),
            ValueError,
            "this Conv1d holds 1 NaN or infinite",
        ),
        (lambda: low_rank(nn.Conv3d(2, 2, 1, device="meta"), 1), ValueError, "on the meta device"),
        (lambda: svd_compress_(nn.Conv1d(4, 4, 3), 0.5), ValueError, r"use LowRankConv1d.from_conv1d\(layer, rank\)"),
        (lambda: svd_compress_(nn.Conv3d(4, 4, 3), 0.5), ValueError, r"use LowRankConv3d.from_conv3d\(layer, rank\)"),
    ],
)
def test_bad_input_is_named_with_the_way_out(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_loading_what_does_not_fit_changes_nothing():
    small, other = Mixed(0), Mixed(1)
    svd_compress_(small, 0.5)
    other.sound[0] = nn.Conv1d(6, 8, 4)
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"no factors of the weight of layer 'sound.0', which has shape \(8, 6, 4\)"):
        load_compressed_(other, small.state_dict())
    assert same(before, snapshot(other))
