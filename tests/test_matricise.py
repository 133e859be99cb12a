"""Matricisations: each scheme against loops, the way back, and names that tell shapes apart."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.reference.lowrank import group_matrices, outputs_first, weight_from_matrices
from tests.strategies import randn, seeds
from torchsmooth._matricise import (
    AMPLIFIED,
    FORMS,
    SCHEMES,
    channel_view,
    distinct_schemes,
    exchanged,
    matricise,
    suited_multiple,
)

sizes = st.integers(1, 4)


@st.composite
def shapes(draw):
    groups = draw(st.integers(1, 3))
    return (groups * draw(sizes), draw(sizes), draw(sizes), draw(sizes)), groups


@given(shapes(), st.sampled_from(SCHEMES), seeds)
def test_matrices_hold_the_entries_that_the_scheme_says(shape_and_groups, scheme, seed):
    shape, groups = shape_and_groups
    weight = randn(*shape, seed=seed)
    layout = matricise(shape, scheme, groups)
    expected = torch.stack(group_matrices(weight, scheme, groups))
    assert torch.equal(layout.to_matrices(weight), expected)
    assert (layout.groups, layout.rows, layout.columns) == expected.shape
    assert layout.full_rank == min(expected.shape[1:])
    assert layout.dense_parameters == weight.numel()


@given(shapes(), st.sampled_from(SCHEMES), seeds)
def test_a_weight_comes_back_from_its_matrices(shape_and_groups, scheme, seed):
    shape, groups = shape_and_groups
    weight = randn(*shape, seed=seed)
    layout = matricise(shape, scheme, groups)
    assert torch.equal(layout.to_weight(layout.to_matrices(weight)), weight)
    assert torch.equal(weight_from_matrices(list(layout.to_matrices(weight)), shape, scheme), weight)


@given(shapes(), st.sampled_from(SCHEMES), st.integers(1, 5), seeds)
def test_factors_come_back_from_layer_weights_of_the_announced_shapes(shape_and_groups, scheme, rank, seed):
    shape, groups = shape_and_groups
    layout = matricise(shape, scheme, groups)
    up = randn(groups, layout.rows, rank, seed=seed)
    down = randn(groups, rank, layout.columns, seed=seed + 1)
    up_weight, down_weight = layout.to_layer_weights(up, down)
    assert (tuple(up_weight.shape), tuple(down_weight.shape)) == layout.layer_shapes(rank)
    assert up_weight.numel() + down_weight.numel() == rank * layout.groups * (layout.rows + layout.columns)
    again = layout.to_factors(up_weight, down_weight)
    assert torch.equal(again[0], up)
    assert torch.equal(again[1], down)


@given(shapes(), st.sampled_from(SCHEMES), st.sampled_from(FORMS), st.integers(1, 3), seeds)
def test_stored_factors_of_either_form_come_back_from_layer_weights(shape_and_groups, scheme, form, rank, seed):
    shape, groups = shape_and_groups
    layout = matricise(shape, scheme, groups)
    assume(rank <= layout.largest_rank(form))
    fewer = rank if form == "pivoted" else 0
    left, right = (0, fewer) if layout.pivots_columns else (fewer, 0)
    up = randn(groups, layout.rows - left, rank, seed=seed)
    down = randn(groups, rank, layout.columns - right, seed=seed + 1)
    weights = layout.to_layer_weights(up, down, form)
    assert tuple(tuple(one.shape) for one in weights) == layout.layer_shapes(rank, form)
    assert sum(one.numel() for one in weights) == layout.parameters(rank, form) == up.numel() + down.numel()
    again = layout.to_factors(*weights, form)
    assert torch.equal(again[0], up)
    assert torch.equal(again[1], down)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pivoted_layers_are_smaller_than_dense_at_every_rank_below_the_full(scheme):
    for shape, groups in (((6, 4, 3, 2), 1), ((6, 4, 3, 2), 3), ((8, 8, 1, 1), 1), ((4, 1, 5, 5), 4)):
        layout = matricise(shape, scheme, groups)
        ranks = torch.arange(layout.full_rank + 1)
        for form in FORMS:
            costs = layout.parameters(ranks, form)
            assert costs.tolist() == [layout.parameters(rank, form) for rank in ranks.tolist()]
            assert costs.dtype == torch.int64
        costs = layout.parameters(ranks, "pivoted")
        assert bool((costs[:-1] < layout.dense_parameters).all())
        assert int(costs[-1]) == layout.dense_parameters
        assert torch.equal(layout.parameters(ranks, "factored"), ranks * layout.groups * (layout.rows + layout.columns))
        assert layout.largest_rank("pivoted") == layout.largest_rank("factored") - 1 == layout.full_rank - 1


@pytest.mark.parametrize(
    ("shape", "children"),
    [
        ((6, 4), ["merge"]),
        ((6, 4, 1, 1), ["merge"] * 4),
        ((6, 4, 3, 3), ["merge", "split", "up", "up"]),
        ((6, 4, 3, 1), ["merge", "split", "merge", "split"]),
        ((6, 4, 1, 3), ["merge", "split", "split", "merge"]),
    ],
)
def test_pivots_are_output_channels_input_channels_or_rows(shape, children):
    schemes = SCHEMES if len(shape) == 4 else SCHEMES[:1]
    assert [matricise(shape, scheme).order_child for scheme in schemes] == children


@pytest.mark.parametrize("scheme", SCHEMES)
def test_channels_last_and_other_strides_change_nothing(scheme):
    weight = randn(4, 3, 2, 5, seed=0)
    layout = matricise(weight.shape, scheme)
    expected = layout.to_matrices(weight)
    assert torch.equal(layout.to_matrices(weight.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(layout.to_matrices(weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)), expected)


def test_a_linear_weight_is_its_own_matrix():
    weight = randn(5, 3, seed=0)
    layout = matricise(weight.shape, "channel")
    assert torch.equal(layout.to_matrices(weight)[0], weight)
    assert layout.layer_shapes(2) == ((5, 2), (2, 3))


@given(st.integers(1, 4), st.integers(1, 4))
def test_schemes_share_a_name_just_when_they_are_one_reshaping(height, width):
    first = distinct_schemes((height, width))
    weight = torch.arange(6.0 * height * width).reshape(2, 3, height, width)
    for one, other in itertools.combinations(SCHEMES, 2):
        matrices = [group_matrices(weight, scheme, 1)[0] for scheme in (one, other)]
        same = matrices[0].shape == matrices[1].shape and torch.equal(*matrices)
        assert (first[one] == first[other]) == same


@given(shapes(), st.integers(1, 6))
def test_layer_shapes_tell_the_distinct_schemes_apart(shape_and_groups, rank):
    shape, groups = shape_and_groups
    names = set(distinct_schemes(shape[2:]).values())
    assert len({matricise(shape, scheme, groups).layer_shapes(rank) for scheme in names}) == len(names)


@given(shapes(), st.integers(1, 6), st.integers(1, 6))
def test_layer_shapes_tell_the_forms_apart(shape_and_groups, rank, other_rank):
    shape, groups = shape_and_groups
    layouts = [matricise(shape, scheme, groups) for scheme in set(distinct_schemes(shape[2:]).values())]
    factored = {one.layer_shapes(rank) for one in layouts if rank <= one.largest_rank("factored")}
    pivoted = {one.layer_shapes(other_rank, "pivoted") for one in layouts if other_rank <= one.largest_rank("pivoted")}
    assert not factored & pivoted
    # Of the spatial schemes, up is a matrix in both; down tells which one it is.
    assert len(pivoted) == sum(other_rank <= one.largest_rank("pivoted") for one in layouts)


@st.composite
def transposed_shapes(draw):
    """Shapes ``(in, out / groups, *kernel)`` of 0 … 3 kernel axes."""
    groups = draw(st.integers(1, 3))
    return (groups * draw(sizes), draw(sizes), *draw(st.lists(st.integers(1, 3), max_size=3))), groups


@given(transposed_shapes(), st.sampled_from(SCHEMES[:2]), st.sampled_from(FORMS), st.integers(1, 3), seeds)
def test_a_transposed_weight_has_the_matrices_of_one_with_its_outputs_first(shape_and_groups, scheme, form, rank, seed):
    shape, groups = shape_and_groups
    weight = randn(*shape, seed=seed)
    plain = outputs_first(weight, groups)
    assert torch.equal(exchanged(weight, groups), plain)
    assert torch.equal(exchanged(plain, groups), weight)
    layout, other = matricise(shape, scheme, groups, transposed=True), matricise(plain.shape, scheme, groups)
    assert layout != other
    assert torch.equal(layout.to_matrices(weight), torch.stack(group_matrices(plain, scheme, groups)))
    assert torch.equal(layout.to_weight(layout.to_matrices(weight)), weight)
    assume(rank <= layout.largest_rank(form))
    fewer = rank if form == "pivoted" else 0
    left, right = (0, fewer) if layout.pivots_columns else (fewer, 0)
    factors = (
        randn(groups, layout.rows - left, rank, seed=seed),
        randn(groups, rank, layout.columns - right, seed=seed + 1),
    )
    weights, others = layout.to_layer_weights(*factors, form), other.to_layer_weights(*factors, form)
    for child, one, plain_one in zip(("up", "down"), weights, others, strict=True):
        assert torch.equal(outputs_first(one, groups) if layout.inputs_first == child else one, plain_one)
    assert layout.inputs_first == ("up" if scheme == "input" and len(shape) > 2 else "down")
    assert tuple(tuple(one.shape) for one in weights) == layout.layer_shapes(rank, form)
    assert layout.rank_of(weights[0].shape) == rank
    for found, expected in zip(layout.to_factors(*weights, form), factors, strict=True):
        assert torch.equal(found, expected)


@given(transposed_shapes(), st.integers(1, 6))
def test_layer_shapes_of_transposed_weights_tell_schemes_and_forms_apart(shape_and_groups, rank):
    shape, groups = shape_and_groups
    names = set(distinct_schemes(shape[2:], transposed=True).values())
    assert names <= {"channel", "input"}
    found = [
        layout.layer_shapes(rank, form)
        for layout in (matricise(shape, scheme, groups, transposed=True) for scheme in names)
        for form in FORMS
        if rank <= layout.largest_rank(form)
    ]
    assert len(set(found)) == len(found)


def test_channel_view_of_a_transposed_weight_swaps_the_channel_axes():
    weight = randn(6, 2, 3, seed=0)  # 3 groups: 2 input and 2 output channels each
    view = channel_view(weight, 3, transposed=True)
    assert view.shape == (3, 2, 2, 3)
    assert torch.equal(view[1, 0, 1], weight[3, 0])


def test_a_spatial_scheme_needs_two_kernel_axes():
    with pytest.raises(ValueError, match="this weight has 1 kernel axes: use 'channel' or 'input'"):
        matricise((4, 3, 5), "spatial")


def test_an_unknown_scheme_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'channel', 'input', 'spatial', 'spatial_transposed'; got str 'row'"):
        matricise((4, 3, 5, 5), "row")


@pytest.mark.parametrize(
    ("full_rank", "multiple"), [(1, 1), (15, 1), (16, 4), (31, 4), (32, 8), (63, 8), (64, 16), (1000, 16)]
)
def test_four_ranks_or_more_are_left_to_choose_from(full_rank, multiple):
    assert suited_multiple(full_rank) == multiple


@pytest.mark.parametrize("scheme", ["channel", "input", "spatial", "spatial_transposed"])
@pytest.mark.parametrize("shape", [(6, 20, 3, 3), (20, 6, 3, 3), (8, 8, 2, 3)])
def test_rounding_is_amplified_by_rows_that_are_no_pivots(shape, scheme):

    layout = matricise(shape, scheme)
    # The pivots are input channels under "input", rows elsewhere.
    size = shape[1] if scheme == "input" else layout.rows
    expected = [1 + AMPLIFIED * rank * (size - rank) / size for rank in range(layout.full_rank + 1)]
    assert layout.amplification("pivoted").tolist() == pytest.approx(expected)
    assert layout.amplification("factored").tolist() == [1.0] * (layout.full_rank + 1)
