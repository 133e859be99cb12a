"""Gradients in closed form: those of autograd through the functions, and of loops over the entries in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.networks import EVERY_LAYER
from tests.reference import penalties as reference
from tests.strategies import HARD_KINDS, fill_, hard_matrix, randn, seeds
from tests.training import LOOPS, PowerSum
from torchsmooth import FirstDerivative, NuclearNorm, NuclearRatio, SecondDerivative, functional
from torchsmooth.penalties import Weight

FUNCTIONS = {
    NuclearNorm: functional.nuclear_norm,
    NuclearRatio: functional.nuclear_ratio,
    FirstDerivative: functional.first_derivative,
    SecondDerivative: functional.second_derivative,
}
SCHEMES = ("channel", "input", "spatial", "spatial_transposed")

each_kind = pytest.mark.parametrize("kind", FUNCTIONS)
few = settings(max_examples=15)
fewer = settings(max_examples=5)


KERNELS = st.lists(st.integers(1, 3), max_size=3)


@st.composite
def weights(draw, kernels=KERNELS):
    """Weights of linear layers and convolutions, grouped, depthwise, transposed; every size may be 1."""
    groups, outputs, inputs = (draw(st.integers(1, most)) for most in (3, 5, 4))
    transposed = draw(st.booleans())
    first, second = (inputs, outputs) if transposed else (outputs, inputs)
    tensor = randn(groups * first, second, *draw(kernels), seed=draw(seeds))
    return Weight(tensor, groups, transposed)


def layout_of(weight):
    return {"groups": weight.groups, "transposed": weight.transposed}


def through_autograd(kind, weight, **options):
    leaf = weight.tensor.detach().clone().requires_grad_()
    value = FUNCTIONS[kind](leaf, **layout_of(weight), **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def close(one, other, **tolerance):
    torch.testing.assert_close(one, other, **({"rtol": 1e-8, "atol": 1e-9} | tolerance))


def differences_gradient(weight, order):
    """Follow each squared difference to the entries that it is made of."""
    stencil = {1: (-1.0, 1.0), 2: (1.0, -2.0, 1.0)}[order]
    groups = weight.groups
    grouped = weight.tensor.reshape(groups, weight.tensor.shape[0] // groups, *weight.tensor.shape[1:])
    gradient = torch.zeros_like(grouped)
    for axis in (1, 2):
        values, sums = grouped.movedim(axis, 0), gradient.movedim(axis, 0)  # views
        for start in range(values.shape[0] - order):
            difference = sum(factor * values[start + place] for place, factor in enumerate(stencil))
            for place, factor in enumerate(stencil):
                sums[start + place] += 2.0 * factor * difference
    return gradient.reshape(weight.tensor.shape)


@each_kind
@few
@given(weight=weights())
def test_closed_form_is_what_autograd_finds(kind, weight):
    penalty, layout = kind(3.0), layout_of(weight)
    expected = through_autograd(kind, weight)
    close(penalty.value_and_gradient(weight.tensor, **layout), expected)
    close(penalty.gradient(weight.tensor, **layout), expected[1])
    ((index, gradient),) = penalty.gradients([weight])
    assert index == 0
    close(gradient, expected[1])
    close(penalty.total([weight]), expected[0])


@each_kind
@few
@given(weight=weights())
def test_value_is_that_of_the_loops(kind, weight):
    value, _ = kind().value_and_gradient(weight.tensor, **layout_of(weight))
    slow = LOOPS[kind](weight.tensor, **layout_of(weight))
    assert value.item() == pytest.approx(slow, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("kind", "order"), [(FirstDerivative, 1), (SecondDerivative, 2)])
@few
@given(weight=weights())
def test_gradient_of_a_derivative_is_that_of_the_loops(kind, order, weight):
    close(kind().gradient(weight.tensor, **layout_of(weight)), differences_gradient(weight, order))


@few
@given(weight=weights())
def test_gradient_of_the_nuclear_norm_is_a_subgradient(weight):
    gradient = NuclearNorm().gradient(weight.tensor, **layout_of(weight))
    defect = reference.subgradient_defect(weight.tensor, gradient, "channel", **layout_of(weight))
    assert defect <= 1e-9


@pytest.mark.parametrize("kind", [NuclearNorm, NuclearRatio])
@pytest.mark.parametrize("scheme", SCHEMES)
@fewer
@given(weight=weights(st.lists(st.integers(1, 3), min_size=2, max_size=2)))
def test_every_scheme_has_the_gradient_that_autograd_finds(kind, scheme, weight):
    penalty, layout = kind(scheme=scheme), layout_of(weight)
    expected = through_autograd(kind, weight, scheme=scheme)
    close(penalty.value_and_gradient(weight.tensor, **layout), expected)
    close(next(iter(penalty.gradients([weight])))[1], expected[1])
    slow = LOOPS[kind](weight.tensor, scheme, **layout_of(weight))
    assert penalty.total([weight]).item() == pytest.approx(slow)


@pytest.mark.parametrize("layer", EVERY_LAYER)
@each_kind
@settings(max_examples=2)
@given(seed=seeds)
def test_every_layer_has_the_gradient_that_autograd_finds(kind, layer, seed):
    module = fill_(EVERY_LAYER[layer]().double(), seed)
    transposed = "Transpose" in type(module).__name__
    weight = Weight(module.weight, getattr(module, "groups", 1), transposed)
    value, gradient = kind().value_and_gradient(weight.tensor, **layout_of(weight))
    close((value, gradient), through_autograd(kind, weight))
    assert gradient.shape == module.weight.shape
    assert value.grad_fn is gradient.grad_fn is None
    assert not value.requires_grad
    assert not gradient.requires_grad
    assert module.weight.grad is None


@pytest.mark.parametrize("kind", [*FUNCTIONS, PowerSum])
@few
@given(many=st.lists(weights(st.just([])), min_size=1, max_size=6), again=st.booleans())
def test_many_weights_at_once_are_each_as_alone(kind, many, again):
    many = many + many if again else many  # of one shape, and decomposed together
    penalty = kind(2.0)
    found = dict(penalty.gradients(many))
    assert sorted(found) == list(range(len(many)))
    total = penalty.total([weight._replace(tensor=weight.tensor.requires_grad_()) for weight in many])
    alone = [penalty.value_and_gradient(weight.tensor, **layout_of(weight)) for weight in many]
    close(total.detach(), sum(value for value, _ in alone))
    for index, (_, gradient) in enumerate(alone):
        close(found[index], gradient)
        assert found[index].grad_fn is None
    through = torch.autograd.grad(total, [weight.tensor for weight in many[: len(many) // (1 + again)]])
    for gradient, (_, one) in zip(through, alone, strict=False):
        close(gradient, (1 + again) * one)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@fewer
@given(weight=weights())
def test_narrow_weights_have_a_value_in_single_and_a_gradient_no_narrower_than_they_are(kind, dtype, weight):
    narrow = weight._replace(tensor=weight.tensor.to(dtype))
    value, gradient = kind().value_and_gradient(narrow.tensor, **layout_of(weight))
    assert value.dtype == torch.float32
    assert gradient.dtype in (dtype, torch.float32)
    slow = LOOPS[kind](narrow.tensor, **layout_of(weight))
    assert value.item() == pytest.approx(slow, rel=1e-4, abs=1e-5)


@each_kind
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (2, 1), (2, 3, 0, 3)])
def test_smallest_weights_have_gradients_of_their_shape(kind, shape):
    value, gradient = kind().value_and_gradient(torch.ones(shape))
    assert value.shape == ()
    assert gradient.shape == shape
    assert gradient.isfinite().all()
    ((_, alone),) = kind().gradients([Weight(torch.ones(shape))])
    assert alone.shape == shape


@each_kind
@fewer
@given(weight=weights(st.just([2, 3])))
def test_strides_do_not_matter_and_the_weight_stays_as_it_is(kind, weight):
    expected = kind().gradient(weight.tensor, **layout_of(weight))
    spread = torch.stack([weight.tensor, weight.tensor + 1], -1)[..., 0]
    for tensor in (
        weight.tensor.contiguous(memory_format=torch.channels_last),
        spread,
        weight.tensor.mT.contiguous().mT,
    ):
        before = tensor.clone()
        close(kind().gradient(tensor, **layout_of(weight)), expected, check_stride=False)
        assert torch.equal(tensor, before)


@each_kind
@fewer
@given(weight=weights(), factor=st.floats(-3.0, 3.0))
def test_autocast_changes_nothing(kind, weight, factor):
    single = (factor * weight.tensor).float()
    plain = kind().value_and_gradient(single, **layout_of(weight))
    with torch.autocast("cpu", torch.bfloat16):
        close(kind().value_and_gradient(single, **layout_of(weight)), plain, rtol=0.0, atol=0.0)
        close(next(iter(kind().gradients([weight._replace(tensor=single)])))[1], plain[1], rtol=1e-5, atol=1e-6)


SCALES = (1e-25, 1e-10, 1e-3, 1.0, 1e5, 1e10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", SCALES)
@fewer
@given(weight=weights())
def test_ratio_does_not_see_the_scale_and_its_gradient_shrinks_with_it(dtype, scale, weight):
    rtol = 1e-8 if dtype == torch.float64 else 1e-3
    penalty, tensor = NuclearRatio(), weight.tensor.to(dtype)
    value, gradient = penalty.value_and_gradient(tensor, **layout_of(weight))
    scaled, shrunk = penalty.value_and_gradient(scale * tensor, **layout_of(weight))
    close(scaled, value, rtol=rtol)
    close(scale * shrunk.double(), gradient.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", HARD_KINDS)
@fewer
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), seed=seeds)
def test_ratio_lies_between_one_and_the_root_of_the_rank(kind, scale, rows, columns, seed):
    matrix = scale * hard_matrix(kind, rows, columns, seed)
    value, gradient = NuclearRatio().value_and_gradient(matrix)
    rank = 1 if kind == "rank_one" else min(rows, columns)
    if kind == "zero":
        assert value.item() == 0.0
        assert not gradient.any()
    else:
        assert 1.0 - 1e-7 <= value.item() <= math.sqrt(rank) + 1e-7
    # No step along it changes the size of the weight to first order.
    largest = matrix.abs().max() or torch.ones(())
    inner = (largest * gradient * (matrix / largest)).sum().item()
    assert abs(inner) <= 1e-7
    assert gradient.isfinite().all()


@few
@given(weight=weights())
def test_gradient_of_the_ratio_is_orthogonal_to_every_group(weight):
    gradient = NuclearRatio().gradient(weight.tensor, **layout_of(weight))
    for one, other in zip(gradient.chunk(weight.groups), weight.tensor.chunk(weight.groups), strict=True):
        assert abs(reference.inner_product(one, other)) <= 1e-9


def test_ratio_of_rank_one_and_of_equal_singular_values_are_its_ends():
    assert NuclearRatio()(randn(5, 1, seed=0) @ randn(1, 4, seed=1)).item() == pytest.approx(1.0)
    assert NuclearRatio()(torch.eye(4, 6)).item() == pytest.approx(2.0)
    # At the least of all values, and at the greatest, no direction is better than another.
    close(NuclearRatio().gradient(torch.eye(4, 4, dtype=torch.float64)), torch.zeros(4, 4, dtype=torch.float64))


@pytest.mark.parametrize("kind", [NuclearNorm, NuclearRatio])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_in_every_way(kind, bad):
    weight = Weight(torch.full((3, 4), bad))
    for evaluate in (
        lambda: kind().value_and_gradient(weight.tensor),
        lambda: kind().gradient(weight.tensor),
        lambda: list(kind().gradients([Weight(torch.ones(3, 4)), weight])),
        lambda: kind().total([weight]),
    ):
        with pytest.raises(ValueError, match="NaN or infinite"):
            evaluate()
