"""Truncated factors and spectra: Eckart–Young, exactness, determinism, on matrices constructed to be hard."""

from __future__ import annotations

import itertools
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import HARD_KINDS, hard_matrices, hard_matrix, randn, seeds
from torchsmooth._decompose import singular_values
from torchsmooth._leading import truncated_factors
from torchsmooth._linalg import (
    LinAlgError,
    balanced,
    clamped,
    eigen,
    eigenvalues,
    relative_tail_energies,
    squared_norms,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative to the norm of the whole matrix. Everything is computed in float64.
TOLERANCE = 1e-7


def norm(matrix):
    return float(torch.linalg.vector_norm(matrix))


@given(hard_matrices(dtype=torch.float32))
def test_singular_values_agree_with_an_svd_in_float64(matrix):
    expected = torch.linalg.svdvals(matrix.double())
    values = singular_values(matrix)
    assert values.dtype == torch.float64
    assert torch.allclose(values, expected, rtol=1e-6, atol=TOLERANCE * norm(matrix.double()))
    assert bool((values[1:] <= values[:-1]).all())


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_the_error_of_a_truncation_is_the_tail_energy(dtype, data):
    matrix = data.draw(hard_matrices(dtype=dtype)).unsqueeze(0)
    rank = data.draw(st.integers(1, min(matrix.shape[1:])))
    up, down = truncated_factors(matrix, rank)
    wide = matrix.double()
    tail = float(torch.linalg.svdvals(wide)[0, rank:].square().sum())
    error = norm(wide - up @ down)
    assert abs(error**2 - tail) <= TOLERANCE * norm(wide) ** 2
    relative = float(relative_tail_energies(singular_values(matrix))[rank])
    assert abs(error**2 - relative * norm(wide) ** 2) <= TOLERANCE * norm(wide) ** 2
    assert up.dtype == down.dtype == torch.float64


@given(hard_matrices(), st.data())
def test_no_other_matrix_of_that_rank_is_closer(matrix, data):
    rank = data.draw(st.integers(1, min(matrix.shape)))
    up, down = truncated_factors(matrix.unsqueeze(0), rank)
    best = up[0] @ down[0]
    seed = data.draw(seeds)
    # Near the best one, where a rival would be, and far from it.
    for scale in (1e-3, 1e-1, 1.0):
        size = scale * norm(best) / max(1.0, norm(up) * norm(down)) ** 0.5
        rival = (up[0] + size * randn(*up[0].shape, seed=seed)) @ (
            down[0] + size * randn(*down[0].shape, seed=seed + 1)
        )
        assert norm(matrix - best) <= norm(matrix - rival) + TOLERANCE * norm(matrix)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_errors_never_grow_with_the_rank_and_vanish_at_full_rank(dtype, data):
    matrix = data.draw(hard_matrices(dtype=dtype)).unsqueeze(0)
    wide = matrix.double()
    errors = []
    for rank in range(1, min(matrix.shape[1:]) + 1):
        up, down = truncated_factors(matrix, rank)
        errors.append(norm(wide - up @ down))
    slack = 1e-13 * norm(wide)
    assert all(later <= earlier + slack for earlier, later in pairwise(errors))
    assert errors[-1] <= 1e-12 * norm(wide)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), seeds)
def test_a_batch_is_factored_matrix_by_matrix(groups, rows, columns, seed):
    matrices = randn(groups, rows, columns, seed=seed, dtype=torch.float32)
    rank = min(rows, columns)
    up, down = truncated_factors(matrices, rank)
    for group in range(groups):
        own_up, own_down = truncated_factors(matrices[group : group + 1], rank)
        assert torch.allclose(up[group] @ down[group], own_up[0] @ own_down[0], atol=1e-10)


@given(hard_matrices(dtype=torch.float32), st.data())
def test_equal_input_gives_equal_factors_whatever_the_random_state(matrix, data):
    rank = data.draw(st.integers(1, min(matrix.shape)))
    first = truncated_factors(matrix.unsqueeze(0), rank)
    torch.manual_seed(data.draw(seeds))
    before = torch.get_rng_state()
    second = truncated_factors(matrix.clone().unsqueeze(0), rank)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(data=st.data())
def test_signs_are_fixed_by_the_largest_entry_of_the_left_vector(dtype, data):
    matrix = data.draw(hard_matrices(dtype=dtype))
    up, _ = truncated_factors(matrix.unsqueeze(0), min(matrix.shape))
    largest = up[0].gather(0, up[0].abs().argmax(0, keepdim=True))
    assert bool((largest >= 0).all())


@given(hard_matrices(dtype=torch.float32))
def test_the_factors_share_the_singular_values_evenly(matrix):
    up, down = truncated_factors(matrix.unsqueeze(0), min(matrix.shape))
    up_norms, down_norms = up[0].norm(dim=0), down[0].norm(dim=1)
    assert torch.allclose(up_norms, down_norms, rtol=1e-6, atol=1e-4 * float(up_norms.max()) + 1e-300)


@given(seeds, st.integers(-150, 150), st.sampled_from([None, 0, 1, 2]))
def test_balancing_rounds_nothing(seed, power, zero):
    up, down = randn(2, 7, 3, seed=seed), randn(2, 3, 5, seed=seed + 1)
    if zero is not None:
        up[0, :, zero] = 0
    up, down = up * 2.0**power, down * 2.0**-power
    one, other = balanced(up, down)
    for group, term in itertools.product(range(2), range(3)):
        product = torch.outer(up[group, :, term], down[group, term])
        assert torch.equal(torch.outer(one[group, :, term], other[group, term]), product)
        if product.any():
            ratio = norm(one[group, :, term]) / norm(other[group, term])
            assert 0.49 <= ratio <= 2.01
    again = balanced(one, other)
    assert torch.equal(again[0], one)
    assert torch.equal(again[1], other)


@pytest.mark.parametrize("kind", HARD_KINDS)
def test_tail_energies_are_the_share_of_the_squares_past_each_rank(kind):
    values = torch.linalg.svdvals(hard_matrix(kind, 7, 5, seed=3)).unsqueeze(0)
    tails = relative_tail_energies(values)
    assert tails.shape == (6,)
    for rank in range(6):
        whole = float(values.square().sum()) or 1.0
        assert float(tails[rank]) == pytest.approx(float(values[0, rank:].square().sum()) / whole, rel=1e-12, abs=0)
    assert float(tails[-1]) == 0.0
    assert bool((tails[1:] <= tails[:-1]).all())


def test_small_tails_survive_beside_large_values():
    tails = relative_tail_energies(torch.tensor([[1e8, 1e-8]], dtype=torch.float64))
    assert float(tails[1]) == pytest.approx(1e-32, rel=1e-12, abs=0)


def test_tail_energies_of_groups_add_up():
    tails = relative_tail_energies(torch.tensor([[2.0, 1.0], [3.0, 1.0]], dtype=torch.float64))
    assert tails.tolist() == pytest.approx([1.0, 2 / 15, 0.0])


@pytest.mark.parametrize("scale", [1e-200, 1e-170, 1e150, 1e300])
def test_tail_energies_do_not_leave_the_range_of_float64(scale):
    values = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(relative_tail_energies(scale * values), relative_tail_energies(values), rtol=1e-12)


def test_large_flat_matrices_take_the_memory_of_their_small_side():
    # full_matrices=True would ask for 200,000² entries here, 160 GB in float32.
    matrix = randn(1, 3, 200_000, seed=0, dtype=torch.float32)
    up, down = truncated_factors(matrix, 2)
    assert up.shape == (1, 3, 2)
    assert down.shape == (1, 2, 200_000)


def mostly_zero(seed, size=576):
    """The second moment of inputs of which one in nine is ever other than zero, seen three times."""
    moment = torch.zeros(size, size, dtype=torch.float64)
    seen = torch.arange(4, size, 9)
    rows = randn(len(seen), 3, seed=seed)
    moment[seen[:, None], seen] = 1e-2 * rows @ rows.T
    return moment


def assert_eigen(matrix, values, vectors):
    size = float(matrix.abs().max())
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    assert torch.allclose(vectors.mT @ vectors, eye.expand_as(matrix), atol=1e-10)
    assert torch.allclose((vectors * values.unsqueeze(-2)) @ vectors.mT, matrix, atol=1e-10 * size, rtol=0)
    assert bool((values.diff() >= 0).all())


def test_matrices_that_lapack_gives_up_on_have_eigenvectors_too():
    for seed in range(12):  # some two in sixty of these fail in one build of it
        matrix = mostly_zero(seed, 288)
        assert_eigen(matrix, *eigen(matrix))


@pytest.mark.parametrize("failures", range(6))
@given(hard_matrices(), st.booleans())
def test_a_decomposition_that_fails_is_tried_otherwise(failures, factor, batched):
    matrix = factor @ factor.T
    matrix = torch.stack([matrix, 2 * matrix]) if batched else matrix
    real, calls = torch.linalg.eigh, []

    def failing(given):
        calls.append(given)
        if len(calls) <= failures:
            raise LinAlgError("failed to converge")
        return real(given)

    with (
        patch("torch.linalg.eigh", failing),
        patch("torch.linalg.eigvalsh", side_effect=LinAlgError("failed to converge")),
    ):
        values, vectors = eigen(matrix)
        calls.clear()
        alone = eigenvalues(matrix)
    assert_eigen(matrix, values, vectors)
    assert torch.equal(alone, values)


def test_a_matrix_with_nan_is_not_tried_again():
    with patch("torch.linalg.eigh", side_effect=LinAlgError("failed to converge")) as eigh, pytest.raises(LinAlgError):
        eigen(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]], dtype=torch.float64))
    assert eigh.call_count == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_out_of_range_become_the_largest_of_a_dtype_on_either_side(dtype):
    most = torch.finfo(dtype).max
    values = torch.tensor([-1e300, -1.0, 0.0, 1.0, 1e300], dtype=torch.float64)
    assert clamped(values, dtype).to(dtype).tolist() == [-most, -1.0, 0.0, 1.0, most]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("exponent", [-100, -59, -30, 0, 30, 59, 100])
def test_squared_norms_are_those_of_float64_whatever_the_size(dtype, exponent):

    values = torch.randn(3, 4, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrices = values * 2.0**exponent
    scale = torch.full((3,), 2.0**exponent, dtype=torch.float64)
    expected = values.double().square().sum((-2, -1))
    assert torch.allclose(squared_norms(matrices, 4 * scale), expected / 16, rtol=1e-5)
    assert torch.allclose(squared_norms(matrices), expected * 4.0**exponent, rtol=1e-5)
