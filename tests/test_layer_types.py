"""register_layer and what rests on it: composite layers, computed weights, low-rank layers compressed again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import torchsmooth
from tests.networks import mlp, same, small_resnet, snapshot
from tests.strategies import fill_, randn, seeds
from torchsmooth import (
    LowRankLinear,
    load_compressed_,
    plan_compression,
    register_layer,
    restore_dense_,
    svd_compress_,
    sweep,
)
from torchsmooth._lowrank_layer import LowRankLayer
from torchsmooth.layer_types import _TYPES

SIZE = 24
INPUTS = randn(5, SIZE, seed=3, dtype=torch.float32)


class Turned(nn.Module):
    """A linear layer with its weight as (in, out), as in GPT-2."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def turned_as_linear(layer):
    linear = nn.Linear(*layer.weight.shape, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.T), layer.bias
    return linear


def linear_as_turned(linear):
    layer = Turned(linear.out_features, linear.in_features)
    layer.weight, layer.bias = nn.Parameter(linear.weight.T.contiguous()), linear.bias
    return layer


class Fused(nn.Module):
    """Two linear layers in one parameter, the second turned inside out, and a child that is a Turned."""

    def __init__(self, size):
        super().__init__()
        self.both = nn.Parameter(torch.zeros(2 * size, size))
        self.offset = nn.Parameter(torch.zeros(2 * size))
        self.last = Turned(size, size)
        self.size = size

    def forward(self, x):
        first, second = (x @ self.both.T + self.offset).chunk(2, -1)
        return self.last(torch.relu(first) * second)


class Unfused(nn.Module):
    def __init__(self, first, second, last):
        super().__init__()
        self.first, self.second, self.last = first, second, last

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) * self.second(x))


def unfuse(layer):
    if layer.size == 1:
        raise ValueError("there is nothing to split.")
    parts = []
    for weight, bias in zip(layer.both.chunk(2), layer.offset.chunk(2), strict=True):
        part = nn.Linear(layer.size, layer.size, device="meta")
        part.weight, part.bias = nn.Parameter(weight), nn.Parameter(bias)
        parts.append(part)
    return Unfused(*parts, layer.last)


def fuse(parts):
    for name in ("first", "second"):
        if type(getattr(parts, name)) is not nn.Linear:
            raise ValueError(f"its {name} is no Linear")
    layer = Fused(parts.first.in_features)
    layer.both = nn.Parameter(torch.cat([parts.first.weight.detach(), parts.second.weight.detach()]))
    layer.offset = nn.Parameter(torch.cat([parts.first.bias.detach(), parts.second.bias.detach()]))
    layer.last = parts.last
    return layer


@pytest.fixture(autouse=True)
def _types(monkeypatch):
    for kind, known in dict(_TYPES).items():
        monkeypatch.setitem(_TYPES, kind, known)  # puts back what a test registers anew
    before = set(_TYPES)
    register_layer(Turned, turned_as_linear, linear_as_turned)
    register_layer(Fused, unfuse, fuse)
    yield
    for kind in set(_TYPES) - before:
        del _TYPES[kind]


def network(seed=0):
    return fill_(nn.Sequential(Fused(SIZE), nn.ReLU(), Turned(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE)), seed)


@settings(max_examples=10)
@given(seeds, st.floats(0.1, 0.8))
def test_composite_layers_are_compressed_saved_loaded_and_restored(seed, ratio):
    model = network(seed)
    before = sum(one.numel() for one in model.parameters())
    report = svd_compress_(model, ratio)
    assert sum(one.numel() for one in model.parameters()) == report.parameters_after <= (1 - ratio) * before
    assert [(one.name, one.type) for one in report.layers] == [
        ("0.first", "Linear"),
        ("0.second", "Linear"),
        ("0.last", "Turned"),
        ("2", "Turned"),
        ("4", "Linear"),
    ]
    for one in report.layers:
        low_rank = one.scheme is not None
        if isinstance(model[0], Unfused) or not one.name.startswith("0."):
            assert low_rank == isinstance(model.get_submodule(one.name), LowRankLinear)
        else:
            assert not low_rank
    again = load_compressed_(network(seed + 1), model.state_dict())
    assert torch.equal(again(INPUTS), model(INPUTS))
    # Nothing of the old, larger memory is held on to: every tensor lies in a piece of its own size.
    for one in (*model.parameters(), *again.parameters()):
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()
        assert one.is_contiguous()
    plan = plan_compression(copy.deepcopy(model), 0.1)  # from low-rank layers, at what they cost now
    read = torchsmooth.CompressionPlan.from_json(plan.to_json())
    assert read == plan
    assert read.to_json() == plan.to_json()
    assert read.parameters_after == plan.parameters_after
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    expected = model(INPUTS)
    assert torch.equal(copied(INPUTS), expected)
    restored = restore_dense_(copied)
    assert [type(one) for one in restored[::2]] == [Fused, Turned, nn.Linear]
    assert restored.state_dict().keys() == network().state_dict().keys()
    assert torch.allclose(restored(INPUTS), expected, atol=1e-4)


def test_at_nearly_full_rank_a_composite_layer_computes_the_same():
    model = network()
    expected = model(INPUTS)
    plan = plan_compression(model, 0.2)
    for layer in plan:
        layer.choose("channel", SIZE - 1, "pivoted")
    weights = {name: one.detach().clone() for name, one in model.named_parameters()}
    report = plan.apply_(model)
    assert len(report.compressed) == 5
    both = torch.cat([model[0].first.weight, model[0].second.weight])
    errors = [report[f"0.{name}"].relative_error for name in ("first", "second")]
    assert torch.linalg.vector_norm(both - weights["0.both"]) <= 1.01 * max(errors) * weights["0.both"].norm()
    assert torch.allclose(model(INPUTS), expected, atol=0.2)


def test_a_composite_layer_of_which_nothing_is_compressed_stays_the_object_that_it_was():
    model = network()
    fused, turned = model[0], model[2]
    parameters = dict(fused.named_parameters())
    report = plan_compression(model, 0.1, filter_fn=lambda module, _: isinstance(module, nn.Linear)).apply_(model)
    assert model[0] is fused
    assert model[2] is turned
    assert all(one is parameters[name] for name, one in fused.named_parameters())
    assert [one.name for one in report.compressed] == ["4"]
    assert report["0"].reason == report["2"].reason == "left out by filter_fn"


def test_filter_fn_sees_the_composite_layer_and_then_what_it_is_written_in():
    model, seen = network(), []
    svd_compress_(model, 0.2, filter_fn=lambda module, name: seen.append((name, type(module))) or name != "0.second")
    assert seen == [
        ("0", Fused),
        ("2", Turned),
        ("0.last", Turned),
        ("0.first", nn.Linear),
        ("0.second", nn.Linear),
        ("4", nn.Linear),
    ]
    assert isinstance(model[0].first, LowRankLinear)
    assert type(model[0].second) is nn.Linear


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["expand", "replace", "report"])
def test_a_failure_leaves_composite_layers_as_they_were(step, kind, monkeypatch):
    model = network()
    before = snapshot(model)

    def fail(*_, **__):
        raise kind("now")

    if step == "expand":
        register_layer(Fused, unfuse)
        register_layer(Turned, fail)
        if kind is ValueError:  # that one says why the layer stays dense
            assert svd_compress_(copy.deepcopy(model), 0.1)["2"].reason == "now"
            return
    else:
        where = {"replace": "torchsmooth.plan.replacements_for", "report": "torchsmooth.plan.CompressionReport"}
        monkeypatch.setattr(where[step], fail)
    with pytest.raises(kind, match="now"):
        svd_compress_(model, 0.3)
    assert same(snapshot(model), before)


def test_planning_leaves_the_model_as_it_is():
    model = network()
    before = snapshot(model)
    plans = sweep(model, [0.2, 0.4])
    assert same(snapshot(model), before)
    report = plans[1].apply_(model)
    assert report.ratio >= 0.4


def test_hooks_flags_modes_and_attributes_of_composite_layers_are_kept():
    model = network().eval()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("fused"))
    model[2].register_forward_pre_hook(lambda *_: calls.append("turned"))
    model[0].mine, model[2].mine = "a", "b"
    model[0].both.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    svd_compress_(model, 0.5)
    assert isinstance(model[0], Unfused)
    assert isinstance(model[2], LowRankLinear)
    assert (model[0].mine, model[2].mine) == ("a", "b")
    assert not any(module.training for module in model.modules())
    model(INPUTS)
    assert calls == ["fused", "turned"]
    assert not model[0].first.down.weight.requires_grad
    assert model[0].first.bias.requires_grad
    assert not model[2].down.weight.requires_grad
    restore_dense_(model)
    assert (type(model[0]), type(model[2])) == (Fused, Turned)
    assert (model[0].mine, model[2].mine) == ("a", "b")
    model(INPUTS)
    assert calls == ["fused", "turned"] * 2


def test_a_composite_layer_that_others_hold_stays_as_it_is_with_the_reason():
    model = network()
    model.register = [model[0]]
    report = svd_compress_(model, 0.1)
    assert report["0"].reason == "also held by the plain attribute register"
    assert isinstance(model[0], Fused)


def with_forward(layer):
    layer.forward = layer.forward


def with_state_hook(layer):
    layer.register_state_dict_pre_hook(lambda *_: None)


def with_parametrization(layer):
    parametrize.register_parametrization(layer.last, "weight", nn.Identity())


def with_sparse(layer):
    layer.both = nn.Parameter(layer.both.detach().to_sparse())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_forward, "its forward was replaced on this instance"),
        (with_state_hook, "it has state-dict hooks, which expect its keys"),
        (
            with_parametrization,
            "a ParametrizedTurned inside stays: parametrized (parametrized='merge' compresses what is computed)",
        ),
        (with_sparse, "its both is sparse (torch.sparse_coo; to_dense() makes it plain)"),
    ],
)
def test_a_composite_layer_that_is_more_than_its_type_stays_as_it_is(change, reason):
    model = network()
    change(model[0])
    assert svd_compress_(model, 0.1)["0"].reason == reason


def test_what_expand_gives_is_checked():
    model = network()
    register_layer(Turned, lambda layer: layer)
    assert plan_compression(model, 0.1)["2"].reason == "the function registered for it returned the layer itself"
    register_layer(Turned, lambda layer: nn.Linear(2, 2))
    reason = "it has 600 parameters, but what it was expanded to has 6"
    assert plan_compression(model, 0.1)["2"].reason == reason
    register_layer(Turned, lambda layer: layer.weight)
    with pytest.raises(
        TypeError, match="layer '2': expand, as registered for Turned, must return a torch.nn.Module, got Param"
    ):
        plan_compression(model, 0.1)
    register_layer(Turned, lambda layer: nn.Sequential(layer, Turned(1, 1)))
    again = "the function registered for it returned what has a Turned inside again"
    assert plan_compression(model, 0.1)["2"].reason == again


def test_what_is_inside_of_a_composite_layer_that_stays_is_compressed_by_itself():
    layer = Fused(1)
    layer.last = Turned(SIZE, SIZE)
    plan = plan_compression(nn.Sequential(fill_(layer, 0)), 0.1)
    assert plan["0"].reason == "there is nothing to split"
    assert plan["0.last"].choice is not None
    assert type(layer.last) is Turned


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("Turned", turned_as_linear), TypeError, "layer_type must be a class of torch.nn.Module, got str 'Turned'"),
        ((int, turned_as_linear), TypeError, "layer_type must be a class of torch.nn.Module, got the class int"),
        ((Turned, "linear"), TypeError, "expand must be a function of a layer, got str 'linear'"),
        ((Turned, turned_as_linear, 3), TypeError, "collapse must be a function of a layer, got int 3"),
        ((nn.Linear, turned_as_linear), ValueError, "layer_type must not be a plain layer, got Linear"),
    ],
)
def test_bad_registrations_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        register_layer(*arguments)


def test_a_bare_composite_layer_is_told_to_be_wrapped():
    with pytest.raises(ValueError, match=r"the model is itself a Turned, with no parent .*: wrap it in a torch.nn.Seq"):
        svd_compress_(fill_(Turned(SIZE, SIZE), 0), 0.5)


def test_without_a_way_back_the_plain_layers_stay():
    register_layer(Turned, turned_as_linear)
    model = network()
    svd_compress_(model, 0.5)
    assert type(restore_dense_(model)[2]) is nn.Linear


def test_a_layer_that_cannot_be_collapsed_is_named_and_nothing_is_changed():
    model = network()
    svd_compress_(model, 0.5)
    model[0].second = nn.Identity()
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer '0': its second is no Linear"):
        restore_dense_(model)
    assert same(snapshot(model), before)


def test_loading_what_does_not_fit_leaves_composite_layers_as_they_were():
    small = network()
    svd_compress_(small, 0.5)
    state = small.state_dict()
    state["4.up.weight"] = torch.zeros(3, 3)
    model = network(1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="are no factors of the weight of layer '4'"):
        load_compressed_(model, state)
    assert same(snapshot(model), before)
    before = snapshot(model)
    state = small.state_dict() | {"more": torch.zeros(1)}
    with pytest.raises(ValueError, match="Unexpected key"):
        load_compressed_(model, state)
    assert same(snapshot(model), before)


def test_calibration_and_multiply_accumulates_reach_into_composite_layers():
    model = network()
    batches = [randn(64, SIZE, seed=one, dtype=torch.float32) for one in range(3)]
    report = svd_compress_(copy.deepcopy(model), 0.4, calibration=batches)
    assert all(one.output_error is not None for one in report.compressed)
    report = svd_compress_(model, 0.4, target="macs", example_inputs=INPUTS)
    assert report.macs_before == 5 * 5 * SIZE * SIZE
    assert report.macs_after <= 0.6 * report.macs_before


# Computed weights.

COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.0),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
}


def computed_network(kind, seed=0):
    make = COMPUTED[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE), nn.Tanh())
        fill_(model, seed)
        make(model[0])
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_kept_or_merged_as_the_user_asks(kind):
    model = computed_network(kind)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    way = "pruned" if "pruned" in kind else "normed" if "old" in kind else "parametrized"
    report = plan_compression(model, 0.1)
    assert report["0"].reason == f"{way} (parametrized='merge' compresses what is computed)"
    model.train()  # where a power iteration would go on
    plan = plan_compression(model, 0.3, parametrized="merge")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], one) for name, one in before.items())
    model.eval()
    for layer in plan:
        layer.choose("channel", SIZE - 1, "pivoted")
    report = plan.apply_(model)
    assert isinstance(model[0], LowRankLinear)
    assert report["0"].parameters_before == SIZE * SIZE + (SIZE if "weight_norm" in kind else 0)
    assert {name for name in model.state_dict() if name.startswith("0.")} == {
        "0.down.weight",
        "0.up.weight",
        "0.merge.bias",
        "0.merge.order",
    }
    assert not model[0]._forward_pre_hooks
    # What the factors stand for is what was computed.
    again = computed_network(kind)
    again(INPUTS)
    computed = again[0].weight.detach()
    assert torch.equal(model[0].bias, again[0].bias)
    assert torch.linalg.vector_norm(model[0].weight - computed) <= 1.01 * report["0"].relative_error * computed.norm()
    again = load_compressed_(computed_network(kind, 1), model.state_dict())
    assert torch.equal(again(INPUTS), model(INPUTS))
    assert type(restore_dense_(model)[0]) is nn.Linear


def test_a_computed_layer_that_stays_dense_keeps_what_computes_it():
    model = computed_network("weight_norm")
    layer = model[0]
    plan = plan_compression(model, 0.2, parametrized="merge")
    plan["0"].keep_dense()
    plan.apply_(model)
    assert model[0] is layer
    assert parametrize.is_parametrized(layer, "weight")


def test_frozen_parts_of_computed_weights_stay_frozen():
    model = computed_network("weight_norm")
    model[0].requires_grad_(False)
    svd_compress_(model, 0.3, parametrized="merge")
    assert not any(one.requires_grad for one in model[0].parameters())
    assert all(one.requires_grad for one in model[2].parameters())


def test_a_parametrized_layer_of_a_registered_type_is_merged_and_then_expanded():
    model = network()
    parametrize.register_parametrization(model[2], "weight", nn.Tanh())
    expected = torch.tanh(model[2].parametrizations.weight.original.detach())
    plan = plan_compression(model, 0.2, parametrized="merge")
    assert plan["2"].type == "Turned"
    plan["2"].choose("channel", SIZE - 1, "pivoted")
    report = plan.apply_(model)
    error = torch.linalg.vector_norm(model[2].weight.T - expected) / expected.norm()
    assert error <= 1.01 * report["2"].relative_error
    assert type(restore_dense_(model)[2]) is Turned


# Low-rank layers, compressed again.


def tiny_convolutions(seed=0):
    return fill_(
        nn.Sequential(nn.Conv2d(6, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=2), nn.Conv1d(12, 9, 3)), seed
    )


@settings(max_examples=6)
@given(seeds, st.sampled_from([mlp, tiny_convolutions]), st.sampled_from(["auto", "factored"]))
def test_a_second_compression_goes_further(seed, build, form):
    model = build(seed)
    svd_compress_(model, 0.3)
    once = copy.deepcopy(model)
    before = sum(one.numel() for one in model.parameters())
    report = svd_compress_(model, 0.4, form=form)
    assert report.parameters_before == before
    assert sum(one.numel() for one in model.parameters()) == report.parameters_after <= 0.6 * before
    for one in report.layers:
        now, earlier = (each.get_submodule(one.name) for each in (model, once))
        assert one.parameters_after <= one.parameters_before
        if one.scheme is None:
            assert type(now) is type(earlier)
            assert all(torch.equal(a, b) for a, b in zip(now.parameters(), earlier.parameters(), strict=True))
        else:
            now, earlier = now.weight.detach(), earlier.weight.detach()
            error = torch.linalg.vector_norm(now - earlier) / torch.linalg.vector_norm(earlier)
            assert float(error) == pytest.approx(one.relative_error, abs=1e-5)
    again = load_compressed_(build(seed + 1), model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_the_second_compression_of_a_linear_network_is_nested_in_the_first():
    model = mlp(0, (40, 40))
    once = copy.deepcopy(model)
    plan_compression(once, 0.3, form="factored").apply_(once)
    twice = copy.deepcopy(once)
    plan = plan_compression(twice, 0.3, form="factored")
    plan.apply_(twice)
    straight = copy.deepcopy(model)
    direct = plan_compression(straight, 0.3, form="factored")
    direct["0"].rank = twice[0].rank
    direct.apply_(straight)
    assert torch.allclose(twice[0].weight, straight[0].weight, atol=1e-5)


def test_low_rank_layers_left_out_or_counted_otherwise_stay_the_objects_that_they_were():
    model = small_resnet()
    svd_compress_(model, 0.3, filter_fn=lambda module, name: name != "fc")
    layers = {name: one for name, one in model.named_modules() if isinstance(one, LowRankLayer)}
    assert layers
    images = randn(1, 3, 8, 8, seed=1, dtype=torch.float32)
    report = svd_compress_(copy.deepcopy(model), 0.01, target="macs", example_inputs=images)
    name = next(iter(layers))
    assert report[name].reason.startswith("already low-rank (rank ")
    assert report[name].reason.endswith("target 'macs' compresses no layer twice: restore_dense_ it first")
    report = svd_compress_(model, 0.001, filter_fn=lambda module, name: name == "fc")
    assert all(model.get_submodule(one) is layer for one, layer in layers.items())
    assert {report[one].reason for one in layers} == {"left out by filter_fn"}


def test_tied_factors_stay_as_they_are():
    model = mlp(0, (40, 40, 40))
    plan_compression(model, 0.5, form="factored").apply_(model)
    model[2] = copy.deepcopy(model[0])
    model[2].down.weight = model[0].down.weight
    model.append(fill_(nn.Linear(40, 40), 1))
    report = svd_compress_(model, 0.1)
    assert report["0"].reason == "down.weight is shared with 2.down.weight"
    assert torchsmooth.restore_dense_(model)


def test_what_expand_writes_in_place_needs_no_gradients():
    def as_linear(layer):
        linear = nn.Linear(*layer.weight.shape, device=layer.weight.device)
        linear.weight.copy_(layer.weight.T)
        linear.bias.copy_(layer.bias)
        return linear

    class Own(Turned):
        pass

    register_layer(Own, expand=as_linear)
    model = fill_(nn.Sequential(Own(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE)), 0)
    assert plan_compression(model, 0.5)["0"].rank
    assert svd_compress_(model, 0.5)["0"].rank
