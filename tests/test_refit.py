"""Factors fitted to data, layer after layer: what the closed form reaches, what it leaves alone, and what it undoes."""

from __future__ import annotations

import copy
from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import Shared, Tied, mlp, same, small_resnet, snapshot
from tests.reference import calibration as reference
from tests.strategies import convolutions, fill_, randn, seeds
from torchsmooth import LowRankLinear, plan_compression, recalibrate_batchnorm_, svd_compress_
from torchsmooth import _refit as room
from torchsmooth._calibration import NOT_REACHED, TOO_WIDE, Calibration
from torchsmooth._layers import KINDS
from torchsmooth._leading import truncated_factors
from torchsmooth._lowrank_layer import LowRankLayer, multiply_out
from torchsmooth._matricise import distinct_schemes
from torchsmooth._moments import Moments
from torchsmooth._norms import FollowingNorms
from torchsmooth._refit import NO_ROWS, _bias_of, refit
from torchsmooth._swap import swap_, take_over_
from torchsmooth._undo import Undo

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def replacements_for(model, choices):
    """Low-rank layers by the layers that they are to replace; ``choices``: name to (rank, scheme, form) or rank."""
    replacements = {}
    for name, choice in choices.items():
        rank, scheme, form = choice if isinstance(choice, tuple) else (choice, "channel", "factored")
        module = model.get_submodule(name)
        replacements[module] = KINDS[type(module)].like(module, rank, scheme, form)
        take_over_(replacements[module], module)
    return replacements


def truncate(replacement, module):
    replacement.set_factors_(*truncated_factors(replacement.matricisation.to_matrices(module.weight), replacement.rank))


def look(model, batches, choices):
    """Refit without committing anything."""
    replacements = replacements_for(model, choices)
    names = {model.get_submodule(name): name for name in choices}
    calibration = Calibration(batches, show=False)
    found = refit(model, replacements, names, calibration, lambda module: truncate(replacements[module], module))
    return found, replacements


def refit_(model, batches, choices):
    found, replacements = look(model, batches, choices)
    found.write_(Undo())
    swap_(model, replacements)
    return found


def truncate_(model, choices):
    """The same layers without data."""
    replacements = replacements_for(model, choices)
    for module, replacement in replacements.items():
        truncate(replacement, module)
    swap_(model, replacements)
    return model


@torch.no_grad()
def outputs(model, batches):
    return torch.cat([model(**one) if isinstance(one, dict) else model(one) for one in batches])


def misfit(one, other):
    """Relative error at the output."""
    return float(torch.linalg.vector_norm(one.double() - other.double()) / torch.linalg.vector_norm(other.double()))


def centred(values):
    """Deviations from the mean of each output channel or feature."""
    values = values.double()
    return values - values.mean((0, 2, 3) if values.dim() == 4 else tuple(range(values.dim() - 1)), keepdim=True)


def correlated(rows, columns, seed, dtype=torch.float64):
    """Inputs of very different energy in different directions, and not around zero."""
    values = randn(rows, columns, seed=seed) * torch.logspace(0, -2, columns, dtype=torch.float64)
    return (values @ randn(columns, columns, seed=seed + 1) + randn(columns, seed=seed + 2)).to(dtype)


# What it reaches


# What is exact where the rows are trusted.
trusted = patch.object(room, "_DOUBT", 0.0)


@trusted
@settings(max_examples=25)
@given(seeds, st.integers(1, 4), st.booleans())
def test_the_first_layer_is_the_reduced_rank_regression(seed, rank, bias):
    model = fill_(nn.Sequential(nn.Linear(7, 5, bias=bias), nn.Linear(5, 3)), seed).double()
    inputs = correlated(60, 7, seed)
    wanted = outputs(model[:1], [inputs])
    found = refit_(model, inputs.split(25), {"0": rank})
    x, y, got = inputs, wanted, outputs(model[:1], [inputs])
    if bias:
        x, y, got = centred(x), centred(y), centred(got)
    best, error = misfit(x @ reference.reduced_rank_regression(x, y, rank).T, y), misfit(got, y)
    assert best - 1e-9 <= error <= best + 2e-3
    assert found.errors["0"] == pytest.approx(error, abs=1e-6)


@settings(max_examples=25)
@given(seeds, st.integers(1, 3))
def test_the_second_layer_makes_the_best_of_what_the_first_one_leaves(seed, rank):
    model = fill_(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 4)), seed).double()
    inputs = correlated(200, 7, seed)
    wanted = centred(outputs(model, [inputs]))
    biases = [layer.bias for layer in model]
    found = refit_(model, inputs.split(64), {"0": 2, "1": rank})
    assert all(layer.bias is bias for layer, bias in zip(model, biases, strict=True))
    arriving = centred(outputs(model[:1], [inputs]))
    best = misfit(arriving @ reference.reduced_rank_regression(arriving, wanted, rank).T, wanted)
    error = misfit(centred(outputs(model, [inputs])), wanted)
    assert best - 1e-9 <= error <= best + 2e-2
    assert found.errors["1"] == pytest.approx(error, abs=1e-6)


def test_layers_are_taken_as_the_data_comes_to_them():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.third, self.second, self.first = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.third(self.second(self.first(x).tanh()).tanh())

    model = fill_(Backwards(), 0).double()
    inputs = correlated(90, 8, 0)
    wanted = centred(outputs(model, [inputs]))
    found = refit_(model, inputs.split(40), {"third": 3, "second": 3, "first": 3})
    assert list(found.errors) == ["first", "second", "third"]
    assert misfit(centred(outputs(model, [inputs])), wanted) == pytest.approx(found.errors["third"], abs=1e-9)


@settings(max_examples=20)
@given(convolutions(), st.data())
def test_a_convolution_puts_out_less_error_than_without_data(case, data):
    conv, images = case
    images = images * torch.logspace(0, 1, images.shape[1], dtype=torch.float64).reshape(-1, 1, 1) + 1
    scheme = data.draw(st.sampled_from(sorted(set(distinct_schemes(conv.kernel_size).values()))))
    layout = KINDS[nn.Conv2d].layouts(conv)[scheme]
    rank = data.draw(st.integers(1, layout.full_rank))
    form = data.draw(st.sampled_from(["factored", "pivoted"][: 1 + (rank < layout.full_rank)]))
    model, free = nn.Sequential(conv), nn.Sequential(copy.deepcopy(conv))
    wanted = outputs(model, [images])
    choices = {"0": (rank, scheme, form)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("torchsmooth._moments.POSITIONS", 10**6)
        found = refit_(model, images.split(1), choices)
    errors = []
    for one in (model, truncate_(free, choices)):
        got = outputs(one, [images])
        missed, whole = (got - wanted, wanted) if conv.bias is None else (centred(got - wanted), centred(wanted))
        errors.append(float(torch.linalg.vector_norm(missed) / torch.linalg.vector_norm(whole)))
    assert found.errors["0"] == pytest.approx(errors[0], abs=1e-6)
    # In the channel scheme nothing is better; in the others the first factor is one that is good on the whole.
    assert errors[0] <= errors[1] * (1 if scheme == "channel" else 1.2) + 2e-3


@given(seeds, st.integers(1, 4), st.sampled_from([(30, 6), (5, 9, 6), (2, 3, 4, 6)]))
def test_biases_bring_the_mean_output_back(seed, rank, shape):
    model = fill_(nn.Sequential(nn.Linear(6, 5)), seed).double()
    inputs = 3 + randn(*shape, seed=seed)
    wanted = outputs(model, [inputs]).reshape(-1, 5).mean(0)
    bias = model[0].bias
    refit_(model, [inputs], {"0": rank})
    assert torch.allclose(outputs(model, [inputs]).reshape(-1, 5).mean(0), wanted)
    assert model[0].bias is bias


def test_without_a_bias_the_mean_goes_into_the_factors():
    model = fill_(nn.Sequential(nn.Linear(6, 5, bias=False)), 0).double()
    inputs = 10 + randn(40, 6, seed=0)
    wanted = outputs(model, [inputs])
    refit_(model, [inputs], {"0": 1})
    assert model[0].bias is None
    x = reference.reduced_rank_regression(inputs, wanted, 1)
    assert misfit(outputs(model, [inputs]), wanted) <= misfit(inputs @ x.T, wanted) + 1e-3


def test_ahead_of_a_norm_the_mean_does_not_matter():
    model = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6))
    fill_(model, 0).double().eval()
    images = 10 + randn(8, 4, 5, 5, seed=0)
    conv, wanted = copy.deepcopy(model[:1]), outputs(model, [images])
    refit_(model, [images], {"0": 2})
    rows, dense = (centred(one).transpose(0, 1).flatten(1).T for one in (images, outputs(conv, [images])))
    best = misfit(rows @ reference.reduced_rank_regression(rows, dense, 2).T, dense)
    fitted = centred(outputs(model[:1], [images])).transpose(0, 1).flatten(1).T
    assert misfit(fitted, dense) <= best + 1e-3
    assert torch.allclose(outputs(model, [images]).mean((0, 2, 3)), wanted.mean((0, 2, 3)))
    assert torch.allclose(outputs(model, [images]).var((0, 2, 3)), wanted.var((0, 2, 3)))


class Tokens(nn.Module):
    """A norm over tokens, which takes up one mean for all features."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.layer(x))


class TwoLayersOneNorm(nn.Module):
    """A norm for the outputs of two layers, which takes up one mean for both."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(self.layer(x[:, 0])) + self.norm(self.other(x[:, 1] - 4))


@pytest.mark.parametrize("build", [Tokens, TwoLayersOneNorm])
def test_ahead_of_a_norm_that_mixes_means_they_matter(build):
    model = fill_(build(), 0).double().eval()
    rows = 3 * randn(6, seed=1) + randn(60, 3, 6, seed=0)
    given = rows if build is Tokens else rows[:, 0]
    wanted = outputs(model.layer, [given])
    refit_(model, [rows], {"layer": 2})
    x, y = given.reshape(-1, 6), wanted.reshape(-1, 6)
    best = misfit(x @ reference.reduced_rank_regression(x, y, 2).T, y)
    assert misfit(outputs(model.layer, [given]), wanted) <= best + 5e-3


@pytest.mark.parametrize(
    ("build", "scheme"), [(mlp, "auto"), (small_resnet, "channel"), (small_resnet, "input"), (small_resnet, "spatial")]
)
def test_a_network_is_closer_to_the_dense_one_than_without_data(build, scheme):
    data = correlated(200, 24, 0, torch.float32) if build is mlp else randn(24, 3, 12, 12, seed=0, dtype=torch.float32)
    seen, unseen = data.chunk(2)
    dense = build(1)
    free, fitted = copy.deepcopy(dense), copy.deepcopy(dense)
    svd_compress_(free, 0.4, scheme=scheme)
    recalibrate_batchnorm_(free, [seen]) if build is small_resnet else None
    svd_compress_(fitted, 0.4, scheme=scheme, calibration=seen.chunk(2), progress=False)
    wanted = outputs(dense, [unseen])
    assert misfit(outputs(fitted, [unseen]), wanted) < 0.8 * misfit(outputs(free, [unseen]), wanted)


class Dense(nn.Module):
    """Norm, then convolution, each of which sees all that came before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(16), nn.BatchNorm2d(24)])
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(16, 8, 1, bias=False)])
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return self.head(self.norms[-1](x).relu().mean((2, 3)))


def test_norms_ahead_of_convolutions_follow():
    model = fill_(Dense(), 0).double().eval()
    images = randn(12, 3, 8, 8, seed=0)
    dense = copy.deepcopy(model)
    spread = {}

    def watch(which, one):
        for number, norm in enumerate(one.norms):
            norm.register_forward_hook(
                lambda _module, _args, output, key=(which, number): spread.__setitem__(
                    key, (output.mean((0, 2, 3)), output.var((0, 2, 3)))
                )
            )

    found = refit_(model, images.split(5), {"stem": 3, "convs.0": (3, "spatial", "pivoted"), "convs.1": 3, "head": 3})
    assert set(found.errors) == {"stem", "convs.0", "convs.1", "head"}
    watch("dense", dense)
    watch("fitted", model)
    assert misfit(outputs(model, [images]), outputs(dense, [images])) < 0.3
    for number in range(3):
        for one, other in zip(spread["dense", number], spread["fitted", number], strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_a_norm_in_training_mode_is_looked_at_in_eval_mode_and_left_in_training_mode():
    expected, model = small_resnet(1), small_resnet(1)
    model.layers[2].bn1.train()
    model.layers[5].train()
    modes = [module.training for module in model.modules()]
    images = randn(8, 3, 12, 12, seed=0, dtype=torch.float32)
    for one in (expected, model):
        refit_(one, [images], {"layers.2.conv1": 3, "layers.5.conv2": 4})
    inside = {child for one in model.modules() if isinstance(one, LowRankLayer) for child in one.children()}
    assert [module.training for module in model.modules() if module not in inside] == modes
    for key, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


@settings(max_examples=20)
@given(seeds, st.sampled_from(["channel", "input", "spatial", "spatial_transposed"]), st.sampled_from([1, 2, 4]))
def test_grouped_and_depthwise_convolutions(seed, scheme, groups):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=groups), nn.ReLU(), nn.Conv2d(8, 8, (3, 5), padding="same", groups=8)
    )
    fill_(model, seed).double()
    images = randn(6, 4, 5, 5, seed=seed)
    wanted = outputs(model, [images])
    other = scheme if scheme in {"spatial", "spatial_transposed"} else "spatial"
    free = truncate_(copy.deepcopy(model), {"0": (1, scheme, "factored"), "2": (1, other, "factored")})
    found = refit_(model, images.split(2), {"0": (1, scheme, "factored"), "2": (1, other, "factored")})
    assert found.errors.keys() == {"0", "2"}
    assert misfit(outputs(model, [images]), wanted) <= misfit(outputs(free, [images]), wanted) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_fitted_in_float64_and_cast_back_once(dtype):
    model = fill_(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 5)), 0)
    model = model.to(dtype).eval()
    images = randn(60, 4, 6, 6, seed=0, dtype=dtype)
    wanted = outputs(model, [images])
    found = refit_(model, images.split(20), {"0": (5, "spatial", "factored"), "3": (4, "channel", "pivoted")})
    assert {one.dtype for one in model.state_dict().values() if one.is_floating_point()} == {dtype}
    assert misfit(centred(outputs(model, [images])), centred(wanted)) == pytest.approx(found.errors["3"], rel=0.1)


def test_rounding_counts_in_the_error():
    # A quarter of the rank would do without any loss: what is left is the rounding of the factors.
    small = torch.randint(-1, 2, (2, 16, 4), generator=torch.Generator().manual_seed(0))
    weight = small[0] @ small[1].T  # exact in every dtype
    inputs = randn(1, 99, 16, seed=2)
    moments = Moments()
    moments.add(inputs, inputs @ weight.mT.double())
    for dtype, least in ((torch.float64, 0.0), (torch.bfloat16, 1e-4)):
        model = nn.Sequential(nn.Linear(16, 16, bias=False, dtype=dtype))
        model[0].weight.data = weight.to(dtype)
        (dense, low_rank), *_ = replacements_for(model, {"0": 4}).items()
        error = room._fit_(low_rank, dense, moments, centred=False, name="0")
        up, down = (factor.detach().double() for factor in low_rank.factors())
        expected = misfit(inputs @ (up @ down).mT, inputs @ weight.mT.double())
        assert least <= expected <= 2e-2
        assert error == pytest.approx(expected, abs=1e-7)


# What it cannot fit


def test_a_layer_that_the_data_never_reaches_falls_back_with_a_note():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.taken, self.other, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x, aside=False):
            return self.last(self.other(x) if aside else self.taken(x))

    model = fill_(Forked(), 0)
    expected = truncate_(copy.deepcopy(model), {"other": 2}).other.state_dict()
    bias = model.other.bias.detach().clone()
    found = refit_(model, [randn(20, 6, seed=0, dtype=torch.float32)], {"taken": 2, "other": 2, "last": 2})
    assert found.notes == {"other": NOT_REACHED}
    assert found.errors.keys() == {"taken", "last"}
    assert all(torch.equal(value, expected[key]) for key, value in model.other.state_dict().items())
    assert torch.equal(model.other.bias, bias)


def test_a_layer_called_with_empty_batches_alone_falls_back_with_a_note():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.chosen, self.conv = nn.Linear(6, 6), nn.Linear(6, 6), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            x = self.first(x)
            none = x[x[:, 0] > 1e9]
            self.conv(none.reshape(0, 2, 3, 1))
            return x.index_add(0, torch.arange(len(none)), self.chosen(none))

    model = fill_(Masked(), 0)
    found = refit_(model, [randn(20, 6, seed=0, dtype=torch.float32)], {"first": 2, "chosen": 2, "conv": 1})
    assert found.notes == {"chosen": NO_ROWS, "conv": NO_ROWS}
    assert isinstance(model.chosen, LowRankLinear)
    assert bool(model.chosen.weight.isfinite().all())


def test_a_layer_that_is_too_wide_falls_back_and_the_next_ones_know(monkeypatch):
    monkeypatch.setattr("torchsmooth._calibration.WIDEST", 23)
    model = mlp()
    found = refit_(model, [randn(50, 24, seed=0, dtype=torch.float32)], {"0": 6, "2": 6, "4": 4})
    assert found.notes == {"0": TOO_WIDE, "2": TOO_WIDE}
    assert found.errors.keys() == {"4"}
    free = truncate_(mlp(), {"0": 6, "2": 6, "4": 4})
    assert torch.equal(model[0].up.weight, free[0].up.weight)
    assert not torch.equal(model[4].up.weight, free[4].up.weight)


@pytest.mark.parametrize("bias", [True, False])
def test_inputs_that_are_all_zero_leave_the_plain_truncation(bias):
    model = fill_(nn.Sequential(nn.Linear(6, 5, bias=bias)), 0).double()
    free = truncate_(copy.deepcopy(model), {"0": 2})
    refit_(model, [torch.zeros(9, 6, dtype=torch.float64)], {"0": 2})
    assert torch.allclose(model[0].weight, free[0].weight)
    assert torch.equal(outputs(model, [torch.zeros(1, 6).double()]), outputs(free, [torch.zeros(1, 6).double()]))


def test_one_row_is_enough_and_says_nothing_of_other_directions():
    model = fill_(nn.Sequential(nn.Linear(6, 5, bias=False)), 0).double()
    dense = copy.deepcopy(model)
    row = randn(1, 6, seed=0)
    refit_(model, [row], {"0": 4})
    assert torch.allclose(outputs(model, [row]), outputs(dense, [row]), atol=5e-2)
    away = torch.linalg.svd(row).Vh[1:]
    free = truncate_(copy.deepcopy(dense), {"0": 4})
    assert misfit(outputs(model, [away]), outputs(dense, [away])) < 2 * misfit(
        outputs(free, [away]), outputs(dense, [away])
    )


@pytest.mark.parametrize("seed", range(3))
def test_few_rows_are_not_taken_at_their_word(seed):
    dense = fill_(nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 20, bias=False)), seed).double()
    rows, others = randn(36, 40, seed=seed + 10), randn(2000, 40, seed=seed + 20)
    lost = {}
    for doubt in (0.0, room._DOUBT):
        model = copy.deepcopy(dense)
        with patch.object(room, "_DOUBT", doubt):
            refit_(model, [rows], {"0": 20, "1": 16})
        lost[doubt] = misfit(outputs(model, [others]), outputs(dense, [others]))
    assert lost[room._DOUBT] < lost[0.0]


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_data_of_any_scale(scale):
    model = fill_(nn.Sequential(nn.Linear(6, 5, bias=False)), 0).double()
    other, inputs = copy.deepcopy(model), randn(50, 6, seed=0)
    refit_(model, [inputs], {"0": 2})
    refit_(other, [scale * inputs], {"0": 2})
    assert torch.allclose(model[0].weight, other[0].weight, rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_inputs_are_refused_with_the_name_of_the_layer(bad):
    model = mlp()
    before = snapshot(model)
    inputs = randn(9, 24, seed=0, dtype=torch.float32)
    inputs[3, 4] = bad
    with pytest.raises(ValueError, match="calibration brings NaN or infinite values to layer '0': look at the inputs"):
        look(model, [inputs], {"0": 4, "2": 4})
    assert same(before, snapshot(model))


# Models that are built in other ways


def test_a_layer_called_with_its_input_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.linear = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

        def forward(self, images):
            return self.linear(input=self.norm(input=self.conv(input=images)).mean((2, 3)))

    model = fill_(Named(), 0).eval()
    plain = nn.Sequential(model.conv, model.norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.linear)
    plain = copy.deepcopy(plain)
    images = randn(30, 3, 6, 6, seed=0, dtype=torch.float32)
    found = refit_(model, [{"images": one} for one in images.split(10)], {"conv": 4, "linear": 2})
    expected = refit_(plain, images.split(10), {"0": 4, "4": 2})
    assert list(found.errors.values()) == pytest.approx(list(expected.errors.values()), rel=1e-4)
    assert misfit(outputs(model, [{"images": images}]), outputs(plain, [images])) < 1e-4


def test_a_shared_module_is_fitted_to_all_of_its_calls():
    model = fill_(Shared(), 0).double()
    dense, inputs = copy.deepcopy(model), correlated(60, 16, 0)
    free = truncate_(copy.deepcopy(model), {"first": 5, "body.1": 5})
    refit_(model, inputs.split(20), {"first": 5, "body.1": 5})
    assert model.first is model.body[0] is model.again["ab"]
    assert isinstance(model.first, LowRankLinear)
    wanted = outputs(dense, [inputs])
    assert misfit(outputs(model, [inputs]), wanted) < 0.7 * misfit(outputs(free, [inputs]), wanted)


@trusted
def test_a_tied_bias_is_left_alone_and_not_brought_a_second_time():
    class TiedBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 5), nn.Linear(6, 5)
            self.two.bias = self.one.bias

        def forward(self, x):
            return self.one(x) - 2 * self.two(x)

    model = fill_(TiedBias(), 0).double()
    with torch.no_grad():
        model.one.bias.fill_(50.0)
    dense, inputs = copy.deepcopy(model), correlated(60, 6, 0)
    found = refit_(model, [inputs], {"one": 4, "two": 4})
    assert model.one.bias is model.two.bias
    assert torch.equal(model.one.bias, dense.one.bias)
    for name in ("one", "two"):
        with torch.no_grad():
            y = dense.get_submodule(name)(inputs) - 50
            error = misfit(model.get_submodule(name)(inputs) - 50, y)
        best = misfit(inputs @ reference.reduced_rank_regression(inputs, y, 4).T, y)
        assert error <= best + 5e-3
        assert found.errors[name] == pytest.approx(error, abs=1e-6)


def test_tied_weights_stay_dense_beside_what_is_fitted():
    model = Tied()
    tokens = torch.arange(40).reshape(4, 10)
    report = svd_compress_(model, 0.1, calibration=[tokens], progress=False)
    assert report["body.2"].output_error is not None
    assert report["head"].scheme is None
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("where", ["whole", "child", "in place"])
@pytest.mark.parametrize("called", [True, False])
def test_compiled_code_is_looked_into_and_not_compiled_again(where, called):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model, expected = mlp(), mlp()
    inputs = randn(40, 24, seed=0, dtype=torch.float32)
    choices = {"0": 8, "2": 6, "4": 4}
    refit_(expected, inputs.split(10), choices)
    if where == "whole":
        compiled = torch.compile(model, backend=backend)
        choices = {f"_orig_mod.{name}": rank for name, rank in choices.items()}
    elif where == "child":
        compiled = nn.Sequential(torch.compile(model[:3], backend=backend), *model[3:])
        choices = {"0._orig_mod.0": 8, "0._orig_mod.2": 6, "2": 4}
    else:
        model.compile(backend=backend)
        compiled = model
    if called:
        compiled(inputs)
    before = len(graphs)
    found = refit_(compiled, inputs.split(10), choices)
    assert len(graphs) == before
    assert not found.notes
    assert torch.allclose(outputs(compiled, [inputs]), outputs(expected, [inputs]), atol=1e-5)
    assert len(graphs) > before
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masked", [True, False])
def test_transformer_encoders_are_looked_into_past_their_fast_path(masked):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    fill_(model, 0).eval()
    tokens = randn(12, 5, 16, seed=0, dtype=torch.float32)
    mask = {"src_key_padding_mask": torch.arange(5).expand(12, 5) > torch.arange(12)[:, None] % 3 + 1} if masked else {}
    batches = [{"src": tokens, **mask}]
    dense = copy.deepcopy(model)
    found = refit_(model, batches, {f"layers.{n}.linear{k}": 12 for n in (0, 1) for k in (1, 2)})
    assert len(found.errors) == 4
    assert torch.backends.mha.get_fastpath_enabled()
    assert misfit(outputs(model, batches), outputs(dense, batches)) < 0.2


def test_a_model_that_begins_in_place_does_not_use_the_data_up():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

        def forward(self, x):
            return self.linears(x.div_(10).add_(1))

    model, other = fill_(Scaled(), 0), fill_(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), 0)
    inputs = randn(30, 6, seed=0, dtype=torch.float32)
    before = inputs.clone()
    refit_(model, [inputs], {"linears.0": 2, "linears.1": 2})
    refit_(other, [before / 10 + 1], {"0": 2, "1": 2})
    assert torch.equal(inputs, before)
    assert torch.allclose(model.linears[1].weight, other[1].weight, atol=1e-5)


def test_hooks_see_what_they_saw_and_what_they_change_is_not_fitted_twice():
    inputs = correlated(40, 6, 0)
    model = fill_(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), 0).double()
    expected = copy.deepcopy(model)
    calls = []
    handles = [
        model[0].register_forward_pre_hook(lambda _module, args: (2 * args[0],)),
        model[0].register_forward_hook(lambda _module, _args, output: 3 * output - 1),
        model[1].register_forward_hook(lambda _module, _args, _output: calls.append(1)),
    ]
    dense = copy.deepcopy(model)
    refit_(model, [inputs], {"0": 3, "1": 3})
    refit_(expected, [2 * inputs], {"0": 3})
    assert torch.allclose(model[0].weight, expected[0].weight)
    assert torch.allclose(model[0].bias, expected[0].bias)
    assert misfit(outputs(model, [inputs]), outputs(dense, [inputs])) < 0.5
    assert len(calls) > 0
    calls.clear()
    outputs(model, [inputs])
    assert calls == [1]
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_behind_branches_that_only_some_batches_take():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            return (self.one if len(x) == 30 else self.two)(self.gate(x))

    model = fill_(Experts(), 0).double()
    dense, batches = copy.deepcopy(model), [correlated(30, 6, 0), correlated(31, 6, 0), correlated(30, 6, 5)]
    found = refit_(model, batches, {"gate": 5, "one": 3, "two": 3})
    assert found.errors.keys() == {"gate", "one", "two"}
    for batch in batches:
        assert torch.allclose(outputs(model, [batch]).mean(0), outputs(dense, [batch]).mean(0), atol=0.5)


# What it leaves alone


def everything(model):
    return snapshot(model), [module._forward_hooks.copy() for module in model.modules()], dict(model.named_buffers())


def is_as(before, model):
    after = everything(model)
    buffers = all(before[2][name] is buffer for name, buffer in after[2].items())
    return same(dict(before[0]), after[0]) and before[1] == after[1] and buffers


class Bomb(nn.Module):
    """Goes off at a given run, or never."""

    def __init__(self):
        super().__init__()
        # What a module keeps by itself is put back after each run, but not in objects of other packages.
        self.seen = Mock(runs=0, at=-1, kind=RuntimeError)

    def forward(self, x):
        self.seen.runs += 1
        if self.seen.runs == self.seen.at:
            raise self.seen.kind("boom")
        return x


def booby_trapped():
    bomb = Bomb()
    model = fill_(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6),
            nn.Flatten(), bomb, nn.Linear(96, 8), nn.Linear(8, 4), nn.BatchNorm1d(4),
        ),
        0,
    )  # fmt: skip
    model.train()
    model[4].eval()
    model[0].weight.requires_grad_(False)
    model[1].register_forward_hook(lambda _module, _args, _output: None)
    return model, bomb, {"0": 3, "4": (3, "spatial", "factored"), "8": 4, "9": 2}


def test_nothing_changes_before_it_is_written():
    model, _, choices = booby_trapped()
    before = everything(model)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(randn(12, 3, 8, 8, seed=0, dtype=torch.float32), 4, shuffle=True)
    found, _ = look(model, loader, choices)
    assert is_as(before, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(found.biases) == 4
    assert len(found.norms.statistics()) == 6


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_at_any_run_leaves_the_model_bit_for_bit(kind):
    images = randn(6, 3, 8, 8, seed=0, dtype=torch.float32)
    model, bomb, choices = booby_trapped()
    look(model, images.split(3), choices)
    runs = bomb.seen.runs
    assert runs > 6
    before = everything(model)
    state = torch.get_rng_state()
    for at in range(1, runs + 1):
        bomb.seen.runs, bomb.seen.at, bomb.seen.kind = 0, at, kind
        with pytest.raises(kind, match="boom"):
            look(model, images.split(3), choices)
        assert is_as(before, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_batch_of_the_wrong_shape_leaves_the_model_bit_for_bit():
    model = small_resnet(1)
    before = everything(model)
    images = randn(4, 3, 8, 8, seed=0, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="channels"):
        svd_compress_(model, 0.5, calibration=[images, images[:, :2]], progress=False)
    assert is_as(before, model)


def test_what_cannot_be_written_is_not_written_by_half():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    fill_(model, 0)
    model[1].running_var = torch.ones(1).expand(5)  # one number in memory: nothing can be copied into it
    before = everything(model)
    found, _ = look(model, [randn(30, 6, seed=0, dtype=torch.float32)], {"0": 2, "2": 2})
    with pytest.raises(RuntimeError), Undo() as undo:
        found.write_(undo)
    assert is_as(before, model)


@pytest.mark.parametrize("grad", [True, False])
def test_it_runs_with_and_without_gradients_and_keeps_the_flags(grad):
    model = fill_(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)), 0)
    model[0].bias.requires_grad_(False)
    inputs = randn(30, 6, seed=0, dtype=torch.float32).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        refit_(model, [inputs], {"0": 2, "2": 2})
    assert inputs.grad is None
    assert {name: one.requires_grad for name, one in model[0].named_parameters()} == {
        "down.weight": True,
        "up.weight": True,
        "up.bias": False,
    }
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model[2].parameters())
    assert not any(buffer.requires_grad for buffer in model.buffers())
    model(inputs).sum().backward()


@pytest.mark.parametrize("made_there", [True, False])
def test_in_inference_mode_it_does_the_same(made_there):
    inputs = randn(30, 6, seed=0, dtype=torch.float32)
    build = lambda: fill_(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)), 0)  # noqa: E731
    expected = build()
    svd_compress_(expected, 0.2, calibration=[inputs], progress=False)
    with torch.inference_mode(made_there):
        model = build()
    with torch.inference_mode():
        svd_compress_(model, 0.2, calibration=[inputs.clone()], progress=False)
    state = expected.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    if not made_there:
        model(inputs).sum().backward()


def test_the_same_data_gives_the_same_network_whatever_the_random_state():
    images = randn(12, 3, 8, 8, seed=0, dtype=torch.float32)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model, _, choices = booby_trapped()
        refit_(model, images.split(5), choices)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_plan_can_be_fitted_to_data_when_it_is_applied():
    images = randn(12, 3, 12, 12, seed=0, dtype=torch.float32)
    model = small_resnet(1)
    plan = plan_compression(model, 0.5)
    free, fitted = copy.deepcopy(model), copy.deepcopy(model)
    plan.apply_(free)
    report = plan.apply_(fitted, calibration=[images], progress=False)
    assert report.parameters_after == plan.parameters_after
    assert all((layer.output_error is not None) == (layer.scheme is not None) for layer in report.layers)
    wanted = outputs(model, [images])
    assert misfit(outputs(fitted, [images]), wanted) < 0.5 * misfit(outputs(free, [images]), wanted)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "calibration is empty: pass at least one batch"),
        (torch.zeros(3, 24), TypeError, r"calibration must be an iterable of inputs, such as \[inputs\]"),
        (["text"], TypeError, "a batch must be a tensor, a tuple or list that begins with the input, or a dict"),
        (3, TypeError, "calibration must be an iterable of inputs.*got int 3"),
    ],
)
def test_what_is_no_data_is_refused(batches, error, message):
    model = mlp()
    before = everything(model)
    with pytest.raises(error, match=message):
        svd_compress_(model, 0.5, calibration=batches)
    assert is_as(before, model)


# Norms, and rows in batches


def normed_mlp(seed):
    layers = [part for _ in range(3) for part in (nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU())]
    return fill_(nn.Sequential(*layers, nn.Linear(12, 5)), seed).double().eval()


@settings(max_examples=10)
@given(seeds, st.sampled_from([1, 7, 40]), st.booleans(), st.sampled_from([("0", "3", "6", "9"), ("0", "9"), ("0",)]))
def test_it_does_not_matter_how_rows_are_cut_into_batches(seed, size, is_sorted, names):
    model, inputs = normed_mlp(seed), correlated(120, 12, seed)
    order = inputs[:, 0].argsort() if is_sorted else torch.arange(120)
    choices = {name: {"0": 6, "9": 3}.get(name, 5) for name in names}
    found, replacements = look(model, [inputs], choices)
    other, others = look(model, inputs[order].split(size), choices)
    for one, another in zip(replacements.values(), others.values(), strict=True):
        assert torch.allclose(multiply_out(one), multiply_out(another), atol=1e-7)
    assert found.errors == pytest.approx(other.errors, abs=1e-7)
    for one, another in zip(found.values, other.values, strict=True):
        assert torch.allclose(one, another, atol=1e-7)


@settings(max_examples=10)
@given(seeds, st.sampled_from([1, 40]))
def test_the_error_that_is_reported_is_the_one_that_is_there(seed, size):
    model, inputs = normed_mlp(seed), correlated(120, 12, seed)
    wanted = centred(outputs(model, [inputs]))
    found = refit_(model, inputs[inputs[:, 0].argsort()].split(size), {"0": 6, "3": 5, "6": 5, "9": 3})
    assert found.errors["9"] == pytest.approx(misfit(centred(outputs(model, [inputs])), wanted), abs=1e-6)


class Twins(nn.Module):
    """An encoder that takes two inputs, one after the other."""

    def __init__(self, seed):
        super().__init__()
        self.encoder = normed_mlp(seed)

    def forward(self, x):
        return torch.cat([self.encoder(x[:, :12]), self.encoder(x[:, 12:])], 1)


@trusted
def test_norms_of_an_encoder_that_is_called_twice_follow():
    twins, inputs = Twins(0), torch.cat([correlated(80, 12, 0), correlated(80, 12, 0)], 1)
    alone = normed_mlp(0)
    choices = {"0": 6, "3": 5, "6": 5, "9": 3}
    found, _ = look(alone, [inputs[:, :12]], choices)
    twice, _ = look(twins, [inputs], {f"encoder.{name}": rank for name, rank in choices.items()})
    norms = [
        (one.running_var, another.running_var)
        for one, another in zip(alone, twins.encoder, strict=True)
        if isinstance(one, nn.BatchNorm1d)
    ]
    assert len(norms) == 3
    moved = {id(buffer): values for buffer, values in found.norms.statistics()}
    moved_twice = {id(buffer): values for buffer, values in twice.norms.statistics()}
    for own, other in norms:
        assert not torch.allclose(moved_twice[id(other)], other, atol=1e-3)
        assert torch.allclose(moved_twice[id(other)], moved[id(own)], atol=1e-7)


class Conditioned(nn.Module):
    """A network with a branch that puts out the same for each row, up to how products of other sizes are rounded."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 100), nn.SiLU(), nn.Linear(100, 16))
        self.inside, self.outside = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x):
        time = self.time(torch.linspace(0.3, 0.9, 16, dtype=x.dtype).expand(len(x), 16))
        return self.outside(torch.relu(self.inside(x + time)))


@pytest.mark.parametrize("sizes", [(90, 90), (64, 1), (33, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_vary_says_nothing_of_ranks(sizes, dtype):
    model = fill_(Conditioned(), 0).to(dtype)
    batches = [randn(size, 16, seed=size, dtype=dtype) for size in sizes]
    plan = plan_compression(model, 0.3, calibration=batches)
    alone = plan_compression(model, 0.3)
    for name in ("time.0", "time.2"):
        options, others = plan[name].options, alone[name].options
        assert all(torch.equal(options[scheme].losses, others[scheme].losses) for scheme in others)
    assert plan.ratio == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_bias_out_of_range_becomes_the_largest_of_the_dtype(sign):
    low_rank = LowRankLinear.from_linear(nn.Linear(6, 5).half(), 2)
    moments = Moments()
    moments.add(torch.zeros(1, 4, 6), torch.full((1, 4, 5), sign * 1e6))
    bias = _bias_of(low_rank, moments, torch.float16)
    assert bias.half().tolist() == [sign * torch.finfo(torch.float16).max] * 5


@pytest.mark.parametrize("sizes", [(90, 90), (64, 1), (33, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_vary_is_brought_back_by_the_bias(sizes, dtype):
    model = fill_(Conditioned(), 0).to(dtype)
    dense = copy.deepcopy(model)
    batches = [randn(size, 16, seed=size, dtype=dtype) for size in sizes]
    found = refit_(model, batches, {"time.0": 4, "time.2": 4, "inside": 8, "outside": 4})
    assert not found.notes
    assert [found.errors[name] for name in ("time.0", "time.2")] == [0.0, 0.0]
    time = torch.linspace(0.3, 0.9, 16, dtype=dtype)
    assert misfit(outputs(model.time, [time]), outputs(dense.time, [time])) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("names", [("0",), ("0", "9")])
@pytest.mark.parametrize("size", [120, 40])
def test_norms_in_a_row_are_found_in_a_round_for_each_and_in_one_if_there_is_one_batch(names, size):
    model, inputs = normed_mlp(0), correlated(120, 12, 0)
    with patch.object(FollowingNorms, "settle", autospec=True, side_effect=FollowingNorms.settle) as rounds:
        look(model, inputs.split(size), dict.fromkeys(names, 3))
    assert rounds.call_count == (1 if size == 120 else 3)


class CalledAgain(nn.Module):
    """An encoder that is called once more after all that lies behind its first call."""

    def __init__(self, late):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
        self.predictor, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.late = late

    def forward(self, x):
        one, other = x[:, :8], x[:, 8:]
        if self.late:
            predicted = self.head(self.predictor(self.encoder(one).relu()))
            return predicted + self.encoder(other)[:, :4]
        one, other = self.encoder(one).relu(), self.encoder(other)
        return self.head(self.predictor(one)) + other[:, :4]


def test_a_norm_that_is_called_again_behind_all_layers_follows_in_all_of_its_calls():
    inputs = torch.cat([randn(90, 8, seed=0) / 3, 3 * randn(90, 8, seed=1) + 1], 1)
    found = {}
    for late in (True, False):
        model = fill_(CalledAgain(late), 0).double().eval()
        dense = copy.deepcopy(model)
        refit_(model, inputs.split(40), {"encoder.0": 3, "predictor": 4, "head": 3})
        rows = torch.cat(inputs.chunk(2, 1))
        after, before = outputs(model.encoder, [rows]), outputs(dense.encoder, [rows])
        assert torch.allclose(after.mean(0), before.mean(0), atol=1e-6)
        assert torch.allclose(after.var(0), before.var(0), rtol=1e-6)
        found[late] = model.state_dict()
    assert all(torch.equal(value, found[False][key]) for key, value in found[True].items())
