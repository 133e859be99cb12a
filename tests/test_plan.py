"""Plans as objects: printing, editing, and the models that they fit."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.networks import mlp, same, small_resnet, snapshot
from tests.strategies import seeds
from torchsmooth import plan_compression

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
