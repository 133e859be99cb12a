"""The penalties as functions of a weight, against float64 loops and by their properties."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import penalties as reference
from tests.strategies import HARD_KINDS, hard_matrices, hard_matrix, randn, seeds
from torchsmooth import functional

DERIVATIVES = (functional.first_derivative, functional.second_derivative)
PENALTIES = (*DERIVATIVES, functional.nuclear_norm, functional.nuclear_ratio)
SCHEMES = ("channel", "input", "spatial", "spatial_transposed")
HALVES = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

each_penalty = pytest.mark.parametrize("penalty", PENALTIES)
each_derivative = pytest.mark.parametrize("penalty", DERIVATIVES)
each_precision = pytest.mark.parametrize("dtype", TOLERANCE)
few = settings(max_examples=12)


class Case(NamedTuple):
    """A weight and the way to read it."""

    weight: Tensor
    layout: dict


@st.composite
def cases(draw, least_axes: int = 0, most_axes: int = 3) -> Case:
    """Weights of linear layers and convolutions, grouped, depthwise, transposed; every size may be 1."""
    groups, outputs, inputs = (draw(st.integers(1, most)) for most in (3, 5, 4))
    kernel = draw(st.lists(st.integers(1, 3), min_size=least_axes, max_size=most_axes))
    transposed = draw(st.booleans())
    first, second = (inputs, outputs) if transposed else (outputs, inputs)
    weight = randn(groups * first, second, *kernel, seed=draw(seeds))
    return Case(weight, {"groups": groups, "transposed": transposed})


def in_groups(case: Case) -> Tensor:
    groups = case.layout["groups"]
    return case.weight.reshape(groups, case.weight.shape[0] // groups, *case.weight.shape[1:])


def expected(penalty, weight: Tensor, layout: dict) -> float:
    return getattr(reference, penalty.__name__)(weight, **layout)


def value_and_gradient(penalty, weight: Tensor, **layout) -> tuple[Tensor, Tensor]:
    weight = weight.detach().requires_grad_()
    value = penalty(weight, **layout)
    return value.detach(), torch.autograd.grad(value, weight)[0]


@each_penalty
@given(case=cases())
def test_value_is_that_of_the_loops(penalty, case):
    value = penalty(case.weight, **case.layout)
    assert value.shape == ()
    assert value.item() == pytest.approx(expected(penalty, *case), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(case=cases(least_axes=2, most_axes=2))
def test_nuclear_norm_of_every_scheme_is_that_of_the_loops(scheme, case):
    value = functional.nuclear_norm(case.weight, scheme=scheme, **case.layout)
    assert value.item() == pytest.approx(reference.nuclear_norm(case.weight, scheme, **case.layout), rel=1e-10)


@given(seed=seeds, groups=st.integers(1, 3), inputs=st.integers(1, 4), outputs=st.integers(1, 4))
@pytest.mark.parametrize("transposed", [False, True])
def test_nuclear_norm_of_a_1x1_layer_is_that_of_the_linear_map_it_computes(transposed, seed, groups, inputs, outputs):
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    weight = randn(groups * shape[0], shape[1], 1, 1, seed=seed)
    every_input = torch.eye(groups * inputs, dtype=torch.float64)[..., None, None]
    layer = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    linear_map = layer(every_input, weight, groups=groups)[..., 0, 0]
    value = functional.nuclear_norm(weight, groups=groups, transposed=transposed)
    torch.testing.assert_close(value, torch.linalg.matrix_norm(linear_map, "nuc"))


@each_penalty
@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALVES])
@given(case=cases())
def test_half_precision_gives_a_value_in_single_and_the_others_keep_theirs(penalty, dtype, case):
    weight = case.weight.to(dtype)
    value, gradient = value_and_gradient(penalty, weight, **case.layout)
    assert value.dtype == (torch.float32 if dtype in HALVES else dtype)
    assert gradient.dtype == dtype
    assert value.item() == pytest.approx(expected(penalty, weight, case.layout), rel=1e-5, abs=1e-6)


@each_penalty
@given(case=cases(least_axes=2, most_axes=2))
def test_strides_do_not_matter(penalty, case):
    plain = value_and_gradient(penalty, case.weight, **case.layout)
    spread = torch.stack([case.weight, case.weight + 1], -1)[..., 0]
    for weight in (case.weight.contiguous(memory_format=torch.channels_last), spread, case.weight.mT.contiguous().mT):
        torch.testing.assert_close(value_and_gradient(penalty, weight, **case.layout), plain, check_stride=False)


@each_penalty
@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALVES])
@few
@given(case=cases())
def test_zero_weight_has_zero_value_and_zero_gradient(penalty, dtype, case):
    value, gradient = value_and_gradient(penalty, torch.zeros_like(case.weight, dtype=dtype), **case.layout)
    assert value.item() == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@each_penalty
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 3, 0, 3)])
def test_empty_weight_has_value_zero(penalty, shape):
    value, gradient = value_and_gradient(penalty, torch.zeros(shape))
    assert value.item() == 0.0
    assert gradient.shape == shape


@each_penalty
@few
@given(case=cases())
def test_gradient_is_that_of_finite_differences(penalty, case):
    assert torch.autograd.gradcheck(lambda weight: penalty(weight, **case.layout), case.weight.requires_grad_())


@each_penalty
@given(case=cases())
def test_values_of_the_groups_add_up(penalty, case):
    transposed = case.layout["transposed"]
    apart = sum(penalty(group, transposed=transposed) for group in in_groups(case))
    torch.testing.assert_close(penalty(case.weight, **case.layout), apart)


@given(case=cases(), seed=seeds)
def test_first_derivative_is_exactly_zero_on_constants(case, seed):
    grouped = in_groups(case)
    constant = randn(grouped.shape[0], 1, 1, *grouped.shape[3:], seed=seed).expand_as(grouped)
    assert functional.first_derivative(constant.reshape_as(case.weight), **case.layout).item() == 0.0


@given(case=cases(), seed=seeds)
def test_second_derivative_is_exactly_zero_on_affine_sequences(case, seed):
    grouped = in_groups(case)
    groups, *channels = grouped.shape[:3]
    p, q = (torch.arange(size, dtype=torch.float64) for size in channels)
    # Affine along each axis, with another slope for each other channel, kernel entry and group; integers are exact.
    a, b, c, d = (10 * randn(4, groups, 1, 1, *grouped.shape[3:], seed=seed)).round()
    p, q = p.reshape(1, -1, 1, *[1] * (grouped.dim() - 3)), q.reshape(1, 1, -1, *[1] * (grouped.dim() - 3))
    affine = (a + b * p + c * q + d * p * q).reshape_as(case.weight)
    assert functional.second_derivative(affine, **case.layout).item() == 0.0


@pytest.mark.parametrize(("penalty", "least"), [(DERIVATIVES[0], 2), (DERIVATIVES[1], 3)])
@given(size=st.integers(0, 3), place=st.integers(0, 5), seed=seeds)
def test_derivative_is_positive_once_one_entry_breaks_the_pattern(penalty, least, size, place, seed):
    weight = randn(1, 1, 2, seed=seed).repeat(least + size, 1, 1)
    weight[place % weight.shape[0], 0, 0] += 1.0
    assert penalty(weight).item() > 0.0
    assert penalty(weight.transpose(0, 1)).item() > 0.0


@each_derivative
@given(case=cases())
def test_derivative_is_unchanged_when_channels_are_reversed(penalty, case):
    value = penalty(case.weight, **case.layout)
    for axes in ((1,), (2,), (1, 2)):
        torch.testing.assert_close(penalty(in_groups(case).flip(axes).reshape_as(case.weight), **case.layout), value)


@each_derivative
@given(case=cases(), shift=st.integers(-50, 50))
def test_derivative_is_unchanged_by_adding_a_constant(penalty, case, shift):
    whole = (10 * case.weight).round()
    assert torch.equal(penalty(whole + shift, **case.layout), penalty(whole, **case.layout))


@each_derivative
@given(case=cases(), factor=st.floats(-1e3, 1e3))
def test_derivative_is_quadratic_and_never_negative(penalty, case, factor):
    value = penalty(case.weight, **case.layout)
    assert value.item() >= 0.0
    torch.testing.assert_close(penalty(factor * case.weight, **case.layout), factor**2 * value)


@given(seed=seeds, kernel=st.lists(st.integers(1, 3), max_size=3), size=st.integers(1, 2))
def test_axis_too_short_for_a_difference_adds_nothing(seed, kernel, size):
    assert functional.second_derivative(randn(size, 3 - size, *kernel, seed=seed)).item() == 0.0
    assert functional.first_derivative(randn(1, 1, *kernel, seed=seed)).item() == 0.0


@each_derivative
@given(case=cases())
def test_derivative_survives_a_tiny_scale(penalty, case):
    _, gradient = value_and_gradient(penalty, case.weight, **case.layout)
    value, double = value_and_gradient(penalty, 1e-25 * case.weight, **case.layout)
    _, single = value_and_gradient(penalty, 1e-25 * case.weight.float(), **case.layout)
    assert 1e50 * value.item() == pytest.approx(expected(penalty, *case), rel=1e-10)
    torch.testing.assert_close(1e25 * double, gradient)
    torch.testing.assert_close(1e25 * single.double(), gradient, rtol=1e-4, atol=1e-5)


@each_precision
@given(matrix=hard_matrices())
def test_nuclear_norm_of_hard_matrices_is_that_of_torch(dtype, matrix):
    matrix = matrix.to(dtype)
    slow = torch.linalg.matrix_norm(matrix.double(), "nuc").item()
    assert functional.nuclear_norm(matrix).item() == pytest.approx(slow, rel=TOLERANCE[dtype], abs=0.0)


@given(matrix=hard_matrices(), seed=seeds)
def test_nuclear_norm_is_unchanged_by_rotations(matrix, seed):
    rows, columns = matrix.shape
    left = torch.linalg.qr(randn(rows, rows, seed=seed)).Q
    right = torch.linalg.qr(randn(columns, columns, seed=seed + 1)).Q
    value = functional.nuclear_norm(matrix)
    torch.testing.assert_close(functional.nuclear_norm(left @ matrix @ right), value, rtol=1e-10, atol=0.0)


@given(matrix=hard_matrices())
def test_nuclear_norm_lies_between_multiples_of_the_frobenius_norm(matrix):
    frobenius = torch.linalg.matrix_norm(matrix).item()
    value = functional.nuclear_norm(matrix).item()
    assert frobenius * (1 - 1e-12) <= value <= math.sqrt(min(matrix.shape)) * frobenius * (1 + 1e-12)


@given(case=cases(), factor=st.floats(-1e6, 1e6))
def test_nuclear_norm_is_absolutely_homogeneous(case, factor):
    value = functional.nuclear_norm(case.weight, **case.layout)
    scaled = functional.nuclear_norm(factor * case.weight, **case.layout)
    torch.testing.assert_close(scaled, abs(factor) * value, rtol=1e-10, atol=1e-300)


@given(case=cases(), seed=seeds)
def test_nuclear_norm_obeys_the_triangle_inequality(case, seed):
    other = randn(*case.weight.shape, seed=seed)
    both = functional.nuclear_norm(case.weight + other, **case.layout).item()
    apart = functional.nuclear_norm(case.weight, **case.layout) + functional.nuclear_norm(other, **case.layout)
    assert both <= apart.item() * (1 + 1e-12)


@given(case=cases(least_axes=2, most_axes=2))
def test_spatial_schemes_trade_places_when_height_and_width_do(case):
    turned = functional.nuclear_norm(case.weight.mT, scheme="spatial_transposed", **case.layout)
    torch.testing.assert_close(functional.nuclear_norm(case.weight, scheme="spatial", **case.layout), turned)


@each_precision
@pytest.mark.parametrize("kind", HARD_KINDS)
@few
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=seeds)
def test_gradient_of_the_nuclear_norm_is_a_subgradient(dtype, kind, rows, columns, seed):
    matrix = hard_matrix(kind, rows, columns, seed, dtype)
    _, gradient = value_and_gradient(functional.nuclear_norm, matrix)
    assert torch.isfinite(gradient).all()
    assert reference.subgradient_defect(matrix, gradient) <= TOLERANCE[dtype]


@each_precision
@pytest.mark.parametrize("scheme", SCHEMES)
@few
@given(case=cases(least_axes=2, most_axes=2))
def test_gradient_of_every_scheme_is_a_subgradient(scheme, dtype, case):
    weight = case.weight.to(dtype)
    _, gradient = value_and_gradient(functional.nuclear_norm, weight, scheme=scheme, **case.layout)
    assert reference.subgradient_defect(weight, gradient, scheme, **case.layout) <= TOLERANCE[dtype]


@each_precision
@given(matrix=hard_matrices(), seed=seeds)
def test_nuclear_norm_lies_above_its_tangents(dtype, matrix, seed):
    matrix = matrix.to(dtype)
    value, gradient = value_and_gradient(functional.nuclear_norm, matrix)
    scale = matrix.abs().max().item() or 1.0
    for other in (scale * randn(*matrix.shape, seed=seed), -matrix.double(), torch.zeros_like(matrix).double()):
        norm = reference.nuclear_norm(other)
        tangent = value.item() + reference.inner_product(gradient, other - matrix.double())
        assert norm >= tangent - TOLERANCE[dtype] * (norm + value.item())


@each_precision
@given(rank=st.integers(0, 5), rows=st.integers(5, 12), columns=st.integers(5, 12), seed=seeds)
def test_gradient_at_a_kink_is_the_smallest_subgradient(dtype, rank, rows, columns, seed):
    left, right = (torch.linalg.qr(randn(size, size, seed=seed + size)).Q for size in (rows, columns))
    matrix = ((left[:, :rank] * torch.linspace(1, 2, rank)) @ right[:rank]).to(dtype)
    _, gradient = value_and_gradient(functional.nuclear_norm, matrix)
    # The factor U Vᵀ of the singular directions that are there has one unit singular value for each, and no other.
    ones = torch.ones(min(rows, columns), dtype=dtype) * (torch.arange(min(rows, columns)) < rank)
    torch.testing.assert_close(torch.linalg.svdvals(gradient), ones, rtol=0.0, atol=1e-5)


def test_second_derivative_of_the_nuclear_norm_raises():
    weight = randn(4, 3, seed=0).requires_grad_()
    (gradient,) = torch.autograd.grad(functional.nuclear_norm(weight), weight, create_graph=True)
    # The product with the weight would otherwise be differentiated as if the gradient were a constant.
    with pytest.raises(RuntimeError):
        torch.autograd.grad((gradient * weight).sum(), weight)


def test_second_derivative_of_the_nuclear_norm_raises_through_torch_func():
    gradient = torch.func.grad(functional.nuclear_norm)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda weight: gradient(weight).square().sum())(randn(4, 3, seed=0))


@each_penalty
@each_precision
@few
@given(case=cases())
def test_autocast_changes_nothing(penalty, dtype, case):
    weight = case.weight.to(dtype)
    plain = value_and_gradient(penalty, weight, **case.layout)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = value_and_gradient(penalty, weight, **case.layout)
    torch.testing.assert_close(autocast, plain, rtol=0.0, atol=0.0)


@each_penalty
@given(case=cases())
def test_torch_func_gives_the_same_gradient(penalty, case):
    value, gradient = value_and_gradient(penalty, case.weight, **case.layout)
    through_func = torch.func.grad_and_value(lambda weight: penalty(weight, **case.layout))(case.weight)
    torch.testing.assert_close(through_func, (gradient, value), rtol=0.0, atol=0.0)


# Dynamo makes an instance of every autograd function that it traces, and torch deprecates that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("shape", "layout"), [((4, 3), {}), ((4, 3, 3, 2), {"groups": 2, "transposed": True})])
def test_nuclear_norm_compiles_as_one_graph_with_the_same_gradient(shape, layout):
    weight = randn(*shape, seed=0, dtype=torch.float32)
    compiled = torch.compile(functional.nuclear_norm, backend="aot_eager", fullgraph=True)
    plain = value_and_gradient(functional.nuclear_norm, weight, **layout)
    torch.testing.assert_close(value_and_gradient(compiled, weight, **layout), plain)


@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALVES])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2), (4, 3), (12, 9), (3, 2, 3, 3)])
@few
@given(bad=st.sampled_from([math.nan, math.inf, -math.inf]), every=st.booleans(), place=st.integers(0, 10**6))
def test_nuclear_norm_refuses_nan_and_infinite_weights(dtype, shape, bad, every, place):
    weight = torch.ones(shape, dtype=dtype)
    weight.view(-1)[slice(None) if every else place % weight.numel()] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        functional.nuclear_norm(weight)


@each_penalty
@pytest.mark.parametrize(
    ("error", "message", "weight", "layout"),
    [
        (TypeError, "weight must be a torch.Tensor, got list", [[1.0]], {}),
        (TypeError, r"weight .* got torch.int64", torch.ones(2, 2, dtype=torch.int64), {}),
        (TypeError, r"weight .* got torch.complex64", torch.ones(2, 2, dtype=torch.complex64), {}),
        (ValueError, r"weight .* got shape \(3,\)", torch.ones(3), {}),
        (ValueError, "groups must lie between 1 and 4 .* got 0", torch.ones(4, 2), {"groups": 0}),
        (ValueError, "groups must lie between 1 and 4 .* got 5", torch.ones(4, 2), {"groups": 5}),
        (ValueError, "groups must divide .* got 3", torch.ones(4, 2), {"groups": 3}),
        (TypeError, "groups must be an integer, got bool", torch.ones(4, 2), {"groups": True}),
        (TypeError, "groups must be an integer, got float", torch.ones(4, 2), {"groups": 2.0}),
    ],
)
def test_wrong_argument_is_named(penalty, error, message, weight, layout):
    with pytest.raises(error, match=message):
        penalty(weight, **layout)


@pytest.mark.parametrize("scheme", ["Channel", "", None, 0])
def test_unknown_scheme_is_named(scheme):
    with pytest.raises(ValueError, match="scheme must be one of 'channel', 'input'"):
        functional.nuclear_norm(torch.ones(2, 2), scheme=scheme)


@pytest.mark.parametrize("scheme", ["spatial", "spatial_transposed"])
@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 3), (2, 2, 3, 3, 3)])
def test_spatial_scheme_is_refused_without_two_kernel_axes(scheme, shape):
    with pytest.raises(ValueError, match=f"{scheme!r} .* {len(shape) - 2} kernel axes"):
        functional.nuclear_norm(torch.ones(shape), scheme=scheme)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e22, 1e30])
def test_the_nuclear_ratio_does_not_see_the_scale(scale):
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    expected = functional.nuclear_ratio(weight)
    assert torch.allclose(functional.nuclear_ratio(weight * scale), expected, rtol=1e-4)
