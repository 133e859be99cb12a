"""Decomposing fast: float32 where that is enough, iteration where few are wanted; truncated as the SVD truncates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import hard_matrices, randn, seeds
from torchsmooth import _decompose, _leading, _linalg
from torchsmooth._decompose import decompose, is_good_for, singular_values
from torchsmooth._leading import leading_basis, truncated_factors
from torchsmooth._linalg import relative_tail_energies

# What is promised of the relative error of every truncation, beside that of an SVD in float64.
PROMISED = 1e-6

SPECTRA = {
    "normal": None,
    "flat": lambda j, k: torch.ones_like(j),
    "steps": lambda j, k: 1.0 + (j < k // 3) + 5 * (j < 3),
    "slow": lambda j, k: (1 + j) ** -0.3,
    "root": lambda j, k: (1 + j) ** -0.5,
    "moderate": lambda j, k: (1 + j) ** -0.8,
    "with a mean": lambda j, k: (1 - 0.9 * j / k) + 15 * (j < 1),
    "inverse": lambda j, k: (1 + j) ** -1.0,
    "steep": lambda j, k: (1 + j) ** -2.0,
    "exponential": lambda j, k: torch.exp(-j * 20 / k),
    "spike": lambda j, k: 1 + 300.0 * (j < 2),
    "low rank": lambda j, k: (j < k // 20).double(),
}


def matrix_with(kind, rows, columns, seed):
    """A matrix of a spectrum, in float64."""
    if SPECTRA[kind] is None:
        return randn(rows, columns, seed=seed)
    small = min(rows, columns)
    left = torch.linalg.qr(randn(rows, small, seed=seed)).Q
    right = torch.linalg.qr(randn(columns, small, seed=seed + 1)).Q
    return (left * SPECTRA[kind](torch.arange(small, dtype=torch.float64), small)) @ right.mT


def excess(matrix, up, down, rank):
    """By how much the relative error of a truncation is above that of an SVD in float64."""
    exact = matrix.double()
    exact = exact / exact.abs().max().clamp_min(1e-300)
    scale = float(matrix.double().abs().max().clamp_min(1e-300))
    values = torch.linalg.svdvals(exact).square()
    whole = float(values.sum())
    if whole == 0:
        return float((up @ down).abs().max())
    found = float((exact - up @ down / scale).square().sum())
    return math.sqrt(found / whole) - math.sqrt(float(values[rank:].sum()) / whole)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(260, 300), (320, 260)])
def test_no_truncation_of_a_large_matrix_is_worse_than_that_of_an_svd(kind, shape):
    matrix = matrix_with(kind, *shape, seed=3).float()
    tails = torch.linalg.svdvals(matrix.double()).square().flip(0).cumsum(0).flip(0)
    tails = torch.cat([tails / tails[0], torch.zeros(1, dtype=torch.float64)])
    for known in (decompose(matrix.unsqueeze(0))[0], singular_values(matrix.unsqueeze(0))):
        errors = relative_tail_energies(known)
        assert float((errors - tails).abs().max()) < PROMISED
    for rank in (1, 5, 60, 130, 200, 250, 260):
        up, down = truncated_factors(matrix.unsqueeze(0), rank)
        assert excess(matrix, up[0], down[0], rank) < PROMISED


def test_float32_is_taken_for_flat_spectra_only(monkeypatch):
    assert decompose(matrix_with("normal", 256, 300, 0).float())[1].dtype == torch.float32
    assert decompose(matrix_with("steep", 256, 300, 0).float())[1].dtype == torch.float64
    assert decompose(matrix_with("normal", 255, 300, 0).float())[1].dtype == torch.float64
    assert decompose(matrix_with("normal", 256, 300, 0))[1].dtype == torch.float64
    both = torch.stack([matrix_with("normal", 256, 300, 0), matrix_with("steep", 256, 300, 0)]).float()
    assert decompose(both)[1].dtype == torch.float64  # as one of them needs it
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert decompose(matrix_with("normal", 256, 300, 0).float())[1].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(data=st.data())
@settings(max_examples=60)
def test_float32_is_enough_for_hard_matrices_of_any_size(dtype, data):
    matrix = data.draw(hard_matrices(dtype=dtype))
    rank = data.draw(st.integers(1, min(matrix.shape)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_decompose, "LARGE", 1)
        up, down = truncated_factors(matrix.unsqueeze(0), rank)
        values = singular_values(matrix)
    assert excess(matrix, up[0], down[0], rank) < PROMISED
    expected = torch.linalg.svdvals(matrix.double())
    assert float((values - expected).abs().max()) <= 1e-3 * float(expected.max())
    assert float((values.square() - expected.square()).abs().max()) <= 1e-6 * float(expected.max()) ** 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SPECTRA)
def test_iteration_finds_the_leading_vectors_or_gives_up(kind, dtype, monkeypatch):
    monkeypatch.setattr(_leading, "_LARGE", 64)
    found = 0
    for rows, columns, scale in ((96, 160, 1.0), (150, 80, 1e-25)):
        matrix = (scale * matrix_with(kind, rows, columns, seed=5)).to(dtype)
        for rank in (1, 3, 5):
            up, down = truncated_factors(matrix.unsqueeze(0), rank)
            assert excess(matrix, up[0], down[0], rank) < PROMISED
            again = truncated_factors(matrix.unsqueeze(0).clone(), rank)
            assert torch.equal(up, again[0])
            assert torch.equal(down, again[1])
            iterated = _leading._tried(_linalg.widened(matrix.unsqueeze(0)), rank)
            found += iterated is not None
            if iterated is not None:
                gram = iterated.double().mT @ iterated.double()
                assert torch.allclose(gram, torch.eye(rank, dtype=torch.float64), atol=3e-6)
    if kind in ("steep", "exponential", "inverse"):
        assert found == 6


@given(seeds, st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=15)
def test_groups_are_iterated_together(seed, groups, rank):
    matrices = torch.stack([matrix_with("exponential", 70, 90, seed + group) for group in range(groups)]).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_leading, "_LARGE", 64)
        up, down = truncated_factors(matrices, rank)
    for group in range(groups):
        assert excess(matrices[group], up[group], down[group], rank) < PROMISED


def test_few_vectors_of_a_large_matrix_take_no_decomposition(monkeypatch):
    matrix = matrix_with("steep", 1024, 1100, seed=1).float().unsqueeze(0)
    monkeypatch.setattr(_leading, "decompose", lambda _: pytest.fail("decomposed"))
    assert leading_basis(matrix, 4).shape == (1, 1024, 4)


def test_autocast_and_the_random_state_change_nothing(monkeypatch):
    monkeypatch.setattr(_leading, "_LARGE", 64)
    for matrix, rank in ((matrix_with("normal", 256, 260, 0), 40), (matrix_with("steep", 80, 90, 0), 3)):
        matrices = matrix.float().unsqueeze(0)
        expected = truncated_factors(matrices, rank)
        state = torch.get_rng_state()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = truncated_factors(matrices, rank)
        assert torch.equal(state, torch.get_rng_state())
        assert all(map(torch.equal, found, expected))


def test_a_zero_matrix_has_any_basis(monkeypatch):
    monkeypatch.setattr(_leading, "_LARGE", 16)
    up, down = truncated_factors(torch.zeros(1, 20, 30), 1)
    assert not up.any()
    assert not down.any()


@pytest.mark.parametrize(("kind", "tried"), [("normal", True), ("root", True), ("steep", False), ("low rank", False)])
def test_no_time_is_spent_on_float32_where_it_would_not_do(kind, tried, monkeypatch):
    matrix, solved = matrix_with(kind, 260, 300, seed=1).float().unsqueeze(0), []
    for name in ("eigen", "eigenvalues"):
        solve = getattr(_decompose, name)
        monkeypatch.setattr(_decompose, name, lambda gram, solve=solve: solved.append(gram.dtype) or solve(gram))
    decompose(matrix)
    singular_values(matrix)
    assert solved == 2 * [torch.float32 if tried else torch.float64]


@pytest.mark.parametrize(("kind", "rows"), [("normal", [65, 260]), ("root", [65, 260]), ("steep", [65])])
def test_some_of_the_rows_tell_whether_float32_is_worth_a_gram_matrix(kind, rows, monkeypatch):
    matrix, seen, multiply = matrix_with(kind, 260, 300, seed=1).float().unsqueeze(0), [], _decompose._single_gram
    monkeypatch.setattr(_decompose, "_single_gram", lambda wide: (seen.append(wide.shape[-2]), multiply(wide))[1])
    decompose(matrix)
    assert seen == rows


@pytest.mark.parametrize(
    ("values", "rank", "good"),
    [
        ([1.0] * 176 + [1e-3] * 80, 176, False),  # what is kept is large, but hardly anything is left out
        ([1.0] * 176 + [1e-3] * 80, 256, False),
        ([1.0] * 8 + [1e-2] * 100 + [0.3e-3] * 148, 108, False),
        ([1.0] * 100 + [0.5] * 76 + [1e-3] * 80, 100, True),
        ([1.0] + [5e-3] * 255, 2, False),  # much is left out, but what is kept is small
        ([1.0] * 256, 1, True),
    ],
)
def test_a_basis_in_float32_is_good_where_what_is_kept_is_large_and_what_is_left_out_too(values, rank, good):
    values = torch.tensor([values], dtype=torch.float64)
    assert is_good_for(values, torch.eye(256)[None], rank) is good
    assert is_good_for(values, torch.eye(256, dtype=torch.float64)[None], rank)
