"""Pairs of ranks off the grid: they take up what a plan leaves over, and nothing else."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.strategies import fill_, seeds
from torchsmooth import plan_compression
from torchsmooth._matricise import Form

FORMS = get_args(Form)


def wide(seed=0):
    return fill_(nn.Sequential(nn.Conv2d(96, 80, 3, bias=False), nn.Conv2d(80, 100, 3, bias=False)), seed)


def larger_pairs(layer, multiple):
    """The parameters of every pair that is one step larger on one side, if it loses less."""
    layout, (r_in, r_out) = layer.options["tucker"].matricisation, layer.rank
    most, losses = layout.largest_rank(layer.form), layer.options["tucker"].losses
    for pair in ((r_in + multiple, r_out), (r_in, r_out + multiple)):
        if pair[0] <= most[0] and pair[1] <= most[1] and losses[pair] < losses[r_in, r_out]:
            yield layout.parameters(pair, layer.form)


@settings(max_examples=15)
@given(seeds, st.floats(0.2, 0.9), st.sampled_from(FORMS), st.sampled_from([1, 2, 5]))
def test_no_larger_pair_fits_what_is_left_over(seed, ratio, form, multiple):
    model = wide(seed)
    total = sum(one.numel() for one in model.parameters())
    plan = plan_compression(model, ratio, scheme="tucker", form=form, rank_multiple=multiple)
    slack = (1 - ratio) * total - plan.parameters_after
    assert slack > -1e-6 * total
    pairs = [layer for layer in plan if isinstance(layer.rank, tuple)]
    assert pairs
    for layer in pairs:
        assert all(rank % multiple == 0 for rank in layer.rank)
        for parameters in larger_pairs(layer, multiple):
            assert parameters - layer.parameters_after > slack or parameters >= layer.parameters_before


@pytest.mark.parametrize(("multiple", "step"), [(1, 1), (8, 8), (None, 16)])
def test_the_budget_of_multiply_accumulates_is_spent_too(multiple, step):
    images = torch.zeros(1, 96, 9, 9)
    plan = plan_compression(wide(), 0.6, scheme="tucker", target="macs", example_inputs=images, rank_multiple=multiple)
    left = 0.4 * plan.macs_before - plan.macs_after
    assert 0 <= left <= step * 81 * (96 + 9 * 96)  # one step on either side of a core costs no more than this


@pytest.mark.parametrize("kwargs", [{"max_error": 0.5}, {"ratio": 0.5, "allocation": "uniform"}])
def test_other_plans_keep_to_the_pairs_that_they_chose(kwargs):
    plan = plan_compression(wide(), scheme="tucker", **kwargs)
    for layer in plan:
        if layer.rank is not None:
            grid = layer.options["tucker"].matricisation.ranks(layer.form).tolist()
            assert list(layer.rank) in grid
