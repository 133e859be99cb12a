"""Hypothesis strategies: every random value comes from a seed that a strategy draws, so a failure can be replayed."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from torchsmooth._layers import KINDS

seeds = st.integers(0, 2**31 - 1)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal entries from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fill_(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Set all parameters and floating buffers of a module from a seed; variances stay positive."""
    with torch.no_grad():
        for number, (name, tensor) in enumerate([*module.named_parameters(), *module.named_buffers()]):
            if tensor.is_floating_point():
                fan_in = max(1, tensor[0].numel()) if tensor.dim() else 1
                values = randn(*tensor.shape, seed=seed + number) / fan_in**0.5
                tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return module


def low_rank(dense: torch.nn.Module, data: st.DataObject) -> torch.nn.Module:
    """Draw a low-rank layer in the place of a dense one, in a scheme and form that it can have."""
    kind = KINDS[type(dense)]
    layouts = kind.layouts(dense)
    scheme = data.draw(st.sampled_from(sorted(layouts)))
    forms = [
        form for form in ("factored", "pivoted")
        if torch.tensor(layouts[scheme].largest_rank(form)).min() >= 1
    ]  # fmt: skip
    form = data.draw(st.sampled_from(forms))
    most = layouts[scheme].largest_rank(form)
    pick = lambda top: data.draw(st.integers(1, top))  # noqa: E731
    rank = pick(most) if isinstance(most, int) else tuple(map(pick, most))
    layer = kind.like(dense, rank, scheme, form)
    layer.truncate_(dense.weight)
    return layer.eval()


HARD_KINDS = ("normal", "zero", "rank_one", "repeated", "tiny", "huge", "decaying", "orthogonal", "strided")


def hard_matrix(kind: str, rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Construct a matrix with one property that breaks careless code."""
    normal = randn(rows, columns, seed=seed)
    full = min(rows, columns)
    left, _, right = torch.linalg.svd(normal, full_matrices=False)
    if kind == "zero":
        matrix = torch.zeros_like(normal)
    elif kind == "rank_one":
        matrix = normal[:, :1] @ normal[:1, :]
    elif kind == "repeated":  # every singular value twice
        matrix = (left * (2.0 + torch.arange(full) // 2)) @ right
    elif kind == "tiny":
        matrix = 1e-25 * normal
    elif kind == "huge":  # near the top of float16, far from it for the others
        matrix = 1e4 * normal / normal.abs().max()
    elif kind == "decaying":
        matrix = (left * 10.0 ** -torch.arange(full)) @ right
    elif kind == "orthogonal":
        matrix = left @ right
    elif kind == "strided":
        matrix = randn(columns, 2 * rows, seed=seed)[:, ::2].T
        return matrix.to(dtype).T.contiguous().T  # transposed strides in every dtype
    else:
        matrix = normal
    return matrix.to(dtype)


@st.composite
def hard_matrices(draw, min_size: int = 1, max_size: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    """Matrices of all shapes and hard kinds."""
    sizes = st.integers(min_size, max_size)
    return hard_matrix(draw(st.sampled_from(HARD_KINDS)), draw(sizes), draw(sizes), draw(seeds), dtype)


PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@st.composite
def convolutions(draw, dtype=torch.float64, *, least=1):
    """A convolution of any geometry with an input that fits it; ``least`` channels in a group, and kernel entries."""
    pair = lambda low, high: st.one_of(st.integers(low, high), st.tuples(*[st.integers(low, high)] * 2))  # noqa: E731
    groups = draw(st.integers(1, 3))
    depthwise = draw(st.booleans()) if least == 1 else False
    inside, outside = (1, 1) if depthwise else (draw(st.integers(least, 4)), draw(st.integers(least, 4)))
    padding = draw(st.one_of(pair(0, 2), st.sampled_from(["same", "valid"])))
    conv = torch.nn.Conv2d(
        groups * inside,
        groups * outside * (draw(st.integers(1, 3)) if depthwise else 1),
        draw(pair(least, 5)),
        stride=1 if padding == "same" else draw(pair(1, 3)),
        padding=padding,
        dilation=draw(pair(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(PADDING_MODES)),
        dtype=torch.float64,
    )
    seed = draw(seeds)
    fill_(conv, seed)
    inputs = randn(2, conv.in_channels, draw(st.integers(10, 13)), draw(st.integers(10, 13)), seed=seed + 100)
    if draw(st.booleans()):
        conv, inputs = (one.to(memory_format=torch.channels_last) for one in (conv, inputs))
    return conv.to(dtype), inputs.to(dtype)


@st.composite
def small_convolutions(draw, axes: int, *, transposed: bool = False):
    """A small convolution of any geometry over 1 … 3 kernel axes, in float64, with an input that fits it."""
    each = lambda low, high: draw(st.one_of(st.integers(low, high), st.tuples(*[st.integers(low, high)] * axes)))  # noqa: E731
    groups, dilation = draw(st.integers(1, 2)), each(1, 2)
    kernel, stride = each(1, 3 if axes < 3 else 2), each(1, 2)
    options = {"dilation": dilation, "stride": stride, "groups": groups, "bias": draw(st.booleans())}
    if transposed:  # torch allows less than the stride or the dilation
        sizes = [value if isinstance(value, tuple) else (value,) * axes for value in (stride, dilation)]
        options["output_padding"] = tuple(draw(st.integers(0, max(pair) - 1)) for pair in zip(*sizes, strict=True))
        options["padding"] = each(0, 1)
    else:
        options["padding"] = draw(st.sampled_from([0, 1, (1,) * axes, "same", "valid"]))
        options["padding_mode"] = draw(st.sampled_from(PADDING_MODES))
        if options["padding"] == "same":
            options["stride"] = 1
    kind = getattr(torch.nn, f"Conv{'Transpose' if transposed else ''}{axes}d")
    channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    conv = fill_(kind(*channels, kernel, **options, dtype=torch.float64), seed := draw(seeds))
    return conv, randn(2, conv.in_channels, *[draw(st.integers(5, 7)) for _ in range(axes)], seed=seed + 100)
