"""What is answered where a model cannot be compressed, or not as far."""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn

from tests.mistakes import Mistake, check, table
from tests.networks import Tied, mlp, two_layers
from tests.strategies import fill_
from torchsmooth import (
    LowRankLinear,
    TuckerConv2d,
    plan_compression,
    recalibrate_batchnorm_,
    restore_dense_,
    svd_compress_,
)

INPUTS = torch.linspace(-1, 1, 48).reshape(8, 6)


def with_weight(change):
    def build():
        model = two_layers()
        with torch.no_grad():
            change(model)
        return model

    return build


def put(value):
    return with_weight(lambda model: model[2].weight[1, 2:4].fill_(value))


def replaced(make):
    def change(model):
        model[0].weight, model[2].weight = (
            nn.Parameter(make(model[index].weight.detach()), requires_grad=False) for index in (0, 2)
        )

    return with_weight(change)


def frozen_computation():
    model = two_layers()
    for index in (0, 2):
        nn.utils.parametrizations.orthogonal(model[index])
    return model


def all_tied():
    model = mlp(0, (8, 8, 8))
    model[2].weight = model[0].weight
    return model


def pruned():
    model = two_layers()
    for index in (0, 2):
        nn.utils.prune.l1_unstructured(model[index], "weight", 0.5)
    return model


def on_meta():
    return nn.Sequential(nn.Linear(6, 5, device="meta"), nn.ReLU(), nn.Linear(5, 4, device="meta"))


def traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit has been replaced, and is still in use
        return torch.jit.trace(two_layers(), INPUTS)


MODELS = [
    Mistake(
        "a ratio too high",
        lambda model: svd_compress_(model, 0.9),
        ValueError,
        (
            "ratio 0.9 cannot be reached: with rank 1 in every layer that can be compressed, 27 of "
            "59 parameters are left. The largest ratio that can be reached is 0.5423."
        ),
    ),
    Mistake(
        "a ratio too high for a multiple",
        lambda model: svd_compress_(model, 0.5, rank_multiple=4),
        ValueError,
        (
            "ratio 0.5 cannot be reached: with the smallest multiple of 4 as rank in every layer "
            "that can be compressed, 57 of 59 parameters are left. The largest ratio that can be "
            "reached is 0.0338."
        ),
    ),
    Mistake(
        "a ratio too high for the layers that are left",
        lambda model: svd_compress_(model, 0.5, filter_fn=lambda _, name: name == "2"),
        ValueError,
        (
            "ratio 0.5 cannot be reached: with rank 1 in every layer that can be compressed, 47 of "
            "59 parameters are left. The largest of the layers that stay dense is '0', with 30: left "
            "out by filter_fn. The largest ratio that can be reached is 0.2033."
        ),
    ),
    Mistake(
        "an error bound too low",
        lambda model: svd_compress_(model, max_error=1e-9),
        ValueError,
        (
            "nothing to compress: no layer can be made smaller within max_error=1e-09. The layer "
            "that comes closest is '0', with a relative error of 0.1505."
        ),
    ),
    Mistake(
        "a model without layers",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "nothing to compress in this Sequential: it has no layers. Linear layers, convolutions "
            "and embeddings with more than a few channels can be."
        ),
        model=lambda: nn.Sequential(nn.ReLU()),
    ),
    Mistake(
        "a model of norms",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "nothing to compress in this Sequential: it has no layers. Linear layers, convolutions "
            "and embeddings with more than a few channels can be."
        ),
        model=lambda: nn.Sequential(nn.BatchNorm1d(8)),
    ),
    Mistake(
        "layers too small",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "nothing to compress in this Sequential: none of its 2 layers can be made smaller (0: no "
            "rank makes it smaller; 1: no rank makes it smaller). Linear layers, convolutions and "
            "embeddings with more than a few channels can be."
        ),
        model=lambda: fill_(nn.Sequential(nn.Linear(1, 9), nn.Linear(9, 1)), 0),
    ),
    Mistake(
        "a Linear alone",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "the model is itself a Linear, with no parent in which it could be replaced: use "
            "LowRankLinear.from_linear(layer, rank), or wrap it in a torch.nn.Sequential."
        ),
        model=lambda: fill_(nn.Linear(6, 5), 0),
    ),
    Mistake(
        "an Embedding alone",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "the model is itself an Embedding, with no parent in which it could be replaced: use "
            "LowRankEmbedding.from_embedding(layer, rank), or wrap it in a torch.nn.Sequential."
        ),
        model=lambda: fill_(nn.Embedding(9, 5), 0),
    ),
    Mistake(
        "attention alone",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "the model is itself a MultiheadAttention, with no parent in which it could be replaced: "
            "wrap it in a torch.nn.Sequential."
        ),
        model=lambda: fill_(nn.MultiheadAttention(8, 2), 0),
    ),
    Mistake(
        "an LSTM alone",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "the model is itself an LSTM, with no parent in which it could be replaced: wrap it in a "
            "torch.nn.Sequential."
        ),
        model=lambda: fill_(nn.LSTM(6, 5), 0),
    ),
    Mistake(
        "a low-rank layer alone",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "the model is itself a LowRankLinear, with no parent in which it could be replaced: use "
            "to_dense() of the layer, or wrap it in a torch.nn.Sequential."
        ),
        model=lambda: fill_(LowRankLinear(6, 5, 2), 0),
    ),
    Mistake(
        "a low-rank layer alone to restore",
        restore_dense_,
        ValueError,
        ("the model is itself a TuckerConv2d, with no parent in which it could be replaced: call its to_dense()."),
        model=lambda: fill_(TuckerConv2d(4, 4, 3, 2), 0),
    ),
    Mistake(
        "a class to restore",
        lambda model: restore_dense_(nn.Sequential),
        TypeError,
        "model must be a torch.nn.Module, got the class Sequential: pass an instance of it.",
    ),
    Mistake(
        "everything tied",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "nothing to compress in this Sequential: none of its 2 layers can be made smaller (0: "
            "weight is shared with 2.weight; 2: weight is shared with 0.weight). Linear layers, "
            "convolutions and embeddings with more than a few channels can be."
        ),
        model=all_tied,
    ),
    Mistake(
        "everything tied or small",
        lambda model: svd_compress_(model, 0.9),
        ValueError,
        (
            "ratio 0.9 cannot be reached: with rank 1 in every layer that can be compressed, 975 of "
            "1,200 parameters are left. The largest of the layers that stay dense is 'embedding', "
            "with 640: weight is shared with head.weight. The largest ratio that can be reached is "
            "0.1875."
        ),
        model=Tied,
    ),
    Mistake(
        "weights that are NaN",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "the weight of layer '2' holds 2 NaN or infinite values out of 20: repair it, or leave "
            "the layer out with filter_fn."
        ),
        model=put(math.nan),
    ),
    Mistake(
        "weights that are infinite",
        lambda model: plan_compression(model, 0.5),
        ValueError,
        (
            "the weight of layer '2' holds 2 NaN or infinite values out of 20: repair it, or leave "
            "the layer out with filter_fn."
        ),
        model=put(math.inf),
    ),
    Mistake(
        "complex weights",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "nothing to compress in this Sequential: none of its 2 layers can be made smaller (0: "
            "weight is of torch.complex64; 2: weight is of torch.complex64). Linear layers, "
            "convolutions and embeddings with more than a few channels can be."
        ),
        model=replaced(lambda weight: weight.to(torch.complex64)),
    ),
    Mistake(
        "integer weights",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "nothing to compress in this Sequential: none of its 2 layers can be made smaller (0: "
            "weight is of torch.int8; 2: weight is of torch.int8). Linear layers, convolutions and "
            "embeddings with more than a few channels can be."
        ),
        model=replaced(lambda weight: weight.to(torch.int8)),
    ),
    Mistake(
        "sparse weights",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "nothing to compress in this Sequential: none of its 2 layers can be made smaller (0: "
            "weight is sparse (torch.sparse_coo; to_dense() makes it plain); 2: weight is sparse "
            "(torch.sparse_coo; to_dense() makes it plain)). Linear layers, convolutions and "
            "embeddings with more than a few channels can be."
        ),
        model=replaced(lambda weight: weight.to_sparse()),
    ),
    Mistake(
        "computed weights",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "nothing to compress in this Sequential: none of its 2 layers can be made smaller (0: "
            "parametrized (parametrized='merge' compresses what is computed); 2: parametrized "
            "(parametrized='merge' compresses what is computed)). Linear layers, convolutions and "
            "embeddings with more than a few channels can be."
        ),
        model=frozen_computation,
    ),
    Mistake(
        "pruned weights",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "nothing to compress in this Sequential: none of its 2 layers can be made smaller (0: "
            "pruned (parametrized='merge' compresses what is computed); 2: pruned "
            "(parametrized='merge' compresses what is computed)). Linear layers, convolutions and "
            "embeddings with more than a few channels can be."
        ),
        model=pruned,
    ),
    Mistake(
        "empty weights",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "nothing to compress in this Sequential: none of its 2 layers can be made smaller (0: "
            "weight is empty; 2: weight is empty). Linear layers, convolutions and embeddings with "
            "more than a few channels can be."
        ),
        model=replaced(lambda weight: weight[:0]),
    ),
    Mistake(
        "weights without values",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "the weight of layer '0' is on the meta device and has no values: load the weights first "
            "(for instance model.to_empty(device=...), then load_state_dict)."
        ),
        model=on_meta,
    ),
    Mistake(
        "lazy weights",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "parameter '0.weight' is not initialised yet (a lazy module): run one batch through the "
            "model first, then call this again."
        ),
        model=lambda: nn.Sequential(nn.LazyLinear(5)),
    ),
    Mistake(
        "lazy norms",
        lambda model: recalibrate_batchnorm_(model, [INPUTS]),
        ValueError,
        (
            "parameter '0.weight' is not initialised yet (a lazy module): run one batch through the "
            "model first, then call this again."
        ),
        model=lambda: nn.Sequential(nn.LazyBatchNorm1d()),
    ),
    Mistake(
        "a program of TorchScript",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "the model is a program of TorchScript (TopLevelTracedModule), in which no layer can be "
            "replaced: compress the model that it was made of, and use torch.jit.trace, torch.export "
            "or torch.compile afterwards."
        ),
        model=traced,
    ),
    Mistake(
        "weights of another shape",
        lambda model: svd_compress_(model, 0.5),
        ValueError,
        (
            "nothing to compress in this Sequential: none of its 2 layers can be made smaller (0: "
            "weight is of shape (3, 6), but the layer's attributes say (5, 6); 2: weight is of shape "
            "(3, 5), but the layer's attributes say (4, 5)). Linear layers, convolutions and "
            "embeddings with more than a few channels can be."
        ),
        model=replaced(lambda weight: weight[:3]),
    ),
]


@table(MODELS)
def test_a_mistake_is_answered_in_these_words(mistake):
    check(mistake)
