"""What ``load_compressed_`` answers to state dicts that are none, or do not fit."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from tests.checkpoints import save
from tests.mistakes import Mistake, check, table
from tests.networks import mlp, two_layers
from tests.strategies import fill_
from torchsmooth import LowRankLinear, load_compressed_, plan_compression, svd_compress_


def compressed_model(**options):
    model = two_layers()
    svd_compress_(model, 0.3, **options)
    return model


def compressed_state(**options):
    return compressed_model(**options).state_dict()


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model)


def packed(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is being moved
        return torch.ao.quantization.quantize_dynamic(compressed_model(**options), {nn.Linear}, dtype=torch.qint8)


def without(*keys):
    state = compressed_state(form="factored")
    return {key: value for key, value in state.items() if key not in keys}


def wide():
    return fill_(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4)), 0)


def deeper():
    return fill_(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 4)), 0)


def two_layers_on_meta():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def tied_ends():
    model = mlp(0, (8, 8, 8))
    model[2].weight = model[0].weight
    return model


def compressed_ends():
    model = mlp(0, (8, 8, 8))
    svd_compress_(model, 0.3)
    return model.state_dict()


def dense(folder):
    return save(two_layers().state_dict(), folder, "pickle")


STATES = [
    Mistake(
        "a class to load into",
        lambda model: load_compressed_(nn.Sequential, {}),
        TypeError,
        "model must be a torch.nn.Module, got the class Sequential: pass an instance of it.",
    ),
    Mistake(
        "model and state dict swapped",
        lambda model: load_compressed_(compressed_state(), model),
        TypeError,
        "model must be a torch.nn.Module, got OrderedDict: load a state dict into a model first.",
    ),
    Mistake(
        "a model for a state dict",
        lambda model: load_compressed_(model, two_layers()),
        TypeError,
        ("state_dict must be a mapping from names to tensors, got Sequential: pass its state_dict()."),
    ),
    Mistake(
        "a report for a state dict",
        lambda model: load_compressed_(model, svd_compress_(two_layers(), 0.3)),
        TypeError,
        "state_dict must be a mapping from names to tensors, got CompressionReport.",
    ),
    Mistake(
        "a list of tensors",
        lambda model: load_compressed_(model, list(compressed_state().values())),
        TypeError,
        "state_dict must be a mapping from names to tensors, got list.",
    ),
    Mistake(
        "a plan for a state dict",
        lambda model: load_compressed_(model, plan_compression(model, 0.3)),
        TypeError,
        "state_dict must be a mapping from names to tensors, got CompressionPlan.",
    ),
    Mistake(
        "a whole training checkpoint",
        lambda model: load_compressed_(model, {"state_dict": compressed_state(), "epoch": 3}),
        TypeError,
        (
            "state_dict must hold tensors, but 'state_dict' is an OrderedDict (a whole checkpoint? "
            "pass that entry of it)."
        ),
    ),
    Mistake(
        "keys that are numbers",
        lambda model: load_compressed_(model, dict(enumerate(compressed_state().values()))),
        TypeError,
        "state_dict must have strings for keys, got int 0.",
    ),
    Mistake(
        "numbers for tensors",
        lambda model: load_compressed_(model, without() | {"0.up.weight": 1.0}),
        TypeError,
        "state_dict must hold tensors, but '0.up.weight' is a float.",
    ),
    Mistake(
        "another input size",
        lambda model: load_compressed_(model, without()),
        ValueError,
        (
            "'0.down.weight' of shape (1, 6) and '0.up.weight' of shape (5, 1) are no factors of the "
            "weight of layer '0', which has shape (5, 7) in this model: was it built with other "
            "sizes?"
        ),
        model=wide,
    ),
    Mistake(
        "a half that is missing",
        lambda model: load_compressed_(model, without("0.down.weight")),
        ValueError,
        ("the state dict holds '0.up.weight' but not '0.down.weight': half of layer '0' is missing."),
    ),
    Mistake(
        "an order that is missing",
        lambda model: load_compressed_(
            model, {key: value for key, value in compressed_state().items() if not key.endswith("order")}
        ),
        ValueError,
        (
            "the state dict holds layer '0' in the pivoted form, with '0.up.weight' of shape (2, 3), "
            "but not '0.merge.order': part of the layer is missing."
        ),
    ),
    Mistake(
        "a bias that is missing",
        lambda model: load_compressed_(model, without("0.up.bias")),
        ValueError,
        "the state dict does not fit this model: {cause}",
    ),
    Mistake(
        "a layer that is missing",
        lambda model: load_compressed_(model, without()),
        ValueError,
        "the state dict does not fit this model: {cause}",
        model=deeper,
    ),
    Mistake(
        "the prefix of a wrapper",
        lambda model: load_compressed_(model, {f"module.{key}": value for key, value in compressed_state().items()}),
        ValueError,
        (
            "the state dict does not fit this model (its keys start with 'module.', the prefix of a "
            "wrapper: strip it, or save model.module.state_dict()): {cause}"
        ),
    ),
    Mistake(
        "an average of models",
        lambda model: load_compressed_(model, averaged(compressed_model()).state_dict()),
        ValueError,
        (
            "the state dict does not fit this model (its keys start with 'module.', the prefix of a "
            "wrapper: strip it, or save model.module.state_dict()): {cause}"
        ),
    ),
    Mistake(
        "a model in an average",
        lambda model: load_compressed_(model, compressed_state()),
        ValueError,
        (
            "the state dict does not fit this model (the model's keys start with 'module.', the prefix "
            "of a wrapper: load into model.module): {cause}"
        ),
        model=lambda: averaged(two_layers()),
    ),
    Mistake(
        "weights that torch.ao has packed",
        lambda model: load_compressed_(model, packed(form="factored").state_dict()),
        ValueError,
        (
            "the state dict does not fit this model ('0.down._packed_params.dtype' is a packed, "
            "quantised weight: save the state dict before quantising, and quantise after loading): {cause}"
        ),
    ),
    Mistake(
        "weights that torch.ao has packed, beside an order",
        lambda model: load_compressed_(model, packed(form="pivoted").state_dict()),
        ValueError,
        (
            "the state dict holds '0.merge.order' but not '0.down.weight' ('0.down._packed_params.dtype' "
            "is a packed, quantised weight: save the state dict before quantising, and quantise after "
            "loading): half of layer '0' is missing."
        ),
    ),
    Mistake(
        "an empty state dict",
        lambda model: load_compressed_(model, {}),
        ValueError,
        "the state dict does not fit this model: {cause}",
    ),
    Mistake(
        "dense and low-rank at once",
        lambda model: load_compressed_(model, two_layers().state_dict() | compressed_state()),
        ValueError,
        (
            "the state dict holds layer '0' twice, dense ('0.weight') and low-rank "
            "('0.down.weight'): only one of the two can be meant."
        ),
    ),
    Mistake(
        "a layer alone",
        lambda model: load_compressed_(model, LowRankLinear(6, 5, 2).state_dict()),
        ValueError,
        (
            "the model is itself a Linear, with no parent in which it could be replaced: build the "
            "low-rank layer with LowRankLinear.like and call its load_state_dict."
        ),
        model=lambda: fill_(nn.Linear(6, 5), 0),
    ),
    Mistake(
        "a model without memory",
        lambda model: load_compressed_(model, compressed_state()),
        ValueError,
        (
            "the model has tensors on the meta device ('0.bias', '0.weight', '2.bias', '2.weight'), "
            "which cannot hold values: call model.to_empty(device=...) first."
        ),
        model=two_layers_on_meta,
    ),
    Mistake(
        "a lazy model",
        lambda model: load_compressed_(model, compressed_state()),
        ValueError,
        (
            "parameter '0.weight' is not initialised yet (a lazy module): run one batch through the "
            "model first, then call this again."
        ),
        model=lambda: nn.Sequential(nn.LazyLinear(5)),
    ),
    Mistake(
        "a tied layer",
        lambda model: load_compressed_(model, compressed_ends()),
        ValueError,
        (
            "layer '0' is low-rank in the state dict, but has to stay dense in this model: weight is "
            "shared with 2.weight. Build the model as the one that was compressed."
        ),
        model=tied_ends,
    ),
]


@table(STATES)
def test_a_state_dict_that_does_not_fit_is_answered_in_these_words(mistake):
    check(mistake)
