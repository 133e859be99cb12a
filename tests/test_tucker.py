"""Tucker-2: its errors, its factors, the layer, and what plans make of it."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchsmooth
from tests.networks import small_resnet
from tests.reference.tucker import count, hosvd, multiplied_out
from tests.strategies import HARD_KINDS, convolutions, fill_, hard_matrix, randn, seeds
from torchsmooth import TuckerConv2d
from torchsmooth._macs import count_macs
from torchsmooth._running import as_inputs
from torchsmooth._tucker import signed, tucker_bases, tucker_errors, tucker_factors, tucker_product
from torchsmooth._tucker_layout import TuckerLayout
from torchsmooth._tucker_spectrum import TuckerSpectrum
from torchsmooth._whitening import Output, tucker_output_errors

FORMS = ("factored", "pivoted")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 7e-2, torch.float16: 8e-3}
# torch says so of the dense convolution as well.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm()) / max(float(expected.norm()), 1e-300)


@st.composite
def tensors(draw, dtype=torch.float64):
    """Weights as ``(groups, out, in, k)``, with every property that breaks careless code."""
    groups, outputs, inputs, positions = (draw(st.integers(1, most)) for most in (2, 7, 7, 4))
    kind = draw(st.sampled_from(HARD_KINDS))
    axis = draw(st.booleans())
    rows, columns = (outputs, inputs * positions) if axis else (inputs, outputs * positions)
    parts = [hard_matrix(kind, rows, columns, draw(seeds), dtype) for _ in range(groups)]
    whole = torch.stack(parts)
    if axis:
        return whole.reshape(groups, outputs, inputs, positions)
    return whole.reshape(groups, inputs, outputs, positions).transpose(1, 2)


@given(tensors())
def test_errors_are_those_of_the_truncated_hosvd(weight):
    errors = TuckerSpectrum(weight).errors()
    groups, outputs, inputs, positions = weight.shape
    flat = weight.reshape(groups * outputs, inputs, 1, positions)
    whole = float(flat.square().sum())
    assert errors.shape == (min(inputs, outputs * positions) + 1, min(outputs, inputs * positions) + 1)
    assert (errors.diff(dim=0) <= 0).all()
    assert (errors.diff(dim=1) <= 0).all()
    assert float(errors[-1, -1]) == 0
    if whole == 0:
        assert not errors.any()
        return
    assert (errors[0] == 1)[:-1].all()
    r_in, r_out = (size - 1 for size in errors.shape)
    matrix = flat.reshape(groups, outputs, -1) / weight.abs().max()
    tails = torch.linalg.svdvals(matrix).square().sum(0).flip(0).cumsum(0).flip(0)
    # With one side whole, it is the truncated SVD of the other.
    assert torch.allclose(errors[r_in, :-1][: len(tails)], (tails / tails[0])[:r_out], atol=1e-10)


@given(data=st.data())
def test_no_pair_is_worse_than_predicted_nor_than_the_hosvd(data):
    weight = data.draw(tensors())
    errors = TuckerSpectrum(weight).errors()
    groups, outputs, inputs, positions = weight.shape
    ranks = tuple(data.draw(st.integers(1, size - 1)) for size in errors.shape)
    up, core, down = tucker_factors(weight, ranks)
    product = tucker_product(up, core, down)
    scale = float(weight.abs().max()) or 1.0
    missed = float(((weight - product) / scale).square().sum())
    whole = float((weight / scale).square().sum())
    assert missed <= (float(errors[ranks]) + 1e-12) * whole
    flat = weight.reshape(groups * outputs, inputs, 1, positions)
    reference = hosvd(flat, ranks, groups)
    assert missed <= float(((flat - reference) / scale).square().sum()) * (1 + 1e-6) + 1e-12 * whole
    for basis in (up, down.mT):
        assert torch.allclose(basis.mT @ basis, torch.eye(basis.shape[-1]).double().expand(groups, -1, -1), atol=1e-10)
    # Pythagoras: what is missing is orthogonal to what is kept.
    kept = float((core / scale).square().sum())
    assert abs(whole - kept - missed) <= 1e-10 * whole


def test_factors_are_the_same_every_time_and_of_fixed_signs():
    weight = randn(2, 6, 5, 9, seed=3)
    first, second = tucker_factors(weight, (2, 3)), tucker_factors(weight.clone(), (2, 3))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    for basis in (first[0], first[2].mT):
        assert (basis.gather(-2, basis.abs().argmax(-2, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e8, 1e-9])
def test_factors_of_any_scale_are_stored_evenly(dtype, scale):
    conv = nn.Conv2d(8, 12, 3).to(dtype)
    layer = TuckerConv2d.from_conv2d(conv, (6, 8))
    before = layer.weight.detach().clone()
    up, core, down = (one.double() for one in layer.factors())
    layer.set_factors_(up * scale, core / scale, down)
    assert relative(layer.weight, before) <= TOLERANCE[dtype]
    layer.set_factors_(up, core / scale, down * scale)
    assert relative(layer.weight, before) <= TOLERANCE[dtype]


def test_a_convolution_with_many_outputs_takes_no_large_decomposition(monkeypatch):
    def no_larger(solve):
        def checked(matrix, *args, **kwargs):
            assert min(matrix.shape[-2:]) <= 64
            return solve(matrix, *args, **kwargs)

        return checked

    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, no_larger(getattr(torch.linalg, name)))
    conv = nn.Conv2d(3, 500, 3)
    for dtype in (torch.float32, torch.float64):
        layer = TuckerConv2d.from_conv2d(conv.to(dtype), (3, 27))
        assert relative(layer.weight, conv.weight) <= TOLERANCE[dtype]
        TuckerConv2d.from_conv2d(conv, (2, 4))


def usable(conv, form):
    return TuckerLayout.of(conv.weight.shape, conv.groups).largest_rank(form)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_a_convolution_is_reproduced_at_full_ranks(dtype, data):
    conv, inputs = data.draw(convolutions(dtype, least=2))
    layer = TuckerConv2d.from_conv2d(conv, usable(conv, "factored"))
    found, expected = layer(inputs), conv(inputs)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert relative(found, expected) <= TOLERANCE[dtype]
    assert relative(layer.weight, conv.weight) <= TOLERANCE[dtype]


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_a_layer_computes_what_its_weight_says(form, data):
    conv, inputs = data.draw(convolutions(least=2))
    most = usable(conv, form)
    ranks = tuple(data.draw(st.integers(1, one)) for one in most)
    layer = TuckerConv2d.from_conv2d(conv, ranks, form)
    dense = copy.deepcopy(conv)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
    assert relative(layer(inputs), dense(inputs)) <= 1e-10
    assert relative(layer.to_dense()(inputs), dense(inputs)) <= 1e-10
    weights = sum(one.numel() for one in layer.parameters() if one.dim() > 1)
    assert weights == count(tuple(conv.weight.shape), conv.groups, ranks, form) == layer.layout.parameters(ranks, form)
    if form == "factored":
        product = multiplied_out(layer.up.weight, layer.core.weight, layer.down.weight, conv.groups)
        assert relative(product, layer.weight) <= 1e-12
    else:
        plain = TuckerConv2d.from_conv2d(conv, ranks)
        assert relative(layer.weight, plain.weight) <= 1e-10
    again = TuckerConv2d.from_conv2d(conv, ranks, form)
    again.set_factors_(*layer.factors())
    assert relative(again.weight, layer.weight) <= 1e-10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e3])
def test_hard_scales(form, scale):
    conv = nn.Conv2d(6, 8, 3)
    with torch.no_grad():
        conv.weight.mul_(scale)
    layer = TuckerConv2d.from_conv2d(conv, (5, 7), form)
    assert layer.weight.isfinite().all()
    found, expected = layer.weight.detach().double(), conv.weight.detach().double()
    assert float((found - expected).norm()) <= 0.5 * float(expected.norm())


@pytest.mark.parametrize("form", FORMS)
def test_copies_pickles_and_state_dicts_compute_the_same(form):
    conv, inputs = fill_(nn.Conv2d(8, 12, 3, groups=2, padding=1), 4), randn(2, 8, 6, 6, seed=1, dtype=torch.float32)
    layer = TuckerConv2d.from_conv2d(conv, (2, 4), form)
    expected = layer(inputs)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = TuckerConv2d.like(conv, (2, 4), form)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(inputs), expected)
    keys = {"down.weight", "core.weight", "up.weight"}
    extra = {"up.bias"} if form == "factored" else {"merge.bias", "merge.order", "split.order"}
    assert layer.state_dict().keys() == keys | extra
    assert layer.bias is layer.bias_owner.bias


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TuckerConv2d(8, 8, 1, 2), "kernel larger than 1×1"),
        (lambda: TuckerConv2d(8, 8, 3, 2, groups=8), "two input and output channels"),
        (lambda: TuckerConv2d(8, 8, 3, (9, 2)), r"\(r_in\) must lie between 1 and 8"),
        (lambda: TuckerConv2d(8, 8, 3, (2, 8), form="pivoted"), r"\(r_out\) must lie between 1 and 7"),
        (lambda: TuckerConv2d(8, 8, 3, (1, 2, 3)), "must be a pair"),
        (lambda: TuckerConv2d(8, 8, 3, 2, form="other"), "form"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize("ratio", [0.4, 0.7, 0.9])
def test_a_plan_meets_its_budget_and_loads_again(form, ratio):
    model = small_resnet()
    inputs = randn(2, 3, 16, 16, seed=2, dtype=torch.float32)
    small = copy.deepcopy(model)
    report = torchsmooth.svd_compress_(small, ratio, scheme="tucker", form=form)
    assert sum(one.numel() for one in small.parameters()) == report.parameters_after
    assert report.parameters_after <= (1 - ratio) * report.parameters_before
    assert report.parameters_after >= (1 - ratio) * report.parameters_before * 0.97
    chosen = [one for one in report.layers if one.scheme == "tucker"]
    assert chosen
    assert "×" in str(report)
    plan = torchsmooth.plan_compression(model, ratio, scheme="tucker", form=form)
    for one in chosen:
        assert one.relative_error <= plan[one.name].relative_error + 1e-6
        assert isinstance(small.get_submodule(one.name), TuckerConv2d)
    again = torchsmooth.load_compressed_(copy.deepcopy(model), small.state_dict())
    assert torch.equal(again(inputs), small(inputs))
    dense = torchsmooth.restore_dense_(copy.deepcopy(small))
    assert relative(dense(inputs), small(inputs)) <= 1e-4
    assert not any(isinstance(one, TuckerConv2d) for one in dense.modules())


def test_tucker_is_one_of_the_choices_and_wins_where_it_is_better():
    conv = nn.Conv2d(16, 16, 3)
    with torch.no_grad():
        core = TuckerConv2d(16, 16, 3, (4, 4))
        conv.weight.copy_(core.weight)
    model = nn.Sequential(conv, nn.ReLU())
    plan = torchsmooth.plan_compression(model, max_error=1e-4)
    assert plan["0"].scheme == "tucker"
    assert plan["0"].rank == (4, 4)
    assert plan["0"].full_rank == (16, 16)
    plan = torchsmooth.plan_compression(model, 0.5, scheme="channel")
    assert plan["0"].scheme == "channel"


def test_linear_layers_and_small_kernels_take_channel_instead():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 32))
    plan = torchsmooth.plan_compression(model, 0.3, scheme="tucker")
    assert all("tucker" not in layer.options for layer in plan)


def test_ranks_of_a_plan_can_be_set():
    model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Conv2d(12, 8, 3))
    plan = torchsmooth.plan_compression(model, 0.5, scheme="tucker")
    layer = plan["0"]
    layer.rank = (3, 5)
    assert layer.rank == (3, 5)
    assert layer.parameters_after == count((12, 8, 3, 3), 1, (3, 5), layer.form) == layer.cost_after
    layer.rank = 4
    assert layer.rank == (4, 4)
    layer.rank = (8, 4)  # not in the pivoted form
    assert layer.form == "factored"
    for wrong in ((9, 4), (3, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match="rank of layer '0'"):
            layer.rank = wrong
    with pytest.raises(TypeError, match="integer"):
        layer.rank = (2.5, 3)
    layer.keep_dense()
    layer.rank = (2, 2)
    assert layer.scheme == "tucker"
    everything = torchsmooth.plan_compression(model, 0.5)["0"]
    everything.choose("tucker", (3, 4))
    with pytest.raises(ValueError, match="pair of ranks"):
        everything.scheme = "channel"


@pytest.mark.parametrize("target", ["params", "macs", "latency"])
def test_a_plan_survives_its_file(target):
    model, inputs, ratio = small_resnet(), randn(1, 3, 16, 16, seed=2, dtype=torch.float32), 0.6
    if target == "latency":  # large enough to get faster
        model, inputs, ratio = nn.Sequential(nn.Conv2d(128, 128, 5, padding=2)), torch.zeros(1, 128, 24, 24), 0.2
    given = {} if target == "params" else {"example_inputs": inputs}
    plan = torchsmooth.plan_compression(model, ratio, scheme="tucker", target=target, **given)
    text = plan.to_json()
    again = torchsmooth.CompressionPlan.from_json(text)
    assert again == plan
    assert str(again) == str(plan)
    for one, other in zip(plan, again, strict=True):
        assert one.cost_after == other.cost_after
        if "tucker" in one.options:
            known, exact = other.options["tucker"].errors, one.options["tucker"].errors
            assert (known >= exact - 1e-5).all()  # an upper bound, where it is not listed
    content = json.loads(text)
    layer = next(one for one in content["layers"] if one["scheme"] == "tucker")
    for wrong in ([1], [0, 1], [10**6, 1], 3):
        layer["rank"] = wrong
        with pytest.raises(ValueError, match="rank"):
            torchsmooth.CompressionPlan.from_json(json.dumps(content))


@pytest.mark.parametrize("form", FORMS)
def test_multiply_accumulates_are_exact(form):
    model = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=2))
    inputs = torch.zeros(2, 8, 12, 10)
    plan = torchsmooth.plan_compression(model, 0.4, scheme="tucker", form=form, target="macs", example_inputs=inputs)
    plan.apply_(model)
    assert count_macs(model, as_inputs(inputs)) == plan.macs_after
    assert plan.macs_after <= 0.6 * plan.macs_before


@pytest.mark.parametrize("multiple", [2, 4])
def test_multiples_apply_to_both_ranks(multiple):
    plan = torchsmooth.plan_compression(small_resnet(), 0.6, scheme="tucker", rank_multiple=multiple)
    ranks = [layer.rank for layer in plan if layer.scheme == "tucker"]
    assert ranks
    assert all(one % multiple == 0 for pair in ranks for one in pair)


@given(st.integers(2, 600), st.integers(2, 600), st.sampled_from([1, 3, 8]), st.sampled_from(FORMS))
def test_a_large_layer_has_a_grid_of_ranks(outputs, inputs, multiple, form):
    layout = TuckerLayout.of((outputs, inputs, 3, 3))
    ranks = layout.ranks(form, multiple)
    for side, most in zip(ranks.unbind(1), layout.largest_rank(form), strict=True):
        values = side.unique().tolist()
        assert len(values) <= 64
        assert values == [] or (values[0] >= multiple and values[-1] <= most)
        assert all(one % multiple == 0 for one in values)
    if multiple == 1:
        small = {(a, a) for a in range(1, min(32, *layout.largest_rank(form)) + 1)}
        assert small <= {tuple(pair) for pair in ranks.tolist()}


@given(seeds)
def test_output_errors_are_those_of_the_best_that_follows_the_first_factor(seed):
    groups, outputs, inputs, kernel = 2, 5, 4, (1, 3)
    layout = TuckerLayout(groups, outputs, inputs, kernel)
    weight = randn(groups, outputs, inputs * 3, seed=seed)
    rows = randn(groups, 40, inputs * 3, seed=seed + 1)
    inner = rows.mT @ rows / 40
    losses = tucker_output_errors(Output(weight, inner), layout)
    assert (losses.diff(dim=0) <= 0).all()
    assert (losses.diff(dim=1) <= 0).all()
    conv = nn.Conv2d(groups * inputs, groups * outputs, kernel, groups=groups, dtype=torch.float64)
    whole = float(((weight @ inner) * weight).sum())
    for ranks in ((1, 1), (2, 3), (4, 2), (3, 5), (4, 5)):
        layer = TuckerConv2d.like(conv, ranks)
        layer.fit_(weight, inner)
        missed = weight - layer.weight.detach().reshape(groups, outputs, -1)
        assert abs(float(((missed @ inner) * missed).sum()) / whole - float(losses[ranks])) <= 1e-6


def test_calibration_fits_the_output_better():
    model = small_resnet()
    batches = [randn(8, 3, 16, 16, seed=seed, dtype=torch.float32) for seed in range(4)]
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    torchsmooth.svd_compress_(plain, 0.7, scheme="tucker")
    report = torchsmooth.svd_compress_(fitted, 0.7, scheme="tucker", calibration=batches)
    assert any(one.scheme == "tucker" and one.output_error is not None for one in report.layers)
    expected = model(batches[0])
    assert relative(fitted(batches[0]), expected) < relative(plain(batches[0]), expected)


def test_a_layer_in_three_is_compressed_further():
    model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Conv2d(12, 12, 3))
    model[0] = TuckerConv2d.from_conv2d(model[0], (5, 6))
    stored = sum(one.weight.numel() for one in model[0].children())
    plan = torchsmooth.plan_compression(model, 0.3, target="macs", example_inputs=torch.zeros(1, 8, 7, 7))
    assert plan["0"].reason.startswith("already low-rank (rank 5×6)")
    report = torchsmooth.svd_compress_(model, 0.5)
    assert (report["0"].type, report["0"].parameters_before) == ("TuckerConv2d", stored)
    assert report["0"].parameters_after < stored


def test_small_tails_of_pairs_are_not_lost_beside_large_energies():
    sizes = 10.0 ** -torch.arange(0, 30, 3, dtype=torch.float64)
    errors = tucker_errors(sizes[:, None] * sizes)
    tails = torch.cat([sizes.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)]) / sizes.sum()
    assert torch.allclose(errors[-1], tails, rtol=1e-12, atol=0)
    assert torch.allclose(errors[:, -1], tails, rtol=1e-12, atol=0)


@given(seeds, st.sampled_from([(3, 5), (2, 8), (3, 8)]), st.sampled_from([torch.float32, torch.float64]))
def test_where_one_side_is_whole_the_first_bases_are_the_best_and_stay(seed, ranks, dtype):
    weight = randn(1, 8, 3, 6, seed=seed, dtype=dtype)
    outer, inner = tucker_bases(weight)
    up, _, down = tucker_factors(weight, ranks)
    assert torch.allclose(down.mT, signed(inner[..., : ranks[0]]), rtol=0, atol=1e-9)
    assert torch.allclose(up, signed(outer[..., : ranks[1]]), rtol=0, atol=1e-9)
