"""The pivoted form of a product: exact, and of bounded growth, on matrices constructed to make pivots fail."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import HARD_KINDS, hard_matrices, hard_matrix, randn, seeds
from torchsmooth import _pivoting
from torchsmooth._leading import truncated_factors
from torchsmooth._linalg import LinAlgError
from torchsmooth._pivoting import GROWTH, listed, pivoted_rows, why_no_order, with_identity

# Rounding of a product of this size in float64, relative to the norms of its factors.
TOLERANCE = 1e-13


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def hadamard(size):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def powers(low, high, rows, columns):
    return torch.linspace(low, high, rows, dtype=torch.float64).unsqueeze(1) ** torch.arange(columns)


def doubling(rank, below):
    """Wilkinson's matrix, with rows below: each step of an elimination with partial pivoting doubles what is left."""
    return torch.cat([eye(rank) - torch.ones(rank, rank).tril(-1), -torch.ones(below, rank, dtype=torch.float64)])


def foster(rank):
    """Foster's matrix: a Volterra equation by the trapezium rule, on which partial pivoting fails in practice."""
    step = 1.0
    matrix = eye(rank) - step * torch.ones(rank, rank, dtype=torch.float64).tril(-1)
    matrix[1:, 0] = -step / 2
    return torch.cat([matrix, -torch.full((rank, rank), step, dtype=torch.float64)])


def kahan(size, cosine):
    """Kahan's triangle: its columns come in the order of QR with column pivoting, which then hides a tiny distance."""
    scale = torch.diag(math.sqrt(1 - cosine**2) ** torch.arange(size, dtype=torch.float64))
    triangle = scale @ (eye(size) - cosine * torch.ones(size, size, dtype=torch.float64).triu(1))
    return triangle * (1 - 1e-10 * torch.arange(size, dtype=torch.float64))  # which breaks the ties


def kahan_frame(size, cosine, copies):
    """Orthogonal columns with Kahan's on top, and below many short rows that pivoting by distance comes to last."""
    triangle = kahan(size, cosine)
    energy = triangle @ triangle.T
    whole = 1.0001 * torch.linalg.eigvalsh(energy)[-1]
    below = torch.linalg.cholesky(whole * eye(size) - energy).T / math.sqrt(copies)
    return torch.cat([triangle.T, below.repeat(copies, 1)])


HARD = {
    "zero": torch.zeros(24, 7, dtype=torch.float64),
    "rank_one": randn(24, 1, seed=0) @ randn(1, 7, seed=1),
    "rank_three": randn(40, 3, seed=0) @ randn(3, 12, seed=1),
    "dependent_columns": randn(24, 4, seed=2).repeat(1, 2),
    "zero_rows": torch.cat([torch.zeros(20, 6, dtype=torch.float64), randn(9, 6, seed=3)]),
    "one_row_left": randn(13, 12, seed=4),
    "equal_rows": torch.ones(30, 5, dtype=torch.float64) + 1e-13 * randn(30, 5, seed=5),
    "identity": torch.cat([eye(9), torch.zeros(5, 9, dtype=torch.float64)]),
    "permutation": torch.eye(40, dtype=torch.float64).flip(0)[:, :17],
    "orthogonal": torch.linalg.qr(randn(60, 60, seed=6)).Q[:, :31],
    "hadamard": hadamard(64)[:, :32],
    "hadamard_odd": hadamard(64)[:, :13],
    "cosines": torch.cos(math.pi * torch.outer(torch.arange(64.0).double() + 0.5, torch.arange(40.0).double()) / 64),
    "tiny": 1e-25 * randn(24, 7, seed=7),
    "huge": 1e30 * randn(24, 7, seed=8),
    "tiniest": 1e-300 * randn(24, 7, seed=9),
    "hugest": 1e300 * randn(24, 7, seed=10).clamp(-1, 1),
    "unequal_columns": randn(24, 7, seed=11) * 10.0 ** torch.arange(-90, 120, 30).double(),
    "unequal_rows": randn(24, 7, seed=12) * 10.0 ** torch.arange(-120, 120, 10).double().unsqueeze(1),
    "hilbert": 1 / (torch.arange(50.0).double().unsqueeze(1) + torch.arange(20.0).double() + 1),
    "vandermonde": powers(-1, 1, 60, 25),
    "vandermonde_positive": powers(0, 1, 60, 40),
    "doubling": doubling(50, 50),
    "doubling_one": doubling(80, 1),
    "doubling_beyond_float64": doubling(1100, 2),
    "foster": foster(60),
    "kahan": kahan(90, 0.285).T[:, :89],
    "kahan_perturbed": kahan(60, 0.5).T[:, :50] + 1e-12 * randn(60, 50, seed=13),
    "kahan_frame": kahan_frame(30, 0.3, 50),
    "strided": randn(14, 48, seed=14)[::2, ::2].T,
}


def basis_of(matrix):
    return torch.linalg.qr(matrix).Q.unsqueeze(0)


def reassembled(pivoted):
    groups, rows = len(pivoted.pivots), pivoted.pivots.shape[1] + pivoted.others.shape[1]
    product = torch.full((groups, rows, pivoted.kept.shape[-1]), math.nan, dtype=torch.float64)
    for group in range(groups):
        for place, row in enumerate(pivoted.pivots[group]):
            product[group, row] = pivoted.kept[group, place]
        for place, row in enumerate(pivoted.others[group]):
            product[group, row] = pivoted.free[group, place] @ pivoted.kept[group]
    return product


def check(up, down):
    """Everything that a pivoted form promises."""
    groups, rows, rank = up.shape
    pivoted = pivoted_rows(up, down)
    assert pivoted.free.shape == (groups, rows - rank, rank)
    assert {one.dtype for one in (pivoted.free, pivoted.kept)} == {torch.float64}
    assert float(pivoted.free.abs().max()) <= GROWTH
    for pivots, others in zip(pivoted.pivots.tolist(), pivoted.others.tolist(), strict=True):
        assert (pivots, others) == (sorted(pivots), sorted(others))
        assert sorted(pivots + others) == list(range(rows))
    # Each term of the product to its own rounding; as ratios, which stay in range.
    sizes = (up.abs().amax((0, 1)).unsqueeze(1) * down.abs()).sum((0, 1)).clamp_min(1e-300)
    difference = (reassembled(pivoted) - up @ down).abs() / sizes
    assert float(difference.max()) <= TOLERANCE * rows
    return pivoted


@pytest.mark.parametrize("name", HARD)
def test_growth_is_bounded_and_the_product_exact_on_a_hard_matrix(name):
    up = HARD[name].unsqueeze(0)
    check(up, eye(up.shape[-1]).unsqueeze(0))
    check(up, randn(1, up.shape[-1], 5, seed=20))


@pytest.mark.parametrize("kind", HARD_KINDS)
@given(data=st.data())
def test_growth_is_bounded_and_the_product_exact_on_truncated_factors(kind, data):
    rows, columns = data.draw(st.integers(2, 24)), data.draw(st.integers(2, 24))
    matrix = hard_matrix(kind, rows, columns, data.draw(seeds))
    up, down = truncated_factors(matrix.unsqueeze(0), data.draw(st.integers(1, min(rows, columns) - 1)))
    check(up, down)
    check(down.mT, up.mT)  # columns as pivots: not even contiguous


@given(st.integers(1, 5), st.integers(2, 12), st.integers(1, 6), seeds, st.data())
def test_groups_are_pivoted_one_by_one(groups, rows, columns, seed, data):
    rank = data.draw(st.integers(1, rows - 1))
    matrices = [data.draw(hard_matrices(rows, rows))[:, :rank] for _ in range(groups)]
    up, down = torch.stack(matrices), randn(groups, rank, columns, seed=seed)
    together = check(up, down)
    for group in range(groups):
        alone = pivoted_rows(up[group : group + 1], down[group : group + 1])
        # Ties may be broken in another way, so the pivots need not be the same ones.
        assert float(alone.free.abs().max()) <= GROWTH
        size = float((up[group].abs().amax() * down[group].abs().amax()).clamp_min(1e-300))
        assert float((reassembled(alone)[0] - reassembled(together)[group]).abs().max()) <= TOLERANCE * rows**2 * size


def test_many_small_groups_among_which_few_need_exchanges():
    up = randn(500, 9, 4, seed=0)
    up[7], up[300] = doubling(4, 5), 0
    check(up, randn(500, 4, 9, seed=1))


@given(hard_matrices(2, 16), seeds)
def test_equal_input_gives_equal_pivots_whatever_the_random_state(matrix, seed):
    up = matrix[:, : len(matrix) - 1].unsqueeze(0)
    down = eye(up.shape[-1]).unsqueeze(0)
    first = pivoted_rows(up, down)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    second = pivoted_rows(up.clone(), down.clone())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@given(seeds, st.integers(-60, 60))
def test_the_scale_of_the_columns_does_not_matter(seed, power):
    up, down = randn(1, 20, 8, seed=seed), randn(1, 8, 5, seed=seed + 1)
    scaled = pivoted_rows(up * 2.0**power, down)
    plain = pivoted_rows(up, down)
    assert torch.equal(scaled.pivots, plain.pivots)
    assert torch.equal(scaled.free, plain.free)


def test_neither_factor_is_changed():
    up, down = HARD["foster"].clone().unsqueeze(0), randn(1, 60, 5, seed=0)
    before = up.clone(), down.clone()
    pivoted_rows(up, down)
    assert torch.equal(up, before[0])
    assert torch.equal(down, before[1])


# What makes the matrices hard: each of the two ways to start is led astray by one of them.


def test_elimination_alone_would_double_with_every_step():
    _, free = _pivoting._by_elimination(basis_of(doubling(50, 50)))
    assert float(free.abs().max()) >= 1e6
    _, free = _pivoting._by_distance(basis_of(doubling(50, 50)))
    assert float(free.abs().max()) <= 2


def test_pivots_by_distance_alone_would_grow_on_kahans_matrix():
    _, free = _pivoting._by_distance(basis_of(kahan_frame(30, 0.3, 50)))
    assert float(free.abs().max()) >= 10


@pytest.mark.parametrize("name", HARD)
def test_pivots_by_distance_are_a_start_from_which_the_exchanges_arrive(name, monkeypatch):
    monkeypatch.setattr(_pivoting, "_by_elimination", _pivoting._by_distance)
    up = HARD[name].unsqueeze(0)
    check(up, randn(1, up.shape[-1], 5, seed=20))


def bad_start(basis):
    """The first rows as pivots, however dependent they are."""
    rank = basis.shape[-1]
    order = torch.arange(basis.shape[1]).repeat(len(basis), 1)
    return order, torch.linalg.solve(basis[:, :rank], basis[:, rank:], left=False)


@pytest.mark.parametrize("gap", [1e-2, 1e-6, 1e-10, 1e-14])
@given(seed=seeds)
def test_the_exchanges_arrive_from_pivots_that_are_all_but_dependent(gap, seed):
    up = randn(2, 30, 8, seed=seed)
    up[:, 4:8] = randn(2, 4, 4, seed=seed + 1) @ up[:, :4] + gap * up[:, 4:8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pivoting, "_by_elimination", bad_start)
        patch.setattr(_pivoting, "_by_distance", bad_start)
        check(up, randn(2, 8, 5, seed=seed + 2))


@given(st.integers(1, 4), st.integers(2, 9), seeds, st.data())
def test_the_identity_goes_where_the_pivots_are(groups, rows, seed, data):
    rank = data.draw(st.integers(1, rows - 1))
    pivoted = pivoted_rows(randn(groups, rows, rank, seed=seed), randn(groups, rank, 4, seed=seed + 1))
    order = listed(pivoted.pivots, pivoted.others)
    whole = with_identity(pivoted.free, order.argsort(), groups, rank)
    for group in range(groups):
        assert torch.equal(whole[group, pivoted.pivots[group]], eye(rank))
        assert torch.equal(whole[group, pivoted.others[group]], pivoted.free[group])
    for value, places in ((order, False), (order.argsort(), True)):
        assert why_no_order(value.int(), groups, rank, rows, places=places) == ""


# Two groups of three rows, one pivot in each: row 1 of the first group, row 2 (5 of all) of the second.
GOOD = [1, 5, 0, 2, 3, 4]


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (torch.tensor(GOOD), ""),
        (torch.tensor(GOOD, dtype=torch.uint8), ""),
        (torch.tensor(GOOD).float(), r"expected 6 integers, got shape \(6,\) of torch.float32"),
        (torch.tensor(GOOD[:5]), r"expected 6 integers, got shape \(5,\)"),
        (torch.tensor(GOOD).reshape(2, 3), r"got shape \(2, 3\)"),
        (torch.tensor(True), "torch.bool"),
        (torch.tensor([1, 5, 0, 2, 3, 3]), "expected each number from 0 to 5 once"),
        (torch.tensor([1, 6, 0, 2, 3, 4]), "expected each number from 0 to 5 once"),
        (torch.tensor([1, -1, 0, 2, 3, 4]), "expected each number from 0 to 5 once"),
        (torch.tensor([1, 2, 0, 5, 3, 4]), "expected 1 pivots from each of 2 groups of 3"),
        (torch.tensor(GOOD, device="meta"), "on the meta device"),
        (GOOD, "expected a tensor of 6 integers, got list"),
    ],
)
@pytest.mark.parametrize("places", [False, True])
def test_an_order_that_could_not_be_one_is_told_apart(order, reason, places):
    if places and (not reason or "pivots" in reason):  # the permutations
        order = order.argsort().to(order.dtype)
    found = why_no_order(order, 2, 1, 3, places=places)
    assert re.search(reason, found) if reason else not found


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_end_in_an_error(value):
    up = randn(2, 9, 4, seed=0)
    up[1, 3, 2] = value
    with pytest.raises(LinAlgError, match="NaN or infinite"):
        pivoted_rows(up, randn(2, 4, 3, seed=1))
