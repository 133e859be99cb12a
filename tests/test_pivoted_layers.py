"""The pivoted form of the low-rank layers: what the factored form computes, with rank² fewer parameters a group."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from tests.networks import COPIES
from tests.reference.lowrank import group_matrices, truncated_weight
from tests.strategies import HARD_KINDS, convolutions, fill_, hard_matrix, randn, seeds
from torchsmooth import LowRankConv2d, LowRankLinear, restore_dense_
from torchsmooth._layers import KINDS
from torchsmooth._leading import truncated_factors
from torchsmooth._matricise import SCHEMES
from torchsmooth._pivoted_modules import ChannelMerge, ChannelSplit, PivotedConv2d
from torchsmooth._pivoting import GROWTH
from torchsmooth._swap import swap_, take_over_

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def norm(tensor):
    return float(tensor.detach().double().norm())


@st.composite
def pivotable(draw, scheme, dtype=torch.float64):
    """A convolution with an input, and a rank below the full rank of a scheme."""
    conv, inputs = draw(convolutions(dtype))
    full = min(group_matrices(conv.weight.detach().double(), scheme, conv.groups)[0].shape)
    assume(full > 1)
    return conv, inputs, draw(st.integers(1, full - 1))


def pivoted_linear(outputs=10, inputs=14, rank=4, seed=0, dtype=torch.float32, **kwargs):
    return LowRankLinear.from_linear(fill_(nn.Linear(inputs, outputs, dtype=dtype, **kwargs), seed), rank, "pivoted")


def pivoted_conv(scheme="channel", rank=3, seed=0, dtype=torch.float32, **kwargs):
    conv = fill_(nn.Conv2d(8, 12, 3, padding=1, dtype=dtype, **kwargs), seed)
    return LowRankConv2d.from_conv2d(conv, rank, scheme, "pivoted")


def every_layer(dtype=torch.float32, **kwargs):
    """One layer of each kind with an input."""
    layers = [pivoted_conv(scheme, dtype=dtype, groups=groups, **kwargs) for scheme in SCHEMES for groups in (1, 2)]
    images = randn(2, 8, 6, 7, seed=9, dtype=dtype)
    return [(pivoted_linear(dtype=dtype, **kwargs), randn(3, 14, seed=9, dtype=dtype))] + [
        (layer, images) for layer in layers
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@given(data=st.data())
def test_at_every_rank_it_is_convolution_with_the_truncated_weight(scheme, dtype, data):
    conv, inputs, rank = data.draw(pivotable(scheme, dtype))
    layer = LowRankConv2d.from_conv2d(conv, rank, scheme, "pivoted")
    truncated = truncated_weight(conv.weight.detach(), scheme, conv.groups, rank)
    dense = copy.deepcopy(conv).double()
    original = norm(dense(inputs.double()))
    with torch.no_grad():
        dense.weight.copy_(truncated)
    exact, found = dense(inputs.double()), layer(inputs)
    assert (found.shape, found.dtype) == (exact.shape, dtype)
    assert norm(found.double() - exact) <= 2 * TOLERANCE[dtype] * max(original + norm(exact), 1e-300)
    assert norm(layer.weight.double() - truncated) <= TOLERANCE[dtype] * norm(conv.weight)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(data=st.data())
def test_a_convolution_in_either_form_is_the_same_to_rounding(scheme, data):
    conv, inputs, rank = data.draw(pivotable(scheme))
    factored, pivoted = (LowRankConv2d.from_conv2d(conv, rank, scheme, form) for form in ("factored", "pivoted"))
    assert norm(factored.weight - pivoted.weight) <= 1e-13 * norm(conv.weight)
    expected = factored(inputs)
    assert norm(expected - pivoted(inputs)) <= 1e-12 * (norm(conv(inputs)) + norm(expected))
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in (factored, pivoted)]
    layout = pivoted.matricisation
    bias = 0 if conv.bias is None else conv.bias.numel()
    assert sizes[0] - sizes[1] == conv.groups * rank**2
    assert sizes[1] == conv.groups * rank * (layout.rows + layout.columns - rank) + bias
    assert sizes[1] == layout.parameters(rank, "pivoted") + bias
    assert sizes[1] - bias < layout.dense_parameters
    assert pivoted.scheme == factored.scheme


@pytest.mark.parametrize("kind", HARD_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_layers_of_hard_weights(kind, dtype):
    linear = nn.Linear(9, 6, dtype=dtype)
    with torch.no_grad():
        linear.weight = nn.Parameter(hard_matrix(kind, 6, 9, seed=5, dtype=dtype))
        linear.bias.copy_(randn(6, seed=6))
    inputs = randn(4, 9, seed=7, dtype=dtype)
    for rank in range(1, 6):
        layer = LowRankLinear.from_linear(linear, rank, "pivoted")
        assert float(layer.up.weight.detach().abs().max()) <= GROWTH * (1 + torch.finfo(dtype).eps)
        exact = F.linear(
            inputs.double(), truncated_weight(linear.weight.detach(), "channel", 1, rank), linear.bias.double()
        )
        size = norm(linear.weight) * norm(inputs) + norm(linear.bias)
        assert norm(layer(inputs).double() - exact) <= 2 * TOLERANCE[dtype] * size


SPECTRA = {
    "flat": torch.ones(64, dtype=torch.float64),
    "slow": 1 / (1 + torch.arange(64, dtype=torch.float64)),
    "fast": 0.8 ** torch.arange(64, dtype=torch.float64),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=seeds, shape=st.sampled_from([(64, 64), (96, 64), (64, 200)]), rank=st.sampled_from([1, 8, 32, 60]))
def test_rounding_costs_little_more_than_in_the_factored_form(spectrum, dtype, seed, shape, rank):
    rows, columns = shape
    left, right = (torch.linalg.qr(randn(size, 64, seed=seed + size)).Q for size in (rows, columns))
    linear = nn.Linear(columns, rows, dtype=dtype, bias=False)
    with torch.no_grad():
        linear.weight.copy_((left * SPECTRA[spectrum]) @ right.T)
    up, down = truncated_factors(linear.weight.unsqueeze(0), rank)
    inputs = randn(30, columns, seed=seed, dtype=dtype)
    errors = []
    for form in ("factored", "pivoted"):
        layer = LowRankLinear.from_linear(linear, rank, form)
        one, other = layer.factors()
        exact = F.linear(inputs.double(), up[0] @ down[0])
        errors.append((norm(one.double() @ other.double() - up @ down), norm(layer(inputs).double() - exact)))
    for factored, pivoted in zip(*errors, strict=True):
        assert pivoted <= 3 * factored


@pytest.mark.parametrize("shape", [(14,), (2, 14), (2, 3, 14), (0, 14), (2, 0, 14)])
def test_linear_inputs_of_any_leading_shape(shape):
    assert pivoted_linear()(torch.zeros(shape)).shape == (*shape[:-1], 10)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(8, 5, 6), (0, 8, 5, 6), (1, 8, 5, 6)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolution_inputs_of_any_batch(scheme, shape, memory_format):
    inputs = randn(*shape, seed=0, dtype=torch.float32)
    inputs = inputs.to(memory_format=memory_format) if len(shape) == 4 else inputs
    layer = pivoted_conv(scheme)
    assert torch.allclose(layer(inputs), layer.to_conv2d()(inputs), atol=1e-5)


def test_the_children_are_ordinary_layers_where_pivots_are_channels():
    assert {type(pivoted_linear().down), type(pivoted_linear().up)} == {nn.Linear}
    for scheme in ("channel", "input"):
        assert {type(pivoted_conv(scheme).down), type(pivoted_conv(scheme).up)} == {nn.Conv2d}
    third = [type(pivoted_conv(scheme, groups=2)._ordered) for scheme in SCHEMES]
    assert third == [ChannelMerge, ChannelSplit, PivotedConv2d, PivotedConv2d]
    # r of the outputs are those of down, and r of the inputs go past it.
    layer, inputs = pivoted_conv("channel", bias=False), randn(1, 8, 5, 5, seed=0, dtype=torch.float32)
    pivots = layer.merge.order.argsort()[:3]
    assert torch.equal(layer(inputs)[:, pivots], layer.down(inputs))
    layer = pivoted_conv("input")
    inputs[:, layer.split.order[3:]] = 0
    assert torch.equal(layer(inputs), layer.up(inputs[:, layer.split.order[:3]]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_everything_about_a_convolution_is_kept(scheme):
    conv = nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, bias=True, padding_mode="circular", dtype=torch.float16)
    conv.eval().requires_grad_(False)
    conv.bias.requires_grad_(True)
    layer = LowRankConv2d.from_conv2d(conv, 1, scheme, "pivoted")
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(conv, name), name
    assert (layer.padding_mode, layer.form) == ("circular", "pivoted")
    assert not any(module.training for module in layer.modules())
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    flags = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    assert {name for name, flag in flags.items() if flag} == {"merge.bias" if scheme == "channel" else "up.bias"}
    assert torch.equal(layer.bias, conv.bias)
    assert layer.bias is not conv.bias
    dense = layer.to_conv2d()
    assert repr(dense) == repr(conv)
    assert [p.requires_grad for p in (dense.weight, dense.bias)] == [False, True]
    assert not dense.training


def test_a_missing_bias_stays_missing():
    for layer, inputs in every_layer(bias=False):
        assert layer.bias is None
        assert layer.to_dense().bias is None
        assert not any(key.endswith("bias") for key in layer.state_dict())
        assert norm(layer(torch.zeros_like(inputs))) == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_channels_last_is_kept_there_and_back(scheme):
    conv = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
    layer = LowRankConv2d.from_conv2d(conv, 4, scheme, "pivoted")
    inputs = randn(2, 8, 5, 5, seed=0, dtype=torch.float32).to(memory_format=torch.channels_last)
    for parameter in layer.parameters():
        assert parameter.dim() != 4 or parameter.is_contiguous(memory_format=torch.channels_last)
    assert layer(inputs).is_contiguous(memory_format=torch.channels_last)
    assert layer.to_conv2d().weight.is_contiguous(memory_format=torch.channels_last)
    plain = LowRankConv2d.from_conv2d(conv.to(memory_format=torch.contiguous_format), 4, scheme, "pivoted")
    assert all(parameter.is_contiguous() for parameter in plain.parameters())
    assert plain(inputs.contiguous()).is_contiguous()
    assert torch.allclose(plain(inputs.contiguous()), layer(inputs), atol=1e-5)


def test_everything_saved_owns_just_the_memory_it_needs():
    for layer, _ in every_layer():
        for name, tensor in layer.state_dict().items():
            assert tensor.stride() == torch.empty(tensor.shape).stride(), name
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
        assert [order.dtype for order in layer.buffers()] == [torch.int32]


@given(st.sampled_from(SCHEMES), st.data())
def test_merging_gives_the_layer_that_the_factors_stand_for(scheme, data):
    conv, inputs, rank = data.draw(pivotable(scheme))
    layer = LowRankConv2d.from_conv2d(conv, rank, scheme, "pivoted")
    dense = layer.to_conv2d()
    assert type(dense) is nn.Conv2d
    assert torch.allclose(dense(inputs), layer(inputs), atol=1e-11)


def test_the_factors_are_whole_and_differentiable():
    for layer, _ in every_layer(dtype=torch.float64):
        up, down = layer.factors()
        layout = layer.matricisation
        assert up.shape == (layout.groups, layout.rows, layer.rank)
        assert down.shape == (layout.groups, layer.rank, layout.columns)
        assert torch.allclose(layout.to_weight(up @ down), layer.weight, atol=1e-15)
        side = down.mT if layout.pivots_columns else up
        unit = torch.eye(layer.rank, dtype=torch.float64)
        for group in side:
            assert int((group.unsqueeze(1) == unit).all(-1).any(0).sum()) == layer.rank
        layer.weight.square().sum().backward()
        assert all(norm(child.weight.grad) > 0 for child in (layer.down, layer.up))
    for form in ("factored", "pivoted"):
        half = LowRankLinear(5, 4, 2, dtype=torch.float16, form=form)
        assert {one.dtype for one in half.factors()} == {torch.float32}


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@given(seed=seeds, scheme=st.sampled_from(SCHEMES), groups=st.integers(1, 3), data=st.data())
def test_any_product_can_be_stored(form, seed, scheme, groups, data):
    conv = nn.Conv2d(4 * groups, 3 * groups, (2, 3), groups=groups, dtype=torch.float64)
    rank = data.draw(st.integers(1, 2))
    layer = KINDS[nn.Conv2d].like(conv, rank, scheme, form)
    layout = layer.matricisation
    up, down = randn(groups, layout.rows, rank, seed=seed), randn(groups, rank, layout.columns, seed=seed + 1)
    layer.set_factors_(up, down)
    assert torch.allclose(layer.weight, layout.to_weight(up @ down), atol=1e-12)
    assert torch.equal(layer.bias, conv.bias)
    assert all(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("power", [-30, -4, 0, 4, 30])
def test_products_are_stored_in_half_precision_however_unequal_their_factors(form, power):
    up, down = randn(1, 12, 3, seed=0) * 10.0**power, randn(1, 3, 9, seed=1) / 10.0**power
    layer = LowRankLinear(9, 12, 3, bias=False, dtype=torch.float16, form=form)
    layer.set_factors_(up, down)
    assert norm(layer.weight.double() - (up @ down)[0]) <= 3e-3 * norm(up @ down)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_stored_stays_in_the_range_of_half_precision(scheme):
    conv = nn.Conv2d(32, 32, 3, dtype=torch.float16, bias=False)
    with torch.no_grad():
        conv.weight.copy_(65_000 * torch.sign(randn(32, 32, 3, 3, seed=0)))
    layer = LowRankConv2d.from_conv2d(conv, 10, scheme, "pivoted")
    assert all(bool(parameter.isfinite().all()) for parameter in layer.parameters())
    assert bool(layer.to_conv2d().weight.isfinite().all())
    factored = LowRankConv2d.from_conv2d(conv, 10, scheme).to_conv2d().weight
    assert norm(layer.to_conv2d().weight - conv.weight) <= 1.01 * norm(factored - conv.weight)


def test_the_bias_is_the_very_one_there_and_back():
    model = fill_(nn.Sequential(nn.Linear(14, 10), nn.ReLU(), nn.Linear(10, 4)), 0)
    bias, dense = model[0].bias, model[0]
    calls = []
    dense.register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    dense.note, dense.merge = "mine", "hides the child"
    layer = LowRankLinear.from_linear(dense, 4, "pivoted")
    take_over_(layer, dense)
    swap_(model, {dense: layer})
    assert layer.bias is bias
    assert model[0].merge.bias is bias
    assert layer.note == "mine"
    model(torch.zeros(1, 14))
    restore_dense_(model)
    assert model[0].bias is bias
    assert model[0].note == "mine"
    model(torch.zeros(1, 14))
    assert calls == [LowRankLinear, nn.Linear]


def test_it_can_be_trained_on():
    for layer, inputs in every_layer(dtype=torch.float64):
        target = layer.to_dense()(inputs).detach() + 1
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
        losses = []
        for _ in range(5):
            loss = (layer(inputs) - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert all(norm(parameter.grad) > 0 for parameter in layer.parameters())
        assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_the_input_are_those_of_the_dense_layer(bias):
    for layer, inputs in every_layer(dtype=torch.float64, bias=bias):
        gradients = []
        for one in (layer, layer.to_dense()):
            own = inputs.clone().requires_grad_()
            one(own).square().sum().backward()
            gradients.append(own.grad)
        assert torch.allclose(*gradients, atol=1e-11)


@given(seeds)
def test_neither_the_source_nor_the_random_state_is_touched(seed):
    conv, linear = fill_(nn.Conv2d(4, 6, 3), seed), fill_(nn.Linear(5, 4), seed)
    torch.manual_seed(seed)
    before = copy.deepcopy((conv.state_dict(), linear.state_dict())), torch.get_rng_state()
    layers = [LowRankConv2d.from_conv2d(conv, 2, scheme, "pivoted") for scheme in SCHEMES]
    layers.append(LowRankLinear.from_linear(linear, 2, "pivoted"))
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.add_(1)
            layer.to_dense()
    assert torch.equal(torch.get_rng_state(), before[1])
    for module, state in zip((conv, linear), before[0], strict=True):
        assert all(torch.equal(module.state_dict()[key], state[key]) for key in state)


def test_equal_weights_give_equal_layers():
    for one, other in zip(every_layer(), every_layer(), strict=True):
        state = other[0].state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one[0].state_dict().items())


def through_a_state_dict(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(layer)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


TRAVELS = {
    **COPIES,
    "state_dict": through_a_state_dict,
    "half_and_back": lambda layer: copy.deepcopy(layer).to(torch.float64).to(torch.float32),
    "fx": torch.fx.symbolic_trace,
    "fx_pickled": lambda layer: pickle.loads(pickle.dumps(torch.fx.symbolic_trace(nn.Sequential(layer)))),
}


@pytest.mark.parametrize("travel", TRAVELS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_the_same_wherever_it_has_been(travel, bias):
    for layer, inputs in every_layer(bias=bias):
        again = TRAVELS[travel](layer)
        assert torch.equal(again(inputs), layer(inputs))
        assert [tensor.dtype for tensor in again.buffers()] == [torch.int32]
        channels_last = inputs.to(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs
        assert torch.allclose(again(channels_last), layer(inputs), atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_it_compiles_to_one_graph_and_exports(bias):
    for layer, inputs in every_layer(bias=bias):
        torch._dynamo.reset()
        expected = layer(inputs)
        for shape in (inputs, inputs[:1]):
            compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
            assert torch.allclose(compiled(shape), layer(shape), atol=1e-6)
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(layer, (inputs,), dynamic_shapes=({0: batch},)).module()
        assert torch.allclose(exported(inputs), expected, atol=1e-6)
        assert torch.allclose(exported(inputs.repeat(2, *[1] * (inputs.dim() - 1)))[: len(inputs)], expected, atol=1e-6)


def test_autocast_gives_the_dtype_it_gives_a_dense_layer():
    for layer, inputs in every_layer():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(inputs)
            assert output.dtype == torch.bfloat16
            assert norm(output - layer.to_dense()(inputs)) <= 5e-2 * norm(output)
            assert layer.weight.dtype == torch.float32


def test_it_runs_over_a_batch_of_inputs_under_vmap():
    for layer, inputs in every_layer():
        batched = torch.func.vmap(layer, in_dims=0)(torch.stack([inputs, 2 * inputs]))
        assert torch.allclose(batched[1], layer(2 * inputs), atol=1e-5)


def test_layers_can_be_built_without_a_dense_one():
    for scheme in SCHEMES:
        layer = LowRankConv2d(4, 6, (3, 5), 2, scheme=scheme, stride=(1, 2), padding="valid", form="pivoted")
        assert layer(torch.zeros(1, 4, 9, 9)).shape == (1, 6, 7, 3)
        assert torch.allclose(layer(torch.ones(1, 4, 9, 9)), layer.to_conv2d()(torch.ones(1, 4, 9, 9)), atol=1e-5)
    linear = LowRankLinear(5, 4, 2, bias=False, form="pivoted")
    assert linear(torch.zeros(3, 5)).shape == (3, 4)
    assert linear.merge.order.tolist() == [0, 1, 2, 3]
    assert linear.extra_repr() == "in_features=5, out_features=4, rank=2, bias=False, form=pivoted"
    assert "form" not in LowRankLinear(5, 4, 2).extra_repr()


def test_a_layer_that_is_still_to_be_filled_has_an_order_already():
    for layer, inputs in every_layer():
        kind = KINDS[nn.Linear if isinstance(layer, LowRankLinear) else nn.Conv2d]
        scheme = getattr(layer, "scheme", "channel")
        empty = kind.like(layer.to_dense(), layer.rank, scheme, "pivoted")
        assert empty(inputs).shape == layer(inputs).shape
        empty.load_state_dict(layer.state_dict())
        assert torch.equal(empty(inputs), layer(inputs))


def test_an_order_that_is_none_is_not_loaded():
    for layer, inputs in every_layer():
        expected = layer(inputs)
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        (key,) = (name for name in state if name.endswith("order"))
        state[key][0] = state[key][1]
        with pytest.raises(RuntimeError, match=f"'{key}' is no order of pivots: expected each number from 0 to"):
            layer.load_state_dict(state)
        del state[key]
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            layer.load_state_dict(state)
        assert torch.equal(layer(inputs), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: LowRankLinear.from_linear(nn.Linear(5, 4), 4, "pivoted"),
            ValueError,
            "between 1 and 3 .one less than the full rank, at which the pivoted form is the dense weight .*, got 4",
        ),
        (lambda: LowRankLinear(5, 4, 0, form="pivoted"), ValueError, "between 1 and 3"),
        (lambda: LowRankLinear(5, 4, 2.0, form="pivoted"), TypeError, "rank must be an integer, got float 2.0"),
        (
            lambda: LowRankLinear(5, 4, 2, form="dense"),
            ValueError,
            "form must be one of 'factored', 'pivoted'; got",
        ),
        (
            lambda: LowRankConv2d(4, 4, 3, 2, form=None),
            ValueError,
            "form must be one of .* got None",
        ),
        (
            lambda: LowRankConv2d(4, 4, 3, 12, scheme="spatial", form="pivoted"),
            ValueError,
            "between 1 and 11 .one less than the full rank of scheme 'spatial' in each group",
        ),
        (
            lambda: LowRankConv2d.from_conv2d(nn.Conv2d(4, 4, 3, groups=4), 1, "channel", "pivoted"),
            ValueError,
            "at least two rows and two columns, got one of 1 × 9: leave the layer dense",
        ),
        (
            lambda: LowRankLinear(5, 4, 2).set_factors_(torch.zeros(1, 4, 3), torch.zeros(1, 3, 5)),
            ValueError,
            r"up must have shape \(1, 4, 2\), got \(1, 4, 3\)",
        ),
        (
            lambda: LowRankLinear(5, 4, 2, form="pivoted").set_factors_(torch.zeros(4, 2), torch.zeros(2, 5)),
            ValueError,
            r"up must have shape \(1, 4, 2\), got \(4, 2\)",
        ),
        (
            lambda: LowRankLinear(5, 4, 1).set_factors_(torch.full((1, 4, 1), torch.inf), torch.zeros(1, 1, 5)),
            ValueError,
            "up must hold finite values, got NaN or infinite ones",
        ),
    ],
)
def test_bad_input_is_named_with_the_way_out(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.skipif(not hasattr(torch.nested, "nested_tensor_from_jagged"), reason="this torch has no jagged tensors")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_jagged_tensors_stay_jagged_with_the_same_lengths():
    layer = LowRankLinear.from_linear(fill_(nn.Linear(8, 8), 0), 3, "pivoted")
    parts = [randn(length, 8, seed=length, dtype=torch.float32) for length in (3, 1, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    found = layer(nested)
    assert found.layout is torch.jagged
    added = nested + found  # which takes the same lengths, not only equal ones
    for one, part in zip(added.unbind(), parts, strict=True):
        assert torch.allclose(one, part + layer(part), atol=1e-5)
    found.values().sum().backward()
    assert layer.down.weight.grad is not None


@pytest.mark.parametrize(("scheme", "module"), [("channel", ChannelMerge), ("input", ChannelSplit), ("spatial", None)])
def test_resetting_the_parameters_makes_an_order_out_of_anything(scheme, module):
    layer = LowRankConv2d.from_conv2d(fill_(nn.Conv2d(6, 8, 3), 0), 3, scheme, "pivoted")
    (order,) = (one for one in layer.modules() if hasattr(one, "order"))
    assert module is None or isinstance(order, module)
    order.order.fill_(-7)
    for one in layer.modules():
        if hasattr(one, "reset_parameters"):
            one.reset_parameters()
    assert not order.why_not(order.order)
    assert layer(torch.zeros(2, 6, 5, 5)).shape == (2, 8, 3, 3)


@pytest.mark.parametrize("make", [lambda: LowRankLinear(8, 12, 3, form="pivoted"), pivoted_conv])
def test_the_bias_alone_may_have_an_axis_of_its_own(make):
    layer = fill_(make(), 0)
    x = torch.zeros(2, 8, *[5] * (2 if isinstance(layer, LowRankConv2d) else 0))
    biases = randn(3, 12, seed=1, dtype=torch.float32)
    call = lambda bias: torch.func.functional_call(layer, {"merge.bias": bias}, (x,))  # noqa: E731
    found = torch.func.vmap(call)(biases)
    assert all(torch.allclose(one, call(bias), atol=1e-6) for one, bias in zip(found, biases, strict=True))
