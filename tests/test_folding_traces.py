"""fold_batchnorm_ looks at a model by tracing it: nothing of that stays in it, and no way to call it is passed by."""

from __future__ import annotations

import io
from collections import deque
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchsmooth
from tests.snapshots import Snapshot
from tests.strategies import convolutions, fill_, low_rank, randn, seeds


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def close(one, other):
    return bool(((one - other).abs() <= 1e-9 * (1 + other.abs().max())).all())


def pair(seed=0):
    """A convolution and a norm that is far from doing nothing."""
    conv, norm = fill_(nn.Conv2d(4, 4, 1).double(), seed), fill_(nn.BatchNorm2d(4).double(), seed + 10)
    return conv, norm


# What a forward does with the output of a layer beside passing it on, or with something else; what leads to the layer's
# own output is told apart from the rest.
KEEPS = {
    "attribute": lambda model, value: setattr(model, "last", value),
    "new attribute": lambda model, value: setattr(model, "late", value),
    "child": lambda model, value: setattr(model.conv, "last", value),
    "list": lambda model, value: model.seen.append(value),
    "list inside": lambda model, value: model.table["inside"][0].append(value),
    "queue": lambda model, value: model.queue.append(value),
    "dictionary": lambda model, value: model.table.update(last=value),
}
DOES = {
    "counter": lambda model, value: setattr(model, "steps", model.steps + 1),
    "buffer in place": lambda model, value: model.hidden.mul_(0.5).add_(1),
    "buffer replaced": lambda model, value: setattr(model, "hidden", model.hidden + 1),
    "constant": lambda model, value: value * torch.tensor([2.0]),
    "random numbers": lambda model, value: value + torch.rand(1),
}


class Keeps(nn.Module):
    """Keeps and does what it is told to: at the output of the layer, or at that of the norm."""

    def __init__(self, at_layer, at_norm, turns):
        super().__init__()
        self.conv, self.norm = pair()
        self.register_buffer("hidden", torch.ones(3, dtype=torch.float64))
        self.at_layer, self.at_norm, self.turns = at_layer, at_norm, turns
        self.last, self.steps, self.seen, self.queue, self.table = None, 0, [], deque(), {"inside": ([],)}

    def forward(self, x):
        x = self.conv(x)
        for name in self.at_layer:
            KEEPS[name](self, x)
        x = self.norm(x)
        for name in self.at_norm:
            (KEEPS | DOES)[name](self, x)
        return -x if self.turns and x.sum() > 0 else x


some = st.lists(st.sampled_from([*KEEPS, *DOES]), max_size=4)


@given(st.lists(st.sampled_from([*KEEPS]), max_size=1), some, st.booleans(), seeds)
@settings(max_examples=16)
def test_what_a_trace_leaves_behind_is_put_back(at_layer, at_norm, in_a_container, seed):
    # What is overwritten is not kept.
    model = Keeps(at_layer, [one for one in at_norm if one not in at_layer], turns=False).eval()
    whole = nn.Sequential(model).eval() if in_a_container else model
    images = randn(2, 4, 3, 3, seed=seed)
    conv, norm = model.conv, model.norm
    expected = run(norm, run(conv, images))
    before = Snapshot(whole)
    report = torchsmooth.fold_batchnorm_(whole)
    assert len(report.folded) == (not at_layer)
    # All that may have changed are the two modules.
    folded = model.conv, model.norm
    model.conv, model.norm = conv, norm
    assert before.difference() == ""
    model.conv, model.norm = folded
    torch.save(whole, io.BytesIO())
    assert close(run(whole, images), expected)


@given(some, some, st.booleans())
@settings(max_examples=20)
def test_so_is_what_a_trace_leaves_that_fails(at_layer, at_norm, in_a_container):
    model = Keeps([one for one in at_layer if one in KEEPS], at_norm, turns=True).eval()
    whole = nn.Sequential(model).eval() if in_a_container else model
    before = Snapshot(whole)
    with pytest.raises(ValueError, match="cannot be traced symbolically"):
        torchsmooth.fold_batchnorm_(whole)
    assert before.difference() == ""


def test_an_output_that_is_kept_outside_of_the_model_is_left_as_it_is():
    seen = []
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)).eval()
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    report = torchsmooth.fold_batchnorm_(model)
    assert report.left == {"1": "the output of '0.0' is kept, in an attribute or elsewhere, for others to read"}


# What a model does once it has a convolution's output ``h``, and ``y``, the norm's.
ACTIONS = {
    "norm": lambda model, x, h: model.norm(h),
    "neither": lambda model, x, h: x,
    "skip": lambda model, x, h: model.norm(h) + h,
    "layer alone": lambda model, x, h: h,
    "norm alone": lambda model, x, h: model.norm(x),
    "another layer": lambda model, x, h: model.norm(model.other(x)),
    "twice": lambda model, x, h: model.norm(model.norm(h)),
    "weight": lambda model, x, h: model.norm(h) * model.conv.weight.sum(),
    "statistics": lambda model, x, h: model.norm(h) * model.norm.running_mean.sqrt().sum(),
}


def layer_of_norm(actions):
    """Which layer alone feeds the norm, and nothing else, in all of these."""
    if actions <= {"norm", "neither"} and "norm" in actions:
        return "conv"
    if actions <= {"another layer", "layer alone", "neither"} and "another layer" in actions:
        return "other"
    return None


class Optional(nn.Module):
    """Does as the arguments that it is given have it."""

    def __init__(self, actions):
        super().__init__()
        self.conv, self.norm = pair()
        self.other = fill_(nn.Conv2d(4, 4, 1).double(), 5)
        self.norm.running_mean.abs_()
        self.actions = actions

    def forward(self, x, one=None, *, two=None):
        action = self.actions[one is not None, two is not None]
        h = None if action == "neither" else self.conv(x)
        return ACTIONS[action](self, x, h)


class Calls(nn.Module):
    """Calls a model that has optional arguments in one way."""

    def __init__(self, model, one, two):
        super().__init__()
        self.model, self.given = model, ([0.5] if one else [], {"two": 0.5} if two else {})

    def forward(self, x):
        args, kwargs = self.given
        return self.model(x, *args, **kwargs)


combinations = list(product([False, True], repeat=2))
tables = st.fixed_dictionaries(dict.fromkeys(combinations, st.sampled_from(["norm", "neither"] * 4 + [*ACTIONS])))


def outputs(model, images):
    return [run(model, images, *([0.5] if one else []), **({"two": 0.5} if two else {})) for one, two in combinations]


@given(tables, seeds)
@settings(max_examples=100)
def test_a_pair_is_folded_if_it_is_one_however_the_model_is_called(actions, seed):
    model = Optional(actions).eval()
    images = randn(1, 4, 3, 3, seed=seed)
    expected = outputs(model, images)
    report = torchsmooth.fold_batchnorm_(model)
    assert all(map(close, outputs(model, images), expected))
    assert report.folded.get("norm") == layer_of_norm({*actions.values()})


@given(tables, st.booleans(), st.booleans(), seeds)
@settings(max_examples=30)
def test_inside_of_a_model_it_counts_how_it_is_called_there(actions, one, two, seed):
    model = Calls(Optional(actions), one, two).eval()
    images = randn(1, 4, 3, 3, seed=seed)
    expected = run(model, images)
    report = torchsmooth.fold_batchnorm_(model)
    assert close(run(model, images), expected)
    layer = layer_of_norm({actions[one, two]})
    assert report.folded.get("model.norm") == (layer and f"model.{layer}")


class Anything(nn.Module):
    """Has arguments whose number and names are open."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = pair()

    def forward(self, x, *args, scale=2.0, names=("a", "b"), **kwargs):
        h = self.conv(x)
        return self.norm(h) * scale + (h if kwargs.get("skip") is None else 0)


@pytest.mark.parametrize("given", [{}, {"skip": 1}])
def test_arguments_whose_number_is_open_may_be_missing(given):
    model = Anything().eval()
    images = randn(1, 4, 3, 3, seed=0)
    expected = run(model, images, **given)
    assert torchsmooth.fold_batchnorm_(model).left == {"norm": "the output of 'conv' goes to others as well"}
    assert close(run(model, images, **given), expected)


class Needs(nn.Module):
    """Cannot be called without its second argument, though that has a default."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = pair()

    def forward(self, x=None, scale=None):
        return self.norm(self.conv(x)) * scale.sum()


def test_a_way_to_call_that_cannot_be_traced_is_named():
    model = Needs().eval()
    before = Snapshot(model)
    message = r"^Needs cannot be traced symbolically, .* \(AttributeError, called without 'scale': .*pairs="
    with pytest.raises(ValueError, match=message):
        torchsmooth.fold_batchnorm_(model)
    assert before.difference() == ""
    assert torchsmooth.fold_batchnorm_(model, pairs=[("conv", "norm")]).folded == {"norm": "conv"}


def test_a_model_whose_forward_was_replaced_is_not_looked_at():
    model = nn.Sequential(*pair()).eval()
    forward = model.forward
    model.forward = lambda x: forward(x) + model[0](x)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"cannot be traced .* \(its forward was replaced on the instance\)"):
        torchsmooth.fold_batchnorm_(model)
    assert before.difference() == ""


# What can be read of a layer and a norm without a call of them.
READS = {
    "weight": lambda layer, norm: layer.weight,
    "bias": lambda layer, norm: layer.bias,
    "mean": lambda layer, norm: norm.running_mean,
    "scale": lambda layer, norm: norm.weight,
    "deviation": lambda layer, norm: norm.running_var.sqrt(),
}
READS_LOW_RANK = {
    "factors": lambda layer, norm: layer.factors()[0],
    "child": lambda layer, norm: layer.up.weight,
    "in place": lambda layer, norm: layer.up.weight.data.zero_(),
    "call of a child": lambda layer, norm: layer.down(torch.ones(1, layer.down.in_channels, 9, 9).double()),
}


class Reads(nn.Module):
    """Uses something of its layer or its norm beside calling them."""

    def __init__(self, layer, norm, read):
        super().__init__()
        self.layer, self.norm, self.read = layer, norm, read

    def forward(self, x):
        return self.norm(self.layer(x)) * self.read(self.layer, self.norm).sum()


@given(convolutions(least=2), st.booleans(), st.data())
@settings(max_examples=60)
def test_what_is_read_of_a_low_rank_layer_counts_as_that_of_a_dense_one(case, compressed, data):
    dense, _ = case
    layer = low_rank(dense, data) if compressed else dense
    norm = nn.BatchNorm2d(layer.out_channels, dtype=torch.float64)
    plain = compressed and getattr(layer, "form", "") == "factored" and len(layer.factor_children) == 2
    reads = READS | (READS_LOW_RANK if plain else {})
    name = data.draw(st.sampled_from([one for one in reads if one != "bias" or layer.bias is not None]))
    model = Reads(layer, norm, reads[name]).eval()
    before = Snapshot(model)
    report = torchsmooth.fold_batchnorm_(model)
    assert report.left == {"norm": "a value of it, or of the layer that feeds it, is used elsewhere"}
    assert before.difference() == ""
