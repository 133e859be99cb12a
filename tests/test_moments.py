"""Second moments in one pass, and the rows that they are made of: patches as the convolution itself takes them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.reference import calibration as reference
from tests.strategies import convolutions, fill_, randn, seeds
from torchsmooth import _moments
from torchsmooth._moments import POSITIONS, Moments, drawn_positions, input_rows, output_rows

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def gathered(inputs, outputs, sizes):
    moments = Moments()
    for part, other in zip(inputs.split(sizes, 1), outputs.split(sizes, 1), strict=True):
        moments.add(part, other)
    return moments


@pytest.fixture
def every_position(monkeypatch):
    monkeypatch.setattr(_moments, "POSITIONS", 10**6)


def without_bias(layer):
    layer = copy.deepcopy(layer)
    layer.bias = None
    return layer


def through_weight(layer, rows):
    weight = layer.weight.detach().reshape(rows.shape[0], -1, rows.shape[2])
    return rows @ weight.mT


@given(seeds, st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(1, 3), st.booleans())
def test_any_split_into_batches_gives_the_moments_of_two_passes(seed, sizes, groups, centred):
    rows = sum(sizes)
    inputs, outputs = 2 + randn(groups, rows, 4, seed=seed), randn(groups, rows, 3, seed=seed + 1) - 1
    moments = gathered(inputs, outputs, sizes)
    assert moments.count == rows
    if not rows:
        return
    wanted = [reference.moments(x, y, centred=centred) for x, y in zip(inputs, outputs, strict=True)]
    assert torch.allclose(moments.inner(centred=centred), torch.stack([one[0] for one in wanted]), atol=1e-12)
    assert torch.allclose(moments.cross(centred=centred), torch.stack([one[1] for one in wanted]), atol=1e-12)
    assert moments.energy(centred=centred) == pytest.approx(sum(one[2] for one in wanted), abs=1e-12)
    assert torch.allclose(moments.inputs_mean, inputs.mean(1))
    assert torch.allclose(moments.outputs_mean, outputs.mean(1))


@given(seeds, st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_a_large_mean_costs_no_digits_of_a_small_variance(seed, sizes):
    noise, others = 1e-3 * randn(1, sum(sizes), 3, seed=seed), 1e-3 * randn(1, sum(sizes), 2, seed=seed + 1)
    inputs, outputs = noise + 1e6, others - 1e6
    moments = gathered(inputs, outputs, sizes)
    # What is left of the noise beside the mean, which float64 holds to about 1e-10.
    inner, cross, energy = reference.moments((inputs - 1e6)[0], (outputs + 1e6)[0], centred=True)
    scale = 1e-6
    assert torch.allclose(moments.inner(centred=True)[0], inner, rtol=0, atol=1e-6 * scale)
    assert torch.allclose(moments.cross(centred=True)[0], cross, rtol=0, atol=1e-6 * scale)
    assert moments.energy(centred=True) == pytest.approx(energy, abs=1e-6 * scale)
    assert torch.allclose(moments.inner(centred=False)[0], inner + 1e12, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_moments_of_lower_precision_are_those_of_its_values_in_float64(dtype):
    inputs, outputs = randn(1, 50, 4, seed=0, dtype=dtype), randn(1, 50, 2, seed=1, dtype=dtype)
    moments = gathered(inputs, outputs, 20)
    inner, cross, energy = reference.moments(inputs[0], outputs[0], centred=False)
    assert moments.inner(centred=False).dtype == torch.float64
    assert torch.allclose(moments.inner(centred=False)[0], inner, rtol=1e-12)
    assert torch.allclose(moments.cross(centred=False)[0], cross, rtol=1e-12, atol=1e-13)
    assert moments.energy(centred=False) == pytest.approx(energy, rel=1e-12)


@given(seeds, st.sampled_from([torch.float32, torch.float64]), st.sampled_from(["inputs", "outputs", "both"]))
def test_what_differs_by_rounding_alone_does_not_vary(seed, dtype, constant):
    rows, others = randn(2, 30, 4, seed=seed), randn(2, 30, 3, seed=seed + 1)
    noise = 4 * torch.finfo(dtype).eps
    same, same_others = (one[:, :1] * (1 + noise * one.sin()) for one in (rows, others))
    # In the second group all varies.
    if constant != "outputs":
        rows = torch.stack([same[0], rows[1]])
    if constant != "inputs":
        others = torch.stack([same_others[0], others[1]])
    moments = gathered(rows.to(dtype), others.to(dtype), [7, 22, 1])
    inner, cross = moments.inner(centred=True), moments.cross(centred=True)
    assert bool((inner[0] == 0).all()) is (constant != "outputs")
    assert bool((cross[0] == 0).all())
    assert bool(inner[1].any())
    assert bool(cross[1].any())
    expected = [reference.moments(x, y, centred=True) for x, y in zip(rows.to(dtype), others.to(dtype), strict=True)]
    energy = expected[1][2] + (expected[0][2] if constant == "inputs" else 0)
    assert moments.energy(centred=True) == pytest.approx(energy, rel=1e-9)
    alone = gathered(rows[:1].to(dtype), others[:1].to(dtype), [7, 22, 1])
    assert alone.likeness(torch.ones(1, 3, 4, dtype=torch.float64)) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_that_varies_by_a_unit_varies(dtype):
    # One row in three is off by one unit in the last place.
    rows = torch.ones(1, 30, 4, dtype=dtype)
    rows[:, ::3] += torch.finfo(dtype).eps
    moments = gathered(rows, rows, 30)
    assert torch.allclose(moments.inner(centred=True)[0], reference.moments(rows[0], rows[0], centred=True)[0])
    assert moments.likeness(torch.eye(4, dtype=torch.float64)[None]) == pytest.approx(1.0)


def test_a_feature_that_is_large_and_constant_hides_no_other():
    rows = randn(1, 200, 16, seed=0)
    rows[..., 0] = 1e5
    moments = gathered(rows.float(), rows.float(), 64)
    assert moments.inner(centred=True)[0, 1:, 1:].diagonal().min() > 0.5


def test_batches_without_rows_bring_nothing():
    moments = Moments()
    moments.add(torch.zeros(2, 0, 3), torch.zeros(2, 0, 1))
    assert moments.count == 0
    moments.add(torch.ones(2, 1, 3), torch.ones(2, 1, 1))
    before = moments.inner(centred=False)
    moments.add(torch.zeros(2, 0, 3), torch.zeros(2, 0, 1))
    assert moments.count == 1
    assert torch.equal(before, torch.ones(2, 3, 3, dtype=torch.float64))
    assert torch.equal(moments.inner(centred=False), before)
    assert torch.equal(moments.inner(centred=True), torch.zeros_like(before))


def test_no_more_memory_is_held_after_more_batches():
    moments = Moments()
    moments.add(randn(2, 5, 3, seed=0), randn(2, 5, 4, seed=1))
    places = {name: one.data_ptr() for name, one in vars(moments).items() if isinstance(one, torch.Tensor)}
    entries = sum(one.numel() for one in vars(moments).values() if isinstance(one, torch.Tensor))
    for seed in range(5):
        moments.add(randn(2, 7, 3, seed=seed), randn(2, 7, 4, seed=seed + 1))
    assert {name: one.data_ptr() for name, one in vars(moments).items() if isinstance(one, torch.Tensor)} == places
    assert entries == 2 * (3 * 3 + 4 * 3 + 3 + 4 + 4)  # inner, cross; the means, the energies


@given(convolutions(), seeds)
def test_rows_of_a_convolution_times_its_weight_are_rows_of_its_output(case, seed):
    conv, images = case
    rows = input_rows(conv, images, seed)
    outputs = output_rows(conv, without_bias(conv)(images), seed)
    assert rows.shape[0] == outputs.shape[0] == conv.groups
    assert rows.shape[1] <= POSITIONS * len(images)
    assert torch.allclose(through_weight(conv, rows), outputs, atol=1e-12)
    assert torch.equal(input_rows(conv, images, seed), rows)


@settings(max_examples=25)
@given(convolutions(), seeds)
def test_an_image_alone_is_a_batch_of_one(case, seed):
    conv, images = case
    assert torch.equal(input_rows(conv, images[0], seed), input_rows(conv, images[:1], seed))
    output = conv(images)
    assert torch.equal(output_rows(conv, output[0], seed), output_rows(conv, output[:1], seed))


@settings(max_examples=25)
@given(convolutions())
def test_all_rows_are_all_patches_in_order(case):
    conv, images = case
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_moments, "POSITIONS", 10**6)
        rows = input_rows(conv, images, 0)
    expected = reference.patches(conv, images).flatten(0, 1).transpose(0, 1)
    assert torch.equal(rows, expected)


@pytest.mark.usefixtures("every_position")
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), ((2, 3), 2, (0, 2), 1), (3, 3, 2, 2)]
)
def test_all_rows_are_those_of_unfold(kernel, stride, padding, dilation):
    conv = nn.Conv2d(3, 4, kernel, stride, padding, dilation)
    images = randn(2, 3, 9, 8, seed=0)
    columns = F.unfold(images, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    assert torch.equal(input_rows(conv, images, 0)[0], columns.transpose(1, 2).flatten(0, 1))


def test_drawn_rows_are_among_all_rows_as_often_as_positions_are_drawn(every_position, monkeypatch):
    conv, images = nn.Conv2d(2, 3, 3), randn(2, 2, 12, 12, seed=0)
    rows = input_rows(conv, images, 5)[0]
    monkeypatch.setattr(_moments, "POSITIONS", POSITIONS)
    drawn = input_rows(conv, images, 5)[0]
    assert drawn.shape == (2 * POSITIONS, 18)
    found = [int((rows == one).all(1).nonzero()) for one in drawn]
    assert len(set(found)) == len(drawn)


def test_geometry_set_after_a_convolution_was_made_counts():
    # As segmentation networks do with a backbone of theirs.
    conv = fill_(nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), 0).double()
    conv.stride, conv.dilation, conv.padding = 1, 2, 2
    images = randn(2, 2, 9, 9, seed=0)
    assert torch.allclose(through_weight(conv, input_rows(conv, images, 1)), output_rows(conv, conv(images), 1))
    conv.padding = "same"
    assert torch.allclose(through_weight(conv, input_rows(conv, images, 1)), output_rows(conv, conv(images), 1))


@given(st.lists(st.integers(1, 7), max_size=3), seeds)
def test_rows_of_a_linear_layer_times_its_weight_are_rows_of_its_output(axes, seed):
    linear = fill_(nn.Linear(5, 4, bias=False), seed).double()
    inputs = randn(*axes, 5, seed=seed)
    rows, outputs = input_rows(linear, inputs, seed), output_rows(linear, linear(inputs), seed)
    examples = axes[0] if axes else 1
    assert rows.shape == (1, examples * min(POSITIONS, inputs.numel() // 5 // examples), 5)
    assert torch.allclose(through_weight(linear, rows), outputs, atol=1e-12)


def test_few_tokens_are_all_taken_and_of_many_a_few():
    linear = nn.Linear(2, 3)
    few, many = randn(3, 4, 2, seed=0), randn(3, 100, 2, seed=0)
    assert torch.equal(input_rows(linear, few, 0)[0], few.flatten(0, 1))
    rows = input_rows(linear, many, 0)[0]
    assert rows.shape == (3 * POSITIONS, 2)
    for example, drawn in zip(many, rows.split(POSITIONS), strict=True):
        assert len({int((example == one).all(1).nonzero()) for one in drawn}) == POSITIONS


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 4), (0, 5)),
        (nn.Linear(5, 4), (0, 7, 5)),
        (nn.Linear(5, 4), (3, 0, 5)),
        (nn.Conv2d(4, 6, 3, groups=2), (0, 4, 9, 9)),
    ],
)
def test_an_empty_batch_has_no_rows(layer, shape):
    inputs = torch.zeros(shape)
    groups = getattr(layer, "groups", 1)
    weight = layer.weight[0].numel()
    assert input_rows(layer, inputs, 0).shape == (groups, 0, weight)
    assert output_rows(layer, layer(inputs), 0).shape == (groups, 0, len(layer.weight) // groups)


@given(st.integers(0, 5), st.integers(0, 200), seeds)
def test_positions_are_distinct_drawn_again_by_the_same_seed_and_by_nothing_else(examples, positions, seed):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    places = drawn_positions(examples, positions, seed)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(drawn_positions(examples, positions, seed), places)
    assert places.shape == (examples, min(positions, POSITIONS))
    assert all(len(set(one.tolist())) == len(one) for one in places)
    assert not places.numel() or (int(places.min()) >= 0 and int(places.max()) < positions)


def test_examples_and_seeds_draw_differently():
    places = drawn_positions(2, 1000, 0)
    assert not torch.equal(places[0], places[1])
    assert not torch.equal(places, drawn_positions(2, 1000, 1))


def test_every_position_is_drawn_as_often_as_any_other():
    counts = torch.bincount(drawn_positions(4000, 64, 0).flatten(), minlength=64)
    assert bool((counts - 2000).abs().max() < 200)  # a standard deviation is 32


@pytest.mark.parametrize("value", [0.1, 0.3, 1e-9, 1234.567])
@pytest.mark.parametrize("rows", [3, 7, 11, 1000])
def test_inputs_that_are_always_the_same_do_not_vary(value, rows):
    moments = Moments()
    for _ in range(3):
        moments.add(torch.full((1, rows, 4), value, dtype=torch.float64), torch.zeros(1, rows, 2))
    assert not moments.inner(centred=True).any()
    assert moments.inner(centred=False).all()
