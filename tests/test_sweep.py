"""Plans for many ratios at once: each is what it would be alone."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import mlp, same, small_resnet, snapshot
from tests.strategies import seeds
from torchsmooth import plan_compression, sweep


@settings(max_examples=8)
@given(
    seeds,
    st.lists(st.floats(0.05, 0.85), min_size=1, max_size=4),
    st.sampled_from([mlp, small_resnet]),
    st.sampled_from(["auto", "factored"]),
    st.sampled_from(["budget", "uniform"]),
)
def test_each_plan_is_what_it_would_be_alone(seed, ratios, build, form, allocation):
    model = build(seed)
    before = snapshot(model)
    plans = sweep(model, ratios, form=form, allocation=allocation)
    assert same(before, snapshot(model))
    for plan, ratio in zip(plans, ratios, strict=True):
        alone = plan_compression(model, ratio, form=form, allocation=allocation)
        assert plan == alone
        assert plan.to_dict() == alone.to_dict()


def test_each_plan_applied_gives_the_model_it_would_give_alone():
    model = small_resnet()
    for plan, ratio in zip(sweep(model, (0.4, 0.8)), (0.4, 0.8), strict=True):
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        plan.apply_(one)
        plan_compression(model, ratio).apply_(other)
        for left, right in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(left, right)


def test_editing_one_plan_leaves_the_others_alone():
    less, more = sweep(mlp(), [0.3, 0.6])
    before = more.to_dict()
    less["0"].rank = 1
    less["2"].keep_dense()
    assert more.to_dict() == before


def test_ratios_may_come_from_anywhere():
    model = mlp()
    assert [plan.asked for plan in sweep(model, iter((0.3, 0.5)))] == ["ratio 0.3", "ratio 0.5"]


@pytest.mark.parametrize(
    ("ratios", "error", "message"),
    [
        (0.5, TypeError, r"ratios must be a list of fractions such as \[0.5, 0.7\], got float 0.5"),
        ("0.5", TypeError, "ratios must be a list of fractions"),
        ([], ValueError, "ratios is empty"),
        ([0.5, 1.5], ValueError, r"ratios\[1\] must lie strictly between 0 and 1"),
        ([0.5, None], TypeError, r"ratios\[1\] must be a real number"),
        ([0.5, 0.9999], ValueError, "ratio 0.9999 cannot be reached"),
    ],
)
def test_bad_ratios_are_refused(ratios, error, message):
    with pytest.raises(error, match=message):
        sweep(mlp(), ratios)


def test_other_arguments_are_those_of_a_single_plan():
    model = mlp()
    plans = sweep(model, [0.3], filter_fn=lambda module, name: name == "0", rank_multiple=2)
    assert plans[0] == plan_compression(model, 0.3, filter_fn=lambda module, name: name == "0", rank_multiple=2)
    assert plans[0]["2"].reason == "left out by filter_fn"
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        sweep("model", [0.5])
    with pytest.raises(ValueError, match="scheme must be one of"):
        sweep(model, [0.5], scheme="row")


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_only_multiples_are_considered(multiple):
    model = small_resnet()
    for form in ("auto", "factored", "pivoted"):
        plan = plan_compression(model, 0.5, form=form, rank_multiple=multiple)
        assert plan.ratio >= 0.5
        assert all(layer.rank % multiple == 0 for layer in plan if layer.rank)
        allowed = 0.5 * plan.parameters_before - plan.parameters_after
        for layer in plan:  # nothing that still fits would help
            if layer.rank:
                layout = layer.options[layer.scheme].matricisation
                larger = layer.rank + multiple
                if larger <= layout.largest_rank(layer.form):
                    assert layout.parameters(larger, layer.form) - layer.parameters_after > allowed


def test_a_layer_without_a_fitting_multiple_stays_dense_and_says_so():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 6))
    plan = plan_compression(model, 0.3, rank_multiple=8)
    assert plan["1"].reason == "no rank that is a multiple of 8 makes it smaller"
    plan["1"].rank = 3  # by hand, any
    assert plan["1"].rank == 3
    with pytest.raises(ValueError, match="with the smallest multiple of 8 as rank in every layer"):
        plan_compression(model, 0.9, rank_multiple=8)
    with pytest.raises(ValueError, match="nothing to compress.*no rank that is a multiple of 64 makes it smaller"):
        plan_compression(model, 0.3, rank_multiple=64)


@pytest.mark.parametrize(
    ("multiple", "error"), [(0, ValueError), (-8, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_bad_multiples_are_refused(multiple, error):
    with pytest.raises(error, match="rank_multiple must"):
        plan_compression(mlp(), 0.5, rank_multiple=multiple)
