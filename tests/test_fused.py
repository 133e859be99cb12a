"""The fused operators where no kernel runs: the same as two layers, with gradients, for compilers and exporters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.strategies import fill_, randn, seeds
from torchsmooth import LowRankConv2d, LowRankLinear, _fused_operators, fused

OPERATORS = torch.ops.torchsmooth


@pytest.fixture(autouse=True, scope="module")
def _no_kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHSMOOTH_FUSED", "0")
        yield


def linear_operands(seed, *, rows=5, sizes=(6, 3, 4), dtype=torch.float64):
    inside, rank, outside = sizes
    shapes = ((rows, inside), (rank, inside), (outside, rank), (outside,))
    return [randn(*shape, seed=seed + number, dtype=dtype) for number, shape in enumerate(shapes)]


def conv_operands(seed, *, kernel=(3, 2), sizes=(4, 3, 5), dtype=torch.float64):
    inside, rank, outside = sizes
    shapes = ((2, inside, 6, 7), (rank, inside, *kernel), (outside, rank, 1, 1), (outside,))
    return [randn(*shape, seed=seed + number, dtype=dtype) for number, shape in enumerate(shapes)]


@given(seeds, st.booleans(), st.booleans(), st.sampled_from([(6,), (3, 6), (2, 3, 6), (0, 6)]))
def test_a_linear_layer_is_computed_bit_for_bit(seed, bias, relu, shape):
    layer = fill_(LowRankLinear(6, 4, 2, bias=bias), seed)
    inputs = randn(*shape, seed=seed, dtype=torch.float32)
    expected = layer(inputs).relu() if relu else layer(inputs)
    output = fused.low_rank_linear(inputs, layer.down.weight, layer.up.weight, layer.bias, relu=relu)
    assert torch.equal(output, expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@given(
    seeds,
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, (2, 3)]),
    st.sampled_from([0, 1, (2, 1), "same", "valid"]),
    st.sampled_from([(1, 1), (2, 1), ((3, 2), (1, 2))]),
    st.booleans(),
)
def test_a_convolution_is_computed_bit_for_bit(seed, bias, relu, stride, padding, size, last):
    kernel, dilation = size
    options = {"stride": 1 if padding == "same" else stride, "padding": padding, "dilation": dilation}
    layer = fill_(LowRankConv2d(4, 5, kernel, 3, bias=bias, **options), seed)
    images = randn(2, 4, 9, 8, seed=seed, dtype=torch.float32)
    if last:
        images = images.to(memory_format=torch.channels_last)
    for inputs in (images, images[0]):
        expected = layer(inputs).relu() if relu else layer(inputs)
        factors = (layer.down.weight, layer.up.weight, layer.bias)
        output = fused.low_rank_conv2d(inputs, *factors, **options, relu=relu)
        assert torch.equal(output, expected)
    assert fused.low_rank_conv2d(images, *factors, **options).is_contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_are_those_of_two_layers(relu):
    operands = [one.requires_grad_() for one in linear_operands(1)]
    call = lambda *given: fused.low_rank_linear(*given, relu=relu)  # noqa: E731
    assert torch.autograd.gradcheck(call, operands)
    assert torch.autograd.gradgradcheck(call, operands)
    operands = [one.requires_grad_() for one in conv_operands(2, sizes=(2, 2, 3))]
    call = lambda *given: fused.low_rank_conv2d(*given, (2, 1), (1, 0), (1, 2), relu=relu)  # noqa: E731
    assert torch.autograd.gradcheck(call, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, operands, fast_mode=True)


@given(seeds, st.lists(st.booleans(), min_size=4, max_size=4))
def test_only_what_is_asked_for_has_a_gradient(seed, wanted):
    if not any(wanted):
        wanted = [True] * 4
    for operands, call, plain in (
        (linear_operands(seed), fused.low_rank_linear, lambda x, d, u, b: F.linear(F.linear(x, d), u, b)),
        (conv_operands(seed), fused.low_rank_conv2d, lambda x, d, u, b: F.conv2d(F.conv2d(x, d), u, b)),
    ):
        gradients = []
        for one in (call, plain):
            leaves = [each.clone().requires_grad_(want) for each, want in zip(operands, wanted, strict=True)]
            one(*leaves).square().sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        for ours, theirs, want in zip(*gradients, wanted, strict=True):
            assert (ours is not None) == want
            assert not want or torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("all_options", [False, True])
def test_torch_finds_nothing_wrong_with_the_operators(all_options):
    relu = last = all_options
    operands = [one.requires_grad_() for one in linear_operands(3, dtype=torch.float32)]
    bias = operands[3] if all_options else None
    torch.library.opcheck(OPERATORS.low_rank_linear.default, (*operands[:3], bias, relu))
    image, *factors = conv_operands(4, dtype=torch.float32)
    image = image.to(memory_format=torch.channels_last) if last else image
    operands = [one.requires_grad_() for one in (image, *factors)]
    torch.library.opcheck(OPERATORS.low_rank_conv2d.default, (*operands, [1, 2], [1, 1], [2, 1], relu))


class Network(nn.Module):
    """Both operators, one after the other."""

    def __init__(self):
        super().__init__()
        self.conv = fill_(LowRankConv2d(4, 6, 3, 2, padding=1), 1)
        self.linear = fill_(LowRankLinear(6, 5, 3), 2)

    def forward(self, images):
        conv, linear = self.conv, self.linear
        images = fused.low_rank_conv2d(images, conv.down.weight, conv.up.weight, conv.bias, padding="same", relu=True)
        return fused.low_rank_linear(images.mean((2, 3)), linear.down.weight, linear.up.weight, linear.bias)


def operators_of(graph):
    return [node.target for node in graph.nodes if "torchsmooth" in str(node.target)]


def test_a_compiler_and_an_exporter_see_one_operator_each():
    model, images = Network(), randn(3, 4, 6, 6, seed=5, dtype=torch.float32)
    graphs = []

    def backend(module, _):
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for batch in (images, images[:2]):
        assert torch.equal(compiled(batch), model(batch))
    both = [OPERATORS.low_rank_conv2d.default, OPERATORS.low_rank_linear.default]
    assert [operators_of(graph) for graph in graphs] == [both]

    sizes = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (images,), dynamic_shapes=(sizes,))
    assert operators_of(program.graph) == both
    assert torch.equal(program.module()(images[:1]), model(images[:1]))


def test_training_under_a_compiler_gives_the_same_gradients():
    model, images = Network(), randn(3, 4, 6, 6, seed=6, dtype=torch.float32)
    torch._dynamo.reset()
    gradients = []
    for one in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        one(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(*gradients, strict=True))


def test_autocast_does_what_it_does_to_two_layers():
    operands = linear_operands(7, dtype=torch.float32)
    double = linear_operands(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fused.low_rank_linear(operands[0].half(), *operands[1:])
        expected = F.linear(F.linear(operands[0].half(), operands[1]), *operands[2:])
        assert fused.low_rank_linear(*double).dtype is torch.float64
    assert output.dtype is torch.bfloat16
    assert torch.equal(output, expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_folded_batchnorm_computes_the_same(affine, bias, dtype):
    image, down, up, shift = conv_operands(8, dtype=dtype)
    norm = fill_(nn.BatchNorm2d(5, affine=affine), 9).eval().to(dtype)
    before = [one.clone() for one in (up, shift)]
    folded = fused.fold_batchnorm(up, shift if bias else None, norm)
    assert [one.dtype for one in folded] == [dtype, dtype]
    exact = [one.double() for one in (image, down, up, shift)]
    with torch.no_grad():
        expected = norm.double()(F.conv2d(F.conv2d(*exact[:2]), exact[2], exact[3] if bias else None)).relu()
    output = fused.low_rank_conv2d(*exact[:2], *(one.double() for one in folded), relu=True)
    assert torch.allclose(output, expected, rtol=0, atol=8 * torch.finfo(dtype).eps * float(expected.abs().max()))
    assert all(map(torch.equal, before, (up, shift)))


def test_a_batchnorm_that_cannot_be_folded_is_refused():
    up = torch.zeros(5, 3, 1, 1)
    with pytest.raises(TypeError, match="batchnorm must be an nn.BatchNorm1d, 2d or 3d, got LayerNorm"):
        fused.fold_batchnorm(up, None, nn.LayerNorm(5))
    with pytest.raises(ValueError, match="got one that is in training mode: call .eval\\(\\) first"):
        fused.fold_batchnorm(up, None, nn.BatchNorm2d(5))
    with pytest.raises(ValueError, match="got one that keeps none"):
        fused.fold_batchnorm(up, None, nn.BatchNorm2d(5, track_running_stats=False).eval())
    with pytest.raises(ValueError, match="must have 5 features, as up has rows, got 4"):
        fused.fold_batchnorm(up, None, nn.BatchNorm2d(4).eval())


X, D, U, B = torch.zeros(2, 6), torch.zeros(3, 6), torch.zeros(4, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("operands", "error", "message"),
    [
        ((None, D, U), TypeError, "input must be a tensor, got None"),
        ((X, D, U, 1.0), TypeError, "bias must be a tensor, got float 1.0"),
        (
            (X, D[0], U),
            ValueError,
            r"takes an input \(\*, in\), down \(rank, in\) and up \(out, rank\), got 2×6, 6, 4×3",
        ),
        ((torch.tensor(1.0), D, U), ValueError, "got a scalar, 3×6"),
        ((X[:, :5], D, U), ValueError, "last axis of the input must have 6 entries, as down has columns, got .* 2×5"),
        ((X, D, U[:, :2]), ValueError, "must have one rank: down has 3 rows, up has 2 columns"),
        (
            (X, D, U, torch.zeros(7)),
            ValueError,
            "one entry for each of the 4 rows of up, got 7. .*pivoted form.*call the",
        ),
        ((X.long(), D, U), TypeError, r"must be of a floating dtype, got torch.int64: convert it with .to\(down.dtype"),
        ((X, D.half(), U), TypeError, "down must be of the input's dtype torch.float32, got torch.float16: .*autocast"),
        ((X, D, U, B.to("meta")), ValueError, "bias must be on the input's device cpu, got meta: bring them together"),
    ],
)
def test_operands_of_a_linear_layer_that_do_not_fit_are_refused(operands, error, message):
    with pytest.raises(error, match=message):
        fused.low_rank_linear(*operands)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 4, 6)}, "takes an input .*got .*"),
        ({"input": torch.zeros(2, 8, 6, 7)}, "must have 4 channels, as down has, got 2×8×6×7. Grouped .*: call"),
        ({"up": torch.zeros(5, 3, 3, 1)}, "kernel of 1×1, as in scheme 'channel', got 5×3×3×1. Other schemes .*: call"),
        ({"up": torch.zeros(5, 6, 1, 1)}, "must have one rank: down has 3 rows, up has 6 columns. Grouped"),
        ({"stride": 0}, r"stride must be two integers of at least 1, got \(0, 0\)"),
        ({"padding": -1}, r"padding must be two integers of at least 0, got \(-1, -1\)"),
        ({"dilation": (1, 2, 3)}, r"dilation must be an integer or a pair of them, got tuple \(1, 2, 3\)"),
        ({"dilation": 9}, r"kernel 3×2 with dilation \(9, 9\) does not fit into an input of 6×7 with padding \(0, 0\)"),
        ({"stride": 1.5}, "stride must be an integer or a pair of them, got float 1.5"),
        ({"stride": (1, 1.5)}, r"stride must be an integer or a pair of them, got tuple \(1, 1.5\)"),
        ({"padding": "some"}, "padding by name must be one of 'same', 'valid'; got str 'some'"),
        ({"padding": "same", "stride": 2}, r"padding 'same' needs stride 1, got \(2, 2\): give the padding in numbers"),
    ],
)  # fmt: skip
def test_what_is_no_low_rank_convolution_is_refused(change, message):
    image, down, up, bias = conv_operands(10, dtype=torch.float32)
    given = {"input": image, "down": down, "up": up, "bias": bias} | change
    if given["input"].dim() == 3:
        given["input"] = given["input"][None, None]
    with pytest.raises(ValueError, match=message):
        fused.low_rank_conv2d(**given)


def test_products_in_float32_are_as_exact_as_the_user_wants_them():
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert _fused_operators._precision(matmul) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert _fused_operators._precision(matmul) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_it_says_why_there_are_no_kernels(monkeypatch):
    assert fused.why_unavailable("cpu") == "TORCHSMOOTH_FUSED=0 turns them off"
    monkeypatch.delenv("TORCHSMOOTH_FUSED")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "set TRITON_INTERPRET=1 before the first call" in fused.why_unavailable("cpu")
    assert fused.why_unavailable("mps") == "they run on CUDA devices, not on 'mps'"
    if not torch.cuda.is_available():
        assert fused.why_unavailable() == "torch finds no CUDA device"
    assert not any(map(fused.is_available, ("cpu", "mps")))
    with pytest.raises(RuntimeError, match="device"):
        fused.why_unavailable("abacus")
