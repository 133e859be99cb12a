"""Forms in plans: what each choice costs, which form wins, and how forms are edited."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import mlp, small_resnet
from tests.strategies import fill_, randn, seeds
from torchsmooth import CompressionPlan, LowRankConv2d, LowRankLinear, plan_compression, svd_compress_

FORMS = st.sampled_from(["auto", "factored", "pivoted"])


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def total_loss(plan):
    return sum(float(one.options[one.scheme].losses[one.rank]) for one in plan if one.scheme)


@settings(max_examples=15)
@given(seeds, st.floats(0.05, 0.85), FORMS, st.sampled_from([mlp, small_resnet]))
def test_the_model_that_comes_out_has_the_planned_parameters_and_forms(seed, ratio, form, build):
    model = build(seed)
    plan = plan_compression(model, ratio, form=form)
    report = plan.apply_(model)
    assert parameters(model) == report.parameters_after == plan.parameters_after <= (1 - ratio) * plan.parameters_before
    for layer, done in zip(plan, report.layers, strict=True):
        module = model.get_submodule(layer.name)
        assert done.form == layer.form == getattr(module, "form", "dense")
        assert form in ("auto", layer.form) or layer.form == "dense"
        if isinstance(module, (LowRankLinear, LowRankConv2d)):
            stored = module.down.weight.numel() + module.up.weight.numel()
            assert layer.parameters_after == done.parameters_after == stored < layer.parameters_before


@settings(max_examples=8)
@given(seeds, st.floats(0.3, 0.8))
def test_auto_loses_no_more_than_either_form_alone(seed, ratio):
    model = small_resnet(seed)
    auto, *alone = (total_loss(plan_compression(model, ratio, form=form)) for form in ("auto", "factored", "pivoted"))
    assert auto <= min(alone) * (1 + 1e-3)


def test_the_pivoted_form_saves_where_the_factored_one_cannot():
    model = mlp(0, (64, 64, 64))
    pivoted = plan_compression(model, 0.05)
    assert all(layer.form == "pivoted" and layer.rank > 32 for layer in pivoted if layer.rank)
    factored = plan_compression(model, 0.05, form="factored")
    assert all(layer.rank < 32 for layer in factored if layer.rank)
    assert total_loss(pivoted) < total_loss(factored)


def test_at_equal_cost_and_error_the_factored_form_wins():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    images = randn(1, 8, 12, 12, seed=0, dtype=torch.float32)
    plan = plan_compression(fill_(model, 0), 0.5, scheme="spatial", target="macs", example_inputs=images)
    assert {layer.form for layer in plan if layer.rank} == {"factored"}  # pivoted ones put their weight together


def test_full_rank_one_has_no_pivoted_form():
    model = nn.Sequential(nn.Linear(1, 64), nn.Linear(64, 64))
    plan = plan_compression(fill_(model, 0), 0.3, form="pivoted")
    assert plan["0"].reason == "no rank makes it smaller"
    with pytest.raises(ValueError, match="layer '0' has no pivoted form: its full rank is 1"):
        plan["0"].choose("channel", 1, "pivoted")


def test_forms_can_be_edited():
    model = small_resnet()
    plan = plan_compression(model, 0.5)
    layer = plan["layers.7.conv2"]
    layer.choose("channel", 5)
    assert layer.form == "factored"
    layer.rank = 7
    assert (layer.rank, layer.form) == (7, "factored")
    layer.form = "pivoted"
    layer.scheme = "input"
    layer.rank = 9
    assert (layer.scheme, layer.rank, layer.form) == ("input", 9, "pivoted")
    assert layer.parameters_after == 9 * (64 * 9 + 64 - 9)
    layer.rank = 64  # full rank: the pivoted form does not exist there
    assert layer.form == "factored"
    layer.choose("input", 9, "pivoted")
    report = plan.apply_(model)
    assert (report[layer.name].form, report[layer.name].parameters_after) == ("pivoted", layer.parameters_after)
    assert model.get_submodule(layer.name).form == "pivoted"


@pytest.mark.parametrize(("form", "expected"), [("auto", "pivoted"), ("pivoted", "pivoted"), ("factored", "factored")])
def test_a_rank_set_on_a_dense_layer_takes_the_smaller_form_that_was_asked_for(form, expected):
    plan = plan_compression(mlp(), 0.3, form=form)
    plan["0"].keep_dense()
    assert plan["0"].form == "dense"
    plan["0"].rank = 5
    assert plan["0"].form == expected
    plan["0"].keep_dense()
    plan["0"].rank = 24
    assert plan["0"].form == "factored"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plan: setattr(plan["0"], "form", "dense"), "form of layer '0' cannot be set to 'dense': keep_dense"),
        (lambda plan: plan["0"].choose("channel", 24, "pivoted"), "between 1 and 23 .one less than the full rank"),
        (lambda plan: plan["0"].choose("channel", 5, "sparse"), "form of layer '0' must be one of"),
        (
            lambda plan: (plan["0"].keep_dense(), setattr(plan["0"], "form", "pivoted")),
            "set its rank first, then the f",
        ),
    ],
)
def test_bad_forms_are_refused(edit, message):
    with pytest.raises(ValueError, match=message):
        edit(plan_compression(mlp(), 0.5))


@pytest.mark.parametrize("form", ["Auto", None, "dense"])
def test_unknown_forms_are_refused(form):
    for function in (plan_compression, svd_compress_):
        with pytest.raises(ValueError, match="form must be one of 'auto', 'factored', 'pivoted'"):
            function(mlp(), 0.5, form=form)


def test_tables_and_dictionaries_show_the_form():
    plan = plan_compression(mlp(), 0.5, form="pivoted")
    assert "channel, pivoted" in str(plan)
    assert {layer["form"] for layer in plan.to_dict()["layers"]} <= {"pivoted", "dense"}
    assert "channel, pivoted" in str(copy.deepcopy(plan).apply_(mlp()))
    assert "pivoted" not in str(plan_compression(mlp(), 0.5, form="factored"))


@settings(max_examples=30)
@given(
    seeds,
    st.floats(0.02, 0.98),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.sampled_from([(64, 64), (32, 128), (128, 32)]),
    st.sampled_from([0.7, 0.9, 0.99]),
)
def test_predicted_errors_cover_what_half_precision_adds_in_either_form(seed, share, dtype, shape, decay):
    left, _, right = torch.linalg.svd(randn(*shape, seed=seed), full_matrices=False)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_((left * decay ** torch.arange(min(shape))) @ right)
    plan = plan_compression(model, 0.01)
    for form in ("factored", "pivoted"):
        plan["0"].choose("channel", max(1, int(share * 21)), form)
        predicted = plan["0"].relative_error
        measured = plan.apply_(copy.deepcopy(model))["0"].relative_error
        assert predicted / 2 - 1e-4 < measured <= predicted * (1 + 1e-6)


@settings(max_examples=20)
@given(seeds, st.sampled_from([0.01, 0.05]), st.sampled_from(["auto", "pivoted"]))
def test_an_error_bound_holds_for_pivoted_factors_in_half_precision(seed, bound, form):
    left, _, right = torch.linalg.svd(randn(96, 96, seed=seed), full_matrices=False)
    model = nn.Sequential(nn.Linear(96, 96, dtype=torch.bfloat16))
    with torch.no_grad():
        model[0].weight.copy_((left * 0.8 ** torch.arange(96)) @ right)
    plan = plan_compression(model, max_error=bound, form=form)
    assert isinstance(plan, CompressionPlan)
    assert 0 < plan.apply_(model)["0"].relative_error <= bound


@settings(max_examples=30)
@given(
    seeds,
    st.floats(0.02, 0.98),
    st.floats(-23.5, -16),
    st.sampled_from(["channel", "input", "spatial", "tucker"]),
)
def test_predicted_errors_cover_what_subnormal_numbers_add_in_either_form(seed, share, size, scheme):
    model = nn.Sequential(nn.Conv2d(12, 16, 3, dtype=torch.float16))
    with torch.no_grad():
        model[0].weight.copy_(randn(16, 12, 3, 3, seed=seed) * 2.0**size)
    plan = plan_compression(model, 0.01, scheme=scheme)
    layer = plan["0"]
    full = 12 if scheme in ("input", "tucker") else 16
    for form, most in (("factored", 0.5), ("pivoted", 0.6)):
        layer.choose(scheme, max(1, int(share * most * full)), form)
        measured = plan.apply_(copy.deepcopy(model))["0"].relative_error
        assert layer.relative_error / 3 < measured <= layer.relative_error * (1 + 1e-6)


@settings(max_examples=20)
@given(seeds, st.floats(-6, -4), st.sampled_from([0.55, 0.7]))
def test_an_error_bound_holds_for_weights_next_to_the_subnormal_numbers(seed, power, bound):
    model = fill_(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), seed)
    for one in model:
        one.weight.data.mul_(10**power)
    model.half()
    report = svd_compress_(model, max_error=bound)
    assert all(layer.relative_error <= bound for layer in report.layers)
