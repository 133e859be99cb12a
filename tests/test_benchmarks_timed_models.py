"""The models whose time the benchmarks measure."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchsmooth
from testbed.llama import LlamaBlock
from tests.cifar10_benchmark import benchmark
from tests.strategies import fill_, randn, seeds

timed_models = benchmark("timed_models")


@given(seeds, st.integers(2, 20), st.integers(2, 20), st.floats(0.1, 2.0))
@settings(max_examples=20)
def test_spectra_decay_by_a_power_law_and_norms_are_kept(seed, rows, columns, exponent):
    layer = fill_(nn.Linear(columns, rows), seed)
    before = layer.weight.detach().double()
    assert timed_models.decay_spectra_(layer, exponent) is layer
    high, wide = (torch.arange(1, size + 1, dtype=torch.float64) ** -exponent for size in (rows, columns))
    scaled = high[:, None] * before * wide
    expected = torch.linalg.svdvals(scaled) * before.norm() / scaled.norm()
    torch.testing.assert_close(
        torch.linalg.svdvals(layer.weight.detach().double()), expected, rtol=1e-4, atol=1e-6 * float(expected[0])
    )


def test_a_wide_random_weight_becomes_one_that_a_low_rank_serves():
    before, after = (fill_(nn.Conv2d(64, 64, 3), 0) for _ in range(2))
    timed_models.decay_spectra_(after, timed_models.EXPONENT)
    kept = [torchsmooth.spectrum(nn.Sequential(one)).layers[0].energy(0.7) for one in (before, after)]
    assert kept[0] < 0.6
    assert kept[1] > 0.9


def test_the_parts_of_an_attention_decay_apart_and_odd_axes_stay():
    attention = fill_(nn.MultiheadAttention(12, 2), 0)
    linear = nn.Linear(12, 12, bias=False)
    with torch.no_grad():
        linear.weight.copy_(attention.in_proj_weight[12:24])
    timed_models.decay_spectra_(attention, 0.7)
    timed_models.decay_spectra_(linear, 0.7)
    torch.testing.assert_close(attention.in_proj_weight[12:24], linear.weight)
    single = fill_(nn.Linear(7, 1), 0)
    before = single.weight.clone()
    assert torch.equal(timed_models.decay_spectra_(single, 0.7).weight, before)


def test_a_model_is_always_the_same():
    entry = timed_models.Entry(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6)), (6,))
    one, two = entry.model(), entry.model()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not one.training
    assert torch.equal(entry.inputs(3), entry.inputs(3))
    assert entry.inputs(3).shape == (3, 6)


@given(seeds)
@settings(max_examples=5)
def test_a_block_of_llama_looks_back_only(seed):
    block = fill_(LlamaBlock(16, 24, 2), seed).double()
    x = randn(2, 6, 16, seed=seed)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = block(x), block(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().min() > 0
    assert sum(isinstance(one, nn.Linear) and one.bias is None for one in block.modules()) == 7
