"""Nuclear norms and polar factors by every method, against an SVD in float64 that shares no code with them."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import HARD_KINDS, hard_matrices, hard_matrix, randn, seeds
from torchsmooth._linalg import LinAlgError
from torchsmooth._polar import _QUINTICS, SMALLEST, nuclear_norms_and_polars, resolve

EXACT = ("svd", "eigh")
PRODUCTS = ("polar_express", "polar_express_bf16")
METHODS = (*EXACT, *PRODUCTS)
# How far from one the singular values of the factor may be, for those of the matrix above SMALLEST of the bound.
ACCURACY = {"svd": 1e-6, "eigh": 1e-5, "polar_express": 1e-5, "polar_express_bf16": 3e-2}


def reference(matrix):
    """Singular values and vectors in float64."""
    return torch.linalg.svd(matrix.double(), full_matrices=False)


def spectrum_of(values, rows, columns, seed):
    """A matrix with these singular values, in float64."""
    left = torch.linalg.qr(randn(rows, len(values), seed=seed)).Q
    right = torch.linalg.qr(randn(columns, len(values), seed=seed + 1)).Q
    return (left * torch.as_tensor(values, dtype=torch.float64)) @ right.T


def bound_of(values):
    """What the products divide by: the eighth root of the sum of eighth powers."""
    largest = values.max()
    return float(largest * (values / largest).pow(8).sum() ** 0.125)


def both_ways(matrices, method):
    """The result, after checking that it is the same for the transpose."""
    values, polars = nuclear_norms_and_polars(matrices, method)
    others, transposed = nuclear_norms_and_polars(matrices.mT, method)
    assert values.dtype == polars.dtype == matrices.dtype
    assert polars.shape == matrices.shape
    tolerance = 1e-12 if matrices.dtype == torch.float64 and method == "svd" else ACCURACY[method]
    assert torch.allclose(values, others, rtol=tolerance, atol=0)
    assert torch.allclose(polars, transposed.mT, atol=4 * tolerance)
    return values, polars


@pytest.mark.parametrize("method", METHODS)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), power=st.floats(0, 2.5), seed=seeds)
def test_the_factor_is_u_v_transposed_where_singular_values_count(method, rows, columns, power, seed):
    full = min(rows, columns)
    # Spread evenly over the orders of magnitude: the least is well above SMALLEST of the bound.
    spread = torch.logspace(0, -power, full, dtype=torch.float64)
    matrix = spectrum_of(spread, rows, columns, seed).float()
    left, values, right = reference(matrix)
    found, polars = both_ways(matrix.unsqueeze(0), method)
    assert torch.linalg.matrix_norm(polars[0].double() - left @ right, ord=2) <= 3 * ACCURACY[method]
    assert float(found) == pytest.approx(float(values.sum()), rel=ACCURACY[method])


@given(hard_matrices())
def test_the_reference_keeps_all_digits_in_float64(matrix):
    found, polars = both_ways(matrix.unsqueeze(0), "svd")
    _, values, _ = reference(matrix)
    assert float(found) == pytest.approx(float(values.sum()), rel=1e-12)
    assert float((polars[0] * matrix).sum()) == pytest.approx(float(values.sum()), rel=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", HARD_KINDS)
@given(rows=st.integers(1, 10), columns=st.integers(1, 10), seed=seeds)
def test_any_matrix_gets_a_subgradient(method, kind, rows, columns, seed):
    """‖G‖₂ ≤ 1 and ⟨G, W⟩ = ‖W‖_* are what makes G a subgradient of the nuclear norm (Watson, 1992)."""
    matrix = hard_matrix(kind, rows, columns, seed, torch.float32)
    _, values, _ = reference(matrix)
    found, polars = nuclear_norms_and_polars(matrix.unsqueeze(0), method)
    assert bool(torch.isfinite(polars).all())
    sizes = torch.linalg.svdvals(polars[0].double())
    # Squared, the smallest values that count leave float64 few digits.
    assert float(sizes.max()) <= 1 + (3e-4 if method == "eigh" else ACCURACY[method])
    # The values that are left out, or fade, may be missing from the sum, and no more.
    left_out = max(rows, columns) * torch.finfo(torch.float32).eps * float(values.max())
    missing = len(values) * (left_out if method in EXACT or not values.any() else SMALLEST * bound_of(values))
    for value in (float(found), float((polars[0].double() * matrix.double()).sum())):
        assert abs(value - float(values.sum())) <= ACCURACY[method] * float(values.sum()) + missing
    if kind == "zero":
        assert not found.any()
        assert not polars.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-10, 1e10, 1e25, 1e36])
def test_the_factor_does_not_see_the_scale(method, scale):
    matrix = randn(1, 6, 9, seed=0, dtype=torch.float32)
    values, polars = nuclear_norms_and_polars(matrix, method)
    scaled_values, scaled = nuclear_norms_and_polars(matrix * scale, method)
    # At 1e-38, entries have lost digits: the rounding of the input counts as well.
    assert torch.allclose(scaled, polars, atol=max(ACCURACY[method], 1e-5 if scale > 1e-38 else 1e-4))
    assert torch.allclose(scaled_values.double() / scale, values.double(), rtol=max(ACCURACY[method], 1e-5))


@pytest.mark.parametrize("method", METHODS)
@given(exponent=st.integers(-1000, 1000), rows=st.integers(1, 6), columns=st.integers(1, 6), seed=seeds)
def test_a_power_of_two_is_taken_out_exactly_in_double_precision(method, exponent, rows, columns, seed):
    matrix = randn(1, rows, columns, seed=seed)
    values, polars = nuclear_norms_and_polars(matrix, method)
    scaled_values, scaled = nuclear_norms_and_polars(torch.ldexp(matrix, torch.tensor(exponent)), method)
    accuracy = 1e-12 if method == "svd" else 0.0
    torch.testing.assert_close(scaled, polars, rtol=0.0, atol=1e-9 if method == "svd" else 0.0)
    expected = torch.ldexp(values, torch.tensor(exponent))
    torch.testing.assert_close(scaled_values, expected, rtol=accuracy, atol=0.0)


@pytest.mark.parametrize("method", [*EXACT, "polar_express"])  # bfloat16 rounds some into them
def test_directions_that_a_matrix_does_not_have_get_no_gradient(method):
    rank_two = spectrum_of([2.0, 1.0], 8, 6, seed=3)
    left, _, right = reference(rank_two)
    _, polars = nuclear_norms_and_polars(rank_two.float().unsqueeze(0), method)
    # Products magnify the rounding of the weight, 1e-7, by up to 4e3.
    tolerance = 1e-3 if method == "polar_express" else 1e-6
    assert torch.linalg.matrix_norm(polars[0].double() - left[:, :2] @ right[:2], ord=2) <= tolerance


@given(st.integers(1, 40), seeds)
def test_values_below_the_interval_fade_and_never_grow_past_one(count, seed):
    small = torch.logspace(0, -6, count + 1, dtype=torch.float64)
    matrix = spectrum_of(small, 48, 48, seed).float()
    left, values, right = reference(matrix)
    left, values, right = left[:, : count + 1], values[: count + 1], right[: count + 1]
    _, polars = nuclear_norms_and_polars(matrix.unsqueeze(0), "polar_express")
    kept = (left * (polars[0].double() @ right.mT)).sum(0)
    assert float(kept.max()) <= 1 + 1e-5
    assert float(kept.min()) >= 0
    assert bool(((kept - 1).abs() <= 1e-5)[values >= SMALLEST * bound_of(values)].all())


def test_the_quintics_do_what_is_said_of_them():
    x = torch.logspace(math.log10(SMALLEST), 0, 20_001, dtype=torch.float64)
    for step, (a, b, c) in enumerate(_QUINTICS, start=1):
        x = a * x + b * x**3 + c * x**5
        if step == 6:
            assert float((x - 1).abs().max()) <= 1.2e-3
    assert float((x - 1).abs().max()) <= 1e-8
    # Below the interval the composition rises from zero, and nowhere past one.
    y = torch.linspace(0, SMALLEST, 20_001, dtype=torch.float64)
    for a, b, c in _QUINTICS:
        y = a * y + b * y**3 + c * y**5
    assert float(y.min()) >= 0
    assert float(y.max()) <= 1 + 1e-8


@pytest.mark.parametrize("method", METHODS)
@given(batch=st.integers(1, 5), seed=seeds, kinds=st.lists(st.sampled_from(HARD_KINDS), min_size=5, max_size=5))
def test_a_batch_is_done_matrix_by_matrix(method, batch, seed, kinds):
    matrices = torch.stack([hard_matrix(kinds[one], 5, 7, seed + one, torch.float32) for one in range(batch)])
    values, polars = nuclear_norms_and_polars(matrices, method)
    for index, matrix in enumerate(matrices):
        value, polar = nuclear_norms_and_polars(matrix.unsqueeze(0), method)
        assert torch.allclose(values[index], value[0], rtol=ACCURACY[method], atol=0)
        _, own, _ = reference(matrix)
        # Directions of values on the edge of what counts may go either way with the rounding of a batch.
        if not own.any() or float(own.min() / own.max()) > 2 * SMALLEST:
            assert torch.allclose(polars[index], polar[0], atol=4 * ACCURACY[method])


@pytest.mark.parametrize("shape", [(3, 64, 8), (2, 8, 64), (1, 1, 1), (1, 1, 50), (1, 50, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_memory_layout_does_not_matter(method, shape):
    matrices = randn(*shape, seed=1, dtype=torch.float32)
    expected = nuclear_norms_and_polars(matrices, method)
    strided = matrices.mT.contiguous().mT
    apart = torch.stack([matrices, matrices], dim=-1)[..., 0]
    for other in (strided, apart):
        for one, two in zip(expected, nuclear_norms_and_polars(other, method), strict=True):
            assert torch.allclose(one, two, rtol=2 * ACCURACY[method], atol=2 * ACCURACY[method])


def test_ill_conditioned_matrices_keep_their_small_directions_in_single_precision():
    """From 1 to 1e-4, where single precision alone would be wrong by percents."""
    matrix = spectrum_of(torch.logspace(0, -4, 24), 24, 96, seed=5).float()
    left, _, right = reference(matrix)
    for method in EXACT:
        _, polars = nuclear_norms_and_polars(matrix.unsqueeze(0), method)
        assert torch.linalg.matrix_norm(polars[0].double() - left @ right, ord=2) <= 1e-4


def test_eigenvectors_that_cannot_be_found_at_first_are_found_otherwise():
    matrices = randn(2, 6, 9, seed=0, dtype=torch.float32)
    expected = nuclear_norms_and_polars(matrices, "eigh")
    real, calls = torch.linalg.eigh, []

    def once(given):
        calls.append(given)
        if len(calls) == 1:
            raise LinAlgError("failed to converge")
        return real(given)

    with patch("torch.linalg.eigh", once):
        found = nuclear_norms_and_polars(matrices, "eigh")
    assert len(calls) == 2
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_auto_goes_by_dtype_and_device(dtype, device):
    method = resolve("auto", dtype, torch.device(device))
    if dtype == torch.float64:
        assert method == "svd"
    elif device == "cuda":
        assert method == ("polar_express" if dtype == torch.float32 else "polar_express_bf16")
    else:
        assert method == "eigh"
    assert all(resolve(one, dtype, torch.device(device)) == one for one in METHODS)


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e-40])
def test_weights_that_are_hardly_there_have_a_polar_factor(scale):
    matrix = randn(8, 8, seed=0).mul(scale).float()
    left, _, right = reference(matrix)
    _, polar = nuclear_norms_and_polars(matrix.unsqueeze(0), "eigh")
    assert torch.allclose(polar[0].double(), left @ right, atol=1e-3)
