"""LowRankLinear and LowRankConv2d against dense layers, over everything that a convolution can be."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.reference.lowrank import group_matrices, tail_energy, truncated_weight
from tests.strategies import HARD_KINDS, convolutions, fill_, hard_matrix, randn, seeds
from torchsmooth import LowRankConv2d, LowRankLinear, TuckerConv2d
from torchsmooth._matricise import SCHEMES

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative errors that a few products in sequence may show in each dtype.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}
# torch says so of the dense convolution as well.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def norm(tensor):
    return float(tensor.detach().double().norm())


def relative(found, expected):
    return norm(found.detach().double() - expected.detach().double()) / max(norm(expected), 1e-300)


def dense_with(conv, weight):
    dense = copy.deepcopy(conv)
    with torch.no_grad():
        dense.weight.copy_(weight)
    return dense


def full_rank(conv, scheme):
    matrices = group_matrices(conv.weight.detach().double(), scheme, conv.groups)
    return min(matrices[0].shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@given(data=st.data())
def test_a_convolution_is_reproduced_at_full_rank(scheme, dtype, data):
    conv, inputs = data.draw(convolutions(dtype))
    layer = LowRankConv2d.from_conv2d(conv, full_rank(conv, scheme), scheme)
    expected = conv(inputs)
    found = layer(inputs)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert relative(found, expected) <= TOLERANCE[dtype]
    assert relative(layer.weight, conv.weight) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@given(data=st.data())
def test_at_every_rank_it_is_convolution_with_the_truncated_weight(scheme, dtype, data):
    conv, inputs = data.draw(convolutions(dtype))
    rank = data.draw(st.integers(1, full_rank(conv, scheme)))
    layer = LowRankConv2d.from_conv2d(conv, rank, scheme)
    truncated = truncated_weight(conv.weight.detach(), scheme, conv.groups, rank)
    exact = dense_with(conv, truncated).double()(inputs.double())
    scale = norm(conv.double()(inputs.double())) + norm(exact)
    assert norm(layer(inputs).double() - exact) <= 2 * TOLERANCE[dtype] * max(scale, 1e-300)
    assert norm(layer.weight.double() - truncated) <= TOLERANCE[dtype] * norm(conv.weight)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(data=st.data())
def test_the_weight_error_is_the_tail_energy_of_the_groups(scheme, data):
    conv, _ = data.draw(convolutions())
    weight = conv.weight.detach()
    matrices = group_matrices(weight, scheme, conv.groups)
    rank = data.draw(st.integers(1, min(matrices[0].shape)))
    error = norm(weight - LowRankConv2d.from_conv2d(conv, rank, scheme).weight) ** 2
    assert error == pytest.approx(tail_energy(matrices, rank), abs=1e-10 * float(weight.square().sum()))


@pytest.mark.parametrize("kind", HARD_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_layers_of_hard_weights(kind, dtype):
    linear = nn.Linear(9, 6, dtype=dtype)
    with torch.no_grad():
        linear.weight = nn.Parameter(hard_matrix(kind, 6, 9, seed=5, dtype=dtype))
        linear.bias.copy_(randn(6, seed=6))
    inputs = randn(4, 9, seed=7, dtype=dtype)
    for rank in range(1, 7):
        layer = LowRankLinear.from_linear(linear, rank)
        exact = F.linear(
            inputs.double(), truncated_weight(linear.weight.detach(), "channel", 1, rank), linear.bias.double()
        )
        size = norm(linear.weight) * norm(inputs) + norm(linear.bias)
        assert norm(layer(inputs).double() - exact) <= 2 * TOLERANCE[dtype] * size
    assert relative(layer(inputs), linear(inputs)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(9,), (2, 9), (2, 3, 9), (0, 9)])
def test_linear_inputs_of_any_leading_shape(shape):
    layer = LowRankLinear.from_linear(nn.Linear(9, 6, dtype=torch.float64), 3)
    assert layer(torch.zeros(shape, dtype=torch.float64)).shape == (*shape[:-1], 6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_everything_about_a_convolution_is_kept(scheme):
    conv = nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, bias=True, padding_mode="circular", dtype=torch.float16)
    conv.eval().requires_grad_(False)
    conv.bias.requires_grad_(True)
    layer = LowRankConv2d.from_conv2d(conv, 1, scheme)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(conv, name), name
    assert not any(module.training for module in layer.modules())
    assert [p.requires_grad for p in (layer.down.weight, layer.up.weight, layer.up.bias)] == [False, False, True]
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert layer.down.bias is None
    assert type(layer.down) is type(layer.up) is nn.Conv2d
    dense = layer.to_conv2d()
    assert repr(dense) == repr(conv)
    assert [p.requires_grad for p in (dense.weight, dense.bias)] == [False, True]
    assert not dense.training


def test_a_missing_bias_stays_missing():
    assert LowRankConv2d.from_conv2d(nn.Conv2d(4, 4, 3, bias=False), 2).bias is None
    layer = LowRankLinear.from_linear(nn.Linear(4, 4, bias=False), 2)
    assert layer.bias is None
    assert sorted(layer.state_dict()) == ["down.weight", "up.weight"]
    assert layer.to_linear().bias is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_channels_last_is_kept_there_and_back(scheme):
    conv = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
    layer = LowRankConv2d.from_conv2d(conv, 4, scheme)
    inputs = randn(2, 8, 5, 5, seed=0, dtype=torch.float32).to(memory_format=torch.channels_last)
    for child in (layer.down, layer.up):
        assert child.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer(inputs).is_contiguous(memory_format=torch.channels_last)
    assert layer.to_conv2d().weight.is_contiguous(memory_format=torch.channels_last)
    plain = LowRankConv2d.from_conv2d(conv.to(memory_format=torch.contiguous_format), 4, scheme)
    assert all(parameter.is_contiguous() for parameter in plain.parameters())
    assert plain.to_conv2d().weight.is_contiguous()


@pytest.mark.parametrize("rank", [1, 3])
def test_factors_own_just_the_memory_they_need(rank):
    linear = nn.Linear(9, 6)
    linear.weight = nn.Parameter(torch.randn(9, 6).T)  # transposed strides
    for layer in (
        LowRankLinear.from_linear(linear, rank),
        LowRankConv2d.from_conv2d(nn.Conv2d(5, 5, 3), rank, "input"),
    ):
        for parameter in layer.parameters():
            assert parameter.stride() == torch.empty(parameter.shape).stride()
            assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


@given(convolutions(), st.data())
def test_merging_gives_the_layer_that_the_factors_stand_for(conv_and_inputs, data):
    conv, inputs = conv_and_inputs
    scheme = data.draw(st.sampled_from(SCHEMES))
    layer = LowRankConv2d.from_conv2d(conv, data.draw(st.integers(1, full_rank(conv, scheme))), scheme)
    dense = layer.to_conv2d()
    assert type(dense) is nn.Conv2d
    assert torch.allclose(dense(inputs), layer(inputs), atol=1e-11)


@given(seeds)
def test_neither_the_source_nor_the_random_state_is_touched(seed):
    conv, linear = fill_(nn.Conv2d(4, 6, 3), seed), fill_(nn.Linear(5, 4), seed)
    torch.manual_seed(seed)
    before = copy.deepcopy((conv.state_dict(), linear.state_dict())), torch.get_rng_state()
    layer, other = LowRankConv2d.from_conv2d(conv, 2), LowRankLinear.from_linear(linear, 2)
    with torch.no_grad():
        for parameter in (*layer.parameters(), *other.parameters()):
            parameter.add_(1)
    layer.to_conv2d(), other.to_linear()
    assert torch.equal(torch.get_rng_state(), before[1])
    for module, state in zip((conv, linear), before[0], strict=True):
        assert all(torch.equal(module.state_dict()[key], state[key]) for key in state)


def test_merging_stays_in_the_range_of_half_precision():
    linear = nn.Linear(64, 64, dtype=torch.float16)
    with torch.no_grad():
        linear.weight.copy_(60_000 * torch.sign(randn(64, 64, seed=0)))
    merged = LowRankLinear.from_linear(linear, 20).to_linear()
    assert bool(merged.weight.isfinite().all())


def test_the_weight_is_differentiable_and_read_only():
    layer = LowRankLinear.from_linear(nn.Linear(5, 4, dtype=torch.float64), 2)
    layer.weight.sum().backward()
    assert layer.down.weight.grad.abs().sum() > 0
    assert layer.up.weight.grad.abs().sum() > 0
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(torch.zeros(4, 5))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (LowRankLinear(5, 4, 2, device="meta"), (4, 5)),
        (LowRankLinear(5, 4, 2, form="pivoted", device="meta"), (4, 5)),
        (LowRankConv2d(6, 4, 3, 2, groups=2, device="meta"), (4, 3, 3, 3)),
        (TuckerConv2d(6, 4, 3, 2, device="meta"), (4, 6, 3, 3)),
    ],
)
def test_the_weight_has_a_shape_on_the_meta_device(layer, shape):
    assert layer.weight.is_meta
    assert layer.weight.shape == shape


def test_layers_can_be_built_without_a_dense_one():
    conv = LowRankConv2d(4, 6, (3, 5), 2, scheme="spatial", stride=(1, 2), padding="valid", dtype=torch.float64)
    assert conv(torch.zeros(1, 4, 9, 9, dtype=torch.float64)).shape == (1, 6, 7, 3)
    assert (conv.down.kernel_size, conv.up.kernel_size, conv.up.stride) == ((3, 1), (1, 5), (1, 2))
    linear = LowRankLinear(5, 4, 2, bias=False)
    assert linear(torch.zeros(3, 5)).shape == (3, 4)
    assert repr(linear).splitlines()[0] == "LowRankLinear("
    assert linear.extra_repr() == "in_features=5, out_features=4, rank=2, bias=False"


def test_schemes_that_coincide_go_by_one_name():
    names = [LowRankConv2d.from_conv2d(nn.Conv2d(4, 4, 1), 2, scheme).scheme for scheme in SCHEMES]
    assert names == ["channel"] * 4
    assert LowRankConv2d.from_conv2d(nn.Conv2d(4, 4, (1, 3)), 2, "spatial").scheme == "input"


@pytest.mark.parametrize("build", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_layers_survive_copies_and_pickles(build):
    layer = LowRankConv2d.from_conv2d(nn.Conv2d(4, 6, 3), 2, "spatial")
    again = build(layer)
    inputs = randn(1, 4, 5, 5, seed=0, dtype=torch.float32)
    assert torch.equal(again(inputs), layer(inputs))
    assert again.to_conv2d().weight.shape == (6, 4, 3, 3)


def test_a_whole_layer_can_be_saved():
    file = io.BytesIO()
    layer = LowRankLinear.from_linear(nn.Linear(5, 4), 2)
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.weight, layer.weight)


def with_values(module, value):
    with torch.no_grad():
        module.weight[0, 0] = value
    return module


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LowRankLinear.from_linear(nn.Linear(5, 4), 5), ValueError, "between 1 and 4 .the full rank., got 5"),
        (lambda: LowRankLinear.from_linear(nn.Linear(5, 4), 0), ValueError, "between 1 and 4 .the full rank., got 0"),
        (lambda: LowRankLinear.from_linear(nn.Linear(5, 4), 2.0), TypeError, "rank must be an integer, got float 2.0"),
        (lambda: LowRankLinear.from_linear(nn.Linear(5, 4), True), TypeError, "rank must be an integer, got bool True"),
        (lambda: LowRankLinear(5, 4, 9), ValueError, "between 1 and 4 .the full rank., got 9"),
        (lambda: LowRankConv2d(4, 4, 3, 13, scheme="spatial"), ValueError, "between 1 and 12 .the full rank of scheme"),
        (
            lambda: LowRankConv2d.from_conv2d(nn.Conv2d(4, 4, 3), 2, "row"),
            ValueError,
            "scheme must be one of 'channel'",
        ),
        (lambda: LowRankConv2d(4, 4, (3, 3, 3), 2), ValueError, r"a number or a pair, got tuple \(3, 3, 3\)"),
        (lambda: LowRankLinear.from_linear(nn.Conv2d(4, 4, 3), 2), TypeError, "Use LowRankConv2d.from_conv2d for that"),
        (lambda: LowRankConv2d.from_conv2d(nn.Linear(4, 4), 2), TypeError, "Use LowRankLinear.from_linear for that"),
        (
            lambda: LowRankLinear.from_linear(with_values(nn.Linear(5, 4), float("nan")), 2),
            ValueError,
            "this Linear holds 1 NaN or infinite values out of 20",
        ),
        (
            lambda: LowRankConv2d.from_conv2d(with_values(nn.Conv2d(4, 4, 1), float("inf")), 2),
            ValueError,
            "this Conv2d holds 1 NaN or infinite values out of 16",
        ),
        (lambda: LowRankLinear.from_linear(nn.Linear(5, 4, device="meta"), 2), ValueError, "on the meta device"),
        (lambda: LowRankLinear.from_linear(nn.LazyLinear(4), 2), ValueError, "not a plain parameter .lazy"),
        (
            lambda: LowRankLinear.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), 2),
            ValueError,
            "remove_parametrizations first",
        ),
        (
            lambda: LowRankLinear.from_linear(nn.Linear(5, 4, dtype=torch.complex64), 2),
            TypeError,
            "complex64; expected",
        ),
    ],
)
def test_bad_input_is_named_with_the_way_out(make, error, message):
    with pytest.raises(error, match=message):
        make()
