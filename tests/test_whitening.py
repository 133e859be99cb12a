"""Factors in the metric of a moment: Eckart–Young, exact least squares, and every rank's error at the output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import torchsmooth
from tests.networks import small_resnet
from tests.reference import calibration as reference
from tests.strategies import randn, seeds
from torchsmooth._matricise import SCHEMES, distinct_schemes, matricise
from torchsmooth._whitening import (
    Output,
    column_moment,
    damped,
    features,
    first_factor,
    output_errors,
    second_factor,
    square_roots,
    target_weight,
)

KERNELS = ((), (1, 1), (1, 3), (3, 1), (3, 3), (5, 3), (5, 5))
# How the rows that come in may be: more of them than columns, or a moment that is singular.
KINDS = ("plenty", "few", "one", "dead channel", "dead border", "plane", "decaying", "constant", "zero")
SINGULAR = KINDS[1:]
SCALES = (1.0, 1e-25, 1e15)


class Case:
    """One layer: its weight ``(groups, m, n)``, what comes in ``(groups, rows, n)``, and a scheme."""

    def __init__(self, kernel, sizes, scheme, *, kind="plenty", scale=1.0, seed=0):
        groups, out, inside = sizes
        self.layout = matricise((groups * out, inside, *kernel), scheme, groups)
        width = inside * torch.Size(kernel).numel()
        rows = randn(groups, {"few": min(3, width), "one": 1}.get(kind, 3 * width), width, seed=seed)
        split = rows.reshape(groups, -1, inside, *kernel)
        if kind == "dead channel":
            split[:, :, 0] = 0
        elif kind == "dead border" and kernel:
            split[:, :, :, 0] = 0
        elif kind == "plane":
            rows = rows[..., :2] @ randn(groups, min(2, width), width, seed=seed + 1)
        elif kind == "decaying":
            rows = rows * torch.logspace(0, -9, width, dtype=torch.float64)
        elif kind == "constant":
            rows = torch.ones_like(rows)
        elif kind == "zero":
            rows = torch.zeros_like(rows)
        self.rows = scale * rows
        self.inner = self.rows.mT @ self.rows / self.rows.shape[1]
        self.weight = randn(groups, out, width, seed=seed + 2)

    @property
    def energy(self):
        return reference.output_error(self.rows, self.weight, torch.zeros_like(self.weight))

    @property
    def size(self):
        """What an error may be compared with: the data may lie where the weight gives next to nothing."""
        return float(self.weight.square().sum() * self.inner.diagonal(dim1=1, dim2=2).sum())

    def relative_error(self, approximation):
        """Squared, on the rows themselves."""
        return reference.output_error(self.rows, self.weight, approximation) / self.energy

    def factors(self, rank):
        down = first_factor(self.weight, self.inner, self.layout, rank)
        return second_factor(self.weight, self.inner, down, self.layout), down

    def multiplied(self, up, down):
        return self.layout.to_weight(up @ down).reshape(self.weight.shape)


@st.composite
def cases(draw, kinds=KINDS, schemes=SCHEMES, scales=SCALES):
    kernel = draw(st.sampled_from(KERNELS))
    scheme = draw(st.sampled_from(schemes))
    assume(scheme in distinct_schemes(kernel))
    sizes = (draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 4)))
    kind, scale = draw(st.sampled_from(kinds)), draw(st.sampled_from(scales))
    return Case(kernel, sizes, scheme, kind=kind, scale=scale, seed=draw(seeds))


def ranks(case):
    return st.integers(1, case.layout.full_rank)


@given(cases(), st.data())
def test_both_ways_to_the_approximation_are_one(case, data):
    (up, fitted), down = case.factors(data.draw(ranks(case)))
    assert up.shape[:2] == (case.layout.groups, case.layout.rows)
    assert down.shape[2] == case.layout.columns
    assert bool(up.isfinite().all() & down.isfinite().all())
    assert torch.allclose(case.multiplied(up, down), fitted, rtol=1e-9, atol=1e-9 * float(fitted.abs().max()))


@given(cases())
def test_features_are_what_up_sees_of_a_patch(case):
    layout = case.layout
    down = randn(layout.groups, 2, layout.columns, seed=0)
    seen = features(down, layout)
    for group in range(layout.groups):
        expected = reference.seen_by_up(down[group], layout.kernel, layout.down_axes, layout.in_channels)
        assert torch.equal(seen[group], expected)


@settings(max_examples=25)
@given(cases(kinds=("plenty",)))
def test_features_and_up_are_the_two_convolutions(case):
    layout = case.layout
    assume(len(layout.kernel) == 2)
    down, up = randn(layout.groups, 2, layout.columns, seed=0), randn(layout.groups, layout.rows, 2, seed=1)
    up_weight, down_weight = layout.to_layer_weights(up, down)
    patches = case.rows.transpose(0, 1).reshape(len(case.rows[0]), -1, *layout.kernel)
    between = torch.nn.functional.conv2d(patches, down_weight, groups=layout.groups)
    outputs = torch.nn.functional.conv2d(between, up_weight, groups=layout.groups)
    between, outputs = (one.reshape(len(one), layout.groups, -1).transpose(0, 1) for one in (between, outputs))
    scale = float(case.rows.abs().max())
    assert torch.allclose(between, case.rows @ features(down, layout).mT, atol=1e-12 * scale)
    assert torch.allclose(outputs, case.rows @ case.multiplied(up, down).mT, atol=1e-11 * scale)


@given(cases(schemes=("channel",), kinds=KINDS[:-1]), st.data())
def test_by_channels_no_approximation_of_the_rank_is_better(case, data):
    rank = data.draw(ranks(case))
    (_, fitted), _ = case.factors(rank)
    error = reference.output_error(case.rows, case.weight, fitted)
    best = reference.optimal_error(case.rows, case.weight, rank)
    assert abs(error - best) <= 1e-9 * case.size


@given(cases(schemes=("channel",), kinds=("plenty",)), st.data())
def test_by_channels_it_is_the_truncation_of_the_whitened_weight(case, data):
    rank = data.draw(ranks(case))
    (_, fitted), _ = case.factors(rank)
    for weight, inner, approximation in zip(case.weight, case.inner, fitted, strict=True):
        expected = reference.whitened_truncation(weight, inner, rank)
        values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(inner))
        # Of two triples of nearly the same size either may come first.
        if rank == len(values) or values[rank - 1] > 1.01 * values[rank]:
            assert torch.allclose(approximation, expected, atol=1e-5 * float(weight.abs().max()))


@given(cases(kinds=("plenty",)), st.data())
def test_the_second_factor_is_the_least_squares_solution_on_the_rows(case, data):
    (_, fitted), down = case.factors(data.draw(ranks(case)))
    seen = features(down, case.layout)
    for group, rows in enumerate(case.rows):
        outputs = rows @ case.weight[group].T
        solution = torch.linalg.lstsq(rows @ seen[group].T, outputs, driver="gelsd").solution
        best = float((outputs - rows @ seen[group].T @ solution).square().sum())
        error = float((outputs - rows @ fitted[group].T).square().sum())
        assert error <= best + 1e-8 * float(outputs.square().sum())


@given(cases(kinds=KINDS[:-1]), st.data())
def test_no_other_second_factor_is_better(case, data):
    assume(case.energy > 0)
    (up, fitted), down = case.factors(data.draw(ranks(case)))
    error = case.relative_error(fitted)
    size = float(up.abs().max())
    for seed, step in enumerate((1e-4, 1e-2, 1.0)):
        rival = case.multiplied(up + step * size * randn(*up.shape, seed=seed), down)
        assert case.relative_error(rival) >= error - 1e-8


@given(cases(), st.data())
def test_errors_of_all_ranks_fall_from_one_to_zero(case, data):
    errors = output_errors(Output(case.weight, case.inner), case.layout)
    assert errors.shape == (case.layout.full_rank + 1,)
    assert errors.dtype == torch.float64
    assert bool((errors[1:] <= errors[:-1]).all())
    assert float(errors[-1]) == 0
    assert float(errors[0]) == (0 if case.energy == 0 else 1)


@given(cases())
def test_the_error_of_each_rank_is_that_of_its_factors(case):
    assume(case.energy > 0)
    errors = output_errors(Output(case.weight, case.inner), case.layout)
    # A little weight on what never comes in is part of it.
    inner = damped(case.inner, 1e-9)
    whole = float((case.weight @ inner * case.weight).sum())
    for rank in range(1, case.layout.full_rank + 1):
        (_, fitted), _ = case.factors(rank)
        missed = case.weight - fitted
        assert float((missed @ inner * missed).sum()) / whole == pytest.approx(float(errors[rank]), abs=1e-5)


@settings(max_examples=25)
@given(cases(kinds=("plenty",)))
def test_where_everything_comes_in_the_errors_agree_to_rounding(case):
    errors = output_errors(Output(case.weight, case.inner), case.layout)
    for rank in range(1, case.layout.full_rank + 1):
        (_, fitted), _ = case.factors(rank)
        assert case.relative_error(fitted) == pytest.approx(float(errors[rank]), abs=1e-6)


@given(cases(kinds=SINGULAR))
def test_at_full_rank_nothing_that_comes_in_is_lost(case):
    (_, fitted), _ = case.factors(case.layout.full_rank)
    error = reference.output_error(case.rows, case.weight, fitted)
    assert error <= 1e-9 * case.size


@given(cases(kinds=("plenty",)))
def test_the_full_rank_is_the_weight_itself(case):
    (_, fitted), _ = case.factors(case.layout.full_rank)
    assert torch.allclose(fitted, case.weight, atol=1e-6)


@given(cases(), st.sampled_from([2.0**-40, 2.0**30]), st.data())
def test_the_scale_of_the_data_changes_nothing(case, scale, data):
    rank = data.draw(ranks(case))
    down = first_factor(case.weight, case.inner, case.layout, rank)
    again = first_factor(case.weight, scale**2 * case.inner, case.layout, rank)
    one = second_factor(case.weight, case.inner, down, case.layout)[1]
    other = second_factor(case.weight, scale**2 * case.inner, again, case.layout)[1]
    assert abs(case_error(case, one) - case_error(case, other)) <= 1e-6


def case_error(case, approximation):
    return case.relative_error(approximation) if case.energy else 0.0


@given(cases(), st.data())
def test_equal_input_gives_equal_factors_of_fixed_signs(case, data):
    rank = data.draw(ranks(case))
    (up, _), down = case.factors(rank)
    (again, _), same = case.factors(rank)
    assert torch.equal(up, again)
    assert torch.equal(down, same)
    assert bool((down.gather(-1, down.abs().argmax(-1, keepdim=True)) >= 0).all())


@given(cases())
def test_the_moment_of_columns_is_the_mean_over_the_kernel_axes_of_up(case):
    layout = case.layout
    rows = case.rows.reshape(layout.groups, -1, layout.in_channels, *layout.kernel)
    up_axes = [3 + axis for axis in layout.up_axes]
    rest = [axis for axis in range(2, rows.dim()) if axis not in up_axes]
    columns = rows.permute(0, 1, *up_axes, *rest).reshape(layout.groups, -1, layout.columns)
    expected = columns.mT @ columns / columns.shape[1]
    scale = float(expected.abs().max())
    assert torch.allclose(column_moment(case.inner, layout), expected, rtol=0, atol=1e-12 * scale)


@given(cases())
def test_square_roots_of_singular_moments_undo_each_other(case):
    root, inverse = square_roots(case.inner)
    scale = float(case.inner.abs().max())
    assert torch.allclose(root @ root.mT, case.inner, rtol=0, atol=1e-8 * scale)
    # A projection onto what comes in.
    projection = root @ inverse
    assert torch.allclose(projection @ projection, projection, atol=1e-6)
    assert torch.allclose(projection @ root, root, rtol=0, atol=1e-6 * scale**0.5)


@given(cases(), st.floats(1e-6, 1e-1))
def test_outputs_of_the_weight_itself_ask_for_nothing_else(case, ridge):
    best = target_weight(case.weight, case.inner, case.weight @ case.inner, ridge)
    assert torch.allclose(best, case.weight, atol=1e-7)


@given(cases(kinds=("plenty",)), seeds)
def test_outputs_of_another_weight_ask_for_that_one(case, seed):
    other = randn(*case.weight.shape, seed=seed)
    best = target_weight(case.weight, case.inner, other @ case.inner, 1e-12)
    assert torch.allclose(best, other, atol=1e-5)


@given(cases(kinds=("few", "one", "dead channel", "dead border", "plane", "zero")), seeds)
def test_where_the_data_is_silent_the_weight_stays(case, seed):
    other = randn(*case.weight.shape, seed=seed)
    best = target_weight(case.weight, case.inner, other @ case.inner, 1e-3)
    values, vectors = torch.linalg.eigh(case.inner)
    silent = values <= 1e-12 * values[..., -1:]
    change = (best - case.weight) @ (vectors * silent.unsqueeze(-2))
    assert float(change.abs().max()) <= 1e-7
    if not bool(case.inner.any()):
        assert torch.equal(best, case.weight)


@given(cases(kinds=("plenty", "few")), seeds, st.floats(1e-4, 1.0))
def test_the_target_is_the_least_of_misfit_and_change_together(case, seed, ridge):
    outputs = case.rows @ randn(*case.weight.shape, seed=seed).mT
    cross = outputs.mT @ case.rows / case.rows.shape[1]
    level = ridge * case.inner.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]

    def objective(weight):
        misfit = (outputs - case.rows @ weight.mT).square().sum(1).mean(-1).sum() / case.rows.shape[1]
        return float(misfit + (level * (weight - case.weight).square()).sum() / weight.shape[1])

    best = target_weight(case.weight, case.inner, cross, ridge)
    for number, step in enumerate((1e-3, 1e-1)):
        rival = best + step * randn(*best.shape, seed=seed + number)
        assert objective(rival) >= objective(best) * (1 - 1e-9)


def test_damping_adds_a_share_of_the_mean_of_the_diagonal():
    inner = torch.diag_embed(torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.float64))
    expected = torch.diag_embed(torch.tensor([[1.2, 3.2], [0.0, 0.0]], dtype=torch.float64))
    assert torch.allclose(damped(inner, 0.1), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_group_into_which_nothing_comes_does_not_disturb_the_others(scheme):
    case, alone = Case((3, 3), (2, 4, 3), scheme), Case((3, 3), (1, 4, 3), scheme)
    alone.rows, alone.weight, alone.inner = case.rows[:1], case.weight[:1], case.inner[:1]
    case.rows[1], case.inner[1] = 0, 0
    assert torch.allclose(
        output_errors(Output(case.weight, case.inner), case.layout),
        output_errors(Output(alone.weight, alone.inner), alone.layout),
    )
    (_, fitted), _ = case.factors(2)
    (_, expected), _ = alone.factors(2)
    assert torch.allclose(fitted[:1], expected)
    assert bool(fitted.isfinite().all())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [50, 500])
def test_a_wide_layer_with_fewer_rows_than_columns(scheme, rows):
    layout = matricise((24, 32, 3, 3), scheme)
    inputs, weight = randn(1, rows, 288, seed=0).relu(), randn(1, 24, 288, seed=1)
    inner = inputs.mT @ inputs / rows
    errors = output_errors(Output(weight, inner), layout)
    for rank in (1, layout.full_rank // 2, layout.full_rank - 1):
        fitted = second_factor(weight, inner, first_factor(weight, inner, layout, rank), layout)[1]
        missed = float(((weight - fitted) @ inner * (weight - fitted)).sum() / (weight @ inner * weight).sum())
        assert missed == pytest.approx(float(errors[rank]), abs=1e-6)


@pytest.mark.parametrize("seed", [11, 12])
def test_layers_that_see_maps_of_one_pixel_can_be_planned(seed):
    # Eight of nine positions of their kernels only ever meet padding, so most of their moments are zeros.
    inputs = randn(8, 3, 8, 8, seed=seed, dtype=torch.float32)
    plan = torchsmooth.plan_compression(small_resnet(), 0.5, calibration=[inputs])
    assert plan.ratio >= 0.5
