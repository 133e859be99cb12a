"""Attention and recurrent layers of torch through the whole compression: planned, swapped, saved, loaded, restored."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import same, snapshot
from tests.reference import multiply_accumulates as by_hand
from tests.strategies import fill_, randn, seeds
from torchsmooth import (
    LowRankGRUCell,
    LowRankLinear,
    LowRankLSTM,
    LowRankMultiheadAttention,
    load_compressed_,
    plan_compression,
    restore_dense_,
    svd_compress_,
)

TOKENS = randn(3, 7, 32, seed=1, dtype=torch.float32)
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3, [False] * 6 + [True]])


class Everything(nn.Module):
    """An encoder, a two-way LSTM, a cell, and attention over other sizes."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.lstm = nn.LSTM(32, 16, 2, bidirectional=True, batch_first=True)
        self.cell = nn.GRUCell(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, kdim=24, vdim=40, add_bias_kv=True, batch_first=True)

    def forward(self, tokens):
        tokens, _ = self.lstm(self.encoder(tokens))
        query = torch.stack([self.cell(one) for one in tokens.unbind(1)], 1)
        return self.attention(query, query[..., :24], torch.cat([query, query[..., :8]], -1))[0]


def build(seed=0):
    return fill_(Everything(), seed).eval()


def parameters(model):
    return sum(one.numel() for one in model.parameters())


@pytest.fixture(scope="module")
def compressed():
    model = build()
    return model, svd_compress_(model, 0.5)


def test_all_their_weights_are_compressed_and_counted(compressed):
    model, report = compressed
    assert parameters(model) == report.parameters_after <= 0.5 * report.parameters_before
    assert report.parameters_before == parameters(build())
    kinds = {type(one) for one in model.modules()}
    assert {LowRankMultiheadAttention, LowRankLSTM, LowRankGRUCell, LowRankLinear} <= kinds
    assert not kinds & {nn.MultiheadAttention, nn.LSTM, nn.GRUCell}
    names = {one.name for one in report.layers}
    assert {
        "encoder.layers.1.self_attn.q_proj",
        "lstm.ih_l1_reverse",
        "cell.hh",
        "attention.v_proj",
    } <= names
    assert not any("bias_k" in one.name or one.name == "attention" for one in report.layers)
    assert all(one.reason in ("", "worth its parameters in this budget") for one in report.layers)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_they_compute_what_the_dense_layers_of_their_product_do(compressed, training):
    model = copy.deepcopy(compressed[0]).train(training)
    dense = restore_dense_(copy.deepcopy(model))
    assert {nn.MultiheadAttention, nn.LSTM, nn.GRUCell} <= {type(one) for one in dense.modules()}
    assert dense.state_dict().keys() == build().state_dict().keys()
    expected = dense(TOKENS)
    assert torch.allclose(model(TOKENS), expected, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), expected, atol=1e-4)
        masked, other = (one.encoder(TOKENS, src_key_padding_mask=PADDING) for one in (model, dense))
        assert torch.allclose(masked[~PADDING], other[~PADDING], atol=1e-4)


def test_they_are_loaded_copied_and_pickled_bit_for_bit(compressed):
    model, _ = compressed
    expected = model(TOKENS)
    again = load_compressed_(build(7), model.state_dict())
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS), expected)
        assert other.state_dict().keys() == model.state_dict().keys()
    # Loading into a model of the right structure is loading as ever.
    assert torch.equal(load_compressed_(copy.deepcopy(again), model.state_dict())(TOKENS), expected)


def test_factors_are_contiguous_and_own_their_memory(compressed):
    for name, one in compressed[0].named_parameters():
        assert one.is_contiguous(), name
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size(), name


def test_attention_of_which_only_the_output_is_compressed_keeps_plain_projections():
    model = build()
    report = svd_compress_(model, 0.01, filter_fn=lambda _, name: name in ("attention", "attention.out_proj"))
    assert [one.name for one in report.compressed] == ["attention.out_proj"]
    assert type(model.attention.q_proj) is nn.Linear
    assert type(model.lstm) is nn.LSTM
    again = load_compressed_(build(3), model.state_dict())
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert torch.allclose(restore_dense_(again)(TOKENS), model(TOKENS), atol=1e-5)


def test_outputs_on_the_meta_device_have_the_shapes_of_those_elsewhere(compressed):
    model = copy.deepcopy(compressed[0]).to("meta")
    assert model(TOKENS.to("meta")).shape == compressed[0](TOKENS).shape


def test_a_failed_load_leaves_attention_whole(compressed):
    model = build(2)
    before = snapshot(model)
    state = compressed[0].state_dict()
    del state["attention.k_proj.up.weight"]
    with pytest.raises(ValueError, match=r"'attention.k_proj.down.weight' but not 'attention.k_proj.up.weight'"):
        load_compressed_(model, state)
    assert same(snapshot(model), before)


def test_calibration_reaches_attention_and_cells_and_says_where_it_does_not():
    model = build()
    report = svd_compress_(model, 0.4, calibration=[TOKENS])
    for one in report.compressed:
        fused = one.name.startswith("lstm.")
        assert (one.output_error is None) == fused
        assert one.note == ("not calibrated: part of a fused recurrent layer" if fused else "")


def test_multiply_accumulates_are_those_of_torch_itself():
    model = build()
    before = snapshot(model)
    plan = plan_compression(model, 0.2, target="macs", example_inputs=TOKENS)
    assert same(snapshot(model), before)
    report = plan.apply_(model, TOKENS)
    assert report.macs_after <= 0.8 * report.macs_before
    assert report["lstm.ih_l0"].reason == "part of a fused recurrent layer: low rank makes it smaller, not faster"
    assert isinstance(model.lstm, nn.LSTM)
    assert not isinstance(model.lstm, LowRankLSTM)


def test_a_second_compression_reaches_into_them(compressed):
    model = copy.deepcopy(compressed[0])
    report = svd_compress_(model, 0.3)
    assert parameters(model) == report.parameters_after <= 0.7 * report.parameters_before
    assert torch.equal(load_compressed_(build(5), model.state_dict())(TOKENS), model(TOKENS))


def test_attention_that_is_more_than_its_type_stays_whole():
    model = build()
    model.attention.forward = model.attention.forward
    model.lstm.register_buffer("more", torch.zeros(1))
    nn.utils.parametrizations.weight_norm(model.encoder.layers[0].self_attn.out_proj)
    report = svd_compress_(model, 0.1)
    assert report["attention"].reason == "its forward was replaced on this instance"
    assert report["lstm"].reason == "this LSTM cannot be taken apart: it has more than its weights and biases: 'more'"
    assert report["encoder.layers.0.self_attn"].reason == (
        "a ParametrizedNonDynamicallyQuantizableLinear inside stays: "
        "parametrized (parametrized='merge' compresses what is computed)"
    )


class Recurrent(nn.Module):
    """A recurrent layer that runs as a whole, between two linear layers, and one that nobody calls."""

    def __init__(self, kind, layers, both):
        super().__init__()
        self.before, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)
        self.steps = getattr(nn, kind)(32, 24, layers, bidirectional=both, batch_first=True)
        self.after = nn.Linear(24 * (1 + both), 32)

    def forward(self, tokens):
        return self.after(self.steps(self.before(tokens))[0])


@settings(max_examples=12)
@given(st.sampled_from(["RNN", "GRU", "LSTM"]), st.integers(1, 2), st.booleans(), seeds)
def test_parts_that_run_as_one_are_not_said_to_be_never_called(kind, layers, both, seed):
    model = fill_(Recurrent(kind, layers, both), seed).eval()
    whole = plan_compression(model, 0.01, target="macs", example_inputs=TOKENS)
    steps = by_hand.recurrent(kind, (32, 24), [7] * 3, layers, 1 + both)
    linear = [one.weight.numel() for one in (model.before, model.after)]
    assert whole.macs_before == steps + 3 * 7 * sum(linear)
    assert [one.prices.dense for one in (whole["before"], whole["after"])] == [3 * 7 * one for one in linear]
    calibrated = svd_compress_(copy.deepcopy(model), 0.5, calibration=[TOKENS], rank_multiple=1)
    parts = {one.name: one for one in whole if one.name.startswith("steps.")}
    assert len(parts) == 2 * layers * (1 + both)
    for name, part in parts.items():
        assert part.reason == "part of a fused recurrent layer: low rank makes it smaller, not faster"
        assert (
            calibrated[name].rank is None or calibrated[name].note == "not calibrated: part of a fused recurrent layer"
        )
    assert whole["idle"].reason == "never called on the example inputs"
    assert calibrated["idle"].note in ("", "not calibrated: never called on the data")


def test_parts_that_run_as_one_are_no_choice_in_a_budget_of_time(monkeypatch):
    monkeypatch.setattr(
        "torchsmooth._timing.seconds", lambda call, device, repeats: 1e-3 * (call.func.__name__ == "run") + 1e-3
    )
    with pytest.raises(ValueError, match="can be made smaller") as caught:
        plan_compression(fill_(Recurrent("LSTM", 1, False), 0), 0.3, target="latency", example_inputs=TOKENS)
    assert "idle: never called on the example inputs" in str(caught.value)
    assert "steps.ih_l0: part of a fused recurrent layer" in str(caught.value)
