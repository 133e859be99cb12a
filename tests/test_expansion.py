"""Composite layers while they are written in plain ones: what is theirs stays theirs, whatever comes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.snapshots import Snapshot
from tests.strategies import fill_, randn
from torchsmooth import (
    LowRankLinear,
    LowRankMultiheadAttention,
    load_compressed_,
    plan_compression,
    register_layer,
    restore_dense_,
    svd_compress_,
)
from torchsmooth.layer_types import _TYPES


class Packed(nn.Module):
    """A bias and a weight in one tensor, and a child with a mode of its own."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.packed = nn.Parameter(torch.zeros(inputs + 1, outputs))
        self.dropout = nn.Dropout()


class Unpacked(nn.Module):
    def __init__(self, linear, dropout):
        super().__init__()
        self.linear, self.dropout = linear, dropout


def as_linear(layer):
    linear = nn.Linear(len(layer.packed) - 1, layer.packed.shape[1])  # draws random numbers
    linear.weight, linear.bias = nn.Parameter(layer.packed[1:].T), nn.Parameter(layer.packed[0])
    return linear


def unpacked(layer):
    return Unpacked(as_linear(layer), layer.dropout)


def packed_again(layer):
    made = Packed(layer.in_features, layer.out_features)
    made.packed = nn.Parameter(torch.cat([layer.bias.detach()[None], layer.weight.detach().T]))
    torch.rand(1)
    return made


@pytest.fixture(autouse=True)
def _types(monkeypatch):
    monkeypatch.setitem(_TYPES, Packed, None)
    register_layer(Packed, as_linear, packed_again)


def network():
    return fill_(nn.Sequential(Packed(12, 10), nn.Linear(10, 12)), 0)


class Unreadable(nn.Module):
    """A property that many classes have, which cannot be read here."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 10)

    @property
    def weight(self):
        raise RuntimeError("gather it first")


def test_properties_of_other_classes_are_not_read():
    model = fill_(nn.Sequential(Unreadable()), 0)
    assert [one.name for one in svd_compress_(model, 0.1).compressed] == ["0.inner"]


def test_what_a_registered_function_draws_is_put_back():
    model, state = network(), torch.get_rng_state()
    svd_compress_(model, 0.3)
    assert type(model[0]) is LowRankLinear
    restore_dense_(model)
    assert type(model[0]) is Packed
    assert torch.equal(torch.get_rng_state(), state)


def test_a_bias_that_was_a_view_gets_memory_of_its_own():
    model = network()
    svd_compress_(model, 0.3)
    bias = model[0].bias
    assert bias.untyped_storage().nbytes() == bias.numel() * bias.element_size()


@pytest.mark.parametrize("training", [True, False])
def test_children_keep_their_own_mode(training):
    register_layer(Packed, unpacked)
    model = network()
    model[0].dropout.train(not training)
    model[0].training = training
    before = Snapshot(model)
    plan_compression(model, 0.1)
    assert not before.difference()
    svd_compress_(model, 0.3)
    assert type(model[0]) is Unpacked
    assert model[0].dropout.training is not training
    assert model[0].training is training


def test_tied_projections_of_attention_stay_tied():
    model = fill_(nn.Sequential(*[nn.MultiheadAttention(8, 2) for _ in range(3)]), 0)
    model[1].in_proj_weight = model[0].in_proj_weight
    report = svd_compress_(model, 0.1)
    assert report["0"].reason == "in_proj_weight is shared with 1.in_proj_weight"
    assert model[0].in_proj_weight is model[1].in_proj_weight
    assert {one.name.partition(".")[0] for one in report.compressed} == {"2"}
    assert report.parameters_after == sum(one.numel() for one in model.parameters())


def test_attention_of_several_dtypes_stays_as_it_is():
    model = fill_(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)), 0)
    model[0].out_proj.double()
    reason = "this MultiheadAttention cannot be taken apart: its parameters are of several kinds: "
    assert svd_compress_(model, 0.01)["0"].reason == f"{reason}torch.float32 on cpu and torch.float64 on cpu"


def attention():
    return nn.Sequential(fill_(nn.MultiheadAttention(8, 2), 0))


def normed_attention():
    model = attention()
    parametrizations.weight_norm(model[0], "in_proj_weight")
    return model


@pytest.mark.parametrize("build", [network, attention, normed_attention])
def test_what_is_loaded_in_inference_mode_can_be_trained(build):
    def first(_, name):
        return name in {"0", "0.k_proj"}

    compressed, loaded = build(), build()
    svd_compress_(compressed, 0.01, parametrized="merge", filter_fn=first)
    with torch.inference_mode():
        load_compressed_(loaded, compressed.state_dict())
    assert not any(map(torch.is_inference, loaded.parameters()))
    inputs = randn(4, 12 if build is network else 8, seed=0, dtype=torch.float32)
    output = loaded(inputs) if build is network else loaded[0](inputs, inputs, inputs)[0]
    output.sum().backward()
    assert all(one.grad is not None for one in loaded.parameters())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("build", [network, attention])
def test_layers_that_were_made_in_inference_mode_are_compressed_and_loaded(build, inside):
    expected = build()
    svd_compress_(expected, 0.1)
    with torch.inference_mode():
        model, loaded = build(), build()
        load_compressed_(loaded, expected.state_dict())
    with torch.inference_mode(inside):
        assert plan_compression(model, 0.1).ratio >= 0.1
        svd_compress_(model, 0.1)
    for other in (model, loaded):
        for key, value in expected.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)
    with torch.inference_mode(inside):
        assert type(restore_dense_(model)[0]) is type(build()[0])


def test_attention_that_was_made_in_inference_mode_can_be_taken_apart():
    with torch.inference_mode():
        layer = attention()[0]
    inputs = randn(4, 8, seed=0, dtype=torch.float32)
    with torch.no_grad():
        apart = LowRankMultiheadAttention.from_attention(layer)
        assert torch.allclose(apart(inputs, inputs, inputs)[0], layer(inputs, inputs, inputs)[0], atol=1e-6)


def test_a_low_rank_layer_on_several_devices_is_named():
    model = nn.Sequential(LowRankLinear(12, 10, 2))
    model[0].up.to("meta")
    before = Snapshot(model)
    for action in (restore_dense_, lambda model: svd_compress_(model, 0.1)):
        with pytest.raises(ValueError, match=r"LowRankLinear cannot be merged: its parameters are on cpu and meta. Br"):
            action(model)
        assert not before.difference()


@pytest.mark.parametrize(
    "name", ["to_dense", "truncate_", "factors", "rank", "up", "to_attention", "q_proj", "_factor"]
)
@pytest.mark.parametrize("build", [lambda: nn.Linear(12, 10), lambda: nn.MultiheadAttention(8, 2)])
def test_attributes_of_the_user_never_hide_what_is_needed(build, name):
    model = nn.Sequential(fill_(build(), 0))
    model[0].__dict__[name] = "mine"
    kind = type(model[0])
    svd_compress_(model, 0.2)
    svd_compress_(model, 0.1)
    assert type(restore_dense_(model)[0]) is kind
