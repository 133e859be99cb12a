"""Penalties under torch.distributed: DistributedDataParallel, fully_shard and other sharded tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.distributed.launch import launch_once
from tests.distributed.penalty_worker import CHECKS
from tests.networks import mlp
from torchsmooth._sharded import settle, sharded_for


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return launch_once("tests.distributed.penalty_worker", tmp_path_factory)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_two_ranks(check, results):
    results.assert_passed(check)


def test_a_gradient_in_flight_is_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("cuda"))

    def tensor(kind, *, is_leaf=True, grad=None):
        return SimpleNamespace(device_mesh=SimpleNamespace(device_type=kind), is_leaf=is_leaf, grad=grad)

    for one in (tensor("cpu", grad=1), tensor("cpu", is_leaf=False), tensor("cuda")):
        settle(one)
    assert waits == []
    settle(tensor("cuda", grad=1))  # offloaded ones, too: the mesh tells where the gradient comes from
    settle(tensor("cuda", is_leaf=False))
    assert waits == ["cuda"] * 2


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (lambda group: SimpleNamespace(_fsdp_param_groups=[group, group]), True),
        (lambda group: SimpleNamespace(_fsdp_param_group=group), True),  # older versions of torch
        (lambda group: SimpleNamespace(_fsdp_param_group=None), False),
        (lambda group: SimpleNamespace(_fsdp_param_groups=[]), False),
        (lambda group: SimpleNamespace(), False),
    ],
)
def test_gathered_parameters_are_known_by_what_torch_has(state, found):
    gathered, trained = torch.zeros(2), torch.ones(2)
    never = SimpleNamespace(sharded_param=torch.ones(3))  # not gathered so far
    group = SimpleNamespace(fsdp_params=[never, SimpleNamespace(_unsharded_param=gathered, sharded_param=trained)])

    class Wrapped(nn.Linear):
        def _get_fsdp_state(self):
            return state(group)

    model = nn.Sequential(mlp(), Wrapped(2, 2))
    assert sharded_for(model) == ({id(gathered): trained} if found else {})
    assert sharded_for(mlp()) == {}
