"""Ranks for a budget: against exhaustive search, and what must hold for every answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.lowrank import least_error_by_search
from torchsmooth._budget import Frontier, uniformly, within_budget, within_error


def build(costs, errors):
    return Frontier.of(torch.tensor(costs), torch.tensor(errors, dtype=torch.float64))


@st.composite
def frontiers(draw, most_layers=4, most_choices=5):
    layers = []
    for _ in range(draw(st.integers(1, most_layers))):
        count = draw(st.integers(1, most_choices))
        costs = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
        errors = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
        layers.append(build(costs, errors))
    return layers


def total(layers, indices, what):
    return sum(getattr(one, what)[index].item() for one, index in zip(layers, indices, strict=True))


@st.composite
def problems(draw):
    layers = draw(frontiers())
    least = total(layers, [0] * len(layers), "costs")
    return layers, least + draw(st.integers(0, 80))


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1)), min_size=1, max_size=12))
def test_a_frontier_keeps_just_the_choices_that_no_other_beats(choices):
    costs, errors = zip(*choices, strict=True)
    frontier = build(costs, errors)
    kept = set(zip(frontier.costs.tolist(), frontier.errors.tolist(), strict=True))
    beaten = {
        (cost, error)
        for cost, error in choices
        if any((c <= cost and e < error) or (c < cost and e <= error) for c, e in choices)
    }
    assert kept == set(choices) - beaten
    assert [(costs[i], errors[i]) for i in frontier.labels.tolist()] == sorted(kept)


@pytest.mark.parametrize("allocate", [within_budget, uniformly])
@given(problems())
def test_the_budget_holds_and_nothing_that_still_fits_would_help(allocate, problem):
    layers, budget = problem
    indices = allocate(layers, budget)
    slack = budget - total(layers, indices, "costs")
    assert slack >= 0
    for layer, index in zip(layers, indices, strict=True):
        steps = layer.costs[index + 1 :] - layer.costs[index]
        assert bool((steps > slack).all())


@given(problems())
def test_the_error_is_within_one_layer_of_the_best_found_by_search(problem):
    layers, budget = problem
    found = total(layers, within_budget(layers, budget), "errors")
    costs, errors = ([getattr(one, what).tolist() for one in layers] for what in ("costs", "errors"))
    best = least_error_by_search(costs, errors, budget)
    # The relaxation is exact but for the one layer on whose segment the budget falls.
    whole_drop = max(float(one.errors[0] - one.errors[-1]) for one in layers)
    assert best - 1e-12 <= found <= best + whole_drop + 1e-12


def test_convex_errors_are_solved_as_well_as_by_search():
    # Geometric spectra: convex frontiers with single steps of one cost, where the relaxation is exact.
    layers = [
        build([4 * (i + 1) for i in range(6)], [scale * (decay**i - decay**5) for i in range(6)])
        for scale, decay in ((1.0, 0.5), (0.8, 0.3), (0.1, 0.9))
    ]
    for budget in range(12, 76, 4):
        found = total(layers, within_budget(layers, budget), "errors")
        costs, errors = ([getattr(one, what).tolist() for one in layers] for what in ("costs", "errors"))
        assert found == pytest.approx(least_error_by_search(costs, errors, budget), abs=1e-9)


@given(problems())
def test_more_budget_never_means_more_error_than_the_cheapest_choice(problem):
    layers, budget = problem
    found = total(layers, within_budget(layers, budget), "errors")
    assert found <= total(layers, [0] * len(layers), "errors")


def test_a_budget_for_everything_takes_everything():
    layers = [build([1, 5], [0.5, 0.0]), build([2, 9], [0.4, 0.0])]
    assert within_budget(layers, 14) == [1, 1]
    assert uniformly(layers, 14) == [1, 1]


def test_uniform_keeps_the_same_fraction_of_each_layer():
    layers = [build(list(range(1, size + 1)), [1 - i / size for i in range(1, size + 1)]) for size in (10, 100, 1000)]
    kept = [int(one.costs[index]) for one, index in zip(layers, uniformly(layers, 555), strict=True)]
    assert kept == [5, 50, 500]


@given(frontiers(), st.floats(0.01, 0.99))
def test_an_error_bound_takes_the_cheapest_choice_within_it(layers, bound):
    layers = [build([*one.costs.tolist(), 99], [*one.errors.tolist(), 0.0]) for one in layers]
    for layer, index in zip(layers, within_error(layers, bound), strict=True):
        assert float(layer.errors[index]) <= bound**2
        assert index == 0 or float(layer.errors[index - 1]) > bound**2


def test_one_run_of_equal_layers_stays_quick_and_exact():
    # Straight frontiers make the multiplier jump past the budget: the rest is filled in step by step.
    layers = [build(list(range(10, 1010, 10)), [1 - i / 100 for i in range(1, 101)]) for _ in range(30)]
    indices = within_budget(layers, 15_003)
    assert total(layers, indices, "costs") == 15_000


def test_an_error_of_just_what_is_allowed_is_allowed():
    errors = torch.tensor([1.0, 0.0625, 0.0], dtype=torch.float64)
    frontier = Frontier(torch.tensor([1, 2, 3]), errors, torch.arange(3))
    assert within_error([frontier], 0.25) == [1]
    assert within_error([frontier], 0.2) == [2]
