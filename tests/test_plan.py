"""Plans as objects: printing, editing, and the models that they fit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import mlp, same, small_resnet, snapshot
from tests.strategies import randn, seeds
from torchsmooth import LowRankLinear, plan_compression
from torchsmooth._layers import find_layers

RATIOS = st.floats(0.05, 0.85)


def test_relative_errors_are_those_of_the_truncation():
    model = mlp(3)
    for layer in plan_compression(model, 0.6):
        values = torch.linalg.svdvals(model.get_submodule(layer.name).weight.detach().double())
        expected = (
            0.0 if layer.rank is None else float(values[layer.rank :].square().sum() / values.square().sum()) ** 0.5
        )
        assert layer.relative_error == pytest.approx(expected, abs=1e-6)


@given(seeds, st.floats(0.1, 0.6))
def test_plans_print_and_serialise(seed, ratio):
    plan = plan_compression(mlp(seed), ratio)
    text = str(plan)
    for layer in plan:
        assert layer.name in text
    assert f"{plan.parameters_before:,} → {plan.parameters_after:,} parameters" in text
    assert json.loads(json.dumps(plan.to_dict()))["parameters_after"] == plan.parameters_after


def test_ranks_and_schemes_can_be_edited():
    model = small_resnet()
    plan = plan_compression(model, 0.5)
    name = "layers.7.conv2"
    plan[name].rank = 5
    plan[name].scheme = "input"
    plan["fc"].keep_dense()
    plan["layers.0.conv1"].rank = 2
    report = plan.apply_(model)
    assert (report[name].rank, report[name].scheme) == (5, "input")
    assert report["fc"].reason == "kept dense by the user"
    assert report["layers.0.conv1"].rank == 2
    assert report.parameters_after == plan.parameters_after == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda plan: setattr(plan["0"], "rank", 0), ValueError, "rank of layer '0' must lie between 1 and 24"),
        (lambda plan: setattr(plan["0"], "rank", 25), ValueError, "rank of layer '0' must lie between 1 and 24"),
        (lambda plan: setattr(plan["0"], "rank", 2.5), TypeError, "rank of layer '0' must be an integer, got float"),
        (
            lambda plan: setattr(plan["0"], "scheme", "input"),
            ValueError,
            "scheme of layer '0' must be 'channel', the only choice here",
        ),
        (
            lambda plan: plan["0"].choose("bogus", 5),
            ValueError,
            "scheme of layer '0' must be 'channel', the only choice here",
        ),
        (lambda plan: plan["0"].choose("channel", 0), ValueError, "rank of layer '0' must lie between 1 and 24"),
        (lambda plan: plan["0"].choose("channel", "3"), TypeError, "rank of layer '0' must be an integer, got str"),
        (lambda plan: setattr(plan["0"], "rank", True), TypeError, "rank of layer '0' must be an integer, got bool"),
        (lambda plan: plan["nope"], KeyError, "no layer 'nope' in this plan; it has '0', '2', '4'"),
    ],
)
def test_bad_edits_are_refused(edit, error, message):
    plan = plan_compression(mlp(), 0.5)
    with pytest.raises(error, match=message):
        edit(plan)


def test_a_layer_that_cannot_be_compressed_takes_no_rank():
    plan = plan_compression(nn.Sequential(nn.Linear(64, 64), nn.EmbeddingBag(8, 8)), 0.3)
    with pytest.raises(ValueError, match="layer '1' cannot be compressed: EmbeddingBag is not supported"):
        plan["1"].rank = 1


def test_a_rank_may_be_an_integer_of_numpy():
    import numpy as np

    plan = plan_compression(mlp(), 0.5)
    plan["0"].rank = np.int64(3)
    assert type(plan["0"].rank) is int


def test_a_plan_for_other_groups_is_refused():
    # Both weights are 64×16×3×3.
    plan = plan_compression(nn.Sequential(nn.Conv2d(16, 64, 3)), 0.3, scheme="channel")
    with pytest.raises(ValueError, match="layer '0' is planned for other groups than this model's"):
        plan.apply_(nn.Sequential(nn.Conv2d(64, 64, 3, groups=4)))


def test_a_plan_holds_for_a_copy_of_the_model():
    model = mlp(1)
    other = mlp(2)
    plan = plan_compression(model, 0.5)
    report = plan.apply_(other)
    assert [layer.rank for layer in report.layers] == [layer.rank for layer in plan]
    assert type(model[0]) is nn.Linear


MORE = {
    "linear": lambda: nn.Linear(8, 30),
    "norm": lambda: nn.LayerNorm(8),  # of which nothing is a matrix
    "unsupported": lambda: nn.Bilinear(4, 5, 6),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "recurrent": lambda: nn.Sequential(nn.GRU(8, 9), nn.LSTMCell(8, 9)),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 9)),
    "low-rank": lambda: LowRankLinear.from_linear(nn.Linear(30, 20), rank=3),
    "blocks": lambda: nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 4, 3)), "b": nn.Embedding(9, 8)}),
}


@settings(max_examples=25)
@given(seeds, st.lists(st.sampled_from(sorted(MORE)), unique=True), st.booleans())
def test_layers_that_a_plan_does_not_know_are_listed_with_a_reason(seed, names, calibrated):
    class Network(nn.Module):
        def __init__(self, more):
            super().__init__()
            self.body, self.more = mlp(seed), more

        def forward(self, inputs):
            return self.body(inputs)

    plan = plan_compression(Network(nn.ModuleDict()), 0.4)
    model = Network(nn.ModuleDict({name: MORE[name]() for name in names}))
    expected = [layer.name for layer in plan] + [one.name for one in find_layers(model) if one.name.startswith("more")]
    report = plan.apply_(model, calibration=[randn(9, 24, seed=seed, dtype=torch.float32)] if calibrated else None)
    assert [layer.name for layer in report.layers] == expected
    beyond = report.layers[len(plan) :]
    assert all(layer.scheme is None and layer.reason for layer in beyond)
    assert all(layer.parameters_before == layer.parameters_after for layer in beyond)
    if "linear" in names:
        assert (report["more.linear"].reason, report["more.linear"].shape) == ("not in the plan", (30, 8))
    if "unsupported" in names:
        assert report["more.unsupported"].reason == "Bilinear is not supported"
    if "low-rank" in names:
        assert (report["more.low-rank"].reason, report["more.low-rank"].shape) == ("not in the plan", (20, 30))
    assert report.parameters_after == sum(one.numel() for one in model.parameters())
    saved = sum(layer.parameters_before - layer.parameters_after for layer in report.layers)
    assert report.parameters_before - report.parameters_after == saved == plan.parameters_before - plan.parameters_after


@settings(max_examples=10)
@given(seeds, st.sampled_from([None, *MORE]))
def test_a_layer_that_the_plan_leaves_dense_is_reported_as_the_model_has_it(seed, head):
    plan = plan_compression(nn.Sequential(mlp(seed), nn.Linear(8, 5)), 0.4, filter_fn=lambda _, name: name != "1")
    model = nn.Sequential(mlp(seed), *([] if head is None else [MORE[head]()]))
    there = [(one.name, one.type, one.parameters) for one in find_layers(model)]
    report = plan.apply_(model)
    assert [(one.name, one.type, one.parameters_before) for one in report.layers] == there
    assert report.parameters_before - report.parameters_after == plan.parameters_before - plan.parameters_after
    if head == "linear":
        assert (report["1"].shape, report["1"].reason) == ((30, 8), "left out by filter_fn")


@pytest.mark.parametrize("build", [nn.MultiheadAttention, nn.LSTM, nn.GRUCell])
def test_parts_of_a_layer_that_the_plan_leaves_whole_are_listed_once(build):
    model = nn.ModuleDict({"whole": build(24, 2), "linear": nn.Linear(30, 30)})
    plan = plan_compression(copy.deepcopy(model), 0.05)
    for layer in plan:
        if layer.name != "linear":
            layer.keep_dense()
    plan["linear"].rank = 3
    assert [layer.name for layer in plan.apply_(model).layers] == [layer.name for layer in plan]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan, model: setattr(plan["0"], "rank", 24), "layer '0' would not get smaller at rank 24"),
        (lambda plan, model: model.__setitem__(0, nn.Linear(24, 31)), r"planned as Linear of shape \(32, 24\), but"),
        (lambda plan, model: model.__setitem__(0, nn.Identity()), "has a layer '0', the model does not"),
        (lambda plan, model: model.__setitem__(0, nn.Bilinear(4, 5, 6)), "'0' .* cannot be: Bilinear is not supported"),
        (lambda plan, model: model[0].weight.data.fill_(torch.nan), "layer '0' holds 768 NaN or infinite values"),
        (lambda plan, model: [layer.keep_dense() for layer in plan], "nothing to compress"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(change, message):
    model = mlp()
    plan = plan_compression(model, 0.5)
    change(plan, model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        plan.apply_(model)
    assert same(before, snapshot(model))
