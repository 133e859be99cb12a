"""Multiply-accumulates are those that are there, counted by hand, whichever operators and kernels torch takes."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry, register_flop_formula

from tests.networks import same, snapshot
from tests.reference import multiply_accumulates as by_hand
from tests.strategies import fill_, randn, seeds
from torchsmooth import fused, plan_compression, svd_compress_
from torchsmooth._counting import _attention
from torchsmooth._macs import count_macs
from torchsmooth._running import as_inputs

sizes = st.integers(1, 5)
# What torch chooses from: everything, only plain products, or those where the other one cannot.
KERNELS = {
    "any": contextlib.nullcontext,
    "math": lambda: sdpa_kernel(SDPBackend.MATH),
    "flash": lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
}
HAS_GROUPED_QUERIES = "enable_gqa" in (F.scaled_dot_product_attention.__doc__ or "")  # since torch 2.5


class Applied(nn.Module):
    """A function of tensors as a model, which chooses kernels of its own."""

    def __init__(self, function, kernels=contextlib.nullcontext):
        super().__init__()
        self.function, self.kernels = function, kernels

    def forward(self, *args, **kwargs):
        with self.kernels():
            return self.function(*args, **kwargs)


def zeros(*shape):
    return torch.zeros(shape)


def counted(function, *args, kernels=contextlib.nullcontext):
    return count_macs(Applied(function, kernels).eval(), as_inputs(args))


# Attention


@settings(max_examples=40)
@given(sizes, sizes, st.integers(1, 3), st.data())
def test_attention_counts_the_same_on_every_kernel(samples, heads, shared, data):
    queries, keys, features, values = (data.draw(sizes) for _ in range(4))
    grouped = HAS_GROUPED_QUERIES and shared > 1
    values = data.draw(st.sampled_from([features, values]))
    mask = data.draw(st.sampled_from([None, "causal", torch.bool, torch.float32]))
    batch = (samples, heads) if grouped else data.draw(st.sampled_from([(samples, heads), (samples * heads,)]))
    of_query = (samples, heads * shared) if grouped else batch
    options = {"is_causal": mask == "causal", "dropout_p": 0.0} | ({"enable_gqa": True} if grouped else {})
    if isinstance(mask, torch.dtype):
        options["attn_mask"] = torch.ones(queries, keys, dtype=mask)
    tensors = zeros(*of_query, queries, features), zeros(*batch, keys, features), zeros(*batch, keys, values)
    expected = by_hand.attention(samples, heads * (shared if grouped else 1), queries, keys, features, values)
    for kernels in KERNELS.values():
        found = counted(lambda *args: F.scaled_dot_product_attention(*args, **options), *tensors, kernels=kernels)
        assert found == expected


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_count_their_attention_although_they_would_run_fused(kernels, padded):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=padded).eval()
    padding = {"src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])} if padded else {}
    tokens = randn(2, 5, 16, seed=0, dtype=torch.float32)
    rows = by_hand.product(2 * 5, 16, 4 * 16) + 2 * by_hand.product(2 * 5, 16, 24)
    expected = 3 * (rows + by_hand.attention(2, 2, 5, 5, 8, 8))
    assert count_macs(Applied(encoder, kernels).eval(), as_inputs({"src": tokens} | padding)) == expected


class SelfAttention(nn.Module):
    """Attention of four heads between two linear layers."""

    def __init__(self, kernels):
        super().__init__()
        self.inside, self.outside, self.kernels = nn.Linear(32, 96), nn.Linear(32, 32), kernels

    def forward(self, tokens):
        parts = [one.unflatten(-1, (4, 8)).transpose(1, 2) for one in self.inside(tokens).chunk(3, -1)]
        with self.kernels():
            attended = F.scaled_dot_product_attention(*parts)
        return self.outside(attended.transpose(1, 2).flatten(2))


@settings(max_examples=10)
@given(seeds, st.integers(1, 3), st.integers(1, 40), st.sampled_from([*KERNELS]))
def test_the_ratio_is_one_of_all_multiply_accumulates_whatever_kernel_attends(seed, samples, length, kernels):
    model = fill_(SelfAttention(KERNELS[kernels]), seed).eval()
    tokens = randn(samples, length, 32, seed=seed, dtype=torch.float32)
    attended = by_hand.attention(samples, 4, length, length, 8, 8)

    def expected():
        return attended + samples * length * sum(one.numel() for one in model.parameters() if one.dim() > 1)

    before = expected()
    report = svd_compress_(model, 0.1, target="macs", example_inputs=tokens, form="factored", rank_multiple=1)
    assert (report.macs_before, report.macs_after) == (before, expected())
    assert report.macs_after <= 0.9 * report.macs_before


# Recurrent layers


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")  # as flags are put back
@settings(max_examples=40)
@given(st.sampled_from([*by_hand.GATES]), sizes, st.integers(2, 5), st.data())
def test_recurrent_layers_count_each_step_of_each_sequence(kind, features, hidden, data):
    layers, both = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    options = {"num_layers": layers, "bidirectional": both, "bias": data.draw(st.booleans())}
    projected = data.draw(st.integers(0, hidden - 1)) if kind == "LSTM" else 0
    if projected:
        options["proj_size"] = projected
    model = getattr(nn, kind)(features, hidden, batch_first=data.draw(st.booleans()), **options)
    lengths = data.draw(st.lists(sizes, min_size=1, max_size=4))
    how = data.draw(st.sampled_from(["packed", "padded", "single"]))
    if how == "packed":
        sequences = [zeros(length, features) for length in lengths]
        given = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    elif how == "padded":
        lengths = [max(lengths)] * len(lengths)
        given = zeros(len(lengths), lengths[0], features)
        given = given if model.batch_first else given.transpose(0, 1)
    else:
        lengths = lengths[:1]
        given = zeros(lengths[0], features)
    expected = by_hand.recurrent(kind, (features, hidden), lengths, layers, 1 + both, projected)
    for enabled in (True, False):
        kernels = lambda enabled=enabled: torch.backends.mkldnn.flags(enabled=enabled)  # noqa: E731
        assert count_macs(Applied(model, kernels), as_inputs((given,))) == expected


@pytest.mark.parametrize("kind", by_hand.GATES)
def test_cells_count_one_step(kind):
    cell = getattr(nn, f"{kind}Cell")(6, 5)
    assert count_macs(cell, as_inputs(zeros(3, 6))) == by_hand.recurrent(kind, (6, 5), [1] * 3)


# Products


@settings(max_examples=15)
@given(st.lists(sizes, max_size=2), sizes, sizes, sizes)
def test_bilinear_layers_count_both_of_their_products(batch, left, right, outputs):
    rows = torch.Size(batch).numel()
    found = counted(nn.Bilinear(left, right, outputs), zeros(*batch, left), zeros(*batch, right))
    assert found == by_hand.bilinear(rows, left, right, outputs)


# Of a batch of b, rows m, columns n and what lies between k: a function, the shapes it is given, and whether it has a
# batch, rows and columns.
PRODUCTS = {
    "matmul": (torch.matmul, ["bmk", "bkn"], "bmn"),
    "matmul of one": (torch.matmul, ["mk", "kn"], "mn"),
    "matrix and vector": (torch.matmul, ["mk", "k"], "m"),
    "vector and matrix": (torch.matmul, ["k", "kn"], "n"),
    "vectors": (torch.matmul, ["k", "k"], ""),
    "mv": (torch.mv, ["mk", "k"], "m"),
    "dot": (torch.dot, ["k", "k"], ""),
    "vdot": (torch.vdot, ["k", "k"], ""),
    "inner": (torch.inner, ["mk", "nk"], "mn"),
    "tensordot": (lambda one, other: torch.tensordot(one, other, 1), ["bmk", "kn"], "bmn"),
    "einsum": (lambda *both: torch.einsum("bmk,bnk->bnm", *both), ["bmk", "bnk"], "bmn"),
    "einsum of one batch": (lambda *both: torch.einsum("bmk,kn->bnm", *both), ["bmk", "kn"], "bmn"),
    "einsum over rows": (lambda *both: torch.einsum("mk,mk->m", *both), ["mk", "mk"], "m"),
    "addmm": (torch.addmm, ["mn", "mk", "kn"], "mn"),
    "addmv": (torch.addmv, ["m", "mk", "k"], "m"),
    "addbmm": (torch.addbmm, ["mn", "bmk", "bkn"], "bmn"),
    "baddbmm": (torch.baddbmm, ["bmn", "bmk", "bkn"], "bmn"),
    "with activation": (torch._addmm_activation, ["n", "mk", "kn"], "mn"),
    "linear": (F.linear, ["bmk", "nk", "n"], "bmn"),
    "linear of a vector": (F.linear, ["k", "nk"], "n"),
}


@pytest.mark.parametrize("name", PRODUCTS)
@settings(max_examples=5)
@given(sizes, sizes, st.integers(2, 5), sizes)  # einsum adds nothing up where there is but one product
def test_products_of_every_kind_are_counted(name, b, m, k, n):
    function, shapes, kept = PRODUCTS[name]
    known = {"b": b, "m": m, "k": k, "n": n}
    tensors = [zeros(*(known[axis] for axis in shape)) for shape in shapes]
    batch, rows, columns = (known[axis] if axis in kept else 1 for axis in "bmn")
    assert counted(function, *tensors) == batch * by_hand.product(rows, k, columns)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="since torch 2.10")
@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ((16, 8), (2, 8, 24), by_hand.product(16, 8, 24)),
        ((2, 8, 16), (2, 16, 24), 2 * by_hand.product(8, 16, 24)),
        ((2, 8, 16), (16, 24), by_hand.product(8, 16, 24)),
        ((8, 16), (16, 24), by_hand.product(8, 16, 24)),
    ],
)
def test_groups_of_products_are_counted(left, right, expected):
    given = [zeros(*shape).bfloat16() for shape in (left, right)]
    offsets = None if len(left) == len(right) == 3 else torch.tensor([8, {2: 16, 3: 24}[len(left)]], dtype=torch.int32)
    assert counted(lambda *both: F.grouped_mm(*both, offs=offsets), *given) == expected


@settings(max_examples=40)
@given(st.integers(1, 3), st.booleans(), st.booleans(), st.integers(1, 3), st.data())
def test_convolutions_of_all_kinds_count_every_position(axes, transposed, batched, groups, data):
    draw = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    channels = groups * draw(1, 3), groups * draw(1, 3)
    kernel = tuple(draw(1, 3) for _ in range(axes))
    options = {"stride": draw(1, 2), "dilation": draw(1, 2), "padding": draw(0, 2), "groups": groups}
    layer = getattr(nn, f"Conv{'Transpose' * transposed}{axes}d")(*channels, kernel, **options)
    images = zeros(*[2] * batched, channels[0], *(draw(6, 8) for _ in range(axes)))
    with torch.no_grad():
        positions = (images if transposed else layer(images)).shape[-axes:]
    expected = by_hand.convolution(1 + batched, channels, groups, kernel, positions)
    assert count_macs(layer, as_inputs(images)) == expected


def test_convolutions_of_sequences_with_the_time_first_are_counted():
    given, weight = zeros(7, 2, 3), zeros(4, 3, 5)
    expected = by_hand.convolution(2, (3, 5), 1, [4], [7 + 2 - 3])
    assert counted(torch.conv_tbc, given, weight, zeros(5), torch.tensor(1).item()) == expected


def test_what_this_library_fuses_is_counted_as_its_two_products():
    rows, images = zeros(2, 5, 16), zeros(2, 6, 9, 9)
    linear = counted(fused.low_rank_linear, rows, zeros(4, 16), zeros(12, 4))
    assert linear == by_hand.product(10, 16, 4) + by_hand.product(10, 4, 12)
    convolved = counted(fused.low_rank_conv2d, images, zeros(4, 6, 3, 3), zeros(12, 4, 1, 1))
    kernels = [((6, 4), [3, 3]), ((4, 12), [1, 1])]
    assert convolved == sum(by_hand.convolution(2, channels, 1, size, [7, 7]) for channels, size in kernels)


# Views of what requires gradients


VIEWS = {
    "expanded": lambda one, count: one.expand(count, -1, -1),
    "squeezed": lambda one, _: one.squeeze(0),
    "indexed": lambda one, _: one[0],
    "repeated": lambda one, count: one.repeat(count, 1, 1),
    "as it is": lambda one, _: one,
}


class Queries(nn.Module):
    """Learned queries, given to a layer beside the inputs."""

    def __init__(self, view):
        super().__init__()
        self.view, self.queries = view, nn.Parameter(zeros(1, 6, 24))
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, inputs):
        return self.first(self.view(self.queries, len(inputs))) + self.second(inputs[:])


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_views_of_parameters_and_of_inputs_with_gradients_may_go_into_layers(view, frozen, wanted):
    model = fill_(Queries(view), 0)
    model.first.requires_grad_(not frozen)
    inputs = randn(3, 6, 24, seed=0, dtype=torch.float32).requires_grad_(wanted)
    before = snapshot(model)
    plan = plan_compression(model, 0.3, target="macs", example_inputs=inputs)
    assert same(snapshot(model), before)
    assert [one.requires_grad for one in model.parameters()] == [True] + [not frozen] * 2 + [True] * 2
    rows = 6 * len(view(model.queries, 3)) if view(model.queries, 3).dim() == 3 else 6
    assert plan.macs_before == by_hand.product(rows, 24, 24) + by_hand.product(3 * 6, 24, 24)
    report = plan.apply_(model, inputs)
    assert report.macs_after == plan.macs_after <= 0.7 * plan.macs_before


def test_a_count_that_is_interrupted_leaves_no_counter_behind():
    def interrupt(given):
        raise KeyboardInterrupt

    model = fill_(nn.Sequential(nn.Linear(24, 24), Applied(interrupt)), 0)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        plan_compression(model, 0.3, target="macs", example_inputs=zeros(1, 24))
    assert same(snapshot(model), before)
    assert all(one.requires_grad for one in model.parameters())
    assert not torch._C._len_torch_dispatch_stack()


# What nobody knows


@pytest.fixture
def operators():
    """Operators of a library that torch does not know: one that multiplies, and one of a single matrix."""
    library = torch.library.Library("counting_tests", "DEF")
    library.define("multiply(Tensor one, Tensor other) -> Tensor")
    library.define("double(Tensor one) -> Tensor")
    library.impl("multiply", torch.mm, "CompositeExplicitAutograd")
    library.impl("double", lambda one: 2 * one, "CompositeExplicitAutograd")
    yield torch.ops.counting_tests
    flop_registry.pop(torch.ops.counting_tests.multiply, None)
    library._destroy()


def test_operators_without_a_formula_are_named_unless_they_are_given_one(operators):
    squared = Applied(lambda one: operators.multiply(operators.double(one), one.T))
    model = fill_(nn.Sequential(nn.Linear(24, 24), squared), 0)
    options = {"target": "macs", "example_inputs": zeros(5, 24)}
    with pytest.warns(UserWarning, match=r"no multiply-accumulates of counting_tests\.multiply are counted"):
        plan = plan_compression(model, 0.1, **options)
    assert plan.macs_before == by_hand.product(5, 24, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.apply_(copy.deepcopy(model), options["example_inputs"])  # it has been said
        register_flop_formula(operators.multiply)(lambda one, other, **_: 2 * one[0] * one[1] * other[1])
        again = plan_compression(model, 0.1, **options)
    assert again.macs_before == by_hand.product(5, 24, 24) + by_hand.product(5, 24, 5)


def test_attention_with_values_of_another_width():
    assert _attention([(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 16)], None) == 2 * 4 * 5 * 7 * (8 + 16)
