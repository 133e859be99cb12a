"""Layers whose weight is computed: what is read of them, and when they are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from tests.snapshots import Snapshot
from tests.strategies import fill_, randn
from torchsmooth import plan_compression, svd_compress_


class Refusing(nn.Module):
    """Works while it is put on, and never after, like what has no kernel for a dtype."""

    error = None

    def forward(self, weight):
        if self.error is not None:
            raise self.error
        return weight


class Repeated(nn.Module):
    """Makes many rows of one."""

    def forward(self, weight):
        return weight.expand(self.rows, *weight.shape[1:])

    def right_inverse(self, weight):
        self.rows = len(weight)
        return weight[:1].clone()


class Particular(nn.Linear):
    """Cannot be made without arguments, not even by __new__."""

    def __new__(cls, *sizes):
        if not sizes:
            raise TypeError("sizes, please")
        return super().__new__(cls)


def two_layers():
    return fill_(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12)), 0)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, NotImplementedError])
def test_what_cannot_be_computed_stays_with_the_reason(error):
    model = two_layers()
    parametrization = Refusing()
    parametrize.register_parametrization(model[0], "weight", parametrization)
    parametrization.error = error("no kernel")
    report = svd_compress_(model, 0.1, parametrized="merge")
    assert report["0"].reason == "parametrized, but what is computed cannot be: no kernel"
    assert [one.name for one in report.compressed] == ["1"]


def test_a_sparse_weight_that_is_pruned_stays_with_the_reason():
    model = two_layers()
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    model[0].weight_orig = nn.Parameter(model[0].weight_orig.detach().to_sparse())
    reason = svd_compress_(model, 0.1, parametrized="merge")["0"].reason
    assert reason == "what is computed for 'weight' is a Tensor of layout torch.sparse_coo"


def test_a_pruned_weight_that_is_tied_stays_so():
    model = two_layers()
    model.append(nn.Linear(12, 10))
    model[2].weight = model[0].weight
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    report = svd_compress_(model, 0.1, parametrized="merge")
    assert report["0"].reason == "weight_orig is shared with 2.weight"
    assert model[0].weight_orig is model[2].weight
    assert report.parameters_after == sum(one.numel() for one in model.parameters())


def test_power_iterations_rest_also_below_an_older_norm():
    model = two_layers()
    spectral_norm(model[0])
    parametrizations.spectral_norm(model[0], "weight_orig")
    before = Snapshot(model)
    plan_compression(model, 0.1, parametrized="merge")
    assert not before.difference()


def test_attention_made_of_few_parameters_is_not_made_larger():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    fill_(model, 0)
    parametrize.register_parametrization(model[0], "in_proj_weight", Repeated())
    before = Snapshot(model)
    with pytest.raises(ValueError, match="parametrized from 104 parameters, of which 288 are computed"):
        svd_compress_(model, 0.05, parametrized="merge")
    assert not before.difference()


def test_a_class_that_cannot_be_made_without_arguments_is_none_that_is_known():
    model = two_layers()
    model.append(fill_(Particular(12, 10), 1))
    parametrizations.weight_norm(model[2])
    report = svd_compress_(model, 0.1, parametrized="merge")
    assert report["2"].reason == "parametrized (call remove_parametrizations first)"


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_handles_of_hooks_still_work_on_what_is_merged(norm):
    model = norm(fill_(nn.Linear(12, 10), 0))
    model = nn.Sequential(model)
    called = []
    handle = model[0].register_forward_pre_hook(lambda *_: called.append(1))
    svd_compress_(model, 0.3, parametrized="merge")
    inputs = randn(2, 12, seed=0, dtype=torch.float32)
    model(inputs)
    handle.remove()
    model(inputs)
    assert called == [1]


class Delegating(nn.Module):
    """Answers for what is inside of it, as wrappers of models do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def test_a_wrapper_of_what_is_parametrized_is_no_layer_itself():
    model = nn.Sequential(Delegating(parametrizations.weight_norm(fill_(nn.Linear(12, 10), 0))), nn.Linear(10, 12))
    assert [one.name for one in plan_compression(model, 0.1).layers] == ["0.inner", "1"]
