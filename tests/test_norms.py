"""BatchNorm statistics that follow: what comes out of a norm has the mean and the variance that it had before."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import same, small_resnet, snapshot
from tests.strategies import fill_, randn, seeds
from torchsmooth._norms import FollowingNorms, Spread, norms_of


def images(seed, count=12):
    return randn(count, 3, 6, 6, seed=seed)


def conv_and_norm(seed=0, **options):
    return fill_(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, **options)), seed).double().eval()


@contextmanager
def another_weight(conv, weight):
    kept = conv.weight
    conv.weight = nn.Parameter(weight)
    try:
        yield
    finally:
        conv.weight = kept


@torch.no_grad()
def follow(model, batches, changed):
    """Run both networks, the second one with other weights, and return it with the statistics that follow."""
    norms = FollowingNorms(model)
    for batch in batches:
        with norms.watching_dense() as seen:
            model(batch)
        with changed(), norms.in_place(seen, norms.unsettled):
            model(batch)
    norms.settle()
    return norms


def values_at(norm, run):
    """What comes out of a norm while something runs."""
    outputs = []
    handle = norm.register_forward_hook(lambda _module, _args, output: outputs.append(output.detach()))
    with torch.no_grad():
        run()
    handle.remove()
    return torch.cat([one.transpose(0, 1).flatten(1) for one in outputs], 1)


def write_(norms):
    with torch.no_grad():
        for buffer, values in norms.statistics():
            buffer.copy_(values)


def close(one, other, tolerance=1e-9):
    """Compare the means and the variances of channels ``(channels, values)``."""
    means = torch.allclose(one.mean(1), other.mean(1), atol=tolerance)
    return means and torch.allclose(one.var(1), other.var(1), rtol=1e-6, atol=tolerance)


@given(st.sampled_from([(5, 3), (5, 3, 4), (5, 3, 2, 4), (2, 3, 2, 2, 2)]), seeds, st.sampled_from([0.0, 1e6]))
def test_a_spread_is_mean_and_variance_of_each_channel(shape, seed, mean):
    values = mean + randn(*shape, seed=seed)
    spread = Spread.of(values)
    channels = values.transpose(0, 1).flatten(1)
    assert spread.count == channels.shape[1]
    assert torch.allclose(spread.mean, channels.mean(1))
    assert torch.allclose(spread.variance, channels.var(1, correction=0), rtol=1e-6)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), seeds, st.sampled_from([0.0, 1e6]))
def test_merged_spreads_are_those_of_all_values(sizes, seed, mean):
    values = mean + randn(sum(sizes), 3, 2, seed=seed)
    merged = None
    for part in values.split(sizes):
        merged = Spread.of(part).merged(merged)
    assert merged.count == 2 * sum(sizes)
    if sum(sizes):
        whole = Spread.of(values)
        assert torch.allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
        assert torch.allclose(merged.variance, whole.variance, rtol=1e-6)


@settings(max_examples=25)
@given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from([1e-5, 1e-2, 0.0]))
def test_what_comes_out_has_the_mean_and_the_variance_of_the_dense_network(seed, sizes, eps):
    model = conv_and_norm(seed, eps=eps)
    batches = images(seed, sum(sizes)).split(sizes)
    weight = randn(4, 3, 3, 3, seed=seed + 1)
    dense = values_at(model[1], lambda: [model(batch) for batch in batches])
    norms = follow(model, batches, lambda: another_weight(model[0], weight))
    write_(norms)
    with another_weight(model[0], weight):
        compressed = values_at(model[1], lambda: [model(batch) for batch in batches])
    assert close(compressed, dense)


def test_one_batch_is_matched_while_it_runs():
    model, weight = conv_and_norm(), randn(4, 3, 3, 3, seed=1)
    norms = FollowingNorms(model)
    with torch.no_grad(), norms.watching_dense() as seen:
        dense = values_at(model[1], lambda: model(images(0)))
    with torch.no_grad(), another_weight(model[0], weight), norms.in_place(seen, norms.unsettled):
        assert close(values_at(model[1], lambda: model(images(0))), dense)


@given(seeds, st.sampled_from([torch.float64, torch.float32, torch.float16]), st.sampled_from([1.0, 1e-12]))
def test_a_norm_whose_input_did_not_change_keeps_its_statistics_bit_for_bit(seed, dtype, scale):
    model = conv_and_norm(seed).to(dtype)
    model[1].running_var.mul_(scale)
    before = [one.clone() for one in model[1].buffers()]
    norms = follow(model, images(seed).to(dtype).split(5), lambda: another_weight(model[0], model[0].weight.detach()))
    write_(norms)
    assert all(torch.equal(one, other) for one, other in zip(model[1].buffers(), before, strict=True))


def test_a_channel_that_was_constant_keeps_its_variance_and_moves_its_mean():
    model = conv_and_norm()
    with torch.no_grad():
        model[0].weight[1] = 0
    before = model[1].running_var.clone()
    weight = randn(4, 3, 3, 3, seed=1)
    batches = images(0).split(4)
    dense = values_at(model[1], lambda: [model(batch) for batch in batches])
    write_(follow(model, batches, lambda: another_weight(model[0], weight)))
    assert model[1].running_var[1] == before[1]
    assert bool((model[1].running_var != before)[[0, 2, 3]].all())
    with another_weight(model[0], weight):
        compressed = values_at(model[1], lambda: [model(batch) for batch in batches])
    assert torch.allclose(compressed.mean(1), dense.mean(1))


def test_a_channel_that_becomes_constant_keeps_the_mean_of_what_comes_out():
    # Its variance can only fall to zero: beside eps, no statistic brings back what does not vary any more.
    model = conv_and_norm(eps=1e-2)
    weight = model[0].weight.detach().clone()
    weight[1] = 0
    weight[2] *= 1e-4
    batches = images(0).split(4)
    dense = values_at(model[1], lambda: [model(batch) for batch in batches])
    write_(follow(model, batches, lambda: another_weight(model[0], weight)))
    assert bool((model[1].running_var[1:3] < 1e-15).all())
    with another_weight(model[0], weight):
        compressed = values_at(model[1], lambda: [model(batch) for batch in batches])
    assert torch.allclose(compressed.mean(1), dense.mean(1))
    assert close(compressed[[0, 3]], dense[[0, 3]])


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(input=self.second(self.norm(self.first(x)).relu()))


def test_a_norm_called_several_times_is_matched_to_all_its_calls_together():
    model = fill_(CalledTwice(), 0).double().eval()
    batch = randn(40, 5, seed=0)
    weight = model.first.weight.detach() + 0.1 * randn(4, 5, seed=1)

    def inputs():
        spreads = []
        handle = model.norm.register_forward_pre_hook(
            lambda _module, args, kwargs: spreads.append(Spread.of(args[0] if args else kwargs["input"])),
            with_kwargs=True,
        )
        with torch.no_grad():
            model(batch)
        handle.remove()
        return spreads[0].merged(spreads[1])

    dense = inputs()
    norms = FollowingNorms(model)
    with torch.no_grad():
        with norms.watching_dense() as seen:
            model(batch)
        with another_weight(model.first, weight), norms.in_place(seen, norms.unsettled):
            compressed = inputs()  # each call matched to that call, until all have been seen
        norms.settle()
    (mean, new_mean), (variance, new_variance) = norms.statistics()
    eps, ratio = model.norm.eps, compressed.variance / dense.variance
    assert torch.allclose(new_variance + eps, (variance + eps) * ratio)
    assert torch.allclose((compressed.mean - new_mean) / ratio.sqrt(), dense.mean - mean)


def test_norms_are_settled_as_the_network_comes_to_them():
    model = fill_(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)), 0).eval()
    norms = FollowingNorms(model)
    batch = randn(20, 5, seed=0, dtype=torch.float32)
    with torch.no_grad():
        with norms.watching_dense() as seen:
            model[1](model[0](batch))
        with norms.in_place(seen, norms.unsettled):
            model[1](model[0](batch))
    assert norms.unsettled
    norms.settle()
    assert norms.unsettled
    assert [buffer is model[1].running_mean for buffer, _ in norms.statistics()] == [True, False]
    with torch.no_grad():
        with norms.watching_dense() as seen:
            assert len(model[1]._forward_pre_hooks) == 0  # it has been
            assert len(model[3]._forward_pre_hooks) == 1
            model(batch)
        with norms.in_place(seen, norms.unsettled):
            model(batch)
    norms.settle()
    assert not norms.unsettled
    assert len(norms.statistics()) == 4


class Stop(BaseException):
    pass


@pytest.mark.parametrize("context", ["watching_dense", "in_place"])
@pytest.mark.parametrize("stop", [None, Stop, KeyboardInterrupt, RuntimeError])
def test_the_model_is_as_before_after_every_context(context, stop):
    model = small_resnet(1)
    before = snapshot(model)
    buffers = {name: id(one) for name, one in model.named_buffers()}
    norms = FollowingNorms(model)
    batch = randn(2, 3, 8, 8, seed=0, dtype=torch.float32)

    def run():
        with torch.no_grad(), norms.watching_dense() as seen:
            model(batch)
        again = norms.watching_dense() if context == "watching_dense" else norms.in_place(seen, norms.unsettled)
        with torch.no_grad(), another_weight(model.conv1, 2 * model.conv1.weight.detach()), again:
            model(batch)
            if stop is not None:
                raise stop

    if stop is None:
        run()
        norms.settle()
    else:
        with pytest.raises(stop):
            run()
    assert same(before, snapshot(model))
    assert {name: id(one) for name, one in model.named_buffers()} == buffers
    assert not any(norm._forward_pre_hooks for norm in norms_of(model).values())


def test_nan_and_infinite_values_are_refused_with_the_name_of_the_norm():
    model = conv_and_norm()
    before = snapshot(model)
    with pytest.raises(ValueError, match="brings NaN or infinite values to BatchNorm layer '1': look at the inputs"):
        follow(model, [images(0) / 0], lambda: another_weight(model[0], model[0].weight.detach()))
    assert same(before, snapshot(model))


def test_an_empty_batch_brings_nothing():
    model, weight = conv_and_norm(), randn(4, 3, 3, 3, seed=1)
    norms = follow(model, [images(0), images(0)[:0]], lambda: another_weight(model[0], weight))
    expected = follow(model, [images(0)], lambda: another_weight(model[0], weight))
    for (_, one), (_, other) in zip(norms.statistics(), expected.statistics(), strict=True):
        assert torch.equal(one, other)
    alone = follow(model, [images(0)[:0]], lambda: another_weight(model[0], weight))
    assert all(torch.equal(buffer, values) for buffer, values in alone.statistics())


def test_statistics_in_half_precision_stay_within_its_range():
    model = conv_and_norm().half()
    with torch.no_grad():
        model[1].running_var.fill_(6e4)
    weight = 4 * model[0].weight.detach()
    norms = follow(model, [images(0).half()], lambda: another_weight(model[0], weight))
    write_(norms)
    assert model[1].running_var.dtype == torch.float16
    assert torch.equal(model[1].running_var, torch.full((4,), torch.finfo(torch.float16).max, dtype=torch.float16))


def test_norms_without_running_statistics_are_none_of_ours():
    model = nn.Sequential(
        nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3), nn.InstanceNorm1d(3, track_running_stats=True)
    )
    assert norms_of(model) == {}
    assert not FollowingNorms(model).unsettled
    assert list(norms_of(small_resnet(1)))[:2] == ["bn1", "layers.0.bn1"]


def test_a_network_that_goes_another_way_leaves_the_rest_alone():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.turn = False

        def forward(self, x):
            x = self.norm(self.first(x))
            return self.norm(x) if self.turn else x

    model = fill_(Branching(), 0).double().eval()
    expected = copy.deepcopy(model)
    norms = FollowingNorms(model)
    with torch.no_grad():
        with norms.watching_dense() as seen:
            model(randn(9, 4, seed=0))
        model.turn = True
        with norms.in_place(seen, norms.unsettled):
            model(randn(9, 4, seed=0))
    norms.settle()
    write_(norms)
    assert torch.equal(model.norm.running_mean, expected.norm.running_mean)
    assert torch.equal(model.norm.running_var, expected.norm.running_var)


def test_settled_statistics_stay_while_they_are_found_again():
    norm = nn.BatchNorm1d(3).eval()
    following = FollowingNorms(norm)
    batch = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    with following.watching_dense() as seen:
        norm(batch)
    with following.in_place(seen, [norm]):
        norm(2 * batch + 1)
    following.settle()
    settled = [one.clone() for _, one in following.statistics()]
    with following.in_place(seen, [norm]):
        norm(5 * batch - 3)
        assert torch.equal(norm.running_mean, settled[0])
    assert all(torch.equal(one, other) for one, (_, other) in zip(settled, following.statistics(), strict=True))
