"""svd_compress_ under torch.distributed: on two processes, and what can be said of its parts on one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist
from torch import nn

import torchsmooth
from tests.distributed.compress_worker import CHECKS
from tests.distributed.launch import launch_once
from tests.networks import mlp, same, snapshot
from tests.strategies import randn, seeds
from torchsmooth import svd_compress_
from torchsmooth._alike import prepared_
from torchsmooth._checksum import checksum
from torchsmooth._options import decomposition_work
from torchsmooth._ranks import ALONE, Ranks, team_of
from torchsmooth._whole import check_whole


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return launch_once("tests.distributed.compress_worker", tmp_path_factory)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_two_ranks(check, results):
    results.assert_passed(check)


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 5))
def test_work_is_divided_evenly_and_always_alike(costs, size):
    named = {f"layer {index}": cost for index, cost in enumerate(costs)}
    ranks = [Ranks.__new__(Ranks) for _ in range(size)]
    for number, one in enumerate(ranks):
        one.rank, one.numbers = number, range(size)
    owners = ranks[0].divide(named)
    assert list(owners) == list(named)
    assert all(one.divide(named) == owners for one in ranks)
    loads = [sum(named[name] for name, owner in owners.items() if owner == rank) for rank in range(size)]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_large_decompositions_count_more_than_many_small_ones():
    def work(layer, *schemes):
        kind = torchsmooth._layers.KINDS[type(layer)]
        return decomposition_work(kind.layouts(layer, schemes or ("auto",)).values())

    assert work(nn.Linear(1024, 1024)) > 100 * work(nn.Linear(128, 128))
    assert work(nn.Conv2d(64, 64, 3)) > work(nn.Conv2d(64, 64, 3), "channel") > 0
    assert work(nn.Conv2d(64, 64, 3, groups=4)) < work(nn.Conv2d(64, 64, 3))
    assert work(nn.Conv2d(64, 64, 3), "tucker") > work(nn.Conv2d(64, 32, 3), "tucker") > 0


@given(seeds, st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool]))
def test_the_checksum_of_a_tensor_sees_any_change(seed, dtype):
    values = randn(4, 6, 3, 3, seed=seed)
    tensor = values.gt(0) if dtype is torch.bool else (100 * values).to(dtype)
    known = checksum(tensor)
    assert known == checksum(tensor.clone()) == checksum(tensor.contiguous(memory_format=torch.channels_last))
    for change in (tensor.flip(0), tensor.transpose(2, 3), tensor.roll(1, 1)):
        assert torch.equal(change, tensor) == (checksum(change.contiguous()) == known)
    changed = tensor.clone()
    changed[3, 5, 2, 2] = 1 - changed[3, 5, 2, 2].to(torch.int64) if dtype is torch.bool else changed[3, 5, 2, 2] + 1
    assert checksum(changed) != known


@given(
    data=st.data(),
    seed=seeds,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]),
    length=st.integers(1, 40),
    offset=st.integers(0, 9),
)
def test_the_checksum_sees_one_bit_and_nothing_of_what_lies_around(data, seed, dtype, length, offset):
    values = randn(length + offset, seed=seed)
    tensor = (100 * values).abs().to(dtype)
    known = checksum(tensor[offset:])
    assert checksum(tensor[offset:].clone()) == known
    strided = torch.stack([tensor, tensor.flip(0)], 1)
    assert checksum(strided[offset:, 0]) == known
    octets = tensor[offset:].clone().view(torch.uint8)
    octets[data.draw(st.integers(0, len(octets) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(octets.view(dtype)) != known


def test_the_checksum_does_not_depend_on_how_much_is_summed_at_a_time(monkeypatch):
    tensor = randn(301, 301, seed=0)
    known = checksum(tensor)
    monkeypatch.setattr(torchsmooth._checksum, "_CHUNK", 3)
    assert checksum(tensor) == known
    assert checksum(torch.zeros(0)) == 0
    assert checksum(torch.zeros(3, device="meta")) is checksum(torch.zeros(3).to_sparse()) is None


def test_a_process_alone_has_nobody_to_talk_to(monkeypatch):
    assert team_of(None, mlp()) is ALONE
    with ALONE, prepared_(ALONE, nn.Module(), {"ratio": 0.5}):
        assert ALONE.share(ALONE.divide({"a": 1, "b": 2}), str.upper) == {"a": "A", "b": "B"}
        assert ALONE.first(lambda: 3) == 3
        assert ALONE.gather(3) == [3]
    # As in a build of torch without torch.distributed, where hardly any other name exists.
    monkeypatch.setattr(dist, "is_available", lambda: False)
    monkeypatch.setattr(dist, "is_initialized", lambda: 1 / 0)
    assert svd_compress_(mlp(), 0.5).ratio >= 0.5


def test_a_process_group_of_one_is_alone_and_other_things_are_no_group(tmp_path):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"that is initialised .*, or None, got int 0\."):
        svd_compress_(model, 0.5, process_group=0)
    assert same(before, snapshot(model))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert team_of(None, model) is team_of(dist.group.WORLD, model) is ALONE
        with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup .*got str 'gloo'"):
            svd_compress_(model, 0.5, process_group="gloo")
        assert svd_compress_(model, 0.5, process_group=dist.group.WORLD).ratio >= 0.5
    finally:
        dist.destroy_process_group()


def test_models_that_are_whole_pass():
    check_whole(nn.Sequential(mlp(), nn.Embedding(3, 4), nn.DataParallel(nn.Linear(2, 2))))
