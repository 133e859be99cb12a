"""Planning: the budget, the schemes, the three ways to choose ranks, and the errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from tests.networks import Shared, Tied, mlp, same, small_resnet, snapshot
from tests.strategies import fill_, low_rank, randn, seeds
from torchsmooth import CompressionPlan, plan_compression, svd_compress_
from torchsmooth._tucker_layout import no_more

RATIOS = st.floats(0.05, 0.85)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def next_triples(plan):
    """What one more singular triple would cost in each low-rank layer that could still use it."""
    costs = []
    for layer in plan:
        if layer.rank is not None:
            layout, rank = layer.options[layer.scheme].matricisation, layer.rank
            pairs = isinstance(rank, tuple)
            wider = [(rank[0] + 1, rank[1]), (rank[0], rank[1] + 1)] if pairs else [rank + 1]
            losses = layer.options[layer.scheme].losses
            fitting = [more for more in wider if no_more(more, layout.largest_rank(layer.form))]
            useful = [more for more in fitting if losses[more] < losses[rank]]
            larger = [layout.parameters(more, layer.form) for more in useful]
            costs.append(min([*larger, layer.parameters_before]) - layer.parameters_after)
    return costs


@pytest.mark.parametrize("allocation", ["budget", "uniform"])
@settings(max_examples=15)
@given(RATIOS, seeds, st.sampled_from([mlp, small_resnet]))
def test_the_budget_is_exact(allocation, ratio, seed, build):
    model = build(seed)
    plan = plan_compression(model, ratio, allocation=allocation)
    allowed = (1 - ratio) * parameters(model)
    assert plan.parameters_before == parameters(model)
    assert plan.parameters_after <= allowed
    assert allowed - plan.parameters_after < max(1, min(next_triples(plan))) + 1
    assert plan.ratio >= ratio


def test_the_budget_is_counted_in_whole_numbers():
    # In floating point 0.7 · 1000 parameters and the like come out a hair above or below the whole number.
    model = nn.Sequential(nn.Linear(40, 20, bias=False), nn.Linear(20, 10, bias=False))  # 1000 parameters
    for percent in range(10, 90):
        plan = plan_compression(fill_(model, percent), percent / 100)
        assert plan.parameters_after <= 1000 - 10 * percent


@given(seeds)
def test_planning_touches_neither_the_model_nor_the_random_state(seed):
    model = mlp(seed)
    before, state = snapshot(model), torch.get_rng_state()
    plan_compression(model, 0.5)
    assert same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=5)
@given(seeds)
def test_equal_models_get_equal_plans(seed):
    plans = [plan_compression(small_resnet(seed), 0.6).to_dict() for _ in range(2)]
    assert plans[0] == plans[1]


@settings(max_examples=20)
@given(seeds, st.floats(0.4, 0.95))
def test_an_error_bound_holds_in_every_layer_with_the_least_rank(seed, bound):
    model = small_resnet(seed)
    plan = plan_compression(model, max_error=bound, scheme="channel")
    for layer in plan:
        matrix = model.get_submodule(layer.name).weight.detach().double().flatten(1)
        values = torch.linalg.svdvals(matrix)
        if layer.rank is not None:
            assert layer.relative_error <= bound
            shorter = float(values[layer.rank - 1 :].square().sum() / values.square().sum()) ** 0.5
            assert layer.rank == 1 or shorter > bound - 1e-6
        else:
            rank = (math.prod(matrix.shape) - 1) // sum(matrix.shape)
            assert rank < 1 or float(values[rank:].square().sum() / values.square().sum()) ** 0.5 > bound - 1e-6


def test_one_scheme_can_be_asked_for():
    model = small_resnet()
    for scheme, allowed in (
        ("channel", {"channel"}),
        ("input", {"input", "channel"}),  # 1×1 convolutions and linear layers have one scheme only
        ("spatial", {"spatial", "spatial_transposed", "channel"}),
    ):
        plan = plan_compression(model, 0.6, scheme=scheme)
        chosen = {layer.scheme for layer in plan if layer.scheme}
        assert chosen <= allowed
        assert scheme in chosen
        assert {layer.scheme for layer in plan if layer.scheme and layer.shape[2:] != (3, 3)} <= {"channel"}


def test_the_best_scheme_is_no_worse_than_each_alone():
    model = small_resnet(4)

    def error(scheme):
        return sum(layer.relative_error**2 for layer in plan_compression(model, 0.7, scheme=scheme))

    assert error("auto") <= min(error(scheme) for scheme in ("channel", "input", "spatial")) + 1e-3


def test_the_global_budget_beats_uniform_ranks_in_total_error():
    model = small_resnet(5)
    errors = [
        sum(layer.relative_error**2 for layer in plan_compression(model, 0.7, allocation=allocation))
        for allocation in ("budget", "uniform")
    ]
    assert errors[0] < errors[1]


def test_filter_fn_sees_module_and_name_and_leaves_layers_dense():
    model = small_resnet()
    seen = {}

    def keep(module, name):
        seen[name] = module
        return name != "fc" and not name.startswith("conv1")

    plan = plan_compression(model, 0.5, filter_fn=keep)
    assert seen == {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}
    assert plan["fc"].reason == plan["conv1"].reason == "left out by filter_fn"
    assert plan["fc"].rank is None


def test_first_and_last_layers_are_ordinary_layers():
    model = mlp(0, (64, 64, 64, 64))
    assert all(layer.rank is not None for layer in plan_compression(model, 0.6))


def test_every_layer_is_listed_and_dense_ones_have_a_reason():
    model = nn.Sequential(
        nn.EmbeddingBag(10, 8),
        nn.Bilinear(2, 3, 4),
        nn.Embedding(10, 8, max_norm=1.0),
        nn.LSTM(8, 8),
        nn.MultiheadAttention(8, 2),
        nn.Linear(64, 64),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        prune.identity(nn.Linear(8, 8), "weight"),
        nn.Conv2d(1, 1, 1),
        nn.Linear(16, 16, dtype=torch.complex64),
        nn.BatchNorm2d(8),
    )
    plan = plan_compression(model, 0.3)
    reasons = {layer.name: layer.reason for layer in plan}
    inside = [f"3.{name}_l0" for name in ("ih", "hh")] + [f"4.{name}_proj" for name in ("q", "k", "v", "out")]
    assert {reasons.pop(name) for name in inside} <= {"", "worth its parameters in this budget"}
    assert reasons == {
        "0": "EmbeddingBag is not supported",
        "1": "Bilinear is not supported",
        "2": "max_norm rescales its rows in place when they are looked up (set it to None first)",
        "5": "",
        "6": "parametrized (parametrized='merge' compresses what is computed)",
        "7": "pruned (parametrized='merge' compresses what is computed)",
        "8": "no rank makes it smaller",
        "9": "weight is of torch.complex64",
    }


def test_a_shared_module_is_one_layer():
    plan = plan_compression(Shared(), 0.3)
    assert [layer.name for layer in plan] == ["first", "body.1"]
    assert plan.parameters_before == 2 * (16 * 16 + 16)


def test_a_zero_weight_costs_rank_one():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    nn.init.zeros_(model[0].weight)
    plan = plan_compression(model, 0.3)
    assert plan["0"].rank == 1
    assert plan["0"].relative_error == 0.0


@settings(max_examples=20)
@given(seeds, st.sampled_from([0.02, 0.05, 0.2]), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_an_error_bound_holds_for_the_factors_as_they_are_stored(seed, bound, dtype):
    left, _, right = torch.linalg.svd(randn(48, 64, seed=seed), full_matrices=False)
    decaying = (left * 0.8 ** torch.arange(48)) @ right
    model = nn.Sequential(nn.Linear(64, 48).to(dtype))
    with torch.no_grad():
        model[0].weight.copy_(decaying)
    report = plan_compression(model, max_error=bound).apply_(model)
    assert 0 < report["0"].relative_error <= bound


@settings(max_examples=15)
@given(seeds, st.floats(0.3, 0.9), st.sampled_from(["auto", "factored"]), st.sampled_from([mlp, small_resnet]))
def test_a_bound_on_errors_is_one_of_weights_whatever_the_data_says(seed, bound, form, build):
    model, shape = build(seed), (24,) if build is mlp else (3, 8, 8)
    few = randn(2, math.prod(shape), seed=seed)  # inputs that use few directions of the weights
    batches = [(randn(16, 2, seed=seed + one) @ few).reshape(16, *shape).float() for one in range(2)]
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    plain, calibrated = (
        plan_compression(model, max_error=bound, form=form, calibration=given, progress=False)
        for given in (None, batches)
    )
    assert plain == calibrated
    assert not calls  # nothing was looked at for nothing
    assert (plain.asked, calibrated.asked) == (f"max_error {bound}", f"max_error {bound} before the refit to data")
    assert all(layer.relative_error <= bound for layer in calibrated)
    report = svd_compress_(model, max_error=bound, form=form, calibration=batches, progress=False)
    assert calls
    assert report.asked == calibrated.asked
    assert [layer.rank for layer in report.layers] == [layer.rank for layer in plain]
    assert all(layer.output_error is not None for layer in report.compressed)


@pytest.mark.parametrize("goal", [{"ratio": 0.5}, {"ratio": 0.5, "allocation": "uniform"}, {"max_error": 0.7}])
def test_a_report_says_where_a_plan_made_with_data_was_applied_without(goal):
    model, batches = mlp(), [randn(64, 24, seed=1, dtype=torch.float32)]
    plan = plan_compression(model, **goal, calibration=batches)
    plan = CompressionPlan.from_json(plan.to_json())
    report = plan.apply_(copy.deepcopy(model))
    asked = plan_compression(model, **goal).asked + (", ranks calibrated" if "ratio" in goal else "")
    assert report.asked == f"{asked}, factors not fitted to data"
    assert report.asked in str(report).splitlines()[-1]
    assert plan.apply_(copy.deepcopy(model), calibration=batches).asked == plan.asked


@pytest.mark.parametrize("scale", [1e-170, 1e150])
def test_float64_weights_of_extreme_scale_are_planned_like_any_other(scale):
    model, scaled = mlp(1).double(), mlp(1).double()
    for module in (scaled[0], scaled[2], scaled[4]):
        module.weight.data.mul_(scale)
    reports = [plan_compression(one, 0.5).apply_(one) for one in (model, scaled)]
    assert [one.rank for one in reports[0].layers] == [one.rank for one in reports[1].layers]
    for one, other in zip(*(report.layers for report in reports), strict=True):
        assert other.relative_error == pytest.approx(one.relative_error)


def nan_model():
    model = mlp()
    model[2].weight.data[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "kwargs", "error", "message"),
    [
        (mlp, {"ratio": 0}, ValueError, "ratio must lie strictly between 0 and 1 .the fraction of the model's"),
        (mlp, {"ratio": 1.0}, ValueError, "ratio must lie strictly between 0 and 1"),
        (mlp, {"ratio": -0.5}, ValueError, "ratio must lie strictly between 0 and 1"),
        (mlp, {"ratio": 70}, ValueError, "ratio must lie strictly between 0 and 1"),
        (mlp, {"ratio": float("nan")}, ValueError, "ratio must be finite, got nan"),
        (mlp, {"ratio": "0.5"}, TypeError, "ratio must be a real number, got str '0.5'"),
        (mlp, {"ratio": True}, TypeError, "ratio must be a real number, got bool True"),
        (mlp, {}, ValueError, "give either ratio .* or max_error"),
        (mlp, {"ratio": 0.5, "max_error": 0.1}, ValueError, "give either ratio .* or max_error"),
        (mlp, {"max_error": 1.5}, ValueError, "max_error must lie strictly between 0 and 1"),
        (mlp, {"max_error": 1e-6}, ValueError, "within max_error=1e-06. The layer that comes closest is '"),
        (
            mlp,
            {"ratio": 0.5, "scheme": "row"},
            ValueError,
            "scheme must be one of 'auto', 'channel', 'input', 'spatial'",
        ),
        (mlp, {"ratio": 0.5, "allocation": "even"}, ValueError, "allocation must be one of 'budget', 'uniform'"),
        (mlp, {"ratio": 0.5, "filter_fn": ["0"]}, TypeError, "filter_fn must be a function of .module, qualified_name"),
        (lambda: "model", {"ratio": 0.5}, TypeError, "model must be a torch.nn.Module, got str 'model'"),
        (nan_model, {"ratio": 0.5}, ValueError, "weight of layer '2' holds 1 NaN or infinite values out of 512"),
        (
            mlp,
            {"ratio": 0.5, "filter_fn": lambda module, name: False},
            ValueError,
            "filter_fn left out all 3 layers",
        ),
        (lambda: nn.Linear(8, 8), {"ratio": 0.5}, ValueError, r"use LowRankLinear.from_linear\(layer, rank\), or wrap"),
        (lambda: nn.Conv2d(8, 8, 3), {"ratio": 0.5}, ValueError, r"use LowRankConv2d.from_conv2d\(layer, rank\)"),
        (
            lambda: nn.Sequential(nn.ReLU()),
            {"ratio": 0.5},
            ValueError,
            "nothing to compress in this Sequential: it has no",
        ),
        (lambda: nn.Sequential(nn.Linear(1, 1)), {"ratio": 0.5}, ValueError, "0: no rank makes it smaller"),
        (lambda: nn.Sequential(nn.EmbeddingBag(8, 8)), {"ratio": 0.5}, ValueError, "0: EmbeddingBag is not"),
        (lambda: nn.Sequential(nn.LazyLinear(8)), {"ratio": 0.5}, ValueError, "'0.weight' is not initialised yet"),
        (
            lambda: nn.Sequential(nn.Linear(8, 8, device="meta")),
            {"ratio": 0.5},
            ValueError,
            "'0' is on the meta device",
        ),
    ],
)
def test_bad_input_is_named_with_the_way_out(make, kwargs, error, message):
    with pytest.raises(error, match=message):
        plan_compression(make(), **kwargs)


@pytest.mark.parametrize("build", [mlp, small_resnet, Tied])
def test_an_unreachable_ratio_names_the_largest_that_can_be_reached(build):
    model = build()
    with pytest.raises(ValueError, match=r"ratio 0.999 cannot be reached") as caught:
        plan_compression(model, 0.999)
    largest = float(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    assert plan_compression(model, largest).ratio >= largest
    with pytest.raises(ValueError, match="cannot be reached"):
        plan_compression(model, largest + 1e-4)


def test_an_unreachable_ratio_names_the_largest_layer_that_stays_dense():
    with pytest.raises(ValueError, match="that stay dense is 'embedding', with 640: weight is shared with head.weight"):
        plan_compression(Tied(), 0.9)
    model = mlp()
    model.table = nn.Parameter(torch.zeros(80, 80))
    with pytest.raises(ValueError, match="that stay dense is the model itself, with 6,400: these belong to Sequential"):
        plan_compression(model, 0.9)


@settings(max_examples=10)
@given(seeds)
def test_numbers_of_numpy_and_fractions_are_numbers(seed):
    import fractions

    import numpy as np

    model = mlp(seed)
    plans = [plan_compression(model, ratio).to_dict() for ratio in (0.5, np.float32(0.5), fractions.Fraction(1, 2))]
    assert plans[0] == plans[1] == plans[2]


def test_low_rank_layers_are_planned_at_what_they_cost_now():
    model = mlp(0, (64, 64, 64))
    plan_compression(model, 0.3, filter_fn=lambda module, name: name == "0").apply_(model)
    again = plan_compression(copy.deepcopy(model), 0.2)
    assert [(layer.name, layer.type) for layer in again] == [("0", "LowRankLinear"), ("2", "Linear")]
    assert again["0"].parameters_before == model[0].down.weight.numel() + model[0].up.weight.numel()
    assert again["0"].rank is None or again["0"].rank < model[0].rank
    assert again["2"].rank is not None


@pytest.mark.parametrize("options", [{"filter_fn": lambda module, name: name == "more"}, {"target": "macs"}])
@settings(max_examples=20)
@given(
    st.sampled_from(
        [
            nn.Linear(12, 20),
            nn.Embedding(20, 12),
            nn.Conv1d(12, 16, 3, groups=2),
            nn.Conv2d(12, 16, (3, 2)),
            nn.Conv2d(12, 16, 3, groups=2),
            nn.Conv3d(12, 16, 2),
            nn.ConvTranspose1d(12, 16, 3, groups=2),
            nn.ConvTranspose2d(12, 16, (3, 2)),
        ]
    ),
    st.data(),
)
def test_low_rank_layers_that_are_left_alone_have_the_shape_that_they_stand_for(options, dense, data):
    class Network(nn.Module):  # of which only one layer is run, so that inputs fit all others
        def __init__(self):
            super().__init__()
            self.more, self.other = fill_(nn.Linear(64, 64), 1), low_rank(fill_(dense, 0), data)

        def forward(self, inputs):
            return self.more(inputs)

    example = {"example_inputs": torch.zeros(2, 64)} if "target" in options else {}
    plan = plan_compression(Network(), 0.1, **options, **example)
    assert plan["other"].reason
    assert plan["other"].shape == tuple(dense.weight.shape)


SPATIAL = ("spatial", "spatial_transposed")


@pytest.mark.parametrize(
    ("scheme", "allowed"),
    [
        (("channel", "spatial"), ("channel", *SPATIAL)),
        (["tucker"], ("tucker",)),
        (("input", "auto"), ("channel", "input", *SPATIAL, "tucker")),
        (("spatial", "tucker", "spatial"), (*SPATIAL, "tucker")),
    ],
)
def test_some_of_the_schemes_can_be_asked_for(scheme, allowed):
    model = small_resnet()
    plan = plan_compression(model, 0.6, scheme=scheme)
    for layer in plan:
        wide = len(layer.shape) == 4 and layer.shape[-1] > 1 and min(layer.shape[:2]) > 1
        assert set(layer.options) == (set(allowed) if wide else {"channel"})
    assert plan == plan_compression(model, 0.6, scheme=tuple(reversed(scheme)))


@pytest.mark.parametrize(
    ("scheme", "error", "message"),
    [
        ((), ValueError, "scheme is an empty tuple: name at least one of"),
        (None, TypeError, "scheme must be a name or a sequence of names, got None"),
        (("channel", "row"), ValueError, "scheme must be one of 'auto', .*'tucker'; got str 'row'"),
        (("channel", 3), ValueError, "scheme must be one of 'auto', .*'tucker'; got int 3"),
    ],
)
def test_bad_schemes_are_named(scheme, error, message):
    with pytest.raises(error, match=message):
        plan_compression(mlp(), 0.5, scheme=scheme)


def test_the_ratio_is_the_number_as_it_is_written():
    # 0.9 is a little more than nine tenths as a float; rank 1 leaves exactly a tenth.
    model = nn.Sequential(nn.Linear(20, 20, bias=False))
    plan = plan_compression(model, 0.9, form="factored", scheme="channel", rank_multiple=1)
    assert plan.parameters_after == 40
