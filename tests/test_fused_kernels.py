"""The fused kernels against float64: small in Triton's interpreter on the CPU, and large on a GPU where there is one.

A kernel is interpreted or compiled for as long as a process lives. Where there is a GPU, it is compiled, unless
TRITON_INTERPRET=1 is set for the tests.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import randn, seeds
from torchsmooth import fused

pytest.importorskip("triton", reason="Triton is not installed")

COMPILED = torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ
interpreted = pytest.mark.skipif(
    COMPILED, reason="the kernels are compiled here: set TRITON_INTERPRET=1 to interpret them"
)
on_a_gpu = pytest.mark.skipif(not COMPILED, reason="there is no CUDA device here (or TRITON_INTERPRET is set)")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=on_a_gpu)]
DEVICE = "cuda" if COMPILED else "cpu"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = (1, 7, 16, 33)
# The interpreter cuts a float32 down to a bfloat16 instead of rounding it.
ROUNDING = {torch.float32: 1.0, torch.float16: 1.0, torch.bfloat16: 1.0 if COMPILED else 2.0}


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCHSMOOTH_FUSED", raising=False)
        if not COMPILED:
            patch.setenv("TRITON_INTERPRET", "1")
        assert fused.why_unavailable(DEVICE) is None
        yield


def reference_conv2d(image, down, up, bias, stride, padding, dilation):
    """Two convolutions in float64, tap by tap."""
    (step_y, step_x), (apart_y, apart_x) = stride, dilation
    padded = F.pad(image.double(), (padding[1], padding[1], padding[0], padding[0]))
    height = (padded.shape[2] - apart_y * (down.shape[2] - 1) - 1) // step_y + 1
    width = (padded.shape[3] - apart_x * (down.shape[3] - 1) - 1) // step_x + 1
    middle = torch.zeros(image.shape[0], down.shape[0], height, width, dtype=torch.float64, device=image.device)
    for y in range(down.shape[2]):
        for x in range(down.shape[3]):
            seen = padded[:, :, y * apart_y :: step_y, x * apart_x :: step_x][:, :, :height, :width]
            middle += torch.einsum("bchw,rc->brhw", seen, down[:, :, y, x].double())
    output = torch.einsum("brhw,or->bohw", middle, up[:, :, 0, 0].double())
    return output if bias is None else output + bias.double()[:, None, None]


def reference_linear(rows, down, up, bias):
    output = (rows.double() @ down.double().T) @ up.double().T
    return output if bias is None else output + bias.double()


def assert_close(output, reference, operands, *options, relu=False):
    """Allow a few roundings of the dtype: of the intermediate, of the sums in float32, and of the output.

    They are relative to the sums of absolute values, which the same function of absolute operands gives.
    """
    exact = reference(*operands, *options)
    exact = exact.relu() if relu else exact
    absolute = reference(*(None if one is None else one.abs() for one in operands), *options)
    numbers = torch.finfo(output.dtype)
    allowed = 4 * ROUNDING[output.dtype] * numbers.eps * absolute + 4 * numbers.smallest_normal
    assert output.shape == exact.shape
    assert bool(((output.double() - exact).abs() <= allowed).all())


def laid_out(matrix, kind):
    """Give a tensor other strides: the same values, but transposed, or with gaps between."""
    if kind == "transposed":
        return matrix.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "gaps":
        wide = torch.full(
            (*matrix.shape[:-1], 2 * matrix.shape[-1]), torch.nan, dtype=matrix.dtype, device=matrix.device
        )
        wide[..., ::2] = matrix
        return wide[..., ::2]
    return matrix


def operands_of(shapes, seed, dtype, device):
    scale = [1.0, shapes[1][1] ** -0.5, shapes[2][1] ** -0.5, 1.0]
    return [
        (factor * randn(*shape, seed=seed + number)).to(device=device, dtype=dtype)
        for number, (shape, factor) in enumerate(zip(shapes, scale, strict=True))
    ]


def linear_operands(seed, rows, sizes, dtype, device=DEVICE):
    inside, rank, outside = sizes
    return operands_of(((rows, inside), (rank, inside), (outside, rank), (outside,)), seed, dtype, device)


def conv_operands(seed, image, sizes, kernel, dtype, device=DEVICE):
    (batch, height, width), (inside, rank, outside) = image, sizes
    shapes = ((batch, inside, height, width), (rank, inside, *kernel), (outside, rank, 1, 1), (outside,))
    return operands_of(shapes, seed, dtype, device)


layouts = st.sampled_from(["plain", "transposed", "gaps"])


@settings(max_examples=20)
@given(
    seeds,
    st.integers(0, 70),
    st.tuples(st.integers(1, 70), st.sampled_from(RANKS), st.integers(1, 70)),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.lists(layouts, min_size=3, max_size=3),
)
def test_linear_layers_of_any_size_and_strides(seed, rows, sizes, dtype, bias, relu, kinds):
    *operands, shift = linear_operands(seed, rows, sizes, dtype)
    operands = [*map(laid_out, operands, kinds), shift if bias else None]
    output = fused.low_rank_linear(*operands, relu=relu)
    assert output.dtype is dtype
    assert output.is_contiguous()
    assert_close(output, reference_linear, operands, relu=relu)


pairs = st.tuples(st.integers(1, 2), st.integers(1, 2))


@settings(max_examples=12)
@given(
    seeds,
    st.tuples(st.integers(0, 2), st.integers(5, 8), st.integers(5, 8)),
    st.tuples(st.sampled_from([1, 3, 16, 40]), st.sampled_from(RANKS), st.sampled_from([1, 5, 33])),
    st.tuples(st.sampled_from([(1, 1), (3, 3), (1, 3)]), pairs, st.tuples(st.integers(0, 2), st.integers(0, 2)), pairs),
    st.sampled_from(DTYPES),
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from(["contiguous", "channels_last", "transposed", "gaps"]),
)
def test_convolutions_of_any_geometry_and_format(seed, image, sizes, geometry, dtype, tail, layout):
    (kernel, *geometry), (bias, relu), last = geometry, tail, layout == "channels_last"
    images, *factors, shift = conv_operands(seed, image, sizes, kernel, dtype)
    if last:
        images = images.to(memory_format=torch.channels_last)
    told_apart = not images.is_contiguous()  # an image of one channel, or none at all, is of both formats
    operands = [laid_out(images, layout), *factors, shift if bias else None]
    output = fused.low_rank_conv2d(*operands, *geometry, relu=relu)
    assert output.dtype is dtype
    assert output.is_contiguous(memory_format=torch.channels_last) or not (last and told_apart)
    assert_close(output, reference_conv2d, operands, *geometry, relu=relu)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("sizes", "kernel", "geometry"),
    [
        ((5, 7, 6), (3, 3), ((2, 1), (2, 1), (1, 2))),
        ((40, 33, 35), (3, 2), ((1, 2), (0, 2), (2, 1))),
        ((5, 1, 3), (2, 4), ((3, 1), (1, 3), (3, 2))),
    ],
)
def test_each_axis_of_an_image_has_its_own_geometry(device, sizes, kernel, geometry):
    operands = conv_operands(8, (2, 9, 8), sizes, kernel, torch.float16, device)
    assert_close(fused.low_rank_conv2d(*operands, *geometry), reference_conv2d, operands, *geometry)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank_of_a_linear_layer_is_exact(device, dtype):
    # Small integers: every dtype holds the results as they are, so a row or a rank left out cannot hide.
    for rank in (*RANKS, 17, 48, 49, 130):
        rows = torch.ones(40, 5, dtype=dtype, device=device)
        down = (torch.arange(rank, device=device) % 2)[:, None].expand(rank, 5).to(dtype)
        up = torch.ones(35, rank, dtype=dtype, device=device)
        output = fused.low_rank_linear(rows, down, up / 5)
        assert torch.allclose(output, torch.full_like(output, rank // 2), rtol=torch.finfo(dtype).eps * 4, atol=0)


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(8 * 197, (768, 184, 3072)), (8 * 197, (3072, 115, 768)), (1, (4096, 256, 4096)), (4099, (1000, 33, 1001))],
)
def test_linear_layers_of_full_size(rows, sizes, dtype):
    operands = linear_operands(1, rows, sizes, dtype, "cuda")
    assert_close(fused.low_rank_linear(*operands), reference_linear, operands)


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    ("image", "sizes", "kernel", "geometry"),
    [
        ((8, 56, 56), (64, 17, 64), (3, 3), ((1, 1), (1, 1), (1, 1))),
        ((8, 28, 28), (128, 40, 256), (3, 3), ((2, 2), (1, 1), (1, 1))),
        ((1, 7, 7), (512, 138, 512), (3, 3), ((1, 1), (2, 2), (2, 2))),
        ((2, 33, 35), (100, 49, 30), (1, 5), ((1, 2), (0, 2), (1, 1))),
    ],
)
def test_convolutions_of_full_size(image, sizes, kernel, geometry, dtype, last):
    images, *factors = conv_operands(2, image, sizes, kernel, dtype, "cuda")
    operands = [images.to(memory_format=torch.channels_last) if last else images, *factors]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert_close(fused.low_rank_conv2d(*operands, *geometry), reference_conv2d, operands, *geometry)


@on_a_gpu
def test_a_cuda_graph_replays_a_kernel():
    operands = linear_operands(3, 512, (256, 48, 256), torch.float16, "cuda")
    expected = fused.low_rank_linear(*operands)  # and a configuration is chosen
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fused.low_rank_linear(*operands)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_the_intermediate_is_rounded_once_as_by_two_calls(device):
    ones = torch.ones(1, 2, dtype=torch.float16, device=device)
    rows = torch.tensor([[2048.0, 1.0]], dtype=torch.float16, device=device)
    down = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float16, device=device)
    up = torch.tensor([[1.0, -1.0]], dtype=torch.float16, device=device)
    assert fused.low_rank_linear(rows, down, up).item() == 0.0  # 2049 is no float16
    assert fused.low_rank_linear(ones, down, up).item() == 1.0


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # NumPy, of inf × 0
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("relu", [False, True])
def test_what_is_not_finite_stays_in_its_row(device, relu):
    rows, down, up, bias = linear_operands(4, 3, (5, 7, 6), torch.float32, device)
    down, up = down.abs(), up.abs()
    rows[0, 0], rows[1, 0] = torch.inf, torch.nan
    output = fused.low_rank_linear(rows, down, up, bias, relu=relu)
    assert output[0].eq(torch.inf).all()
    assert output[1].isnan().all()
    assert output[2].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_input_gives_the_same_output(device):
    operands = linear_operands(5, 40, (50, 33, 40), torch.float32, device)
    before = [one.clone() for one in operands]
    assert torch.equal(fused.low_rank_linear(*operands), fused.low_rank_linear(*operands))
    assert all(map(torch.equal, before, operands))


@pytest.mark.parametrize("device", DEVICES)
def test_entries_more_than_2_to_the_31_apart_are_found(device):
    try:
        far = torch.empty(2**31 + 8, dtype=torch.float16, device=device)  # only three pages of it are touched
    except RuntimeError:
        pytest.skip("there are not 4 GiB of memory here")
    apart = 2**30  # which fits into 32 bits, as the number of the row does, but not their product
    for row in range(3):
        far[row * apart : row * apart + 4] = row + 1.0
    ones = torch.ones(1, 4, dtype=torch.float16, device=device)
    rows = far.as_strided((3, 4), (apart, 1))
    assert fused.low_rank_linear(rows, ones, ones[:, :1]).flatten().tolist() == [4.0, 8.0, 12.0]
    columns = far.as_strided((4, 3), (1, apart))
    assert fused.low_rank_linear(columns, ones[:, :3], ones[:, :1]).flatten().tolist() == [6.0] * 4
    images = far.as_strided((3, 4, 1, 1), (apart, 1, 1, 1))
    output = fused.low_rank_conv2d(images, ones[:, :, None, None], ones[:, :1, None, None])
    assert output.flatten().tolist() == [4.0, 8.0, 12.0]
    channels = far.as_strided((4, 3, 1, 1), (1, apart, 1, 1))
    output = fused.low_rank_conv2d(channels, ones[:, :3, None, None], ones[:, :1, None, None])
    assert output.flatten().tolist() == [6.0] * 4


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_inputs_and_gradients(device):
    rows, down, up, bias = linear_operands(6, 1, (20, 7, 18), torch.float32, device)
    gradients = []
    for call in (fused.low_rank_linear, lambda x, d, u, b: F.linear(F.linear(x, d), u, b)):
        leaves = [one.clone().requires_grad_() for one in (rows, down, up, bias)]
        call(leaves[0].expand(2, 19, 20), *leaves[1:]).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_run_where_they_can_and_two_calls_otherwise(device, monkeypatch):
    from torchsmooth import _triton_linear

    calls = []
    run = _triton_linear.run
    monkeypatch.setattr(_triton_linear, "run", lambda *given, **options: (calls.append(1), run(*given, **options)))

    def runs(dtype, rank):
        calls.clear()
        operands = linear_operands(7, 4, (8, rank, 8), dtype, device)
        assert torch.allclose(
            fused.low_rank_linear(*operands).double(), reference_linear(*operands), rtol=1e-2, atol=1e-2
        )
        return bool(calls)

    assert runs(torch.float32, 5)
    assert runs(torch.float16, 257)
    assert not runs(torch.float32, 257)
    assert not runs(torch.float64, 5)
    monkeypatch.setenv("TORCHSMOOTH_FUSED", "0")
    assert not runs(torch.float32, 5)


@given(st.integers(1, 512))
def test_a_rank_is_tiled_with_little_waste(rank):
    from torchsmooth._triton_tiles import rank_tiles

    head, tail = rank_tiles(rank)
    for size in (head, *([tail] if tail else [])):
        assert size >= 16
        assert size & (size - 1) == 0
    assert rank <= head + tail < max(17, 1.5 * rank + 1)


@given(st.integers(1, 512), st.sampled_from(DTYPES))
def test_some_configuration_is_always_left(rank, dtype):
    from torchsmooth._triton_tiles import CONFIGS, FIXED, fitting, rank_tiles

    if rank * dtype.itemsize > 1024:
        rank //= 2
    head, tail = rank_tiles(rank)
    left = fitting(CONFIGS, {}, head=head, tail=tail, up=torch.empty(0, dtype=dtype))
    fixed = {name: FIXED[name] for name in ("block_rows", "block_inner", "block_columns", "splits")}
    assert fixed in [one.kwargs for one in left]


@interpreted
def test_every_configuration_computes_the_same(monkeypatch):
    from torchsmooth import _triton_tiles

    rows = linear_operands(9, 40, (70, 33, 140), torch.float32)
    image = conv_operands(10, (1, 5, 6), (70, 17, 40), (1, 2), torch.float32)
    for config in _triton_tiles.CONFIGS:
        monkeypatch.setattr(_triton_tiles, "FIXED", config.kwargs)
        assert_close(fused.low_rank_linear(*rows), reference_linear, rows)
        geometry = ((2, 1), (1, 0), (1, 1))
        assert_close(fused.low_rank_conv2d(*image, *geometry), reference_conv2d, image, *geometry)
