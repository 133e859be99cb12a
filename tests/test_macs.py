"""A budget of multiply-accumulates: counted exactly, for every geometry, and on models with a flow of their own."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.networks import Shared, mlp, same, small_resnet, snapshot
from tests.strategies import convolutions, fill_, randn, seeds
from torchsmooth import plan_compression, svd_compress_, sweep
from torchsmooth._tucker_layout import as_rank

IMAGES = randn(2, 3, 16, 16, seed=0, dtype=torch.float32)


def counted(model, *args, **kwargs):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*args, **kwargs)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@settings(max_examples=10)
@given(seeds, st.floats(0.05, 0.7), st.sampled_from(["auto", "factored", "pivoted"]))
def test_planned_counts_are_those_of_the_model_that_comes_out(seed, ratio, form):
    model = small_resnet(seed)
    before = counted(model, IMAGES)
    plan = plan_compression(model, ratio, form=form, target="macs", example_inputs=IMAGES)
    assert plan.macs_before == before
    report = plan.apply_(model, IMAGES)
    assert plan.macs_after == report.macs_after == counted(model, IMAGES) <= (1 - ratio) * before
    assert report.macs_before == before
    for layer in report.layers:
        assert layer.parameters_after <= layer.parameters_before


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=30)
@given(convolutions(dtype=torch.float32), st.sampled_from(["factored", "pivoted"]), st.data())
def test_every_choice_is_priced_exactly(case, form, data):
    conv, images = case
    wide = nn.Sequential(nn.Conv2d(conv.out_channels, 30, 1), nn.Conv2d(30, 30, 1))
    model = nn.Sequential(OrderedDict(conv=conv, wide=wide))  # something that can be compressed in any case
    plan = plan_compression(model, 0.01, target="macs", example_inputs=images)
    layer = plan["conv"]
    for scheme, option in layer.options.items():
        layout = option.matricisation
        fitting = [
            rank
            for rank in map(as_rank, layout.ranks(form).tolist())
            if layout.parameters(rank, form) < layer.parameters_before
        ]
        if fitting:
            layer.choose(scheme, data.draw(st.sampled_from(fitting)), form)
            other = copy.deepcopy(model)
            report = plan.apply_(other, images)
            assert report.macs_after == plan.macs_after == counted(other.eval(), images)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
def test_linear_layers_count_every_row(shape):
    model = mlp()
    inputs = randn(*shape, seed=0, dtype=torch.float32)
    report = svd_compress_(model, 0.5, target="macs", example_inputs=inputs)
    assert report.macs_after == counted(model, inputs) <= 0.5 * report.macs_before


def test_an_image_without_a_batch_counts_once():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    report = svd_compress_(model, 0.5, target="macs", example_inputs=IMAGES[0])
    assert report.macs_after == counted(model, IMAGES[0]) <= 0.5 * report.macs_before


def test_a_module_that_is_called_twice_counts_twice():
    model = fill_(Shared(), 0)
    inputs = randn(4, 16, seed=0, dtype=torch.float32)
    plan = plan_compression(model, 0.4, target="macs", example_inputs=inputs)
    assert plan["first"].prices.dense == 3 * 4 * 16 * 16
    report = plan.apply_(model, inputs)
    assert report.macs_after == plan.macs_after == counted(model, inputs)


def test_inputs_may_be_positional_or_named():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, one, *, other):
            return self.left(one) + self.right(input=other)

    model = fill_(Both(), 0)
    inputs = {"one": torch.zeros(2, 16), "other": torch.zeros(3, 1, 16)}
    plan = plan_compression(model, 0.4, target="macs", example_inputs=inputs)
    assert [layer.prices.dense for layer in plan] == [2 * 256, 3 * 256]
    assert plan.apply_(model, inputs).macs_after == counted(model, **inputs)
    one = plan_compression(mlp(), 0.4, target="macs", example_inputs=(torch.zeros(2, 24),))
    assert one == plan_compression(mlp(), 0.4, target="macs", example_inputs=torch.zeros(2, 24))


def test_a_layer_that_is_never_reached_stays_dense():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    model = Half()
    plan = plan_compression(model, 0.4, target="macs", example_inputs=torch.zeros(1, 32))
    assert plan["idle"].reason == "never called on the example inputs"
    report = plan.apply_(model, torch.zeros(1, 32))
    assert type(model.idle) is nn.Linear
    assert report.macs_after <= 0.6 * report.macs_before


class Asking(nn.Module):
    """Asks for the dtype of a weight at each call, as T5 and CLIP do."""

    def __init__(self, wide=64):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.first, self.second = nn.Linear(32, wide), nn.Linear(wide, 32)

    def forward(self, images):
        x = self.patches(images.to(self.patches.weight.dtype)).flatten(2).mT
        return self.second(self.first(x).relu().to(self.second.weight.dtype))


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("scheme", ["channel", "input", "spatial", "tucker"])
def test_a_read_of_a_weight_costs_what_it_takes_to_multiply_it_out(scheme, form):
    model = Asking()
    plan = plan_compression(model, 0.1, target="macs", example_inputs=IMAGES, scheme=scheme, form=form, rank_multiple=1)
    plan["patches"].rank = (2, 5) if scheme == "tucker" else 2
    plan["second"].rank = 3
    report = plan.apply_(model, IMAGES)
    assert plan.macs_after == report.macs_after == counted(model, IMAGES)


def test_a_layer_whose_weight_the_model_reads_is_low_rank_where_that_pays():
    model = Asking()
    report = svd_compress_(model, 0.5, target="macs", example_inputs=IMAGES)
    assert report["second"].rank
    assert report.macs_after == counted(model, IMAGES) <= 0.5 * report.macs_before


def test_a_layer_whose_weight_the_model_reads_stays_dense_where_no_rank_pays_for_it():
    model, images = Asking(), IMAGES[:1, :, :4, :4]
    before = counted(model, images)
    plan = plan_compression(model, 0.1, target="macs", example_inputs=images)
    read = "the model reads its weight at each call, which a low-rank layer would have to multiply out"
    assert plan["patches"].reason == plan["second"].reason == read
    report = plan.apply_(model, images)
    assert (report["first"].rank, report["second"].reason) == (plan["first"].rank, read)
    assert plan.macs_after == report.macs_after == counted(model, images) <= 0.9 * before
    assert all(layer.rank is not None for layer in plan_compression(Asking(), 0.5))
    with pytest.raises(ValueError, match=f"The largest of the layers that stay dense is 'second', with 2,048: {read}"):
        plan_compression(Asking(), 0.9, target="macs", example_inputs=images)


class Looking(nn.Module):
    """Reads a weight in one of the ways that cost nothing, or from a hook, which costs as much as in forward."""

    def __init__(self, look):
        super().__init__()
        self.looked_at, self.other = nn.Linear(32, 32), nn.Linear(32, 32)
        self.look = look

    def forward(self, x):
        self.look(self.looked_at, x)
        return self.other(self.looked_at(x))


FREE = {
    "parameters": lambda layer, _: [one.dtype for one in layer.parameters()],
    "state": lambda layer, _: layer.state_dict(),
    "bias": lambda layer, _: layer.bias.dtype,
    "copy": lambda layer, x: copy.deepcopy(layer)(x),
    "forward": lambda layer, x: layer.forward(x),
    "functional_call": lambda layer, x: torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)),
    "compiled": lambda layer, x: torch.compile(layer, backend="eager")(x),
}


@pytest.mark.parametrize("way", FREE)
def test_what_multiplies_no_factors_out_keeps_no_layer_dense(way):
    model, inputs = Looking(FREE[way]), torch.zeros(4, 32)
    plan = plan_compression(model, 0.3, target="macs", example_inputs=inputs)
    assert not any("reads its weight" in layer.reason for layer in plan)
    plan["looked_at"].rank = 8
    assert isinstance(plan.apply_(model, inputs).macs_after, int)


def test_a_weight_that_a_hook_reads_is_read():
    model, inputs = Looking(lambda *_: None), torch.zeros(4, 32)
    model.looked_at.register_forward_pre_hook(lambda layer, args: (args[0].to(layer.weight.dtype),))
    plan = plan_compression(model, 0.2, target="macs", example_inputs=inputs)
    assert plan["looked_at"].reason.startswith("the model reads its weight")
    assert plan.apply_(model, inputs).macs_after == plan.macs_after == counted(model, inputs)


@pytest.mark.parametrize("target", ["macs", "latency"])
def test_no_layer_is_watched_any_more_when_a_plan_is_made_or_failed(target):
    def fail(layer, _):
        if type(vars(layer)["_parameters"]) is not before:
            raise KeyboardInterrupt

    model, inputs = Looking(lambda *_: None), torch.zeros(4, 32)
    before = type(vars(model.other)["_parameters"])
    own = [vars(one)["_parameters"] for one in model.modules()]
    with contextlib.suppress(ValueError):  # where no rank happens to be faster
        plan_compression(model, 0.1, target=target, example_inputs=inputs)
    assert all(vars(one)["_parameters"] is mine for one, mine in zip(model.modules(), own, strict=True))
    model.look = fail
    with pytest.raises(KeyboardInterrupt):
        plan_compression(model, 0.3, target=target, example_inputs=inputs)
    assert all(vars(one)["_parameters"] is mine for one, mine in zip(model.modules(), own, strict=True))


def test_layers_of_a_transformer_are_counted_although_it_would_run_fused():
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    model = nn.Sequential(fill_(layer, 0))
    inputs = randn(2, 5, 16, seed=0, dtype=torch.float32)
    enabled = torch.backends.mha.get_fastpath_enabled()
    plan = plan_compression(model, 0.2, target="macs", example_inputs=inputs)
    assert plan["0.linear1"].prices.dense == 2 * 5 * 16 * 64
    report = plan.apply_(model, inputs)
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    assert report.macs_after == plan.macs_after <= 0.8 * report.macs_before


def test_the_cheapest_layers_for_their_work_are_not_those_for_their_parameters():
    model = small_resnet()
    plans = [
        plan_compression(model, 0.5),
        plan_compression(model, 0.5, target="macs", example_inputs=IMAGES),
    ]
    assert plans[0] != plans[1]
    assert plans[0].macs_before is plans[0].macs_after is None
    assert "multiply-accumulates" in str(plans[1])
    assert "multiply-accumulates" not in str(plans[0])


def test_planning_leaves_everything_as_it_was():
    model = small_resnet().train()
    model.add_module("dropout", nn.Dropout(0.5))
    model.fc.eval()
    before, state = snapshot(model), torch.get_rng_state()
    plan_compression(model, 0.5, target="macs", example_inputs=IMAGES)
    sweep(model, [0.3, 0.5], target="macs", example_inputs=IMAGES)
    assert same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [torch.zeros(2, 5), (torch.zeros(2, 24), torch.zeros(1)), {"other": torch.zeros(2)}])
def test_inputs_that_do_not_fit_change_nothing(bad):
    model = mlp().train()
    before = snapshot(model)
    with pytest.raises((RuntimeError, TypeError)):
        svd_compress_(model, 0.5, target="macs", example_inputs=bad)
    plan = plan_compression(model, 0.5, target="macs", example_inputs=torch.zeros(2, 24))
    with pytest.raises((RuntimeError, TypeError)):
        plan.apply_(model, bad)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"target": "macs"}, ValueError, "target 'macs' is measured on example_inputs, got None: pass a tensor"),
        ({"target": "latency"}, ValueError, "target 'latency' is measured on example_inputs"),
        ({"target": "flops"}, ValueError, "target must be one of 'params', 'macs', 'latency'"),
        ({"example_inputs": [torch.zeros(1)]}, TypeError, "example_inputs must be a tensor, a tuple"),
        ({"target": "macs", "example_inputs": {1: 2}}, TypeError, "example_inputs must be a tensor, a tuple"),
        (
            {"ratio": None, "max_error": 0.1, "target": "macs", "example_inputs": torch.zeros(2, 24)},
            ValueError,
            "max_error .* cannot be combined with target 'macs': give a ratio, or leave target out",
        ),
        (
            {"ratio": 0.99, "target": "macs", "example_inputs": torch.zeros(2, 24)},
            ValueError,
            "multiply-accumulates are left. The largest ratio that can be reached is",
        ),
    ],
)
def test_bad_targets_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        plan_compression(mlp(), **{"ratio": 0.5, **kwargs})


def test_the_largest_ratio_of_multiply_accumulates_can_be_reached():
    model = small_resnet()
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        plan_compression(model, 0.999, target="macs", example_inputs=IMAGES)
    largest = float(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    plan = plan_compression(model, largest, target="macs", example_inputs=IMAGES)
    assert plan.macs_after <= (1 - largest) * plan.macs_before


@pytest.mark.parametrize(
    "decide",
    [
        lambda model, **kwargs: svd_compress_(model, 0.5, **kwargs),
        lambda model, **kwargs: plan_compression(model, 0.5, **kwargs),
        lambda model, **kwargs: sweep(model, [0.5], **kwargs),
    ],
)
def test_inputs_for_a_target_that_takes_none_are_refused_and_nothing_changes(decide):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^example_inputs are what targets 'macs' and 'latency' are measured on"):
        decide(model, example_inputs=torch.zeros(2, 24))
    assert same(before, snapshot(model))


def test_without_inputs_the_report_has_the_planned_counts():
    model = mlp()
    plan = plan_compression(model, 0.5, target="macs", example_inputs=torch.zeros(2, 24), allocation="uniform")
    report = plan.apply_(model)
    assert (report.macs_before, report.macs_after) == (plan.macs_before, plan.macs_after)
    assert report.to_dict()["macs_after"] == plan.to_dict()["macs_after"] == counted(model, torch.zeros(2, 24))


@pytest.mark.parametrize(("size", "step"), [(15, 1), (16, 4), (32, 8), (64, 16), (130, 16)])
def test_ranks_suit_the_hardware_unless_another_multiple_is_asked_for(size, step):
    model, inputs = mlp(3, (size, size, size, size)), torch.zeros(2, size)
    for form in ("factored", "pivoted"):
        options = {"form": form, "target": "macs", "example_inputs": inputs}
        ranks = [layer.rank for layer in plan_compression(model, 0.5, **options) if layer.rank]
        assert ranks
        assert all(rank % step == 0 for rank in ranks)
        assert plan_compression(model, 0.5, **options).macs_after <= 0.5 * 3 * 2 * size**2
    params = plan_compression(model, 0.5, form="factored")
    assert params == plan_compression(model, 0.5, form="factored", rank_multiple=1)
    finer = plan_compression(model, 0.5, form="factored", target="macs", example_inputs=inputs, rank_multiple=1)
    # Each weight is used equally often, so but for the biases the budgets are the same.
    assert all(abs(one.rank - other.rank) <= 1 for one, other in zip(finer, params, strict=True))


def test_pairs_of_ranks_suit_the_hardware_on_each_side():
    model = torch.nn.Sequential(torch.nn.Conv2d(32, 64, 3), torch.nn.Conv2d(64, 64, 3))
    plan = plan_compression(model, 0.5, scheme="tucker", target="macs", example_inputs=torch.zeros(1, 32, 8, 8))
    (r_in, r_out), (next_in, next_out) = (layer.rank for layer in plan)
    assert (r_in % 8, r_out % 16, next_in % 16, next_out % 16) == (0, 0, 0, 0)


class Mapped(nn.Module):
    """Calls its layers under torch.vmap."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return torch.vmap(lambda one: self.b(self.a(one)))(x)


LOOKS = {
    "macs": {"target": "macs", "example_inputs": torch.zeros(8, 32)},
    "latency": {"target": "latency", "example_inputs": torch.zeros(8, 32)},
    "calibration": {"calibration": [torch.zeros(8, 32)]},
}


@pytest.mark.parametrize("options", LOOKS.values(), ids=LOOKS)
def test_layers_under_vmap_are_named_where_they_would_have_to_be_looked_at(options):
    model = fill_(Mapped(), 0)
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer 'a' is called under torch.vmap"):
        svd_compress_(model, 0.3, **options)
    assert same(snapshot(model), before)
    svd_compress_(model, 0.3)
    assert model(torch.zeros(8, 32)).shape == (8, 32)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fast_path_is_as_the_user_had_it(enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        plan_compression(model, 0.5, target="macs", example_inputs=torch.zeros(1, 32))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
