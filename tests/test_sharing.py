"""Layers that somebody else holds, or that are more than weight and bias: they stay whole, and the report says why."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
import types
import weakref
from collections import UserDict, UserList, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.networks import Tied, mlp, same, snapshot
from tests.strategies import fill_, randn
from torchsmooth import LowRankLinear, load_compressed_, plan_compression, restore_dense_, svd_compress_


def test_tied_weights_stay_dense_with_the_partner_named():
    plan = plan_compression(Tied(), 0.1)
    assert plan["head"].reason == "weight is shared with embedding.weight"
    assert plan["body.0"].reason == "weight is shared with body.1.weight"
    assert plan["body.1"].reason == "weight is shared with body.0.weight"
    assert plan["body.2"].rank is not None


def test_weights_tied_by_their_memory_stay_dense_too():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(64, 64))
    model[1].weight.data = model[0].weight.data
    plan = plan_compression(model, 0.3)
    assert plan["0"].reason == "weight is shared with 1.weight"
    assert plan["2"].rank is not None


def test_weights_in_one_flat_buffer_are_not_taken_for_tied():
    model = mlp()
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    assert any(layer.rank is not None for layer in plan_compression(model, 0.5))


class Holder(nn.Module):
    """Runs a layer that it finds outside of the module tree."""

    def __init__(self, hold):
        super().__init__()
        self.layer, self.other = nn.Linear(32, 32), nn.Linear(32, 32)
        self.held = hold(self.layer)


class Hidden(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layers = [layer]


def cycle_with(layer):
    nodes = [{"next": None} for _ in range(60)]
    for node in nodes:
        node["next"] = nodes
    nodes[30]["layer"] = layer
    return nodes


def tied_to(layer):
    other = nn.Linear(32, 32)
    other.weight = layer.weight
    return other


class Plain:
    def __init__(self, layer):
        self.inner = {"layer": layer}

    def run(self, x):
        return self.inner["layer"](x)


@dataclasses.dataclass
class Record:
    layer: nn.Module


class Slots:
    __slots__ = ("__private", "empty")

    def __init__(self, layer):
        self.__private = layer


class Grown(Slots):
    __slots__ = ("more",)


class Listed(list):
    """A list with an attribute."""


def listed(layer):
    empty = Listed()
    empty.first = layer
    return empty


HOLDERS = {
    "list": lambda layer: [layer],
    "dict": lambda layer: {"a": layer},
    "dict_key": lambda layer: {layer: 1},
    "nested": lambda layer: [("a", {"b": [layer]})],
    "deque": lambda layer: deque([layer]),
    "frozenset": lambda layer: frozenset([layer]),
    "bound_method": lambda layer: layer.forward,
    "partial": lambda layer: functools.partial(map, layer),
    "namespace": lambda layer: SimpleNamespace(inner=layer),
    "hidden_container": lambda layer: [nn.Sequential(layer, nn.ReLU())],
    "hidden_attribute": lambda layer: [SimpleNamespace(a=Hidden(layer))],
    "compiled": lambda layer: [torch.compile(layer, backend="eager")],
    "cycle": cycle_with,
    "object": Plain,
    "objects": lambda layer: [Plain(None), Plain(Record([layer]))],
    "dataclass": Record,
    "slots": Slots,
    "inherited_slots": Grown,
    "list_with_attribute": listed,
    "bound_method_of_object": lambda layer: Plain(layer).run,
    "user_dict": lambda layer: UserDict(a=layer),
    "user_list": lambda layer: UserList([layer]),
    "mapping_proxy": lambda layer: types.MappingProxyType({"a": layer}),
    "weak": weakref.ref,
    "proxy": lambda layer: [weakref.proxy(layer)],
    "weak_keys": lambda layer: weakref.WeakKeyDictionary({layer: 1}),
    "weak_values": lambda layer: weakref.WeakValueDictionary({1: layer}),
    "weak_set": lambda layer: weakref.WeakSet([layer]),
    "array": lambda layer: np.array([[layer, None]], dtype=object),
    "weight": lambda layer: [layer.weight],
    "hidden_weight": lambda layer: (tied_to(layer),),
    "view": lambda layer: layer.weight.detach()[3:],
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_layer_held_by_a_plain_attribute_stays_dense(kind):
    # A replacement in the tree would not reach the attribute, and forward would go on with the dense layer.
    model = nn.Sequential(Holder(HOLDERS[kind]))
    plan = plan_compression(model, 0.3)
    assert plan["0.layer"].reason.endswith("the plain attribute 0.held")
    assert plan["0.other"].rank is not None


@pytest.mark.parametrize(
    "refer", [lambda model: [model], weakref.ref, Record, lambda model: Record(weakref.ref(model))]
)
def test_a_reference_to_a_parent_is_no_obstacle(refer):
    model = Holder(lambda layer: None)
    object.__setattr__(model, "parent", refer(model))
    assert all(layer.rank is not None for layer in plan_compression(model, 0.3))


def test_objects_of_other_packages_are_not_looked_into():
    # A trainer that a model refers to refers to the optimizer, and that to every weight.
    model = Holder(lambda layer: None)
    model.optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.thread = threading.Thread(target=print, args=(model.layer,))
    assert all(layer.rank is not None for layer in plan_compression(model, 0.3))


def test_views_of_one_parameter_and_buffers_over_a_weight_are_tied():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Parameter(torch.zeros(96, 32))
            self.parts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
            for number, part in enumerate(self.parts):
                part.weight = nn.Parameter(self.qkv.data[32 * number : 32 * (number + 1)])
            self.free = nn.Linear(64, 64)
            self.watched = nn.Linear(32, 32)
            self.register_buffer("average", self.watched.weight.detach())

    plan = plan_compression(Views(), 0.1)
    assert {plan[f"parts.{number}"].reason for number in range(3)} == {"weight is shared with qkv"}
    assert plan["watched"].reason == "weight is shared with average"
    assert plan["free"].rank is not None


def with_pruned_bias():
    layer = nn.Linear(32, 32)
    prune.l1_unstructured(layer, "bias", 0.5)
    return layer


def with_buffer_bias():
    layer = nn.Linear(32, 32)
    bias = layer.bias.detach()
    del layer.bias
    layer.register_buffer("bias", bias)
    return layer


def with_extra_parameter():
    layer = nn.Linear(32, 32)
    layer.adapter = nn.Parameter(torch.zeros(2, 32))
    return layer


def with_child():
    layer = nn.Linear(32, 32)
    layer.observer = nn.Identity()
    return layer


def with_own_forward():
    layer = nn.Linear(32, 32)
    layer.forward = types.MethodType(lambda self, x: 2 * nn.functional.linear(x, self.weight), layer)
    return layer


def with_sliced_weight():
    layer = nn.Linear(32, 32, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach()[:16].clone())
    return layer


def with_state_hook():
    layer = nn.Linear(32, 32)
    layer.register_state_dict_post_hook(lambda module, state, prefix, metadata: None)
    return layer


MORE_THAN_WEIGHT_AND_BIAS = {
    with_pruned_bias: "pruned (parametrized='merge' compresses what is computed)",
    with_buffer_bias: "bias is not a plain parameter (pruned, or a buffer)",
    with_extra_parameter: "it has more than a weight and a bias: 'adapter'",
    with_child: "it has more than a weight and a bias: 'observer'",
    with_state_hook: "it has state-dict hooks, which expect the key 'weight'",
    with_own_forward: "its forward was replaced on this instance",
    with_sliced_weight: "weight is of shape (16, 32), but the layer's attributes say (32, 32)",
}


@pytest.mark.parametrize("make", MORE_THAN_WEIGHT_AND_BIAS)
def test_layers_that_are_more_than_weight_and_bias_stay_dense(make):
    model = nn.Sequential(make(), nn.Linear(32, 32))
    inputs = torch.ones(1, 32)
    expected = model[0](inputs)
    report = svd_compress_(model, 0.2)
    assert report["0"].reason == MORE_THAN_WEIGHT_AND_BIAS[make]
    assert torch.equal(model[0](inputs), expected)
    with pytest.raises(ValueError, match="this Linear cannot be factored: "):
        LowRankLinear.from_linear(make(), 2)


def test_a_layer_that_was_compiled_by_itself_stays_dense():
    model = nn.Sequential(torch.compile(nn.Linear(32, 32), backend="eager"), nn.Linear(32, 32))
    report = svd_compress_(model, 0.2)
    assert report["0._orig_mod"].reason == "compiled by itself (compress first, then torch.compile)"
    with pytest.raises(ValueError, match="compiled by itself"):
        svd_compress_(torch.compile(nn.Linear(32, 32), backend="eager"), 0.2)


def test_a_compiled_model_runs_its_low_rank_layers():
    model = mlp(0, (32, 32, 32))
    compiled = torch.compile(model, backend="eager")
    inputs = randn(2, 32, seed=0, dtype=torch.float32)
    compiled(inputs)
    svd_compress_(compiled, 0.5)
    assert torch.equal(compiled(inputs), model(inputs))
    assert isinstance(model[0], LowRankLinear)


def test_a_model_in_distributed_data_parallel_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(mlp())
        with pytest.raises(ValueError, match=r"compress the module inside \(.module\), and wrap that anew"):
            svd_compress_(model, 0.5)
    finally:
        torch.distributed.destroy_process_group()


def test_loading_and_restoring_refuse_layers_that_others_hold():
    small = nn.Sequential(Holder(lambda layer: None))
    svd_compress_(small, 0.5)
    fresh = nn.Sequential(Holder(lambda layer: [layer]))
    before = snapshot(fresh)
    with pytest.raises(
        ValueError, match="layer '0.layer' is low-rank in the state dict, but has to stay dense .* 0.held"
    ):
        load_compressed_(fresh, small.state_dict())
    assert same(before, snapshot(fresh))
    small[0].held = [small[0].layer]
    with pytest.raises(ValueError, match="layer '0.layer' cannot be replaced: it is also held by the plain attribute"):
        restore_dense_(small)


def test_loading_refuses_to_cut_a_tie():
    class Pair(nn.Module):
        def __init__(self, tie):
            super().__init__()
            self.embedding, self.head = nn.Embedding(64, 64), nn.Linear(64, 64)
            if tie:
                self.head.weight = self.embedding.weight

    small = fill_(Pair(tie=False), 0)
    svd_compress_(small, 0.2)
    tied = fill_(Pair(tie=True), 1)
    before = snapshot(tied)
    with pytest.raises(ValueError, match="layer 'embedding' .* weight is shared with head.weight"):
        load_compressed_(tied, small.state_dict())
    assert same(before, snapshot(tied))


def test_a_factor_that_was_quantised_cannot_be_merged():
    model = mlp(0, (32, 32, 32))
    svd_compress_(model, 0.5)
    model[0].up = nn.Identity()
    with pytest.raises(ValueError, match="a LowRankLinear cannot be merged: its factor is now a torch.nn.modules"):
        restore_dense_(copy.deepcopy(model))
