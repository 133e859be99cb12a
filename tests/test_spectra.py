"""The numbers of a spectrum against slow references, and how they are given out."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchsmooth
from tests.networks import EVERY_LAYER, linear_of, two_layers
from tests.reference import spectra as reference
from tests.strategies import HARD_KINDS, fill_, hard_matrices, hard_matrix, randn, seeds
from torchsmooth import spectrum

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest singular value: that of a float64 SVD, or of a Gram matrix in float64.
TOLERANCE = {torch.float64: 1e-12} | dict.fromkeys(DTYPES[1:], 1e-6)
SCHEMES = ("channel", "input", "spatial", "spatial_transposed")
ratios = st.integers(1, 99).map(lambda percent: percent / 100)


def seen(layer: nn.Module, **options):
    (only,) = spectrum(layer, **options)
    return only


@pytest.mark.parametrize("layer", EVERY_LAYER)
@settings(max_examples=4)
@given(seed=seeds, scheme=st.sampled_from(SCHEMES), dtype=st.sampled_from(DTYPES), ratio=ratios)
def test_every_layer_has_the_numbers_of_the_reference(layer, seed, scheme, dtype, ratio):
    module = fill_(EVERY_LAYER[layer](), seed).to(dtype)
    found = seen(module, scheme=scheme)
    scheme = scheme if module.weight.dim() == 4 or scheme == "input" else "channel"
    layout = {"groups": getattr(module, "groups", 1), "transposed": "Transpose" in type(module).__name__}
    values = reference.singular_values(module.weight, scheme, **layout)
    tolerance = TOLERANCE[dtype]
    assert (found.shape, found.scheme, found.type) == (tuple(module.weight.shape), scheme, type(module).__name__)
    assert found.singular_values.dtype == torch.float64
    torch.testing.assert_close(
        found.singular_values, torch.tensor(values, dtype=torch.float64), rtol=0, atol=tolerance * max(map(max, values))
    )
    assert found.full_rank == len(values[0])
    assert found.effective_rank == pytest.approx(reference.effective_rank(values), rel=1e-5)
    assert found.stable_rank == pytest.approx(reference.stable_rank(values), rel=1e-5)
    kept = reference.kept(module.weight, scheme, found.rank_at(ratio), **layout)
    assert found.energy(ratio) == pytest.approx(kept, abs=1e-9)
    rough = reference.roughness(module.weight, **layout)
    assert (found.first_difference, found.second_difference) == pytest.approx(rough, rel=1e-9)


@given(data=st.data(), dtype=st.sampled_from(DTYPES), ratio=ratios)
def test_hard_matrices_have_the_numbers_of_the_reference(data, dtype, ratio):
    matrix = data.draw(hard_matrices(dtype=dtype))
    found = seen(linear_of(matrix))
    values = reference.singular_values(matrix, "channel")
    assert found.singular_values.tolist()[0] == pytest.approx(values[0], abs=10 * TOLERANCE[dtype] * values[0][0])
    assert found.effective_rank == pytest.approx(reference.effective_rank(values), rel=1e-4)
    assert found.stable_rank == pytest.approx(reference.stable_rank(values), rel=1e-5)
    assert found.energy(ratio) == pytest.approx(reference.kept(matrix, "channel", found.rank_at(ratio)), abs=1e-9)
    rough = reference.roughness(matrix)
    assert (found.first_difference, found.second_difference) == pytest.approx(rough, rel=1e-9, abs=1e-12)


@given(data=st.data(), dtype=st.sampled_from(DTYPES), energy=st.floats(0.01, 0.999))
def test_the_numbers_keep_their_bounds(data, dtype, energy):
    matrix = data.draw(hard_matrices(dtype=dtype))
    found = seen(linear_of(matrix))
    least = 1 if matrix.any() else 0
    slack = 1 + 1e-12
    assert least <= found.stable_rank * slack <= found.effective_rank * slack**2 <= found.full_rank * slack**3
    assert 0 <= found.relative_rank <= slack
    assert 0 <= found.first_difference <= 8
    assert 0 <= found.second_difference <= 32
    energies = [found.energy(percent / 100) for percent in range(1, 100, 7)]
    assert all(0 <= later <= earlier <= 1 for earlier, later in pairwise(energies))
    rank = found.rank_for(energy)
    assert least <= rank <= found.full_rank
    assert reference.kept(matrix, "channel", rank) >= energy - 1e-9
    assert rank == 0 or reference.kept(matrix, "channel", rank - 1) <= energy + 1e-9


@settings(max_examples=30)
@given(seed=seeds, kind=st.sampled_from(HARD_KINDS), power=st.integers(-1000, 900), dtype=st.sampled_from(DTYPES[:2]))
def test_only_the_singular_values_depend_on_the_scale(seed, kind, power, dtype):
    # As far as the dtype reaches without rounding.
    power = power if dtype == torch.float64 else power // 16
    matrix = hard_matrix("normal" if kind == "tiny" else kind, 6, 5, seed, dtype)
    one, other = seen(linear_of(matrix)), seen(linear_of(torch.ldexp(matrix, torch.tensor(power, dtype=dtype))))
    assert (other.first_difference, other.second_difference) == (one.first_difference, one.second_difference)
    measures = ("effective_rank", "stable_rank")
    assert [getattr(other, name) for name in measures] == pytest.approx([getattr(one, name) for name in measures])
    assert other.energy(0.5) == pytest.approx(one.energy(0.5))
    expected = torch.ldexp(one.singular_values, torch.tensor(power, dtype=torch.float64))
    torch.testing.assert_close(other.singular_values, expected, rtol=0, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_single_precision_at_the_ends_of_its_range(scale):
    matrix = randn(7, 6, seed=3, dtype=torch.float32)
    one, other = seen(linear_of(matrix)), seen(linear_of(scale * matrix))
    for name in ("effective_rank", "stable_rank", "first_difference", "second_difference"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-5)
    assert other.singular_values.amax().item() == pytest.approx(scale * one.singular_values.amax().item(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_groups_in_double_precision_far_beyond_the_range_of_squares(scale):
    conv = fill_(nn.Conv1d(8, 8, 1, groups=2), 0).double()
    expected = seen(conv)
    with torch.no_grad():
        conv.weight *= scale
    for name in ("effective_rank", "stable_rank", "first_difference", "second_difference"):
        assert getattr(seen(conv), name) == pytest.approx(getattr(expected, name))
    assert seen(conv).energy(0.5) == pytest.approx(expected.energy(0.5))


@given(rows=st.integers(1, 60), columns=st.integers(1, 60), percent=st.integers(1, 99))
def test_the_rank_at_a_ratio_is_the_largest_that_is_small_enough(rows, columns, percent):
    found = torchsmooth.spectra.LayerSpectrum("", "", (rows, columns), "channel", (rows, columns), torch.ones(1), 0, 0)
    assert found.rank_at(percent / 100) == reference.rank_at(Fraction(percent, 100), rows, columns)


def test_the_energy_is_that_of_the_layer_that_compression_makes():
    layer = fill_(nn.Conv2d(8, 12, 3, groups=2, bias=False), 5).double()
    found = seen(layer)
    factored = torchsmooth.LowRankConv2d.from_conv2d(layer, found.rank_at(0.5))
    assert sum(one.numel() for one in factored.parameters()) <= 0.5 * layer.weight.numel()
    error = float(((factored.weight - layer.weight).norm() / layer.weight.norm()).detach())
    assert found.energy(0.5) == pytest.approx(1 - error**2)


def test_patterns_that_are_known():
    flat, slope = torch.full((6, 5), 0.3), torch.arange(6.0)[:, None] + 2 * torch.arange(5.0)
    chess = (-1.0) ** (torch.arange(40)[:, None] + torch.arange(40))
    assert (seen(linear_of(flat)).first_difference, seen(linear_of(flat)).second_difference) == (0, 0)
    assert seen(linear_of(slope)).second_difference == 0
    assert seen(linear_of(chess)).first_difference == pytest.approx(2 * 4 * 39 / 40)
    assert seen(linear_of(chess)).second_difference == pytest.approx(2 * 16 * 38 / 40)
    noise = seen(linear_of(randn(200, 200, seed=0)))
    assert noise.first_difference == pytest.approx(4, rel=0.05)
    assert noise.second_difference == pytest.approx(12, rel=0.05)
    assert seen(linear_of(torch.eye(7))).effective_rank == pytest.approx(7)
    grouped = fill_(nn.Conv1d(8, 8, 1, groups=2), 0)
    with torch.no_grad():
        grouped.weight[4:] = 0  # a group of zeros carries nothing, and changes nothing
    assert seen(grouped).effective_rank == pytest.approx(
        seen(linear_of(grouped.weight[:4, :, 0].detach())).effective_rank
    )


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 4), (3, 0), (0, 0)])
def test_zero_and_empty_weights(shape):
    found = seen(linear_of(torch.zeros(shape)))
    assert found.singular_values.shape == (1, min(shape))
    assert (found.effective_rank, found.stable_rank, found.relative_rank) == (0, 0, 0)
    assert (found.first_difference, found.second_difference) == (0, 0)
    assert (found.energy(0.5), found.rank_for(0.5)) == (1, 0)
    assert found.relative_values.tolist() == [0.0] * min(shape)
    assert "(the model)" in str(spectrum(linear_of(torch.zeros(shape))))


def test_means_over_the_model_are_weighted_by_size():
    model = nn.Sequential(linear_of(torch.eye(10)), linear_of(torch.zeros(5, 2)))
    found = spectrum(model, ratio=0.5)
    assert found.relative_rank == pytest.approx(100 / 110)
    assert found.energy == pytest.approx((100 * 0.2 + 10) / 110)
    assert spectrum(linear_of(torch.zeros(3, 0))).energy == 0


def test_the_table_is_aligned_and_names_everything():
    lines = str(spectrum(two_layers(), ratio=0.25)).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert len({line.index("×") for line in lines[2:4]}) == 1
    assert lines[2].startswith("0      5×6")
    assert re.fullmatch(
        r"2 layers: effective rank \d+\.\d % of full, energy 0\.\d{4} with 25 % fewer parameters in each", lines[4]
    )


def test_scalars_are_ready_to_be_logged():
    found = spectrum(two_layers(), ratio=0.5)
    scalars = found.scalars()
    assert len(scalars) == 2 + 5 * 2
    assert all(type(value) is float and math.isfinite(value) for value in scalars.values())
    assert all(re.fullmatch(r"torchsmooth(\.\w+)?/[\w.]+", tag) for tag in scalars)  # nothing that a logger replaces
    assert scalars["torchsmooth/energy"] == found.energy
    assert scalars["torchsmooth.energy/2"] == found["2"].energy(0.5)
    assert scalars["torchsmooth.first_difference/0"] == found["0"].first_difference
    assert set(found.scalars("")) == {re.sub(r"^torchsmooth[./]", "", tag) for tag in scalars}
    assert "torchsmooth.stable_rank/model" in spectrum(nn.Linear(2, 2)).scalars()
    with pytest.raises(TypeError, match="prefix must be a string, got None"):
        found.scalars(None)


def test_the_dictionary_goes_through_json():
    found = spectrum(two_layers())
    given = json.loads(json.dumps(found.to_dict()))
    assert given == found.to_dict()
    assert [layer["name"] for layer in given["layers"]] == ["0", "2"]
    assert given["layers"][0]["singular_values"] == found["0"].singular_values.tolist()
    assert (given["ratio"], given["energy"]) == (0.8, found.energy)
