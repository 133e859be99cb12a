"""Merged projections of an attention layer are run as one product: the same numbers, only where that is right."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

import torchsmooth
from tests.networks import same, snapshot
from tests.strategies import fill_, randn, seeds
from torchsmooth._derive import derive
from torchsmooth._execution import derived_of, use_
from torchsmooth._together import join_, run_together

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def low_rank_attention(seed, *, bias=True, rank=3, **options):
    dense = fill_(nn.MultiheadAttention(12, 3, bias=bias, batch_first=True, **options), seed).double()
    layer = torchsmooth.LowRankMultiheadAttention.from_attention(dense)
    for name in (*PROJECTIONS, "out_proj"):
        setattr(layer, name, torchsmooth.LowRankLinear.from_linear(getattr(layer, name), rank))
    return layer.eval()


def joined(layer, executions=("dense", "dense", "dense")):
    children = [getattr(layer, name) for name in PROJECTIONS]
    derived = [derive(one, execution) for one, execution in zip(children, executions, strict=True)]
    for child, one in zip(children, derived, strict=True):
        use_(child, one)
    join_(derived)
    return layer


class Products(TorchFunctionMode):
    """Counts the linear products of calls while it is active."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is F.linear
        return function(*args, **(kwargs or {}))


def run(layer, *inputs, **options):
    with torch.no_grad():
        return layer(*inputs, **options)[0]


@given(seeds, st.booleans(), st.booleans(), st.integers(1, 11))
@settings(max_examples=20)
def test_one_product_gives_what_three_give(seed, bias, batched, rank):
    layer = low_rank_attention(seed, bias=bias, rank=rank)
    x = randn(2, 5, 12, seed=seed) if batched else randn(5, 12, seed=seed)
    expected, before = run(layer, x, x, x), snapshot(layer)
    joined(layer)
    assert run_together([getattr(layer, name) for name in PROJECTIONS], x) is None  # with gradients
    with Products() as products:
        found = run(layer, x, x, x)
    assert products.count == 2 + 1  # the factors of out_proj
    assert torch.allclose(found, expected, atol=1e-10)
    assert same(snapshot(layer), before)


def test_other_inputs_gradients_hooks_and_changed_factors_take_three():
    layer = joined(low_rank_attention(0))
    x, y = randn(2, 5, 12, seed=1), randn(2, 5, 12, seed=2)
    plain = low_rank_attention(0)

    def takes(count, *inputs):
        with Products() as products:
            found = run(layer, *inputs)
        return products.count == count and torch.allclose(found, run(plain, *inputs), atol=1e-10)

    assert takes(3, x, x, x)
    assert takes(5, x, y, y)
    assert takes(5, x, x, y)
    seen = []
    handle = layer.k_proj.register_forward_hook(lambda *_: seen.append(1))
    assert takes(5, x, x, x)
    assert seen == [1]
    handle.remove()
    layer.q_proj.forward = lambda given: seen.append(2) or type(layer.q_proj).forward(layer.q_proj, given)
    assert takes(5, x, x, x)
    assert seen == [1, 2]
    del layer.q_proj.forward
    assert takes(3, x, x, x)
    assert torch.allclose(layer(x, x, x)[0], plain(x, x, x)[0])  # with gradients
    layer(x, x, x)[0].sum().backward()
    assert layer.v_proj.up.weight.grad is not None
    for one in (layer, plain):
        with torch.no_grad():
            one.v_proj.up.weight.mul_(2)
    assert takes(2 + 1 + 1 + 2, x, x, x)


@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), lambda one: one.to("cpu", torch.float32)]
)
def test_what_is_copied_or_moved_is_not_joined_any_more(change):
    layer = joined(low_rank_attention(0))
    x = randn(2, 5, 12, seed=1)
    expected = run(layer, x, x, x)
    other = change(layer)
    x = x.to(other.q_proj.up.weight.dtype)
    assert derived_of(other.q_proj).together is None
    assert run_together([getattr(other, name) for name in PROJECTIONS], x) is None
    assert torch.allclose(run(other, x, x, x), expected.to(x.dtype), atol=1e-5)


def test_only_what_fits_is_joined():
    assert derived_of(joined(low_rank_attention(0), ("dense", "pivoted", "dense")).q_proj).together is None
    assert derived_of(joined(low_rank_attention(0, kdim=8), ("dense",) * 3).q_proj).together is None
    join_([None, None, None])
    layer = joined(low_rank_attention(0))
    weights = [derived_of(getattr(layer, name)).module.weight for name in PROJECTIONS]
    assert len({one.untyped_storage().data_ptr() for one in weights}) == 1
    assert derived_of(layer.q_proj).together.weight.shape == (36, 12)


def test_tune_joins_what_it_merges(monkeypatch):
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(12, 3, 24, batch_first=True), 2, enable_nested_tensor=False
    )
    model = fill_(model, 0).eval()
    torchsmooth.svd_compress_(model, 0.3, progress=False)
    x = randn(2, 5, 12, seed=1).float()
    with torch.no_grad():
        expected = model(x)
    monkeypatch.setattr(
        torchsmooth.tuning, "median_nanoseconds",
        lambda calls, device, before=None, **_: [9 - place for place, _ in enumerate(calls)],
    )  # fmt: skip
    torchsmooth.tune_(model, x, executions=["dense"], memory_format="keep", progress=False)
    attentions = [one for one in model.modules() if isinstance(one, torchsmooth.LowRankMultiheadAttention)]
    low_rank = [
        one
        for one in attentions
        if all(isinstance(getattr(one, name), torchsmooth.LowRankLinear) for name in PROJECTIONS)
    ]
    assert low_rank
    assert all(derived_of(one.q_proj).together is not None for one in low_rank)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5)
        torch.compiler.reset()  # it may have given up on torch's own forward in another test of this process
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), expected, atol=1e-5)
