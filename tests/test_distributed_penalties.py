"""Penalties under torch.distributed: DistributedDataParallel, fully_shard and other sharded tensors."""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch_once
from tests.distributed.penalty_worker import CHECKS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return launch_once("tests.distributed.penalty_worker", tmp_path_factory)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_two_ranks(check, results):
    results.assert_passed(check)
