"""What a plan answers to mistakes: when it is edited, compared, kept in a file, and applied."""

from __future__ import annotations

import json

import torch
from torch import nn

from tests.mistakes import Mistake, check, table
from tests.networks import mlp, two_layers
from tests.strategies import fill_
from torchsmooth import CompressionPlan, plan_compression, svd_compress_


def planned(model):
    return plan_compression(model, 0.3)


def edited(**changes):
    """Plan, and change the first layer."""

    def does(model):
        plan = planned(model)
        for name, value in changes.items():
            setattr(plan["0"], name, value)

    return does


def changed(field, value):
    """Read a plan in which one field of the first layer is another."""

    def does(model):
        content = json.loads(planned(model).to_json())
        if field in content["layers"][0]:
            content["layers"][0][field] = value
        else:
            content[field] = value
        return CompressionPlan.from_json(json.dumps(content))

    return does


def lacking(model):
    content = json.loads(planned(model).to_json())
    del content["layers"][0]["rank"]
    return CompressionPlan.from_json(json.dumps(content))


def grown(model):
    plan = planned(model)
    plan["0"].form = "factored"
    plan["0"].rank = 5
    return plan.apply_(model)


def all_dense(model):
    plan = planned(model)
    for layer in plan:
        layer.keep_dense()
    return plan.apply_(model)


def of_rank_one(model):
    plan = plan_compression(model, 0.1)
    plan["0"].choose("channel", 1)
    return plan


def grouped():
    return fill_(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3)), 0)


def ungrouped():
    return fill_(nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3)), 0)


def tied():
    model = mlp(0, (8, 8, 8))
    model[2].weight = model[0].weight
    return model


def compressed():
    model = two_layers()
    svd_compress_(model, 0.3)
    return model


EDITS = [
    Mistake(
        "a layer that is not there",
        lambda model: planned(model)["layer1"],
        KeyError,
        "no layer 'layer1' in this plan; it has '0', '2'.",
    ),
    Mistake(
        "a layer by number", lambda model: planned(model)[0], KeyError, "no layer 0 in this plan; it has '0', '2'."
    ),
    Mistake(
        "rank zero",
        edited(rank=0),
        ValueError,
        (
            "rank of layer '0' must lie between 1 and 5 (the full rank of scheme 'channel'; "
            "keep_dense() leaves the layer whole), got 0."
        ),
    ),
    Mistake(
        "a rank too high",
        edited(rank=100),
        ValueError,
        (
            "rank of layer '0' must lie between 1 and 5 (the full rank of scheme 'channel'; "
            "keep_dense() leaves the layer whole), got 100."
        ),
    ),
    Mistake("a rank as text", edited(rank="3"), TypeError, "rank of layer '0' must be an integer, got str '3'."),
    Mistake(
        "a rank as a fraction", edited(rank=0.5), TypeError, "rank of layer '0' must be an integer, got float 0.5."
    ),
    Mistake(
        "a rank of None",
        edited(rank=None),
        TypeError,
        "rank of layer '0' must be an integer, got None: keep_dense() leaves it whole.",
    ),
    Mistake(
        "a pair of ranks for a matrix",
        edited(rank=(2, 2)),
        TypeError,
        "rank of layer '0' must be an integer in scheme 'channel', got tuple (2, 2).",
    ),
    Mistake(
        "a scheme for an axis that is not there",
        edited(scheme="spatial"),
        ValueError,
        "scheme of layer '0' must be 'channel', the only choice here; got str 'spatial'.",
    ),
    Mistake(
        "an attribute that a layer has not",
        edited(ranks=2),
        AttributeError,
        "'ranks' of layer '0' cannot be set: its rank, scheme and form can be, and keep_dense() leaves it whole.",
    ),
    Mistake(
        "a ratio for one layer",
        edited(ratio=0.95),
        AttributeError,
        "'ratio' of layer '0' cannot be set: its rank, scheme and form can be, and keep_dense() leaves it whole.",
    ),
    Mistake(
        "an error that a layer is to have",
        edited(relative_error=0.1),
        AttributeError,
        "'relative_error' of layer '0' cannot be set: its rank, scheme and form can be, and keep_dense() leaves it "
        "whole.",
    ),
    Mistake(
        "a scheme misspelt in an edit",
        edited(scheme="chanel"),
        ValueError,
        ("scheme of layer '0' must be 'channel', the only choice here; got str 'chanel': did you mean 'channel'?"),
    ),
    Mistake(
        "a form misspelt in an edit",
        edited(form="dense"),
        ValueError,
        "form of layer '0' cannot be set to 'dense': keep_dense() leaves it whole.",
    ),
    Mistake(
        "the pivoted form at full rank",
        lambda model: planned(model)["0"].choose("channel", 5, "pivoted"),
        ValueError,
        (
            "rank of layer '0' must lie between 1 and 4 (one less than the full rank of scheme "
            "'channel', at which form 'pivoted' is the weight itself), got 5."
        ),
    ),
    Mistake(
        "a scheme for a layer that stays dense",
        lambda model: setattr(
            plan_compression(model, 0.1, filter_fn=lambda _, name: name == "0")["2"], "form", "pivoted"
        ),
        ValueError,
        "layer '2' cannot be compressed: left out by filter_fn.",
    ),
    Mistake(
        "a rank for a layer that was left out",
        lambda model: setattr(plan_compression(model, 0.1, filter_fn=lambda _, name: name == "0")["2"], "rank", 2),
        ValueError,
        "layer '2' cannot be compressed: left out by filter_fn.",
    ),
    Mistake(
        "comparing with a ratio",
        lambda model: planned(model).compare(0.5),
        TypeError,
        "other must be a CompressionPlan, got float 0.5.",
    ),
    Mistake(
        "a layer of a report that is not there",
        lambda model: svd_compress_(two_layers(), 0.3)["layer1"],
        KeyError,
        "no layer 'layer1' in this report; it has '0', '2'.",
    ),
]


APPLIED = [
    Mistake(
        "a plan for another model",
        lambda model: plan_compression(mlp(0, (6, 5, 9, 9)), 0.3).apply_(model),
        ValueError,
        "the plan has a layer '4', the model does not: was it made for another model?",
    ),
    Mistake(
        "a plan for another width",
        lambda model: planned(mlp(0, (6, 8, 4))).apply_(model),
        ValueError,
        (
            "layer '0' is planned as Linear of shape (8, 6), but the model has Linear of shape (5, "
            "6): was the plan made for another model, or applied to this one already?"
        ),
    ),
    Mistake(
        "a plan for another type",
        lambda model: planned(fill_(nn.Sequential(nn.Embedding(9, 6), nn.ReLU(), nn.Linear(5, 4)), 0)).apply_(model),
        ValueError,
        (
            "layer '0' is planned as Embedding of shape (9, 6), but the model has Linear of shape "
            "(5, 6): was the plan made for another model, or applied to this one already?"
        ),
    ),
    Mistake(
        "a plan for other groups",
        lambda model: of_rank_one(grouped()).apply_(model),
        ValueError,
        ("layer '0' is planned for other groups than this model's: was the plan made for another model?"),
        model=ungrouped,
    ),
    Mistake(
        "a plan applied twice",
        lambda model: planned(two_layers()).apply_(model),
        ValueError,
        (
            "layer '0' is planned as Linear of shape (5, 6), but the model has LowRankLinear of "
            "shape (5, 6): was the plan made for another model, or applied to this one already?"
        ),
        model=compressed,
    ),
    Mistake(
        "a plan that would make a layer grow",
        grown,
        ValueError,
        (
            "layer '0' would not get smaller at rank 5 (30 → 55 parameters): lower the rank, or "
            "leave it whole with keep_dense()."
        ),
    ),
    Mistake("a plan of nothing", all_dense, ValueError, "nothing to compress: every layer of this plan stays dense."),
    Mistake(
        "a plan applied to a state dict",
        lambda model: planned(model).apply_(model.state_dict()),
        TypeError,
        "model must be a torch.nn.Module, got OrderedDict: load a state dict into a model first.",
    ),
    Mistake(
        "a plan applied to a class",
        lambda model: planned(model).apply_(nn.Sequential),
        TypeError,
        "model must be a torch.nn.Module, got the class Sequential: pass an instance of it.",
    ),
    Mistake(
        "a plan applied with one tensor of data",
        lambda model: planned(model).apply_(model, calibration=torch.ones(2, 6)),
        TypeError,
        "calibration must be an iterable of inputs, such as [inputs] or a DataLoader, got Tensor.",
    ),
    Mistake(
        "a plan applied to inputs of a list",
        lambda model: planned(model).apply_(model, [torch.ones(2, 6)]),
        TypeError,
        ("example_inputs must be a tensor, a tuple of positional arguments, or a dict of keyword arguments; got list."),
    ),
    Mistake(
        "a plan for a layer that became tied",
        lambda model: planned(mlp(0, (8, 8, 8))).apply_(model),
        ValueError,
        "layer '0' is planned to be compressed, but cannot be: weight is shared with 2.weight.",
        model=tied,
    ),
]


TEXTS = [
    Mistake(
        "no text",
        lambda model: CompressionPlan.from_json(planned(model)),
        TypeError,
        "text must be a string that to_json wrote, got CompressionPlan.",
    ),
    Mistake(
        "a path for a text",
        lambda model: CompressionPlan.from_json("plan.json"),
        ValueError,
        (
            "not JSON ({cause}): expected what CompressionPlan.save or to_json wrote "
            "(CompressionPlan.load reads a file)."
        ),
    ),
    Mistake(
        "a report for a plan",
        lambda model: CompressionPlan.from_json(json.dumps(planned(model).to_dict())),
        ValueError,
        (
            "not a plan: expected an object with the field 'format' of 'torchsmooth plan', as "
            "CompressionPlan.save writes it."
        ),
    ),
    Mistake(
        "another version",
        changed("version", 2),
        ValueError,
        (
            "field 'version' must be 1, got 2: the plan was written by another version of "
            "torchsmooth; read it there, or plan again."
        ),
    ),
    Mistake(
        "a target that is none",
        changed("target", "flops"),
        ValueError,
        "field 'target' must be 'params' or 'macs' or 'latency', got 'flops'.",
    ),
    Mistake("a field that is missing", lacking, ValueError, "field 'layers[0].rank' is missing."),
    Mistake(
        "a rank of zero in a file",
        changed("rank", 0),
        ValueError,
        "field 'layers[0].rank' must be a whole number of at least 1, got 0.",
    ),
    Mistake(
        "a rank too high in a file",
        changed("rank", 100),
        ValueError,
        "field 'layers[0].rank' must be 1 … 4 in form 'pivoted', got 100.",
    ),
    Mistake(
        "a rank as text in a file",
        changed("rank", "3"),
        ValueError,
        "field 'layers[0].rank' must be a whole number of at least 1, got '3'.",
    ),
    Mistake(
        "a scheme that is none in a file",
        changed("scheme", "svd"),
        ValueError,
        "field 'layers[0].scheme' must be 'channel', got 'svd'.",
    ),
    Mistake(
        "a form that is none in a file",
        changed("form", "pivot"),
        ValueError,
        "field 'layers[0].form' must be 'dense' or 'factored' or 'pivoted', got 'pivot'.",
    ),
    Mistake(
        "a shape that is none in a file",
        changed("shape", "5x6"),
        ValueError,
        "field 'layers[0].shape' must be a list, got '5x6'.",
    ),
]


@table([*EDITS, *APPLIED, *TEXTS])
def test_a_mistake_is_answered_in_these_words(mistake):
    check(mistake)
