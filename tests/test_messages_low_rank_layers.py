"""What the low-rank layers answer to layers that cannot be factored, and to factors that do not fit."""

from __future__ import annotations

import math

import torch
from torch import nn

from tests.mistakes import Mistake, check, table
from tests.networks import two_layers
from tests.strategies import fill_
from torchsmooth import (
    LowRankConv2d,
    LowRankEmbedding,
    LowRankLinear,
    LowRankLSTM,
    LowRankMultiheadAttention,
    TuckerConv2d,
    restore_dense_,
)


def linear():
    return fill_(nn.Linear(6, 5), 0)


def low_rank():
    return fill_(LowRankLinear(6, 5, 2), 0)


def nan_linear():
    layer = linear()
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    return layer


def pruned_low_rank():
    layer = low_rank()
    nn.utils.prune.l1_unstructured(layer.down, "weight", 0.5)
    return layer


def low_rank_attention():
    layer = LowRankMultiheadAttention.from_attention(fill_(nn.MultiheadAttention(8, 2), 0))
    layer.k_proj = LowRankLinear.from_linear(layer.k_proj, 2)
    return layer


def without_bias():
    layer = LowRankLSTM.from_recurrent(fill_(nn.LSTM(6, 5), 0))
    layer.hh_l0.bias = None
    return layer


SOURCES = [
    Mistake(
        "a convolution to from_linear",
        lambda model: LowRankLinear.from_linear(nn.Conv2d(3, 4, 3), 2),
        TypeError,
        (
            "expected a torch.nn.Linear, got Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1)). Use "
            "LowRankConv2d.from_conv2d for that."
        ),
    ),
    Mistake(
        "a weight to from_linear",
        lambda model: LowRankLinear.from_linear(torch.ones(5, 6), 2),
        TypeError,
        "expected a torch.nn.Linear, got Tensor.",
    ),
    Mistake(
        "a class to from_linear",
        lambda model: LowRankLinear.from_linear(nn.Linear, 2),
        TypeError,
        "expected a torch.nn.Linear, got the class Linear.",
    ),
    Mistake(
        "a model to from_linear",
        lambda model: LowRankLinear.from_linear(model, 2),
        TypeError,
        "expected a torch.nn.Linear, got Sequential.",
        model=two_layers,
    ),
    Mistake(
        "a transposed one to from_conv2d",
        lambda model: LowRankConv2d.from_conv2d(nn.ConvTranspose2d(3, 4, 3), 2),
        TypeError,
        (
            "expected a torch.nn.Conv2d, got ConvTranspose2d(3, 4, kernel_size=(3, 3), stride=(1, "
            "1)). Use LowRankConvTranspose2d.from_conv_transpose2d for that."
        ),
    ),
    Mistake(
        "a linear to the tucker form",
        lambda model: TuckerConv2d.from_conv2d(model, 2),
        TypeError,
        (
            "expected a torch.nn.Conv2d, got Linear(in_features=6, out_features=5, bias=True). Use "
            "LowRankLinear.from_linear for that."
        ),
        model=linear,
    ),
    Mistake(
        "a rank too high for a layer",
        lambda model: LowRankLinear.from_linear(model, 6),
        ValueError,
        "rank must lie between 1 and 5 (the full rank), got 6.",
        model=linear,
    ),
    Mistake(
        "an embedding that clips its rows",
        lambda model: LowRankEmbedding.from_embedding(model, 2),
        ValueError,
        (
            "this Embedding cannot be factored: max_norm rescales its rows in place when they are "
            "looked up (set it to None first)."
        ),
        model=lambda: fill_(nn.Embedding(9, 5, max_norm=1.0), 0),
    ),
    Mistake(
        "a layer with NaN",
        lambda model: LowRankLinear.from_linear(model, 2),
        ValueError,
        "the weight of this Linear holds 1 NaN or infinite values out of 30: repair it.",
        model=nan_linear,
    ),
    Mistake(
        "a layer without values",
        lambda model: LowRankLinear.from_linear(model, 2),
        ValueError,
        (
            "the weight of this Linear is on the meta device and has no values: load the weights "
            "first (for instance model.to_empty(device=...), then load_state_dict)."
        ),
        model=lambda: nn.Linear(6, 5, device="meta"),
    ),
    Mistake(
        "a lazy layer",
        lambda model: LowRankLinear.from_linear(model, 2),
        ValueError,
        (
            "the weight of this LazyLinear is not a plain parameter (lazy, pruned or parametrized): "
            "run a batch, or call torch.nn.utils.prune.remove / parametrize.remove_parametrizations "
            "first."
        ),
        model=lambda: nn.LazyLinear(5),
    ),
    Mistake(
        "a pruned layer",
        lambda model: LowRankLinear.from_linear(model, 2),
        ValueError,
        (
            "the weight of this Linear is not a plain parameter (lazy, pruned or parametrized): run "
            "a batch, or call torch.nn.utils.prune.remove / parametrize.remove_parametrizations "
            "first."
        ),
        model=lambda: nn.utils.prune.l1_unstructured(linear(), "weight", 0.5),
    ),
    Mistake(
        "a complex layer",
        lambda model: LowRankLinear.from_linear(model, 2),
        TypeError,
        ("the weight of this Linear is of torch.complex64; expected float64, float32, bfloat16 or float16."),
        model=lambda: nn.Linear(6, 5, dtype=torch.complex64),
    ),
    Mistake(
        "a linear to from_attention",
        LowRankMultiheadAttention.from_attention,
        TypeError,
        (
            "expected a torch.nn.MultiheadAttention itself, got Linear(in_features=6, "
            "out_features=5, bias=True): a subclass may use its weights in ways that linear layers "
            "would not know of (a parametrized one: call remove_parametrizations first)."
        ),
        model=linear,
    ),
    Mistake(
        "a GRU to the LSTM's",
        LowRankLSTM.from_recurrent,
        TypeError,
        (
            "expected a torch.nn.LSTM itself, got GRU(6, 5): a subclass may use its weights in ways "
            "that linear layers would not know of (a parametrized one: call remove_parametrizations "
            "first)."
        ),
        model=lambda: nn.GRU(6, 5),
    ),
    Mistake(
        "attention not yet dense",
        lambda model: model.to_attention(),
        ValueError,
        (
            "child 'k_proj' of this LowRankMultiheadAttention must be a torch.nn.Linear, got "
            "LowRankLinear: restore_dense_ the model first."
        ),
        model=low_rank_attention,
    ),
    Mistake(
        "an LSTM without a bias in a child",
        lambda model: model.to_recurrent(),
        ValueError,
        "child 'hh_l0' of this LowRankLSTM has no bias: give it one of zeros.",
        model=without_bias,
    ),
    Mistake(
        "factors of other shapes",
        lambda model: model.set_factors_(torch.ones(5, 2), torch.ones(2, 6)),
        ValueError,
        "up must have shape (1, 5, 2), got (5, 2).",
        model=low_rank,
    ),
    Mistake(
        "a parameter for the weight",
        lambda model: setattr(model, "weight", nn.Parameter(torch.ones(5, 6))),
        AttributeError,
        (
            "weight of a LowRankLinear cannot be set, as it is computed from the factors: set_factors_ stores others, "
            "up.weight and down.weight are the parameters, and restore_dense_ makes an ordinary layer of it."
        ),
        model=low_rank,
    ),
    Mistake(
        "a tensor for the weight of three layers",
        lambda model: setattr(model, "weight", torch.ones(4, 4, 3, 3)),
        AttributeError,
        (
            "weight of a TuckerConv2d cannot be set, as it is computed from the factors: set_factors_ stores others, "
            "up.weight, core.weight and down.weight are the parameters, and restore_dense_ makes an ordinary layer "
            "of it."
        ),
        model=lambda: fill_(TuckerConv2d(4, 4, 3, 2), 0),
    ),
    Mistake(
        "factors that are NaN",
        lambda model: model.set_factors_(torch.full((1, 5, 2), math.nan), torch.ones(1, 2, 6)),
        ValueError,
        "up must hold finite values, got NaN or infinite ones.",
        model=low_rank,
    ),
    Mistake(
        "factors that are lists",
        lambda model: model.set_factors_([[1.0]], [[1.0]]),
        TypeError,
        "up must be a torch.Tensor, got list [[1.0]].",
        model=low_rank,
    ),
    Mistake(
        "factors of the tucker form that are lists",
        lambda model: model.set_factors_([[1.0]], [[1.0]], None),
        TypeError,
        "up must be a torch.Tensor, got list [[1.0]].",
        model=lambda: fill_(TuckerConv2d(4, 4, 3, 2), 0),
    ),
    Mistake(
        "complex factors",
        lambda model: model.set_factors_(torch.ones(1, 5, 2, dtype=torch.complex64), torch.ones(1, 2, 6)),
        TypeError,
        "up must be of a floating dtype, got torch.complex64.",
        model=low_rank,
    ),
    Mistake(
        "a pruned low-rank layer to merge",
        lambda model: model.to_linear(),
        ValueError,
        (
            "a LowRankLinear cannot be merged: its factor is now a torch.nn.modules.linear.Linear "
            "without a plain weight (quantised, pruned or parametrized after it was compressed). Do "
            "it before quantising; prune.remove or remove_parametrizations makes the others plain "
            "again."
        ),
        model=pruned_low_rank,
    ),
    Mistake(
        "a pruned low-rank layer to fill",
        lambda model: model.set_factors_(torch.ones(1, 5, 2), torch.ones(1, 2, 6)),
        ValueError,
        (
            "a LowRankLinear cannot be filled: its factor is now a torch.nn.modules.linear.Linear "
            "without a plain weight (quantised, pruned or parametrized after it was compressed). Do "
            "it before quantising; prune.remove or remove_parametrizations makes the others plain "
            "again."
        ),
        model=pruned_low_rank,
    ),
    Mistake(
        "a pruned low-rank layer to restore",
        restore_dense_,
        ValueError,
        (
            "layer '0': a LowRankLinear cannot be merged: its factor is now a "
            "torch.nn.modules.linear.Linear without a plain weight (quantised, pruned or "
            "parametrized after it was compressed). Do it before quantising; prune.remove or "
            "remove_parametrizations makes the others plain again."
        ),
        model=lambda: nn.Sequential(pruned_low_rank()),
    ),
]


@table(SOURCES)
def test_a_mistake_is_answered_in_these_words(mistake):
    check(mistake)
