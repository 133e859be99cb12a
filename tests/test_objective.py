"""What a plan makes small: absolute squared errors, at any scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import mlp, small_resnet
from tests.strategies import randn, seeds
from torchsmooth import plan_compression
from torchsmooth._budget import Frontier, within_budget
from torchsmooth._objective import importances


def choices(plan):
    return [(layer.scheme, layer.form, layer.rank) for layer in plan]


@given(st.lists(st.tuples(seeds, st.floats(-3, 3)), min_size=1, max_size=5))
def test_importances_are_squared_norms_over_the_largest(layers):
    weights = [10.0**power * randn(3, 4, seed=seed) for seed, power in layers]
    squares = [float(weight.square().sum()) for weight in weights]
    assert importances(weights) == pytest.approx([one / max(squares) for one in squares])


def test_of_a_table_the_mean_row_counts():
    table, matrix = randn(60, 4, seed=0), randn(5, 4, seed=1)
    squares = float(table.square().sum()) / 60, float(matrix.square().sum())
    assert importances([table, matrix], [60, 1]) == pytest.approx([one / max(squares) for one in squares])
    # Two layers of one spectrum: the table gives up its ranks first.
    model = nn.ModuleDict({"table": nn.Embedding(64, 16), "head": nn.Linear(16, 64, bias=False)})
    with torch.no_grad():
        for one in model.values():
            one.weight.copy_(randn(64, 16, seed=2))
    plan = plan_compression(model, 0.4)
    assert plan["table"].rank < (plan["head"].rank or 16)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e150, 1e300])
def test_importances_do_not_depend_on_the_scale(scale):
    weights = [randn(5, 5, seed=0), 0.1 * randn(5, 5, seed=1), torch.zeros(5, 5, dtype=torch.float64)]
    assert importances([scale * one for one in weights]) == pytest.approx(importances(weights))
    assert importances(weights)[2] == 0.0


@pytest.mark.parametrize("scale", [1e-100, 1e-170, 1e-300])
def test_a_layer_of_next_to_no_importance_loses_no_more_than_the_budget_asks(scale):
    model = mlp(0, (32, 32, 32)).double()
    model[0].weight.data.mul_(scale)
    plan = plan_compression(model, 0.2)
    allowed = 0.8 * plan.parameters_before
    assert allowed - 2 * 32 < plan.parameters_after <= allowed
    assert plan["2"].rank is None


def test_nothing_but_zeros_has_no_importance():
    assert importances([torch.zeros(2, 2), torch.zeros(3, 3)]) == [0.0, 0.0]
    assert importances([]) == []


@settings(max_examples=8)
@given(seeds, st.floats(0.2, 0.8))
def test_losses_are_absolute_errors_up_to_one_factor(seed, ratio):
    model = small_resnet(seed)
    plan = plan_compression(model, ratio)
    norms = {layer.name: float(model.get_submodule(layer.name).weight.detach().double().norm()) for layer in plan}
    largest = max(norms.values())
    for layer in plan:
        for option in layer.options.values():
            assert torch.allclose(option.losses, option.errors * (norms[layer.name] / largest) ** 2)


def test_a_layer_with_small_weights_gives_way():
    model = mlp(0, (64, 64, 64))
    model[0].weight.data.mul_(0.1)
    plan = plan_compression(model, 0.6)
    assert plan["0"].rank < plan["2"].rank
    assert plan["0"].relative_error > plan["2"].relative_error


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e30])
def test_plans_do_not_depend_on_the_scale_of_the_weights(scale):
    model, scaled = mlp(1), mlp(1)
    for module in (scaled[0], scaled[2], scaled[4]):
        module.weight.data.mul_(scale)
    assert choices(plan_compression(model, 0.5)) == choices(plan_compression(scaled, 0.5))


@given(seeds, st.sampled_from([-250, -40, 40, 250]), st.integers(10, 200))
def test_the_budget_is_spent_alike_at_any_scale_of_losses(seed, power, budget):
    errors = [randn(20, seed=seed + one).abs().sort(descending=True).values for one in range(4)]
    costs = torch.arange(1, 21) * 3
    frontiers, scaled = ([Frontier.of(costs, factor * one) for one in errors] for factor in (1.0, 2.0 ** (power * 3)))
    assert within_budget(frontiers, budget + 12) == within_budget(scaled, budget + 12)


def test_a_zero_weight_among_others_loses_nothing():
    model = mlp(0, (32, 32, 32))
    nn.init.zeros_(model[0].weight)
    plan = plan_compression(model, 0.5)
    assert (plan["0"].rank, plan["0"].relative_error) == (1, 0.0)
    report = plan.apply_(model)
    assert report["0"].relative_error == 0.0


@settings(max_examples=20)
@given(seeds, st.floats(-2, 2), st.booleans())
def test_with_data_too_a_layer_counts_by_the_square_of_its_weight(seed, power, centred):
    class Network(nn.Module):  # that computes the same at any scale of one weight
        def __init__(self, scale):
            super().__init__()
            self.one, self.other = (nn.Linear(6, 8, bias=centred, dtype=torch.float64) for _ in range(2))
            for number, layer in enumerate((self.one, self.other)):
                layer.weight.data.copy_(randn(8, 6, seed=seed + number))
            self.other.weight.data.mul_(scale)
            self.scale = scale

        def forward(self, inputs):
            return self.one(inputs) + self.other(inputs / self.scale)

    batches = [1 + randn(40, 6, seed=seed + 2)]
    losses = []
    for scale in (1.0, 10.0**power):
        plan = plan_compression(Network(scale), 0.1, calibration=batches, progress=False)
        losses.append([plan[name].options["channel"].losses for name in ("one", "other")])
    (one, other), (again, scaled) = losses
    assert torch.allclose(again / again[0], one / one[0], rtol=1e-6, atol=1e-9)  # within a layer the data decides
    assert torch.allclose(scaled / again[0], 100**power * other / one[0], rtol=1e-6, atol=1e-9)
    inputs = batches[0] - batches[0].mean(0) if centred else batches[0]
    outputs, values = inputs @ randn(8, 6, seed=seed).mT, torch.linalg.svdvals(inputs @ randn(8, 6, seed=seed).mT)
    expected = [float(values[rank:].square().sum() / outputs.square().sum()) for rank in range(7)]
    assert (one / one[0]).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
