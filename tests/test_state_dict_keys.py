"""State-dict keys are API: files written today have to load tomorrow. Those of every layer, scheme and form."""

from __future__ import annotations

import pytest
from torch import nn

import torchsmooth
from tests.strategies import fill_

# What a product of two factors is stored as, by scheme and form, with a bias.
FACTORED = ["down.weight", "up.weight", "up.bias"]
PIVOTED = {
    "channel": ["down.weight", "up.weight", "merge.bias", "merge.order"],
    "input": ["split.order", "down.weight", "up.weight", "up.bias"],
    "spatial": ["down.weight", "up.weight", "up.bias", "up.order"],
    "spatial_transposed": ["down.weight", "up.weight", "up.bias", "up.order"],
}
CONVOLUTIONS = [
    (f"LowRankConv{kind}{axes}d", scheme)
    for axes in (1, 2, 3)
    for kind in ("", "Transpose")
    for scheme in (PIVOTED if (axes, kind) == (2, "") else ("channel", "input"))
]


def keys(module):
    return list(module.state_dict())


def without_bias(names):
    return [name for name in names if not name.endswith("bias")]


@pytest.mark.parametrize(("name", "scheme"), CONVOLUTIONS)
def test_convolutions(name, scheme):
    def made(form, *, bias):
        return getattr(torchsmooth, name)(4, 4, 3, 2, scheme=scheme, form=form, bias=bias)

    assert keys(made("factored", bias=True)) == FACTORED
    assert keys(made("factored", bias=False)) == without_bias(FACTORED)
    assert keys(made("pivoted", bias=True)) == PIVOTED[scheme]
    assert keys(made("pivoted", bias=False)) == without_bias(PIVOTED[scheme])


def test_groups_change_no_key():
    for form, expected in (("factored", FACTORED), ("pivoted", PIVOTED["channel"])):
        assert keys(torchsmooth.LowRankConv2d(8, 8, 3, 2, groups=2, form=form)) == expected


def test_linear_layers():
    for form, expected in (("factored", FACTORED), ("pivoted", PIVOTED["channel"])):
        for bias in (True, False):
            layer = torchsmooth.LowRankLinear.from_linear(nn.Linear(4, 3, bias=bias), 2, form)
            assert keys(layer) == (expected if bias else without_bias(expected))


def test_tucker():
    factored = ["down.weight", "core.weight", "up.weight", "up.bias"]
    pivoted = ["split.order", "down.weight", "core.weight", "up.weight", "merge.bias", "merge.order"]
    for form, expected in (("factored", factored), ("pivoted", pivoted)):
        for bias in (True, False):
            layer = torchsmooth.TuckerConv2d(4, 6, 3, (2, 3), form=form, bias=bias)
            assert keys(layer) == (expected if bias else without_bias(expected))


def test_embeddings():
    assert keys(torchsmooth.LowRankEmbedding(5, 4, 2)) == ["down.weight", "up.weight"]
    assert keys(torchsmooth.LowRankEmbedding(5, 4, 2, form="pivoted")) == ["down.weight", "up.weight", "merge.order"]


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 6}, {"bias": False}, {"add_bias_kv": True}], ids=str)
def test_attention(options):
    layer = torchsmooth.LowRankMultiheadAttention.from_attention(nn.MultiheadAttention(8, 2, **options))
    projections = ["q_proj", "k_proj", "v_proj", "out_proj"]
    parts = ["weight"] if options.get("bias") is False else ["weight", "bias"]
    more = ["bias_k", "bias_v"] if options.get("add_bias_kv") else []
    assert keys(layer) == more + [f"{name}.{part}" for name in projections for part in parts]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_layers_and_cells(kind, bias):
    parts = ["weight", "bias"] if bias else ["weight"]
    cell = getattr(torchsmooth, f"LowRank{kind}Cell").from_cell(getattr(nn, f"{kind}Cell")(4, 3, bias=bias))
    assert keys(cell) == [f"{name}.{part}" for name in ("ih", "hh") for part in parts]
    dense = getattr(nn, kind)(4, 3, num_layers=2, bidirectional=True, bias=bias)
    layer = getattr(torchsmooth, f"LowRank{kind}").from_recurrent(dense)
    suffixes = ("l0", "l0_reverse", "l1", "l1_reverse")
    assert keys(layer) == [f"{name}_{suffix}.{part}" for suffix in suffixes for name in ("ih", "hh") for part in parts]


def test_projections_of_an_lstm():
    layer = torchsmooth.LowRankLSTM.from_recurrent(nn.LSTM(4, 3, proj_size=2, bias=False))
    assert keys(layer) == ["ih_l0.weight", "hh_l0.weight", "hr_l0.weight"]


def test_a_compressed_model():
    """Keys of the dense model, and in place of `weight` and `bias` those of the layer that it became."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.MultiheadAttention(32, 2), nn.LSTM(32, 32))
    torchsmooth.svd_compress_(fill_(model, 0), 0.7, form="factored", scheme="channel", allocation="uniform")
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    attention = [f"2.{name}.{part}" for name in ("q_proj", "k_proj", "v_proj", "out_proj") for part in FACTORED]
    assert keys(model) == [
        *(f"0.{part}" for part in FACTORED),
        *(f"1.{part}" for part in norm),
        *attention,
        *(f"3.{name}_l0.{part}" for name in ("ih", "hh") for part in FACTORED),
    ]


def test_penalties_add_no_key():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = keys(model)
    assert keys(torchsmooth.smooth_(model, torchsmooth.NuclearNorm())) == before
