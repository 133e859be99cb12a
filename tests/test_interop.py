"""The modules of torch that read the weights of their children themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.strategies import fill_, randn
from torchsmooth import LowRankLinear, restore_dense_, svd_compress_


def encoder_layer(activation="relu", **kwargs):
    layer = nn.TransformerEncoderLayer(32, 4, 128, batch_first=True, dropout=0.0, activation=activation, **kwargs)
    return fill_(layer, 3)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_layers_work_in_both_modes(activation, norm_first):
    layer = encoder_layer(activation, norm_first=norm_first)
    report = svd_compress_(layer, 0.3, filter_fn=lambda _, name: name != "self_attn")
    assert {type(layer.linear1), type(layer.linear2)} == {LowRankLinear}
    assert report["self_attn"].reason == "left out by filter_fn"
    dense = restore_dense_(copy.deepcopy(layer))
    tokens = randn(2, 7, 32, seed=0, dtype=torch.float32)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    for training in (True, False):
        layer.train(training), dense.train(training)
        expected = dense(tokens)
        assert torch.allclose(layer(tokens), expected, atol=1e-5)  # in eval mode with gradients: the slow path
        with torch.no_grad():  # in eval mode without: the fast path, which reads linear1.weight
            assert torch.allclose(layer(tokens), expected, atol=1e-5)
            masked = layer(tokens, src_key_padding_mask=padding)
            assert torch.allclose(masked[1, :4], dense(tokens, src_key_padding_mask=padding)[1, :4], atol=1e-5)


def test_a_transformer_encoder_works_in_both_modes():
    encoder = fill_(nn.TransformerEncoder(encoder_layer(), 2), 5)
    svd_compress_(encoder, 0.4)
    dense = restore_dense_(copy.deepcopy(encoder))
    tokens = randn(2, 7, 32, seed=0, dtype=torch.float32)
    for training in (True, False):
        with torch.no_grad():
            assert torch.allclose(encoder.train(training)(tokens), dense.train(training)(tokens), atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"kdim": 24, "vdim": 40}, {"add_bias_kv": True}, {"batch_first": True}])
def test_multihead_attention_that_is_left_out_stays_whole_beside_compressed_layers(kwargs):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, **kwargs)
            self.linear = nn.Linear(32, 256)

    model = fill_(Block(), 4)
    sizes = [32, kwargs.get("kdim", 32), kwargs.get("vdim", 32)]
    query, key, value = (randn(5, 5, size, seed=i, dtype=torch.float32) for i, size in enumerate(sizes))
    for training in (True, False):
        model.train(training)
        expected = model.attention(query, key, value)[0]
        again = copy.deepcopy(model)
        report = svd_compress_(again, 0.1, filter_fn=lambda _, name: name == "linear")
        assert report["attention"].reason == "left out by filter_fn"
        assert report["attention.out_proj"].reason == "NonDynamicallyQuantizableLinear is not supported"
        assert torch.equal(again.attention(query, key, value)[0], expected)
        with torch.no_grad():
            assert torch.allclose(again.attention(query, key, value)[0], expected, atol=1e-6)
