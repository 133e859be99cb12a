"""Layers whose weight is computed: what is read of them, and when they are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from tests.snapshots import Snapshot
from tests.strategies import fill_, randn
from torchsmooth import load_compressed_, plan_compression, svd_compress_


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


def attention():
    return nn.Sequential(fill_(nn.MultiheadAttention(8, 2), 0), fill_(nn.Linear(8, 8), 1))


def pruned_together(model):
    weights = [(model[0], "in_proj_weight"), (model[0].out_proj, "weight"), (model[1], "weight")]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=0.3)


COMPUTED_OUTPUTS = [
    pruned_together,
    lambda model: parametrizations.weight_norm(model[0].out_proj),
    lambda model: spectral_norm(model[0].out_proj),
]


@pytest.mark.parametrize("put_on", COMPUTED_OUTPUTS)
def test_attention_with_a_computed_output_is_compressed_like_what_that_amounts_to(put_on):
    model, plain, fresh = attention(), attention(), attention()
    put_on(model.eval())
    put_on(fresh)
    with torch.no_grad():
        model[0].out_proj(torch.zeros(1, 8))  # the older norm sets the weight when it is called first
        plain[0].in_proj_weight.copy_(model[0].in_proj_weight)
        plain[0].out_proj.weight.copy_(model[0].out_proj.weight)
        plain[1].weight.copy_(model[1].weight)
    before = Snapshot(model)
    plan = plan_compression(model, max_error=0.4, parametrized="merge")
    assert not before.difference()
    report = plan.apply_(model)
    svd_compress_(plain, max_error=0.4)
    assert {f"0.{name}_proj" for name in ("q", "k", "v", "out")} <= {one.name for one in report.compressed}
    assert report.parameters_after == sum(one.numel() for one in model.parameters())
    load_compressed_(fresh, model.state_dict())
    for one in (model, fresh):
        assert one.state_dict().keys() == plain.state_dict().keys()
        assert all(torch.allclose(one.state_dict()[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("put_on", COMPUTED_OUTPUTS)
def test_attention_with_a_computed_output_of_which_nothing_is_compressed_comes_back(put_on):
    model = attention()
    put_on(model)
    layer, output, keys = model[0], model[0].out_proj, list(model[0].state_dict())
    parts = {f"0.{name}_proj" for name in ("q", "k", "v", "out")}
    svd_compress_(
        model,
        max_error=0.4,
        parametrized="merge",
        filter_fn=lambda module, name: name not in parts or module is output,
    )
    assert model[0] is layer
    assert layer.out_proj is output
    assert list(layer.state_dict()) == keys


def test_an_output_that_is_filtered_out_stays_with_its_attention():
    model = attention()
    pruned_together(model)
    report = svd_compress_(model, 0.05, parametrized="merge", filter_fn=lambda _, name: name != "0.out_proj")
    assert report["0"].reason == "a NonDynamicallyQuantizableLinear inside stays: left out by filter_fn"
    assert [one.name for one in report.compressed] == ["1"]


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
