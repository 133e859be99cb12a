"""A budget of time: with a clock of our own, choices follow the times. No test here asserts a real one."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.networks import ByKeyword, Shared, mlp, same, small_resnet, snapshot
from tests.strategies import fill_, randn
from torchsmooth import CompressionPlan, LowRankConv2d, LowRankLinear, plan_compression, svd_compress_, sweep
from torchsmooth._apply import replacements_for
from torchsmooth._expansion import Expansion
from torchsmooth._latency import compare_times
from torchsmooth._running import as_inputs
from torchsmooth._timing import median_nanoseconds, seconds

INPUTS = torch.zeros(2, 24)
IMAGES = randn(1, 3, 8, 8, seed=0, dtype=torch.float32)


class Clock:
    """Tells how long a call takes by what it calls, and remembers what it was asked."""

    def __init__(self, of_layer, elsewhere=0.0, reading=0.0):
        self.of_layer, self.elsewhere, self.reading, self.asked = of_layer, elsewhere, reading, []

    def layer(self, module):
        return self.of_layer(module) / 1e6

    def seconds(self, call, device, repeats):
        if call.func is getattr:  # the weight of one layer, multiplied out
            return self.reading * self.layer(call.args[0])
        owner = call.func.__self__
        self.asked.append(owner)
        if isinstance(owner, nn.Module):  # the forward of one layer
            return self.layer(owner)
        (model,) = call.args  # the whole model
        assert not any(module.training for module in model.modules())
        kinds = (nn.Linear, nn.Conv2d, LowRankLinear, LowRankConv2d)
        inside = {part for one in model.modules() if isinstance(one, kinds[2:]) for part in one.modules()} - {
            one for one in model.modules() if isinstance(one, kinds[2:])
        }
        layers = [one for one in model.modules() if isinstance(one, kinds) and one not in inside]
        return self.elsewhere / 1e6 + sum(map(self.layer, layers))


@pytest.fixture
def clock(monkeypatch):
    def start(of_layer, elsewhere=0.0, reading=0.0):
        made = Clock(of_layer, elsewhere, reading)
        monkeypatch.setattr("torchsmooth._timing.seconds", made.seconds)
        return made

    return start


def stored(module):
    """Time goes with what is stored."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return module.weight.numel()
    return sum(getattr(module, child).weight.numel() for child in module.factor_children)


def slow_when_pivoted(module):
    return stored(module) * (1 + 99 * (getattr(module, "form", "") == "pivoted"))


def slow_unless_input(module):
    return stored(module) * (1 + 99 * (getattr(module, "scheme", "input") != "input"))


def test_choices_follow_the_times(clock):
    clock(slow_when_pivoted)
    plan = plan_compression(mlp(), 0.5, target="latency", example_inputs=INPUTS)
    assert {layer.form for layer in plan if layer.rank} == {"factored"}
    clock(slow_unless_input)
    plan = plan_compression(small_resnet(), 0.5, target="latency", example_inputs=IMAGES)
    assert {layer.scheme for layer in plan if layer.rank} == {"input"}


def test_layers_without_a_rank_to_try_are_passed_over(clock):
    clock(stored)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1))
    images = torch.zeros(1, 16, 6, 6)
    for multiple in (1, 8):
        plan = plan_compression(model, 0.05, target="latency", example_inputs=images, rank_multiple=multiple)
        assert plan["0"].rank
        assert CompressionPlan.from_json(plan.to_json()) == plan


def test_a_layer_that_is_never_reached_is_written_and_read(clock):
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)

        def forward(self, images):
            return self.used(images)

    clock(stored)
    plan = plan_compression(Partly(), 0.2, target="latency", example_inputs=torch.zeros(1, 16, 9, 9))
    assert plan["spare"].rank is None
    assert CompressionPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("allocation", ["budget", "uniform"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_the_budget_of_time_holds(ratio, allocation, clock):
    clock(stored, elsewhere=500)
    model = mlp()
    plan = plan_compression(model, ratio, target="latency", example_inputs=INPUTS, allocation=allocation)
    whole = sum(stored(model[place]) for place in (0, 2, 4)) + 500
    assert plan.latency_before == pytest.approx(whole / 1e6)
    assert plan.latency_after <= (1 - ratio) * plan.latency_before
    report = plan.apply_(model, INPUTS)
    assert report.latency_before == pytest.approx(plan.latency_before)
    assert report.latency_after == pytest.approx(plan.latency_after)
    assert "ms (" in str(plan)
    assert "ms (" in str(report)
    assert "of the model's time" in report.asked


def test_a_layer_that_nothing_makes_faster_stays_dense(clock):
    slow = lambda module: 10_000 if isinstance(module, LowRankLinear) and module.in_features == 24 else stored(module)  # noqa: E731
    clock(slow)
    plan = plan_compression(mlp(), 0.2, target="latency", example_inputs=INPUTS)
    assert plan["0"].reason == "no rank is faster"
    assert plan["2"].rank


def test_a_model_that_nothing_makes_faster_is_an_error(clock):
    clock(lambda module: 5)
    with pytest.raises(ValueError, match="nothing to compress.*0: no rank is faster"):
        plan_compression(mlp(), 0.2, target="latency", example_inputs=INPUTS)


def test_an_unreachable_ratio_names_the_largest(clock):
    clock(stored, elsewhere=1000)
    with pytest.raises(ValueError, match=r"with the fastest choice in every layer, .* ms are left") as caught:
        plan_compression(mlp(), 0.9, target="latency", example_inputs=INPUTS)
    largest = float(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    plan = plan_compression(mlp(), largest, target="latency", example_inputs=INPUTS)
    assert plan.latency_after <= (1 - largest) * plan.latency_before


def test_an_unreachable_ratio_of_convolutions_names_the_other_memory_format(clock):
    clock(stored, elsewhere=1000)
    with pytest.raises(ValueError, match=r"channels last: .*channels_last.* The largest ratio .* is 0\.\d+\.$"):
        plan_compression(
            nn.Sequential(nn.Conv2d(3, 16, 3)), 0.9999, target="latency", example_inputs=torch.zeros(1, 3, 8, 8)
        )
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        plan_compression(mlp(), 0.9, target="latency", example_inputs=INPUTS)
    assert "channels" not in str(caught.value)


def test_no_layer_gets_faster_by_growing(clock):
    clock(lambda module: 1000 if isinstance(module, (nn.Linear, nn.Conv2d)) else 1)
    plan = plan_compression(small_resnet(), 0.3, target="latency", example_inputs=IMAGES)
    assert all(layer.parameters_after < layer.parameters_before for layer in plan if layer.rank)


def test_few_ranks_are_timed_and_they_are_multiples(clock):
    clock(stored)
    for multiple, step in ((1, 1), (None, 16), (32, 32)):
        plan = plan_compression(
            mlp(0, (256, 256, 256)), 0.3, target="latency", example_inputs=torch.zeros(1, 256), rank_multiple=multiple
        )
        for layer in plan:
            for times in layer.prices.times.values():
                assert 2 <= len(times) <= 6
                assert min(times) == step
                assert all(rank % step == 0 for rank in times)


def test_layers_of_one_kind_are_timed_once(clock):
    watch = clock(stored)
    plan = plan_compression(mlp(0, (32,) * 6), 0.3, target="latency", example_inputs=torch.zeros(1, 32))
    assert len({one for one in watch.asked if type(one) is nn.Linear}) == 1
    assert len(plan) == 5


def test_a_layer_that_is_called_thrice_counts_thrice(clock):
    watch = clock(stored)
    watch.elsewhere = 2 * 256  # the clock sees the module once
    model = fill_(Shared(), 0)
    plan = plan_compression(model, 0.3, target="latency", example_inputs=torch.zeros(1, 16))
    assert plan["first"].prices.dense == 3 * plan["body.1"].prices.dense


def test_layers_that_take_longer_alone_are_scaled_to_the_model(clock):
    clock(stored, elsewhere=-900)
    plan = plan_compression(mlp(), 0.3, target="latency", example_inputs=INPUTS)
    assert sum(layer.prices.dense for layer in plan) == pytest.approx(1e9 * plan.latency_before, abs=3)
    assert plan.latency_after <= 0.7 * plan.latency_before


def test_a_layer_that_is_never_reached_stays_dense(clock):
    clock(stored)
    model = mlp()
    model.add_module("idle", nn.Linear(24, 24))
    model.forward = lambda inputs: model[2](torch.relu(model[0](inputs)))
    plan = plan_compression(model, 0.3, target="latency", example_inputs=INPUTS)
    assert plan["idle"].reason == plan["4"].reason == "never called on the example inputs"


def asking_mlp():
    model = mlp()
    model.forward = lambda inputs: model[4](model[2](torch.relu(model[0](inputs))).to(model[4].weight.dtype))
    return model


def test_reading_a_weight_costs_what_multiplying_it_out_takes(clock):
    clock(stored)
    free = plan_compression(asking_mlp(), 0.1, target="latency", example_inputs=INPUTS)
    clock(stored, reading=0.5)
    dear = plan_compression(asking_mlp(), 0.1, target="latency", example_inputs=INPUTS)
    for layer, other in zip(free, dear, strict=True):
        assert layer.prices.dense == other.prices.dense
        for key, times in layer.prices.times.items():
            factor = 1.5 if layer.name == "4" else 1.0
            assert list(other.prices.times[key].values()) == pytest.approx(
                [factor * one for one in times.values()], rel=1e-3
            )


def test_a_layer_whose_weight_the_model_reads_stays_dense_where_no_rank_pays_for_it(clock):
    clock(stored, reading=1e3)
    model = asking_mlp()
    plan = plan_compression(model, 0.1, target="latency", example_inputs=INPUTS)
    assert plan["4"].reason.startswith("the model reads its weight at each call")
    assert plan["0"].reason == plan["2"].reason == ""
    assert plan.latency_after <= 0.9 * plan.latency_before


def test_an_edited_rank_that_was_not_timed_has_no_time(clock):
    clock(stored)
    plan = plan_compression(mlp(), 0.3, target="latency", example_inputs=INPUTS)
    times = plan["0"].prices.times["channel", plan["0"].form]
    plan["0"].rank = next(rank for rank in range(1, 24) if rank not in times)
    assert plan["0"].cost_after is None
    assert plan.latency_after is None
    assert "planned" in str(plan)
    plan["0"].keep_dense()
    assert plan.latency_after is not None


def test_one_measurement_serves_a_sweep(clock):
    watch = clock(stored)
    plans = sweep(mlp(), [0.2, 0.4], target="latency", example_inputs=INPUTS)
    asked = len(watch.asked)
    assert plans == [plan_compression(mlp(), one, target="latency", example_inputs=INPUTS) for one in (0.2, 0.4)]
    assert len(watch.asked) == 3 * asked


def test_users_hooks_are_not_called_for_timing(clock):
    clock(stored)
    model, calls = mlp(), []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    plan_compression(model, 0.3, target="latency", example_inputs=INPUTS)
    assert len(calls) == 1  # the run that sees what each layer is called with


class Interrupted(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("after", [0, 1, 2, 3, 7])
def test_a_failure_while_timing_changes_nothing(after, monkeypatch, clock):
    clock(stored)
    model = mlp().train()
    model[2].eval()
    plan = plan_compression(model, 0.3, target="latency", example_inputs=INPUTS)
    before, hooks = snapshot(model), copy.copy(nn.modules.module._global_forward_pre_hooks)
    count = itertools.count()

    def broken(*args):
        if next(count) == after:
            raise Interrupted
        return 1e-3

    monkeypatch.setattr("torchsmooth._timing.seconds", broken)
    for attempt in (
        lambda: plan.apply_(model, INPUTS),
        lambda: svd_compress_(model, 0.3, target="latency", example_inputs=INPUTS),
    ):
        count = itertools.count()
        with pytest.raises(Interrupted):
            attempt()
        assert same(before, snapshot(model))
        assert hooks == nn.modules.module._global_forward_pre_hooks
        before = snapshot(model)


def test_with_a_real_clock_everything_is_put_back():
    model = small_resnet().train()
    before, state = snapshot(model), torch.get_rng_state()
    with contextlib.suppress(ValueError):  # on a machine where no rank is faster
        plan = plan_compression(model, 0.01, target="latency", example_inputs=IMAGES)
        assert plan.latency_before > 0
    plan = plan_compression(model, 0.3)
    with torch.no_grad():
        measured = compare_times(model, as_inputs(IMAGES), replacements_for(plan, model)[0], Expansion(model))
    assert min(measured) > 0
    assert same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=4), st.integers(0, 3))
def test_medians_are_those_of_alternating_runs(times, late):
    order = []

    def fake(call, device, repeats):
        order.append(call)
        return call() / 1e9 * (1000 if len(order) % 7 == late else 1)

    calls = [lambda one=one: one for one in times]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchsmooth._timing.seconds", fake)
        medians = median_nanoseconds(calls, torch.device("cpu"))
    assert len(medians) == len(times)
    assert order[-len(calls) :] == calls
    assert order[-2 * len(calls) : -len(calls)] == calls


@pytest.mark.parametrize(("took", "times"), [(1e-3, 2 + 9), (0.5, 1 + 5)])
def test_long_calls_are_made_less_often(took, times, monkeypatch):
    asked = []
    monkeypatch.setattr("torchsmooth._timing.seconds", lambda call, *_: asked.append(call) or took)
    calls = [lambda: None, lambda: None]
    assert median_nanoseconds(calls, torch.device("cpu")) == [round(1e9 * took)] * 2
    assert [asked.count(call) for call in calls] == [times] * 2


def test_timing_shows_how_far_it_is_where_it_is_asked_to(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for show in (True, False):
        median_nanoseconds([lambda: None] * 2, torch.device("cpu"), show=show)
    assert capsys.readouterr().err.count("Timing the model: 18 of 18\n") == 1


def test_seconds_are_those_of_one_call():
    calls = []
    assert seconds(lambda: calls.append(1), torch.device("cpu"), 5) >= 0
    assert len(calls) == 5


class Mixed(ByKeyword):
    """Does so under an autocast of its own."""

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x):
        return super().forward(x)


def test_calls_by_keyword_and_under_autocast_are_timed():
    plan = plan_compression(fill_(Mixed(40), 0).eval(), 1e-9, target="latency", example_inputs=torch.zeros(8, 40))
    assert not any("never called" in layer.reason for layer in plan)
    assert all(layer.prices.dense > 0 for layer in plan)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_padded_batches_are_timed_as_the_encoder_runs_them(clock):
    clock(stored, elsewhere=500)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1).eval()
    mask = torch.arange(7)[None] >= torch.tensor([[7], [4], [5]])
    inputs = {"src": torch.zeros(3, 7, 32), "src_key_padding_mask": mask}
    plan = plan_compression(model, 0.01, target="latency", example_inputs=inputs)
    assert all(layer.prices.dense > 0 for layer in plan if layer.name.endswith(("linear1", "linear2")))
