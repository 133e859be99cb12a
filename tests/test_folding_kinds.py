"""fold_batchnorm_ folds what it knows: a norm or a convolution that computes more, or that others watch, stays."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchsmooth
from tests.networks import same, snapshot
from tests.strategies import convolutions, fill_, low_rank, randn, seeds


class BatchNormReLU(nn.BatchNorm2d):
    """Computes more than its base class."""

    def forward(self, x):
        return super().forward(x).relu()


class Shifted(nn.Conv2d):
    """Computes more than its base class."""

    def forward(self, x):
        return super().forward(x) + 1


def becomes(module, place, kind):
    """Put a module of another type in the place of one of a Sequential, with its values."""
    old = module[place]
    new = kind(4) if isinstance(old, nn.BatchNorm2d) else kind(4, 4, 1)
    new.load_state_dict(old.state_dict())
    module[place] = new.eval()


def replace_forward_(module):
    forward = module.forward
    module.forward = lambda x: forward(x).relu() + 1


def low_rank_pair():
    pair = nn.Sequential(torchsmooth.LowRankConv2d.from_conv2d(nn.Conv2d(4, 4, 1), rank=2), nn.BatchNorm2d(4))
    return fill_(pair, 0).eval()


_FORWARD = "the forward of '0.0' or of the norm was replaced on the instance"
_HOOKS = "'0.0' or the norm has hooks"

# What is done to a pair of a convolution and a norm, and why it stays then.
ODD = {
    "norm of another type": (
        lambda pair: becomes(pair, 1, BatchNormReLU),
        "it is no plain BatchNorm, but a BatchNormReLU, which may compute more",
    ),
    "norm, parametrized": (
        lambda pair: nn.utils.parametrize.register_parametrization(pair[1], "weight", nn.Softplus()),
        "it is no plain BatchNorm, but a ParametrizedBatchNorm2d, which may compute more",
    ),
    "forward of the norm": (lambda pair: replace_forward_(pair[1]), _FORWARD),
    "forward of the layer": (lambda pair: replace_forward_(pair[0]), _FORWARD),
    "hook": (lambda pair: pair[1].register_forward_hook(lambda module, args, output: output * 2), _HOOKS),
    "hook before": (lambda pair: pair[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,)), _HOOKS),
    "hook on gradients": (lambda pair: pair[1].register_full_backward_hook(lambda module, *_: None), _HOOKS),
    "hook before gradients": (lambda pair: pair[0].register_full_backward_pre_hook(lambda module, *_: None), _HOOKS),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("compressed", [False, True])
@given(seed=seeds)
@settings(max_examples=5)
def test_what_computes_more_stays_and_others_are_folded(name, compressed, seed):
    make_odd, reason = ODD[name]
    first = low_rank_pair() if compressed else fill_(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), 0)
    model = nn.Sequential(first, fill_(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), 1)).eval()
    make_odd(first)
    images = randn(2, 4, 5, 5, seed=seed, dtype=torch.float32)
    with torch.no_grad():
        expected = model(images)
    before = snapshot(first)
    with pytest.raises(ValueError, match=f"^'0.1' cannot be folded into '0.0': {reason}.$"):
        torchsmooth.fold_batchnorm_(model, pairs=[("0.0", "0.1")])
    report = torchsmooth.fold_batchnorm_(model)
    assert (report.folded, report.left) == ({"1.1": "1.0"}, {"0.1": reason})
    assert same(snapshot(first), before)
    with torch.no_grad():
        assert torch.allclose(model(images), expected, rtol=1e-4, atol=1e-5)


def test_a_convolution_of_another_type_stays():
    model = fill_(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), 0).eval()
    becomes(model, 0, Shifted)
    assert torchsmooth.fold_batchnorm_(model).folded == {}
    with pytest.raises(ValueError, match="'0', which feeds it, is no plain convolution, but a Shifted"):
        torchsmooth.fold_batchnorm_(model, pairs=[("0", "1")])


@pytest.mark.parametrize(
    ("make", "axes"),
    [
        (lambda: [nn.LazyConv1d(4, 1), nn.LazyBatchNorm1d()], 1),
        (lambda: [nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d()], 2),
        (lambda: [nn.LazyConv3d(4, 1), nn.LazyBatchNorm3d()], 3),
        (lambda: [nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)], 2),
    ],
)
def test_lazy_layers_that_have_become_plain_ones_and_synchronised_norms_are_folded(make, axes):
    images = randn(2, 3, *[4] * axes, seed=0, dtype=torch.float32)
    model = nn.Sequential(*make()).eval()
    model(images)
    fill_(model, 1)
    with torch.no_grad():
        expected = model(images)
        assert torchsmooth.fold_batchnorm_(model).folded == {"1": "0"}
        assert torch.allclose(model(images), expected, rtol=1e-4, atol=1e-5)


@given(convolutions(), st.booleans(), st.booleans(), st.data())
@settings(max_examples=30)
def test_in_inference_mode_it_does_the_same(case, compressed, made_there, data):
    dense, images = case
    layer = low_rank(dense, data) if compressed else dense
    norm = fill_(nn.BatchNorm2d(layer.out_channels, dtype=torch.float64), 3)
    expected = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm)).eval()
    torchsmooth.fold_batchnorm_(expected)
    with torch.inference_mode(made_there):
        model = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm)).eval()
    with torch.inference_mode():
        assert torchsmooth.fold_batchnorm_(model).folded == {"1": "0"}
    state = expected.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    # The model is as one that was folded elsewhere: gradients flow, weights can be loaded.
    inputs = images.clone().requires_grad_()
    model(inputs).sum().backward()
    assert inputs.grad is not None
    model.load_state_dict(state)
