"""tune_: however a layer is run, it computes what its factors say, and what is saved stays small."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchsmooth
from tests.networks import COPIES, ByKeyword, mlp, same, small_resnet, snapshot
from tests.strategies import convolutions, fill_, low_rank, randn, seeds, small_convolutions
from torchsmooth import _fused_layers, tuning
from torchsmooth._derive import derive, is_tunable
from torchsmooth._execution import EXECUTIONS, derived_of, use_
from torchsmooth._layers import KINDS
from torchsmooth._lowrank_layer import LowRankLayer
from torchsmooth._recurrent import FUSED
from torchsmooth.tuning import default_executions


def low_rank_layers(model):
    return [one for one in model.modules() if isinstance(one, LowRankLayer)]


def run(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


def close(one, other, tolerance=1e-9):
    return bool(((one - other).abs() <= tolerance * (1 + other.abs().max())).all())


def check_all_executions(layer, inputs):
    expected = run(layer, inputs)
    for execution in EXECUTIONS:
        derived = derive(layer, execution)
        if derived is None:
            assert execution in ("pivoted", "padded", "packed", "packed_dense", "fused")
            continue
        before = snapshot(layer)
        use_(layer, derived)
        assert layer.execution == execution
        found = run(layer, inputs)
        assert close(found, expected)
        assert same(snapshot(layer), before)
        use_(layer, None)
        assert layer.execution == layer.form


@given(convolutions(), st.data())
@settings(max_examples=40)
def test_every_execution_of_a_convolution_computes_the_same(case, data):
    dense, inputs = case
    check_all_executions(low_rank(dense, data), inputs)


@pytest.mark.parametrize(("axes", "transposed"), [(1, False), (3, False), (1, True), (2, True), (3, True)])
@given(data=st.data())
@settings(max_examples=12)
def test_every_execution_of_other_convolutions_computes_the_same(axes, transposed, data):
    dense, inputs = data.draw(small_convolutions(axes, transposed=transposed))
    check_all_executions(low_rank(dense, data), inputs)


@given(seeds, st.integers(2, 12), st.integers(2, 12), st.booleans(), st.data())
@settings(max_examples=30)
def test_every_execution_of_a_linear_layer_computes_the_same(seed, inside, outside, bias, data):
    dense = fill_(nn.Linear(inside, outside, bias=bias, dtype=torch.float64), seed)
    check_all_executions(low_rank(dense, data), randn(3, 2, inside, seed=seed))


@pytest.mark.parametrize(
    ("dense", "rank", "scheme", "padded"),
    [
        (nn.Linear(40, 30), 13, "channel", 16),
        (nn.Linear(40, 30), 16, "channel", None),
        (nn.Linear(40, 14), 9, "channel", 14),  # no longer than the side
        (nn.Linear(40, 14), 14, "channel", None),
        (nn.Conv2d(20, 24, 3, groups=2), 5, "channel", 8),
        (nn.Conv2d(20, 24, 3), 11, "spatial", 16),
        (nn.Conv2d(20, 24, 3), (9, 8), "tucker", (16, 8)),
        (nn.Conv2d(20, 24, 3), (8, 23), "tucker", (8, 24)),
    ],
)
def test_a_padded_rank_is_a_multiple_of_eight_or_the_whole_side(dense, rank, scheme, padded):
    layer = KINDS[type(dense)].like(fill_(dense.double(), 0), rank, scheme, "factored")
    layer.truncate_(dense.weight)
    derived = derive(layer, "padded")
    assert (None if derived is None else derived.module.rank) == padded
    if derived is not None:
        assert close(derived.module.weight, layer.weight, 1e-13)
        assert derived.module.form == "factored"


def test_what_is_tried_by_default_depends_on_the_device():
    assert default_executions(torch.device("cpu")) == ("factored", "pivoted", "packed", "dense", "packed_dense")
    assert default_executions(torch.device("cuda")) == ("factored", "pivoted", "padded", "dense")
    assert default_executions(torch.device("mps")) == ("factored", "pivoted", "dense")


def test_cuda_graphs_need_a_cuda_device():
    model, inputs = nn.Sequential(torchsmooth.LowRankLinear(8, 8, 2)), torch.zeros(1, 8)
    with pytest.raises(ValueError, match=r"^cuda_graphs=True times CUDA graphs, and the model is on 'cpu': bring it"):
        torchsmooth.tune_(model, inputs, cuda_graphs=True)
    with pytest.raises(TypeError, match=r"^cuda_graphs must be True or False, got str 'yes'"):
        torchsmooth.tune_(model, inputs, cuda_graphs="yes")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_cuda_graphs_are_timed_and_what_cannot_be_recorded_is_refused():
    class Reads(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs) * float(inputs.sum())

    layers = [torchsmooth.LowRankLinear.from_linear(nn.Linear(64, 64), 9), nn.ReLU()]
    inputs = torch.ones(4, 64, device="cuda", dtype=torch.bfloat16)
    model = nn.Sequential(*layers).to(inputs).eval()
    expected = run(model, inputs)
    report = torchsmooth.tune_(model, inputs, cuda_graphs=True, executions=["padded", "dense"])
    assert set(report.layers[0].seconds) == {"factored", "padded", "dense"}
    assert torch.allclose(run(model, inputs), expected, atol=0.05)
    with pytest.raises(ValueError, match=r"^cuda_graphs=True .* cannot be recorded as one .*: leave cuda_graphs out"):
        torchsmooth.tune_(Reads(*layers).to(inputs).eval(), inputs, cuda_graphs=True, executions=["padded"])


def test_a_transposed_convolution_still_takes_a_size_of_the_output():
    dense = fill_(nn.ConvTranspose2d(6, 8, 3, stride=2, dtype=torch.float64), 0)
    layer = torchsmooth.LowRankConvTranspose2d.from_conv_transpose2d(dense, 3).eval()
    inputs = randn(2, 6, 5, 5, seed=1)
    expected = [run(layer, inputs, size) for size in ([11, 12], [12, 11])]
    use_(layer, derive(layer, "dense"))
    for size, value in zip(([11, 12], [12, 11]), expected, strict=True):
        assert close(run(layer, inputs, size), value)


def tuned_linear(execution="dense", form="factored"):
    layer = torchsmooth.LowRankLinear.from_linear(fill_(nn.Linear(12, 10, dtype=torch.float64), 3), 4, form).eval()
    use_(layer, derive(layer, execution))
    return layer, randn(5, 12, seed=9)


def from_factors(layer, inputs):
    """What the factors give, in the simplest way."""
    up, down = layer.factors()
    return inputs @ (up[0] @ down[0]).mT + layer.bias


CHANGES = {
    "in place": lambda layer: layer.down.weight.mul_(2),
    "the bias": lambda layer: layer.bias.add_(1),
    "other data": lambda layer: setattr(layer.up.weight, "data", layer.up.weight.data * 2),
    "another parameter": lambda layer: setattr(layer.up, "weight", nn.Parameter(layer.up.weight.detach() * 2)),
    "another child": lambda layer: setattr(layer, "down", fill_(nn.Linear(12, 4, bias=False).double(), 5)),
    "set_factors_": lambda layer: layer.set_factors_(torch.ones(1, 10, 4), torch.ones(1, 4, 12)),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_factors_that_were_changed_are_run_as_they_are(name):
    layer, inputs = tuned_linear()
    assert close(run(layer, inputs), from_factors(layer, inputs).detach())
    with torch.no_grad():
        before = run(layer, inputs)
        CHANGES[name](layer)
        assert close(run(layer, inputs), from_factors(layer, inputs))
        assert not close(run(layer, inputs), before, 1e-3)
    assert layer.execution == "factored"


def test_a_step_of_an_optimiser_counts_as_a_change():
    layer, inputs = tuned_linear()
    optimiser = torch.optim.SGD(layer.train().parameters(), lr=0.5)
    layer(inputs).square().mean().backward()
    optimiser.step()
    assert close(run(layer.eval(), inputs), from_factors(layer, inputs).detach())


def test_functional_call_uses_the_parameters_that_it_is_given():
    layer, inputs = tuned_linear()
    doubled = {name: 2 * one.detach() for name, one in layer.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(layer, doubled, (inputs,))
        assert close(found, 4 * (from_factors(layer, inputs) - layer.bias) + 2 * layer.bias)
        assert layer.execution == "dense"


def test_children_that_are_pruned_parametrized_or_hooked_are_called():
    for change in (
        lambda down: torch.nn.utils.prune.random_unstructured(down, "weight", amount=0.5),
        torch.nn.utils.parametrizations.spectral_norm,
        lambda down: down.register_forward_hook(lambda *_: torch.zeros(5, 4, dtype=torch.float64)),
        lambda down: down.register_forward_pre_hook(lambda _, args: (0 * args[0],)),
    ):
        layer, inputs = tuned_linear()
        before = run(layer, inputs)
        change(layer.down)
        assert not close(run(layer, inputs), before, 1e-3)


def test_gradients_of_factors_and_of_inputs_are_there_in_eval_mode():
    layer, inputs = tuned_linear()
    layer(inputs).square().sum().backward()
    assert bool(layer.up.weight.grad.any())
    assert bool(layer.down.weight.grad.any())
    frozen, _ = tuned_linear()
    wanted = inputs.clone().requires_grad_()
    expected = torch.autograd.grad(from_factors(frozen, wanted).square().sum(), wanted)[0]
    frozen.requires_grad_(requires_grad=False)
    assert close(torch.autograd.grad(frozen(wanted).square().sum(), wanted)[0], expected)


def test_training_mode_runs_the_factors():
    layer, inputs = tuned_linear()
    layer.train()(inputs).sum().backward()
    assert bool(layer.down.weight.grad.any())
    with torch.no_grad():
        derived_of(layer).module.weight.zero_()
        assert close(layer(inputs), from_factors(layer, inputs))
        assert not close(layer.eval()(inputs), from_factors(layer, inputs), 1e-3)


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_run_in_the_same_way_and_on_their_own(way):
    layer, inputs = tuned_linear("pivoted")
    other = COPIES[way](layer)
    assert other.execution == layer.execution == "pivoted"
    assert torch.equal(run(other, inputs), run(layer, inputs))
    with torch.no_grad():
        layer.up.weight.zero_()
    assert close(run(other, inputs), from_factors(other, inputs).detach())
    assert copy.deepcopy(layer).execution == "factored"  # a copy of what is no longer up to date is not either
    assert other.execution == "pivoted"


def test_moving_and_casting_take_what_was_derived_along():
    layer, inputs = tuned_linear()
    layer.float()
    assert layer.execution == "dense"
    assert run(layer, inputs.float()).dtype == torch.float32
    layer.double()
    assert close(run(layer, inputs), from_factors(layer, inputs).detach(), 1e-6)
    layer.to_empty(device="cpu")
    layer.load_state_dict(tuned_linear()[0].state_dict())
    assert close(run(layer, inputs), from_factors(layer, inputs).detach())


def compressed_resnet():
    model = small_resnet(seed=2).eval()
    torchsmooth.svd_compress_(model, 0.5, form="factored")
    return model, randn(2, 3, 16, 16, seed=4, dtype=torch.float32)


def measured(function):
    """Return the module that a measured call runs; of what is merged and called directly, one of the same class."""
    merged = {torch.conv2d: nn.Conv2d(1, 1, 1), nn.functional.linear: nn.Linear(1, 1)}
    return merged.get(function) or function.__self__


class FakeClock:
    """Stands in for the measurement: names the time of every call by how layers are run at that moment."""

    def __init__(self, layer=None, whole=None):
        self.layer = layer or (lambda _: 1000)
        self.whole = whole or (lambda _: 1000)
        self.compared = []

    def __call__(self, calls, device, before=None, *, cuda_graphs=False, show=False):
        assert (device, cuda_graphs, bool(show)) == (torch.device("cpu"), False, False)
        if before is None:  # single layers
            for call in calls:
                call()
            return [self.layer(measured(call.func)) for call in calls]
        times = []
        for prepare, call in zip(before, calls, strict=True):
            prepare()
            call()
            layers = low_rank_layers(call.args[0])
            last = any(not one.is_contiguous() for one in call.args[0].parameters())
            state = ({layer.execution for layer in layers}, last)
            self.compared.append(state)
            times.append(self.whole(state))
        return times


def dense_is_faster(module):
    return 2000 if isinstance(module, LowRankLayer) else 1000


def test_the_fastest_way_is_taken_for_each_layer(monkeypatch):
    model, inputs = compressed_resnet()
    expected, before = run(model, inputs), snapshot(model)
    fastest = lambda one: {nn.Conv2d: 800}.get(type(one), 500 if getattr(one, "form", "") == "pivoted" else 1000)  # noqa: E731
    clock = FakeClock(fastest, lambda state: 900 if "pivoted" in state[0] else 1000)
    monkeypatch.setattr(tuning, "median_nanoseconds", clock)
    report = torchsmooth.tune_(model, inputs, memory_format="keep")
    assert {layer.execution for layer in low_rank_layers(model)} == {"pivoted"}
    assert {layer.execution for layer in report.layers} == {"pivoted"}
    # Convolutions are not packed in this memory format.
    assert report.layers[0].seconds == {"factored": 1e-6, "pivoted": 5e-7, "dense": 8e-7}
    assert (report.seconds_before, report.seconds_after, report.memory_format) == (1e-6, 9e-7, "kept")
    assert report.seconds_dense == 1e-6
    assert "as stored 0.001 → tuned 0.0009 ms (-10.0 %), all layers dense 0.001 ms; memory format kept" in str(report)
    assert clock.compared == 2 * [({"factored"}, False), ({"pivoted"}, False), ({"dense"}, False)]
    assert close(run(model, inputs), expected, 1e-5)
    assert same(snapshot(model), before)


@pytest.mark.parametrize(
    ("whole", "executions", "memory_format"),
    [
        (lambda _: 1000, {"factored"}, "kept"),  # nothing gained: all as it was
        (lambda state: 980 if state[1] else 1000, {"factored"}, "kept"),  # nor worth the change
        (lambda state: 900 if "dense" in state[0] else 1000, {"dense"}, "kept"),
        (lambda state: 900 if state[1] else 1000, {"factored"}, "channels_last"),
        (lambda state: 500 if state == ({"dense"}, True) else 1000, {"dense"}, "channels_last"),
    ],
)
def test_the_whole_model_decides(monkeypatch, whole, executions, memory_format):
    model, inputs = compressed_resnet()
    expected, state = run(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    monkeypatch.setattr(tuning, "median_nanoseconds", FakeClock(dense_is_faster, whole))
    report = torchsmooth.tune_(model, inputs)
    assert {layer.execution for layer in low_rank_layers(model)} == executions
    assert report.memory_format == memory_format
    planar = [one for one in parameters if one.dim() == 4 and min(one.shape[1:]) > 1]
    assert all(one.is_contiguous() == (memory_format == "kept") for one in planar)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert close(run(model, inputs), expected, 1e-5)


def test_only_what_is_allowed_is_tried_and_the_last_word_counts(monkeypatch):
    model, inputs = compressed_resnet()
    monkeypatch.setattr(tuning, "median_nanoseconds", FakeClock(dense_is_faster, lambda s: 1 if "dense" in s[0] else 9))
    torchsmooth.tune_(model, inputs)
    assert {layer.execution for layer in low_rank_layers(model)} == {"dense"}
    report = torchsmooth.tune_(model, inputs, executions=["factored"])
    assert {layer.execution for layer in low_rank_layers(model)} == {"factored"}
    assert all(set(layer.seconds) == {"factored"} for layer in report.layers)
    assert report.seconds_dense is None
    assert "all layers dense" not in str(report)


def test_what_is_derived_has_the_channels_last_even_at_a_rank_of_one(monkeypatch):
    convolution = fill_(nn.Conv2d(8, 8, 3, padding=1), 0).to(memory_format=torch.channels_last)
    tucker = torchsmooth.TuckerConv2d.from_conv2d(convolution, (1, 1))  # whose factors are in both formats at once
    model = nn.Sequential(fill_(nn.Conv2d(4, 8, 3), 0), tucker).eval().to(memory_format=torch.channels_last)
    inputs = torch.zeros(1, 4, 8, 8)
    monkeypatch.setattr(tuning, "median_nanoseconds", FakeClock(dense_is_faster, lambda s: 1 if "dense" in s[0] else 9))
    torchsmooth.tune_(model, inputs)
    assert tucker.execution == "dense"
    assert derived_of(tucker).module.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_convolution_over_three_axes_may_stand_beside_one_in_channels_last(monkeypatch):
    planar, spatial = fill_(nn.Conv2d(8, 8, 3), 0), fill_(nn.Conv3d(8, 8, 3, padding=1), 1)
    layers = [torchsmooth.LowRankConv2d.from_conv2d(planar, 4), torchsmooth.LowRankConv3d.from_conv3d(spatial, 4)]
    model = nn.Sequential(layers[0], nn.Unflatten(1, (8, 1)), layers[1]).eval()
    inputs = randn(2, 8, 6, 6, seed=2, dtype=torch.float32)
    expected = run(model, inputs)
    monkeypatch.setattr(tuning, "median_nanoseconds", FakeClock(dense_is_faster, lambda s: 1 if s[1] else 9))
    assert torchsmooth.tune_(model, inputs).memory_format == "channels_last"
    assert close(run(model, inputs), expected, 1e-5)


class Viewed(nn.Module):
    """Views what a convolution returns as rows, which in channels_last is not possible."""

    def __init__(self):
        super().__init__()
        self.convolution = fill_(nn.Conv2d(3, 16, 3), 0)
        self.linear = fill_(nn.Linear(16 * 36, 5), 1)

    def forward(self, inputs):
        return self.linear(self.convolution(inputs).view(len(inputs), -1))


@pytest.mark.parametrize("faster", [True, False])
def test_a_model_that_fails_in_channels_last_is_tuned_without(monkeypatch, faster):
    model, inputs = Viewed().eval(), randn(2, 3, 8, 8, seed=0, dtype=torch.float32)
    torchsmooth.svd_compress_(model, 0.1, filter_fn=lambda _, name: name == "convolution")
    expected, before = run(model, inputs), snapshot(model)
    monkeypatch.setattr(tuning, "median_nanoseconds", FakeClock(dense_is_faster, lambda s: 9 if s[1] == faster else 10))
    report = torchsmooth.tune_(model, inputs)
    assert report.memory_format == "kept"
    assert report.note.startswith("in channels last the model fails: RuntimeError: view size is not compatible")
    assert str(report).endswith(f"memory format kept ({report.note})")
    assert close(run(model, inputs), expected, 1e-6)
    assert same(snapshot(model), before)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # but a model that fails as it is, fails
        torchsmooth.tune_(model, randn(2, 3, 9, 9, seed=0, dtype=torch.float32))
    assert close(run(model, inputs), expected, 1e-6)


def test_tuning_for_real_changes_no_result():
    model, inputs = compressed_resnet()
    model.train()
    expected, before = run(copy.deepcopy(model).eval(), inputs), snapshot(model)
    state = torch.get_rng_state()
    report = torchsmooth.tune_(model, inputs, memory_format="keep")
    assert same(snapshot(model), before)
    assert torch.equal(state, torch.get_rng_state())
    assert close(run(model.eval(), inputs), expected, 1e-5)
    names = [name for name, one in model.named_modules() if isinstance(one, LowRankLayer)]
    assert [layer.name for layer in report.layers] == names
    for layer in report.layers:
        assert layer.execution in layer.seconds
        assert layer.name in str(report)
    assert report.seconds_after > 0
    assert "memory format kept" in str(report)


FUSABLE = {
    "linear": (torchsmooth.LowRankLinear(8, 6, 3), (4, 8)),
    "linear without bias": (torchsmooth.LowRankLinear(8, 6, 3, bias=False), (2, 4, 8)),
    "convolution": (torchsmooth.LowRankConv2d(4, 6, 3, 2, stride=2, padding=(1, 2), dilation=(1, 2)), (2, 4, 9, 8)),
    "padding by name": (torchsmooth.LowRankConv2d(4, 6, (3, 1), 2, padding="same"), (2, 4, 9, 8)),
}
NOT_FUSABLE = {
    "no fused operator for a LowRankConv1d": torchsmooth.LowRankConv1d(4, 4, 3, 2),
    "no fused operator for a TuckerConv2d": torchsmooth.TuckerConv2d(4, 4, 3, 2),
    "the fused operators take the factored form": torchsmooth.LowRankLinear(6, 6, 2, form="pivoted"),
    "that of scheme 'channel' without groups": torchsmooth.LowRankConv2d(4, 4, 3, 2, groups=2),
    "pads with zeros, not by 'circular'": torchsmooth.LowRankConv2d(4, 4, 3, 2, padding=1, padding_mode="circular"),
    "nowhere": torchsmooth.LowRankLinear(6, 6, 2),
}


@pytest.mark.parametrize("name", FUSABLE)
def test_the_fused_operators_compute_the_same_from_the_same_factors(name, monkeypatch):
    layer, shape = FUSABLE[name]
    layer = fill_(copy.deepcopy(layer), 3).eval()
    monkeypatch.setattr(_fused_layers, "why_unavailable", lambda _: None)
    inputs = randn(*shape, seed=1, dtype=torch.float32)
    expected = run(layer, inputs)
    use_(layer, derive(layer, "fused"))
    assert layer.execution == "fused"
    assert close(run(layer, inputs), expected, 1e-6)
    again = copy.deepcopy(layer)
    with torch.no_grad():
        layer.up.weight.zero_()
        assert close(again(inputs), expected, 1e-6)
        assert torch.equal(torch.compile(again, fullgraph=True, backend="eager")(inputs), again(inputs))


@pytest.mark.parametrize("reason", NOT_FUSABLE)
def test_layers_without_a_fused_operator_say_why(reason, monkeypatch):
    monkeypatch.setattr(_fused_layers, "why_unavailable", lambda _: "nowhere")
    layer = NOT_FUSABLE[reason]
    assert reason in _fused_layers.why_not_fused(layer)
    assert derive(layer, "fused") is None


def test_fused_operators_are_tried_only_where_they_are_named(monkeypatch):
    monkeypatch.setattr(_fused_layers, "why_unavailable", lambda _: None)
    model = mlp(sizes=(40, 40, 40)).eval()
    torchsmooth.svd_compress_(model, 0.5, form="factored")
    clock = FakeClock(
        lambda one: 1 if isinstance(one, _fused_layers.FusedExecution) else 1000,
        lambda s: 1000 - ("fused" in s[0]) * 500,
    )
    monkeypatch.setattr(tuning, "median_nanoseconds", clock)
    report = torchsmooth.tune_(model, torch.zeros(2, 40))
    assert all("fused" not in layer.seconds for layer in report.layers)
    report = torchsmooth.tune_(model, torch.zeros(2, 40), executions=["fused"])
    assert {layer.execution for layer in low_rank_layers(model)} == {"fused"}
    assert set(report.layers[0].seconds) == {"factored", "fused"}
    monkeypatch.setattr(_fused_layers, "why_unavailable", lambda _: "nowhere")
    report = torchsmooth.tune_(model, torch.zeros(2, 40), executions=["fused"])
    assert {layer.note for layer in report.layers} == {"not fused: nowhere"}


def test_layers_that_are_not_run_alone_stay_as_they_are_stored():
    embedding = torchsmooth.LowRankEmbedding(10, 6, 2)
    unused = torchsmooth.LowRankLinear(6, 6, 2)
    model = nn.Sequential(embedding, torchsmooth.LowRankLinear(6, 6, 2))
    model[1].register_module("aside", unused)
    report = torchsmooth.tune_(model, torch.zeros(2, 3, dtype=torch.int64))
    assert [(layer.name, layer.note) for layer in report.layers] == [("1", ""), ("1.aside", "never called")]
    assert unused.execution == "factored"
    assert not is_tunable(embedding)


def test_a_model_whose_low_rank_layers_are_run_in_one_way_only_says_so():
    model = nn.Sequential(fill_(nn.Embedding(60, 24), 0), nn.Linear(24, 4))
    torchsmooth.svd_compress_(model, 0.3)
    with pytest.raises(ValueError, match=r"^there is nothing to tune in .* '0' \(LowRankEmbedding\), have one way"):
        torchsmooth.tune_(model, torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_parts_of_fused_recurrent_layers_are_called_that(kind):
    class Last(nn.Sequential):
        def forward(self, inputs):
            return self[1](self[0](inputs)[0])

    model = fill_(Last(kind(24, 32), nn.Linear(32, 24)), 0).eval()
    torchsmooth.svd_compress_(model, 0.4, form="factored", allocation="uniform")
    notes = {layer.name: layer.note for layer in torchsmooth.tune_(model, torch.zeros(3, 2, 24)).layers}
    assert notes == {"0.ih_l0": FUSED, "0.hh_l0": FUSED, "1": ""}


def test_a_module_in_two_places_is_one_layer():
    shared = torchsmooth.LowRankLinear.from_linear(fill_(nn.Linear(8, 8), 0), 3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert [layer.name for layer in torchsmooth.tune_(model, torch.zeros(2, 8)).layers] == ["0"]


def test_quantised_factors_are_run_as_they_are():
    torchao = pytest.importorskip("torchao.quantization")
    model = mlp(sizes=(64, 64, 64)).eval()
    torchsmooth.svd_compress_(model, 0.5, form="factored")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    inputs = randn(4, 64, seed=0, dtype=torch.float32)
    expected = run(model, inputs)
    report = torchsmooth.tune_(model, inputs)
    assert all("as stored: a LowRankLinear cannot be merged" in layer.note for layer in report.layers)
    assert torch.equal(run(model, inputs), expected)


def test_a_pruned_layer_beside_one_like_it_is_run_from_its_factors(monkeypatch):
    for pruned, plain in ((0, 1), (1, 0)):
        model = nn.Sequential(*(torchsmooth.LowRankLinear(8, 8, 3) for _ in range(2))).eval()
        torch.nn.utils.prune.l1_unstructured(model[pruned].down, "weight", amount=0.5)
        expected = run(model, inputs := randn(3, 8, seed=1, dtype=torch.float32))
        monkeypatch.setattr(tuning, "median_nanoseconds", FakeClock(dense_is_faster, lambda s: 9 - ("dense" in s[0])))
        report = torchsmooth.tune_(model, inputs)
        assert (model[pruned].execution, model[plain].execution) == ("factored", "dense")
        assert "as stored: a LowRankLinear cannot be merged" in report.layers[pruned].note
        assert close(run(model, inputs), expected, 1e-5)


def test_an_error_or_an_interruption_leaves_the_model_as_it_was(monkeypatch):
    for error in (RuntimeError, KeyboardInterrupt):
        model, inputs = compressed_resnet()
        use_(low_rank_layers(model)[0], derive(low_rank_layers(model)[0], "dense"))
        before, executions = snapshot(model), [layer.execution for layer in low_rank_layers(model)]
        strides = [one.stride() for one in model.parameters()]
        clock = FakeClock(dense_is_faster)

        def failing(calls, device, before=None, *, clock=clock, error=error, **options):
            found = clock(calls, device, before, **options)
            if before is not None:
                raise error
            return found

        monkeypatch.setattr(tuning, "median_nanoseconds", failing)
        with pytest.raises(error):
            torchsmooth.tune_(model, inputs)
        assert same(snapshot(model), before)
        assert [layer.execution for layer in low_rank_layers(model)] == executions
        assert [one.stride() for one in model.parameters()] == strides


def test_what_was_derived_does_not_outlive_the_layer(monkeypatch):
    model, inputs = compressed_resnet()
    monkeypatch.setattr(tuning, "median_nanoseconds", FakeClock(dense_is_faster, lambda s: 1 if "dense" in s[0] else 9))
    torchsmooth.tune_(model, inputs)
    expected, saved = run(model, inputs), model.state_dict()
    loaded = torchsmooth.load_compressed_(small_resnet(seed=5).eval(), saved)
    assert close(run(loaded, inputs), expected, 1e-5)
    assert all(layer.execution == "factored" for layer in low_rank_layers(loaded))
    again = copy.deepcopy(model)
    torchsmooth.svd_compress_(again, 0.3)
    torchsmooth.restore_dense_(model)
    assert not low_rank_layers(model)
    assert close(run(model, inputs), expected, 1e-5)
    for one in (model, again):
        assert not any(derived_of(module) for module in one.modules() if type(module) is nn.Conv2d)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated")
@pytest.mark.parametrize("execution", ["dense", "pivoted"])
def test_compiled_graphs_hold_what_is_run_and_traces_and_exports_the_factors(execution):
    model = nn.Sequential(
        torchsmooth.LowRankConv2d.from_conv2d(fill_(nn.Conv2d(6, 8, 3), 0), 4),
        nn.Flatten(),
        torchsmooth.LowRankLinear.from_linear(fill_(nn.Linear(8 * 36, 12), 1), 5),
    ).eval()
    inputs = randn(2, 6, 8, 8, seed=1, dtype=torch.float32)
    expected = run(model, inputs)
    for layer in low_rank_layers(model):
        use_(layer, derive(layer, execution))
    with torch.no_grad():
        for traced in (torch.jit.trace(model, inputs), torch.fx.symbolic_trace(model)):
            assert close(traced(inputs), expected, 1e-5)
            assert traced.state_dict().keys() == model.state_dict().keys()
        for strict in (False, True):
            exported = torch.export.export(model, (inputs,), strict=strict)
            assert close(exported.module()(inputs), expected, 1e-5)
            assert exported.state_dict.keys() == model.state_dict().keys()
            assert len([node for node in exported.graph.nodes if "conv2d" in str(node.target)]) == 2
        assert close(torch.compile(model, fullgraph=True, backend="eager")(inputs), expected, 1e-5)


def test_what_is_compiled_after_a_factor_was_changed_is_what_is_run():
    model, inputs = compressed_resnet()
    for layer in low_rank_layers(model):
        use_(layer, derive(layer, "dense"))
    with torch.no_grad():
        low_rank_layers(model)[0].up.weight.mul_(2)
        expected = model(inputs)
        assert close(torch.compile(model, fullgraph=True, backend="eager")(inputs), expected, 1e-5)


def test_bad_arguments_are_refused_before_anything_is_run():
    model, inputs = compressed_resnet()
    model.register_forward_pre_hook(lambda *_: pytest.fail("run"))
    with pytest.raises(
        TypeError,
        match=r"^executions must be a sequence of names out of 'dense', 'factored', .*, 'pivoted', got str 'dense'",
    ):
        torchsmooth.tune_(model, inputs, executions="dense")
    with pytest.raises(ValueError, match=r"^executions must be one of 'factored', .*; got str 'merged'"):
        torchsmooth.tune_(model, inputs, executions=["merged"])
    with pytest.raises(ValueError, match=r"memory_format must be one of 'auto', 'keep'; got str 'last'"):
        torchsmooth.tune_(model, inputs, memory_format="last")
    with pytest.raises(TypeError, match=r"^example_inputs must be a tensor"):
        torchsmooth.tune_(model, [inputs])
    with pytest.raises(ValueError, match=r"^there is no low-rank layer to tune in this Sequential: compress it first"):
        torchsmooth.tune_(mlp(), inputs)
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module"):
        torchsmooth.tune_("model", inputs)


class Autocast(nn.Module):
    """Brings its own autocast, so that layers get inputs of another dtype than their weights have."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 128), nn.Linear(128, 64)

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x):
        return self.b(nn.functional.relu(self.a(x)))


def test_a_model_with_an_autocast_of_its_own_is_tuned_as_it_runs():
    model = fill_(Autocast(), 0).eval()
    torchsmooth.svd_compress_(model, 0.3)
    x = randn(16, 64, seed=1, dtype=torch.float32)
    expected = run(model, x)
    report = torchsmooth.tune_(model, x)
    assert all({"factored", "dense"} <= layer.seconds.keys() for layer in report.layers)
    assert not any("packed" in way for layer in report.layers for way in layer.seconds)  # not used under autocast
    assert close(run(model, x).float(), expected.float(), 5e-2)


def test_a_layer_that_is_called_by_keyword_is_tuned_too():
    model = fill_(ByKeyword(48), 0).eval()
    torchsmooth.svd_compress_(model, 0.5)
    report = torchsmooth.tune_(model, randn(16, 48, seed=1, dtype=torch.float32))
    assert not any(layer.note for layer in report.layers)
    assert all(layer.seconds for layer in report.layers)


def replica_of(module, device):
    """Copy a module as nn.DataParallel does for another device."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replica_of(child, device)
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.detach().to(device))
    for name, buffer in module._buffers.items():
        replica._buffers[name] = buffer.to(device)
    return replica


@pytest.mark.parametrize("execution", ["dense", "factored"])
def test_copies_for_other_devices_run_their_own_factors(execution):
    model = fill_(nn.Sequential(nn.Linear(32, 32)), 0).eval()
    torchsmooth.svd_compress_(model, 0.5, form="pivoted")
    x = randn(3, 32, seed=1, dtype=torch.float32)
    use_(model[0], derive(model[0], execution, x))
    with torch.no_grad():
        assert replica_of(model, "meta")(x.to("meta")).is_meta
        assert close(replica_of(model, "cpu")(x), model(x), 1e-5)
    assert model[0].execution == execution


@pytest.mark.parametrize("execution", ["dense", "packed_dense", "factored"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_leaves_no_trace_is_seen_all_the_same(execution, fused):
    model = fill_(nn.Sequential(nn.Linear(32, 32)), 0).eval()
    torchsmooth.svd_compress_(model, 0.3, form="pivoted")
    x = randn(8, 32, seed=1, dtype=torch.float32)
    derived = derive(model[0], execution, x)
    if derived is None:
        pytest.skip("weights cannot be packed here")
    use_(model[0], derived)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    model.train()
    model(x)
    model.eval()
    run(model, x)
    assert model[0].execution == execution  # nothing was stepped
    model.train()
    model(x).square().sum().backward()
    optimizer.step()
    model.eval()
    assert model[0].execution == "pivoted"
    untuned = copy.deepcopy(model)
    use_(untuned[0], None)
    assert torch.equal(run(model, x), run(untuned, x))
    assert model[0].execution == "pivoted"


PADDED = "ignore:The PyTorch API of nested tensors is in prototype stage"


@pytest.mark.filterwarnings(PADDED)
@pytest.mark.parametrize("executions", [None, ["packed"], ["packed_dense"], ["dense"]])
def test_padded_batches_of_an_encoder_are_run_and_tuned_for(executions):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = fill_(nn.TransformerEncoder(layer, 2), 0).eval()
    torchsmooth.svd_compress_(model, 0.4)
    inputs = {
        "src": randn(3, 7, 32, seed=1, dtype=torch.float32),
        "src_key_padding_mask": torch.arange(7)[None] >= torch.tensor([[7], [4], [5]]),
    }
    with torch.no_grad():
        expected = model(**inputs)
    for example in (inputs["src"], inputs):
        torchsmooth.tune_(model, example, executions=executions)
        with torch.no_grad():
            assert close(model(**inputs), expected, 1e-4)
