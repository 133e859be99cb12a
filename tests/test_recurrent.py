"""Recurrent layers and cells whose weights are children against those of torch."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import torchsmooth
from tests.strategies import fill_, randn, seeds
from torchsmooth import LowRankGRU, LowRankLinear, LowRankLSTM, LowRankLSTMCell, LowRankRNN, LowRankRNNCell

LAYERS = {nn.RNN: LowRankRNN, nn.LSTM: LowRankLSTM, nn.GRU: LowRankGRU}
CELLS = {cell: getattr(torchsmooth, f"LowRank{cell.__name__}") for cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)}
FEATURES, HIDDEN = 3, 4


@st.composite
def layers(draw):
    """A recurrent layer of torch, of any settings, in float64 and without dropout."""
    cls = draw(st.sampled_from(list(LAYERS)))
    more = {"nonlinearity": draw(st.sampled_from(["tanh", "relu"]))} if cls is nn.RNN else {}
    more |= {"proj_size": draw(st.integers(0, 2))} if cls is nn.LSTM else {}
    layer = cls(
        FEATURES,
        HIDDEN,
        draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        dtype=torch.float64,
        **more,
    )
    return fill_(layer, draw(seeds))


@st.composite
def sequences(draw, layer):
    """An input that the layer takes, batched or not or packed, with initial states or without."""
    kind, seed = draw(st.sampled_from(["unbatched", "batched", "packed"])), draw(seeds)
    length, samples = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shape = (samples, length) if layer.batch_first else (length, samples)
    inputs = randn(*((length,) if kind == "unbatched" else shape), FEATURES, seed=seed)
    if kind == "packed":
        lengths = torch.tensor([draw(st.integers(1, length)) for _ in range(samples)])
        inputs = pack_padded_sequence(inputs, lengths, batch_first=layer.batch_first, enforce_sorted=False)
    if draw(st.booleans()):
        return inputs, None
    stacked = layer.num_layers * (1 + layer.bidirectional)
    first = (stacked,) if kind == "unbatched" else (stacked, samples)
    hidden = randn(*first, layer.proj_size or HIDDEN, seed=seed + 1)
    return inputs, (hidden, randn(*first, HIDDEN, seed=seed + 2)) if isinstance(layer, nn.LSTM) else hidden


def flat(outputs):
    """List the tensors of what a layer returns."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, PackedSequence):
        return [outputs.data, outputs.batch_sizes]
    return [tensor for one in outputs for tensor in flat(one)]


def the_same(found, expected):
    return all(torch.equal(one, other) for one, other in zip(flat(found), flat(expected), strict=True))


def close(found, expected, tolerance=1e-10):
    pairs = zip(flat(found), flat(expected), strict=True)
    return all(torch.allclose(one, other, rtol=tolerance, atol=tolerance) for one, other in pairs)


def raw_names(layer):
    """Names of the parameters of a layer of torch for those of one taken apart."""
    return {name: "_".join(reversed(name.split("."))) for name, _ in layer.named_parameters()}


@given(st.data())
def test_outputs_and_gradients_are_those_of_torch_bit_for_bit(data):
    dense = data.draw(layers())
    inputs, states = data.draw(sequences(dense))
    layer = LAYERS[type(dense)].from_recurrent(dense)
    found, expected = layer(inputs, states), dense(inputs, states)
    assert the_same(found, expected)
    names = raw_names(layer)
    assert sorted(names.values()) == sorted(name for name, _ in dense.named_parameters())
    own = torch.autograd.grad(flat(found)[0].square().sum(), list(layer.parameters()))
    theirs = torch.autograd.grad(flat(expected)[0].square().sum(), [dense.get_parameter(names[one]) for one in names])
    assert the_same(own, theirs)


@given(st.data())
def test_taking_apart_shares_memory_and_putting_together_is_bit_for_bit(data):
    dense = data.draw(layers()).train(data.draw(st.booleans())).requires_grad_(data.draw(st.booleans()))
    dense.dropout = 0.25
    state = torch.get_rng_state()
    layer = LAYERS[type(dense)].from_recurrent(dense)
    again = layer.to_recurrent()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(dense)
    assert repr(again) == repr(dense)
    assert layer.extra_repr() == dense.extra_repr()
    assert the_same(layer.all_weights, dense.all_weights)
    for name, raw in raw_names(layer).items():
        assert layer.get_parameter(name) is dense.get_parameter(raw)
        assert torch.equal(again.get_parameter(raw), dense.get_parameter(raw))
        assert again.get_parameter(raw) is not dense.get_parameter(raw)
        assert again.get_parameter(raw).requires_grad == dense.get_parameter(raw).requires_grad
    assert list(again.state_dict()) == list(dense.state_dict())
    assert all(module.training == dense.training for module in (*layer.modules(), again))
    inputs = randn(2, 2, FEATURES, seed=0)
    assert the_same(again.eval()(inputs), dense.eval()(inputs))


def low_rank_(layer, dense, form, rank):
    """Replace every child by a low-rank layer, and set the original's weights to what they stand for."""
    for name, child in list(layer.named_children()):
        if min(child.weight.shape) > (form == "pivoted"):
            low = LowRankLinear.from_linear(child, min(rank, min(child.weight.shape) - (form == "pivoted")), form)
            setattr(layer, name, low)
            with torch.no_grad():
                dense.get_parameter(f"weight_{name}").copy_(low.weight)


@settings(max_examples=25)
@given(st.data())
def test_low_rank_children_compute_what_their_products_stand_for(data):
    dense = data.draw(layers())
    inputs, states = data.draw(sequences(dense))
    layer = LAYERS[type(dense)].from_recurrent(copy.deepcopy(dense))
    before = dense(inputs, states)
    low_rank_(layer, copy.deepcopy(dense), "factored", 2 * HIDDEN)
    assert close(layer(inputs, states), before)
    layer = LAYERS[type(dense)].from_recurrent(copy.deepcopy(dense))
    low_rank_(layer, dense, data.draw(st.sampled_from(["factored", "pivoted"])), data.draw(st.integers(1, 3)))
    assert close(layer(inputs, states), dense(inputs, states))
    flat(layer(inputs, states))[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@settings(max_examples=5)
@given(seeds)
def test_dropout_between_layers_is_that_of_torch(seed):
    dense = fill_(nn.GRU(FEATURES, HIDDEN, 3, dropout=0.5), seed)
    layer = LowRankGRU.from_recurrent(dense)
    inputs, outputs = randn(4, 2, FEATURES, seed=seed, dtype=torch.float32), []
    for one in (layer, dense):
        torch.manual_seed(seed)
        outputs.append(one(inputs))
    assert the_same(*outputs)
    assert not close(layer(inputs), outputs[0])


@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
def test_a_new_layer_is_drawn_as_torch_draws_one(cls):
    built = []
    for one in (cls, (LAYERS | CELLS)[cls]):
        torch.manual_seed(1)
        built.append(one(FEATURES, HIDDEN, dtype=torch.float64))
    inputs = randn(2, FEATURES, seed=2)
    assert close(built[1](inputs), built[0](inputs))


def test_state_dict_keys_are_api():
    layer = LowRankLSTM(FEATURES, HIDDEN, bidirectional=True, proj_size=2)
    expected = ["ih_l0.weight", "ih_l0.bias", "hh_l0.weight", "hh_l0.bias", "hr_l0.weight"]
    assert list(layer.state_dict()) == expected + [key.replace("l0", "l0_reverse") for key in expected]
    assert list(LowRankRNN(FEATURES, HIDDEN, 2, bias=False).state_dict()) == [
        *("ih_l0.weight", "hh_l0.weight", "ih_l1.weight", "hh_l1.weight")
    ]
    assert list(LowRankLSTMCell(FEATURES, HIDDEN).state_dict()) == ["ih.weight", "ih.bias", "hh.weight", "hh.bias"]


@given(st.data())
def test_cells_compute_what_those_of_torch_do(data):
    cls, seed = data.draw(st.sampled_from(list(CELLS))), data.draw(seeds)
    more = {"nonlinearity": data.draw(st.sampled_from(["tanh", "relu"]))} if cls is nn.RNNCell else {}
    dense = fill_(cls(FEATURES, HIDDEN, bias=data.draw(st.booleans()), dtype=torch.float64, **more), seed)
    dense.train(data.draw(st.booleans()))
    cell = CELLS[cls].from_cell(dense)
    first = data.draw(st.sampled_from([(), (1,), (3,)]))
    inputs, states = randn(*first, FEATURES, seed=seed), None
    if data.draw(st.booleans()):
        states = tuple(randn(*first, HIDDEN, seed=seed + number) for number in (1, 2))
        states = states if cls is nn.LSTMCell else states[0]
    found, expected = cell(inputs, states), dense(inputs, states)
    assert close(found, expected)
    names = raw_names(cell)
    own = torch.autograd.grad(sum(flat(found)).sum(), list(cell.parameters()))
    theirs = torch.autograd.grad(sum(flat(expected)).sum(), [dense.get_parameter(names[one]) for one in names])
    assert close(own, theirs)
    assert all(cell.get_parameter(name) is dense.get_parameter(raw) for name, raw in names.items())
    assert cell.extra_repr() == dense.extra_repr()
    again = cell.to_cell()
    assert (repr(again), again.training) == (repr(dense), dense.training)
    assert list(again.state_dict()) == list(dense.state_dict())
    assert the_same(list(again.state_dict().values()), list(dense.state_dict().values()))
    low_rank_(cell, dense, "factored", 2)
    called = []
    cell.ih.register_forward_hook(lambda *_: called.append("ih"))
    assert close(cell(inputs, states), dense(inputs, states))
    assert called == ["ih"]


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("build", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded])
@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
def test_layers_survive_copies_and_pickles(cls, build):
    layer = (LAYERS | CELLS)[cls](FEATURES, HIDDEN)
    child = "hh_l0" if cls in LAYERS else "hh"
    setattr(layer, child, LowRankLinear.from_linear(getattr(layer, child), 2))
    inputs = randn(2, FEATURES, seed=0, dtype=torch.float32)
    again = build(layer)
    assert the_same(again(inputs), layer(inputs))
    assert repr(again) == repr(layer)
    again.load_state_dict({key: value + 1 for key, value in layer.state_dict().items()})
    assert not close(again(inputs), layer(inputs))
    assert close(build(layer).double()(inputs.double()), [one.double() for one in flat(layer(inputs))], 1e-5)


def test_a_parameter_that_is_changed_or_swapped_in_is_used_at_the_next_call():
    layer, inputs = LowRankLSTM(FEATURES, HIDDEN), randn(2, FEATURES, seed=0, dtype=torch.float32)
    layer.flatten_parameters()
    zeros = {name: torch.zeros_like(parameter) for name, parameter in layer.named_parameters()}
    assert not torch.func.functional_call(layer, zeros, (inputs,))[0].any()
    assert layer(inputs)[0].any()
    layer.ih_l0, layer.hh_l0 = (nn.Linear(size, 4 * HIDDEN) for size in (FEATURES, HIDDEN))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert not layer(inputs)[0].any()


@pytest.mark.parametrize("cls", LAYERS)
def test_a_layer_is_exported(cls):
    layer = LAYERS[cls](FEATURES, HIDDEN, bidirectional=True).eval()
    layer.ih_l0 = LowRankLinear.from_linear(layer.ih_l0, 2)
    inputs = randn(3, 2, FEATURES, seed=0, dtype=torch.float32)
    exported = torch.export.export(layer, (inputs,)).module()
    assert close(exported(inputs), layer(inputs), 1e-5)


def test_a_compiled_cell_is_one_graph():
    cell = LowRankLSTMCell(FEATURES, HIDDEN)
    cell.hh = LowRankLinear.from_linear(cell.hh, 2)
    inputs = randn(2, FEATURES, seed=0, dtype=torch.float32)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    assert close(compiled(inputs), cell(inputs), 1e-5)


def test_a_model_around_a_layer_compiles_with_a_break_as_torchs_own_layer_does():
    model = nn.Sequential(LowRankGRU(FEATURES, HIDDEN))
    inputs = randn(2, FEATURES, seed=0, dtype=torch.float32)
    assert close(torch.compile(model, backend="aot_eager")(inputs), model(inputs), 1e-5)


def pruned(layer, name):
    prune.l1_unstructured(layer, name, 0.5)
    return layer


def changed(layer, name, child):
    setattr(layer, name, child)
    return layer


class Recurrent(nn.LSTM):
    """A subclass."""


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LowRankLSTM.from_recurrent(nn.GRU(3, 4)), TypeError, "torch.nn.LSTM itself, got GRU"),
        (lambda: LowRankLSTM.from_recurrent(Recurrent(3, 4)), TypeError, "a subclass may use its weights"),
        (
            lambda: LowRankGRU.from_recurrent(pruned(nn.GRU(3, 4), "weight_hh_l0")),
            ValueError,
            "weight_hh_l0 is not a plain parameter",
        ),
        (lambda: LowRankRNN(3, 4, nonlinearity="sin"), ValueError, "sin"),
        (lambda: LowRankRNN(3, 0), ValueError, "greater than zero"),
        (
            lambda: changed(LowRankGRU(3, 4), "hh_l0", LowRankLinear(4, 12, 2)).to_recurrent(),
            ValueError,
            "child 'hh_l0' of this LowRankGRU must be a torch.nn.Linear, got LowRankLinear: restore_dense_",
        ),
        (
            lambda: changed(LowRankGRU(3, 4), "hh_l0", nn.Linear(4, 12, bias=False)).to_recurrent(),
            ValueError,
            "child 'hh_l0' of this LowRankGRU has no bias: give it one of zeros",
        ),
        (
            lambda: changed(LowRankGRU(3, 4), "hh_l0", nn.Linear(4, 12, bias=False))(torch.zeros(2, 3)),
            ValueError,
            "child 'hh_l0' of this LowRankGRU has no bias: give it one of zeros",
        ),
        (
            lambda: changed(LowRankGRU(3, 4), "hh_l0", nn.Identity())(torch.zeros(2, 3)),
            ValueError,
            "child 'hh_l0' of this LowRankGRU is a torch.nn.modules.linear.Identity without a weight",
        ),
        (lambda: LowRankGRU(3, 4)(torch.zeros(2, 3).double()), ValueError, "float32, got torch.float64: convert one"),
        (lambda: LowRankGRU(3, 4)(torch.zeros(2, 5)), RuntimeError, "the last of size 3, got shape"),
        (lambda: LowRankGRU(3, 4)(torch.zeros(2, 1, 1, 3)), ValueError, "2D or 3D"),
        (lambda: LowRankRNNCell(3, 4, nonlinearity="sin"), ValueError, "nonlinearity must be one of 'tanh', 'relu'"),
        (
            lambda: LowRankRNNCell.from_cell(nn.RNNCell(3, 4, nonlinearity="sin")),
            ValueError,
            "its nonlinearity is 'sin'",
        ),
        (lambda: LowRankRNNCell.from_cell(nn.RNN(3, 4)), TypeError, "torch.nn.RNNCell itself, got RNN"),
        (
            lambda: LowRankRNNCell.from_cell(pruned(nn.RNNCell(3, 4), "weight_ih")),
            ValueError,
            "weight_ih is not a plain parameter",
        ),
        (
            lambda: changed(LowRankRNNCell(3, 4), "ih", LowRankLinear(3, 4, 2)).to_cell(),
            ValueError,
            "child 'ih' of this LowRankRNNCell .* restore_dense_",
        ),
        (
            lambda: changed(LowRankRNNCell(3, 4), "ih", nn.Linear(3, 4, bias=False)).to_cell(),
            ValueError,
            "child 'ih' of this LowRankRNNCell has no bias",
        ),
        (lambda: LowRankRNNCell(3, 4)(torch.zeros(2, 5)), ValueError, r"shape \(3,\) or \(N, 3\), got \(2, 5\)"),
        (
            lambda: LowRankLSTMCell(3, 4)(torch.zeros(2, 3), (torch.zeros(2, 4), torch.zeros(4))),
            ValueError,
            r"expected hx\[1\] of shape \(2, 4\), as the input has it, got \(4,\)",
        ),
    ],
)
def test_bad_input_is_named_with_the_way_out(make, error, message):
    with pytest.raises(error, match=message):
        make()
