"""Pairs of ranks off the grid: they take up what a plan leaves over, and nothing else."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.strategies import fill_, seeds
from torchsmooth import plan_compression
from torchsmooth._fine_ranks import raise_pairs
from torchsmooth._matricise import Form

FORMS = get_args(Form)


WIDE = (96, 80, 100)
WIDER = (256, 224, 256)  # not every pair stands on the frontier


def wide(seed=0, channels=WIDE):
    return fill_(nn.Sequential(*(nn.Conv2d(*pair, 3, bias=False) for pair in pairwise(channels))), seed)


def larger_pairs(layer, multiple):
    """Every pair that is one step larger on one side, if it loses less."""
    layout, (r_in, r_out) = layer.options["tucker"].matricisation, layer.rank
    most, losses = layout.largest_rank(layer.form), layer.options["tucker"].losses
    for pair in ((r_in + multiple, r_out), (r_in, r_out + multiple)):
        if pair[0] <= most[0] and pair[1] <= most[1] and losses[pair] < losses[r_in, r_out]:
            yield pair


def tucker_macs(shape, inside, outside, r_in, r_out):
    """Multiply-accumulates of a convolution in three, with so many positions of its input and of its output."""
    out_channels, in_channels, *kernel = shape
    return inside * in_channels * r_in + outside * r_out * (math.prod(kernel) * r_in + out_channels)


@settings(max_examples=15)
@given(seeds, st.floats(0.2, 0.9), st.sampled_from(FORMS), st.sampled_from([1, 2, 5]))
def test_no_larger_pair_fits_what_is_left_over(seed, ratio, form, multiple):
    check_that_no_larger_pair_fits(wide(seed), ratio, form, multiple)


@pytest.mark.parametrize("form", FORMS)
def test_nor_does_one_where_the_frontier_leaves_pairs_out(form):
    check_that_no_larger_pair_fits(wide(0, WIDER), 0.35, form, 1)


def check_that_no_larger_pair_fits(model, ratio, form, multiple):
    total = sum(one.numel() for one in model.parameters())
    plan = plan_compression(model, ratio, scheme="tucker", form=form, rank_multiple=multiple)
    slack = (1 - ratio) * total - plan.parameters_after
    assert slack > -1e-6 * total
    pairs = [layer for layer in plan if isinstance(layer.rank, tuple)]
    assert pairs
    for layer in pairs:
        assert all(rank % multiple == 0 for rank in layer.rank)
        for pair in larger_pairs(layer, multiple):
            parameters = layer.options["tucker"].matricisation.parameters(pair, layer.form)
            assert parameters - layer.parameters_after > slack or parameters >= layer.parameters_before


@pytest.mark.parametrize(
    ("channels", "ratio", "multiple", "step"),
    [(WIDE, 0.6, 1, 1), (WIDE, 0.6, 8, 8), (WIDE, 0.6, None, 16), (WIDER, 0.5, 1, 1)],
)
def test_the_budget_of_multiply_accumulates_is_spent_too(channels, ratio, multiple, step):
    images = torch.zeros(1, channels[0], 9, 9)
    options = {"scheme": "tucker", "target": "macs", "example_inputs": images, "rank_multiple": multiple}
    plan = plan_compression(wide(0, channels), ratio, **options)
    left = (1 - ratio) * plan.macs_before - plan.macs_after
    # One step on either side of a core costs no more than this.
    assert 0 <= left <= step * 81 * (channels[0] + 9 * max(channels))
    found = zip(plan, (81, 49), (49, 25), strict=True)
    pairs = [one for one in found if one[0].rank is not None]  # others stay dense
    assert pairs
    for layer, inside, outside in pairs:
        macs = partial(tucker_macs, layer.shape, inside, outside)
        assert all(rank % step == 0 for rank in layer.rank)
        larger = [macs(*pair) for pair in larger_pairs(layer, step)]
        assert larger
        assert all(one - macs(*layer.rank) > left or one >= outside * math.prod(layer.shape) for one in larger)


@pytest.mark.parametrize("kwargs", [{"max_error": 0.5}, {"ratio": 0.5, "allocation": "uniform"}])
def test_other_plans_keep_to_the_pairs_that_they_chose(kwargs):
    plan = plan_compression(wide(), scheme="tucker", **kwargs)
    for layer in plan:
        if layer.rank is not None:
            grid = layer.options["tucker"].matricisation.ranks(layer.form).tolist()
            assert list(layer.rank) in grid


@pytest.mark.parametrize("short", [0, 1])
def test_a_step_is_taken_just_if_what_is_left_over_pays_for_it(short):
    model = fill_(nn.Sequential(nn.Conv2d(24, 20, 3, bias=False)), 0)
    (layer,) = plan_compression(model, 0.6, scheme="tucker", form="factored", rank_multiple=1)
    r_in, r_out = 4, 4
    layer.choose("tucker", (r_in, r_out), "factored")
    layout = layer.options["tucker"].matricisation
    before = layout.parameters((r_in, r_out), "factored")
    prices = {pair: layout.parameters(pair, "factored") - before for pair in ((5, 4), (4, 5))}
    pair, price = min(prices.items(), key=lambda one: one[1])
    raise_pairs([layer], price - short, 1)
    assert layer.rank == ((r_in, r_out) if short else pair)


def test_both_ranks_rise_where_one_alone_gains_nothing():
    model = nn.Sequential(nn.Conv2d(24, 24, 3, bias=False))
    with torch.no_grad():  # each output from one input: what is kept depends on the smaller rank alone
        sizes = torch.linspace(2, 1, 24)
        model[0].weight.copy_(torch.diag(sizes)[:, :, None, None] * torch.arange(1.0, 10.0).reshape(3, 3))
    (layer,) = plan_compression(model, 0.6, scheme="tucker", form="factored", rank_multiple=1)
    layer.choose("tucker", (4, 4), "factored")
    layout = layer.options["tucker"].matricisation
    raise_pairs([layer], layout.parameters((5, 5), "factored") - layout.parameters((4, 4), "factored"), 1)
    assert layer.rank == (5, 5)
