"""One decomposition: computed once, shared by all plans of a sweep, and never used for another weight."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import mlp, small_resnet
from tests.strategies import convolutions, hard_matrices, randn, seeds
from torchsmooth import CompressionPlan, _options, plan_compression, sweep
from torchsmooth._decompose import decompose
from torchsmooth._layers import FoundLayer
from torchsmooth._leading import truncated_factors
from torchsmooth._linalg import LinAlgError, factors_in
from torchsmooth._options import options_of
from torchsmooth._spectrum import Spectrum
from torchsmooth._tucker import tucker_factors
from torchsmooth._tucker_spectrum import TuckerSpectrum

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def solves(monkeypatch):
    """Count the decompositions by kind and size."""
    counts = Counter()

    def counting(name):
        solve = getattr(torch.linalg, name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return solve(*args, **kwargs)

        return counted

    for name in ("eigh", "eigvalsh", "svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, counting(name))
    return counts


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(one, other):
    return all(torch.equal(left, right) for left, right in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_a_known_basis_gives_the_same_factors(dtype, data):
    matrices = data.draw(hard_matrices(dtype=dtype)).unsqueeze(0)
    rank = data.draw(st.integers(1, min(matrices.shape[1:])))
    expected = truncated_factors(matrices, rank)
    for with_basis in (True, False):
        spectrum = Spectrum(matrices, with_basis=with_basis)
        for _ in range(2):  # the second time with the basis of the first
            assert all(map(torch.equal, spectrum.factors(matrices, rank), expected))


@given(hard_matrices())
def test_projections_onto_the_basis_are_as_long_as_the_singular_values(matrix):
    values, basis = decompose(matrix.unsqueeze(0))
    up, down = factors_in(basis, matrix.unsqueeze(0))
    sizes = up.norm(dim=-2) * down.norm(dim=-1)
    assert torch.allclose(sizes, values, rtol=1e-6, atol=1e-7 * float(values.max()))


def test_a_small_group_beside_a_large_one_is_looked_at_too():
    matrices = randn(2, 6, 9, seed=0) * torch.tensor([1.0, 1e-9]).reshape(2, 1, 1)
    other = matrices.clone()
    other[1] = 1e-9 * randn(6, 9, seed=5)
    spectrum = Spectrum(matrices, with_basis=True)
    assert all(map(torch.equal, spectrum.factors(other, 2), truncated_factors(other, 2)))


@settings(max_examples=30)
@given(seeds, st.integers(1, 6), st.sampled_from(["other", "scaled", "more", "rotated", "zero"]), st.booleans())
def test_a_basis_is_not_used_for_another_weight(seed, rank, change, with_basis):
    matrices = randn(2, 6, 9, seed=seed)
    spectrum = Spectrum(matrices, with_basis=with_basis)
    spectrum.factors(matrices, rank)
    if change == "more":  # what is kept stays as it is, but something larger lies beside it
        left, values, right = torch.linalg.svd(matrices, full_matrices=False)
        values[..., -1] *= 1000
        other = (left * values.unsqueeze(-2)) @ right
    else:
        other = {
            "other": randn(2, 6, 9, seed=seed + 1),
            "scaled": 1.001 * matrices,
            "rotated": matrices.flip(-2),
            "zero": torch.zeros_like(matrices),
        }[change]
    assert all(map(torch.equal, spectrum.factors(other, rank), truncated_factors(other, rank)))
    assert all(map(torch.equal, spectrum.factors(matrices, rank), truncated_factors(matrices, rank)))


@settings(max_examples=60)
@given(
    seed=seeds,
    rank=st.integers(1, 6),
    scale=st.integers(0, 12).map(lambda power: 10.0**-power),
    dtype=st.sampled_from(DTYPES),
    with_basis=st.booleans(),
)
def test_a_basis_is_not_used_for_a_weight_with_much_in_common(seed, rank, scale, dtype, with_basis):
    common = torch.ones(2, 6, 9, dtype=torch.float64)
    matrices, other = ((common + scale * randn(2, 6, 9, seed=seed + one)).to(dtype) for one in range(2))
    spectrum = Spectrum(matrices, with_basis=with_basis)
    spectrum.factors(matrices, rank)
    assert all(map(torch.equal, spectrum.factors(other, rank), truncated_factors(other, rank)))
    pairs, known = (min(rank, 2), min(rank, 3)), TuckerSpectrum(matrices.unflatten(2, (3, 3)))
    tensors = other.unflatten(2, (3, 3))
    assert all(map(torch.equal, known.factors(tensors, pairs), tucker_factors(tensors, pairs)))


@given(seeds, st.integers(1, 5))
def test_a_matrix_is_not_taken_for_its_transpose_which_has_the_same_memory(seed, rank):
    matrices = randn(1, 5, 5, seed=seed)
    spectrum = Spectrum(matrices, with_basis=True)
    assert all(map(torch.equal, spectrum.factors(matrices.mT, rank), truncated_factors(matrices.mT, rank)))


@settings(max_examples=20)
@given(seeds, st.sampled_from(["factored", "pivoted"]), st.sampled_from(["channel", "input", "spatial", "tucker"]))
def test_a_plan_for_one_training_serves_another_as_well_as_its_file_does(seed, form, scheme):
    def trained(number):  # both have learnt the same mean, of which the tails are far below
        model = nn.Sequential(nn.Conv2d(8, 12, 3, bias=False), nn.Linear(24, 20, bias=False))
        for index, layer in enumerate(model):
            falling = 2e-3 * 0.5 ** torch.arange(len(layer.weight), dtype=torch.float64)
            tails = randn(*layer.weight.shape, seed=seed + 10 * number + index)
            layer.weight.data.copy_(1 + tails * falling.reshape(-1, *[1] * (tails.dim() - 1)))
        return model

    plan = plan_compression(trained(0), 0.5, form=form, scheme=scheme)
    models = [trained(1), trained(1)]
    for one, model in zip((plan, CompressionPlan.from_json(plan.to_json())), models, strict=True):
        one.apply_(model)
    assert equal(*models)


def test_no_layer_is_decomposed_twice(solves):
    model = small_resnet()
    plans = sweep(model, [0.3, 0.5, 0.7, 0.8], scheme=("spatial", "input"))
    single = sum(len(layer.options) == 1 for layer in plans[0])
    several = sum(len(layer.options) for layer in plans[0] if len(layer.options) > 1)
    assert solves == {"eigh": single, "eigvalsh": several}
    applied = {(layer.name, layer.scheme) for plan in plans for layer in plan if len(layer.options) > 1 and layer.rank}
    for plan in [*plans, *plans]:
        plan.apply_(copy.deepcopy(model))
    assert solves["eigh"] == single + len(applied)
    assert solves["eigvalsh"] == several


def test_tucker_shares_the_bases_of_two_other_schemes(solves, monkeypatch):
    # Only its refinement for a pair of ranks is new: two bases in a round.
    monkeypatch.setattr("torchsmooth._tucker._SWEEPS", 0)
    model = small_resnet()
    plans = sweep(model, [0.5, 0.7, 0.9])
    plans[0]["layers.3.conv2"].choose("tucker", (5, 6))
    options = [layer.options for layer in plans[0] if layer.options]
    convolutions = sum("tucker" in one for one in options)
    others = len(options) - convolutions
    assert convolutions > 10
    assert solves == {"eigh": 2 * convolutions + others, "eigvalsh": 2 * convolutions}
    before = solves.copy()
    applied = {(layer.name, layer.scheme) for plan in plans for layer in plan if layer.rank}
    for plan in [*plans, *plans]:
        plan.apply_(copy.deepcopy(model))
    assert any(scheme == "tucker" for _, scheme in applied)
    spatial = sum(scheme.startswith("spatial") for _, scheme in applied)
    assert solves == before + Counter(eigh=spatial)


@settings(max_examples=30)
@given(seeds, st.sampled_from([(6, 5), (2, 40), (40, 2), (6, 6)]), st.booleans())
def test_a_tucker_basis_is_not_used_for_another_weight(seed, sizes, scaled):
    weight = randn(2, *sizes, 9, seed=seed)
    other = randn(2, *sizes, 9, seed=seed + 1) * (1e-9 if scaled else 1)
    spectrum = TuckerSpectrum(weight)
    for _ in range(2):
        assert all(map(torch.equal, spectrum.factors(weight, (2, 2)), tucker_factors(weight, (2, 2))))
        assert all(map(torch.equal, spectrum.factors(other, (2, 2)), tucker_factors(other, (2, 2))))
    read = pickle.loads(pickle.dumps(spectrum))
    assert torch.equal(read.errors(), spectrum.errors())
    assert all(map(torch.equal, read.factors(weight, (2, 2)), tucker_factors(weight, (2, 2))))


@given(convolutions(least=2), st.sampled_from(DTYPES))
def test_bases_of_channel_and_input_are_those_of_tucker(case, dtype):
    conv = case[0].to(dtype)
    found = FoundLayer("conv", conv, "Conv2d", conv.weight.numel())
    together = options_of([found], ("auto",), [1.0], keep_bases=True)[0]["tucker"]
    alone = options_of([found], ("tucker",), [1.0], keep_bases=False)[0]["tucker"]
    assert torch.allclose(together.errors, alone.errors, rtol=1e-6, atol=1e-12)


def test_linear_layers_are_decomposed_just_once_in_all(solves):
    model = mlp()
    plan_compression(model, 0.5).apply_(model)
    assert solves == {"eigh": 3}


def test_float64_layers_take_one_svd(solves):
    model = mlp().double()
    plan_compression(model, 0.5).apply_(model)
    assert solves == {"svd": 3}


@pytest.mark.parametrize("build", [mlp, small_resnet])
def test_a_plan_applied_to_other_weights_decomposes_those(build):
    plan = plan_compression(build(0), 0.5)
    plan.apply_(build(0))
    results = []
    for one in (plan, copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        model = build(1)
        one.apply_(model)
        results.append(model)
    fresh = build(1)
    again = plan_compression(build(0), 0.5)
    for layer in again:  # so that nothing of the first weights is known
        for scheme, option in layer.options.items():
            object.__setattr__(option, "spectrum", None)
            assert layer.options[scheme].spectrum is None
    again.apply_(fresh)
    assert all(equal(model, fresh) for model in results)


def test_copies_share_what_was_decomposed_and_pickles_leave_the_basis_out(solves):
    model = mlp()
    plan = plan_compression(model, 0.5)
    size = len(pickle.dumps(plan))
    models = [copy.deepcopy(model) for _ in range(3)]
    other = copy.deepcopy(plan)
    other["0"].rank = 3
    assert plan["0"].rank != 3
    plan.apply_(models[0])
    other.apply_(models[1])
    assert solves == {"eigh": 3}
    pickle.loads(pickle.dumps(plan)).apply_(models[2])
    assert solves == {"eigh": 6}
    assert equal(models[0], models[2])
    assert size < 8 * sum(parameter.numel() for parameter in model.parameters())


def test_a_plan_holds_no_weights():
    model = mlp()
    plan = plan_compression(model, 0.5)
    expected = copy.deepcopy(model)
    plan.apply_(expected)
    changed = copy.deepcopy(model)
    plan_before = plan.to_dict()
    for parameter in model.parameters():
        parameter.data.zero_()
    plan.apply_(changed)
    assert equal(changed, expected)
    assert plan.to_dict() == plan_before


def test_a_plan_made_in_inference_mode_can_be_applied_outside():
    model, expected = mlp(), mlp()
    with torch.inference_mode():
        plan = plan_compression(model, 0.5)
    plan.apply_(model)
    plan_compression(expected, 0.5).apply_(expected)
    assert equal(model, expected)
    model(torch.zeros(1, 24)).sum().backward()
    assert isinstance(model, nn.Module)


@pytest.fixture
def together(monkeypatch):
    """As if the CPU were a device that decomposes several weights at once."""
    monkeypatch.setattr(_options, "_TOGETHER", ("cpu",))


@pytest.mark.parametrize("room", [1 << 26, 0])
def test_weights_of_one_shape_are_decomposed_in_one_call_with_the_same_result(solves, together, monkeypatch, room):
    monkeypatch.setattr(_options, "_ROOM", room)
    model = nn.Sequential(*(nn.Conv2d(6, 6, 3, groups=groups) for groups in (1, 1, 2, 2, 2, 1)), nn.Linear(6, 5))
    plan = plan_compression(model, 0.4)
    assert solves["eigh"] + solves["eigvalsh"] <= 2 * 5 + 1 + 2 * 2  # five schemes of two kinds, one linear layer
    monkeypatch.setattr(_options, "_TOGETHER", ())
    alone = plan_compression(model, 0.4)
    assert plan == alone
    for one, other in zip(plan, alone, strict=True):
        for scheme, option in one.options.items():
            assert torch.allclose(option.errors, other.options[scheme].errors, atol=1e-12)
    first, second = (copy.deepcopy(model) for _ in range(2))
    plan.apply_(first)
    alone.apply_(second)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(weights(first), weights(second), strict=True))


def test_a_call_holds_no_more_than_fits_and_only_what_is_kept_alike(together, monkeypatch):
    layers = {str(n): FoundLayer(str(n), nn.Linear(8, 8), "Linear", 64) for n in range(5)}
    monkeypatch.setattr(_options, "_AT_ONCE", 2 * 8 * 64)
    found = _options.alike(layers, {"0", "1", "2"}, {"4": 1})
    assert found == {"0": ["0", "1"], "1": ["0", "1"], "2": ["2"], "3": ["3"], "4": ["4"]}
    monkeypatch.setattr(_options, "_TOGETHER", ("cuda",))
    assert _options.alike(layers, set(), {}) == {name: [name] for name in layers}


def test_the_layer_that_cannot_be_decomposed_is_named_among_several(together, monkeypatch):
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    solve = torch.linalg.eigh

    def failing(matrices):
        if len(matrices) > 1 or bool(torch.allclose(matrices[0].trace(), model[1].weight.double().square().sum())):
            raise LinAlgError("no convergence")
        return solve(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr("torchsmooth._linalg._eigen_otherwise", lambda _: (_ for _ in ()).throw(LinAlgError("never")))
    with pytest.raises(ValueError, match="weight of layer '1' could not be decomposed"):
        plan_compression(model, 0.4)
