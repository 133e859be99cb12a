"""What two ranks do about each other's errors; part of tests/distributed/compress_worker.py."""

from __future__ import annotations

import contextlib
import importlib
import time
from unittest.mock import patch

import torch
from torch import distributed as dist
from torch import nn

from tests.distributed.common import IMAGES, ROWS, assert_same_everywhere, convolutions, left_as_it_was, raises
from tests.networks import mlp
from tests.strategies import fill_
from torchsmooth import svd_compress_

CHECKS = []


@CHECKS.append
def a_rank_that_comes_alone_is_told_so_and_can_come_again():
    model = mlp()
    for lonely in (0, 1, 0):
        with patch("torchsmooth._arrival.PATIENCE", 0.3):
            if dist.get_rank() == lonely:
                start = time.monotonic()
                with (
                    left_as_it_was(model),
                    raises(RuntimeError, f"not on rank {1 - lonely}", "if rank == 0", "plan_compression(model, ratio)"),
                ):
                    svd_compress_(model, 0.5)
                assert time.monotonic() - start < 10
        dist.barrier()
    assert_same_everywhere(model, svd_compress_(model, 0.5))


@CHECKS.append
def ranks_that_want_different_things_are_told_so():
    rank = dist.get_rank()
    extra = mlp()
    if rank:
        extra.extra = nn.Parameter(torch.zeros(3))
    turned = mlp()
    turned[2].weight.data = turned[2].weight.detach().flip(0) if rank else turned[2].weight.detach()
    cases = [
        (mlp(), {"ratio": 0.5 + 0.1 * rank}, "ratio=0.5 on rank 0, but ratio=0.6 on rank 1"),
        (mlp(), {"ratio": 0.5, "scheme": ("auto", "channel")[rank]}, "scheme='auto' on rank 0, but scheme='channel'"),
        (
            mlp(),
            {"ratio": 0.5, "calibration": [ROWS] if rank else None},
            "calibration=None on rank 0, but calibration=",
        ),
        (mlp(), {"ratio": 0.5, "filter_fn": lambda _, name: rank == 0 or name != "2"}, "layer '2' can be compressed"),
        (mlp(rank), {"ratio": 0.5}, "'weight' of layer '0' has other values on rank 1 than on rank 0. Load the same"),
        (turned, {"ratio": 0.5}, "'weight' of layer '2' has other values on rank 1"),
        (
            mlp(0, (24, 32 + rank, 8)),
            {"ratio": 0.5},
            "is torch.float32 of shape (32, 24) on rank 0, and torch.float32 of",
        ),
        (mlp().to(torch.float64 if rank else torch.float32), {"ratio": 0.5}, "is torch.float32 of shape"),
        (extra, {"ratio": 0.5}, "only rank 1 has 'extra'"),
    ]
    for model, kwargs, message in cases:
        with left_as_it_was(model), raises(ValueError, message):
            svd_compress_(model, **kwargs)


# Where something breaks, at which call, how, and what kind of error the other rank is told.
FAILURES = [
    ("torchsmooth._workpiece.find_layers", 0, ValueError, {}, ValueError),
    ("torchsmooth._workpiece.options_of", 0, torch.linalg.LinAlgError, {}, RuntimeError),
    ("torchsmooth._spectrum.singular_values", 1, torch.linalg.LinAlgError, {}, ValueError),
    ("torchsmooth._spectrum.factors_in", 1, torch.linalg.LinAlgError, {}, ValueError),
    ("torchsmooth._apply.take_over_", 2, MemoryError, {}, RuntimeError),
    ("torchsmooth._apply.measured_error", 1, KeyboardInterrupt, {}, RuntimeError),
    ("torchsmooth._apply._tensors_of", 0, RuntimeError, {}, RuntimeError),
    ("torchsmooth._swap._put", 0, RuntimeError, {}, RuntimeError),
    ("torchsmooth._swap._put", 3, KeyboardInterrupt, {}, RuntimeError),
    ("torchsmooth.plan._report", 2, RuntimeError, {}, RuntimeError),
    ("torchsmooth._calibration.run", 0, RuntimeError, {"calibration": [IMAGES]}, RuntimeError),
    ("torchsmooth._workpiece.output_losses", 0, torch.linalg.LinAlgError, {"calibration": [IMAGES]}, RuntimeError),
    ("torchsmooth._two_networks.run", 3, RuntimeError, {"calibration": [IMAGES]}, RuntimeError),
    ("torchsmooth._refit.target_weight", 2, torch.linalg.LinAlgError, {"calibration": [IMAGES]}, ValueError),
    ("torchsmooth._refit.Refitted.write_", 0, RuntimeError, {"calibration": [IMAGES]}, RuntimeError),
]


def broken(target, at, error):
    """Let a function fail at its n-th call."""
    place, name = target.rsplit(".", 1)
    try:
        owner = importlib.import_module(place)
    except ModuleNotFoundError:
        place, kind = place.rsplit(".", 1)
        owner = getattr(importlib.import_module(place), kind)
    original, calls = getattr(owner, name), iter(range(10_000))

    def fail(*args, **kwargs):
        if next(calls) == at:
            raise error("injected")
        return original(*args, **kwargs)

    return patch.object(owner, name, fail)


@CHECKS.append
def an_error_on_one_rank_reaches_all_and_changes_no_model():
    for index, (target, at, error, kwargs, told) in enumerate(FAILURES):
        failing = (index + 1) % 2 if at == 0 else index % 2
        model = convolutions()
        model[1].running_mean += dist.get_rank()
        here = dist.get_rank() == failing
        with left_as_it_was(model):
            try:
                with broken(target, at, error) if here else contextlib.nullcontext():
                    svd_compress_(model, 0.6, **kwargs)
            except BaseException as caught:  # noqa: BLE001 - interruptions are among them
                raised = caught
            else:
                raise AssertionError(f"no error for {target}")
        if here:
            assert isinstance(raised, (error, ValueError)), (target, raised)
        else:
            assert type(raised) is told, (target, raised)
            assert f"failed on rank {failing}, so that no rank has compressed its model" in str(raised), (
                target,
                raised,
            )
        assert "injected" in str(raised)
    model = convolutions()
    assert_same_everywhere(model, svd_compress_(model, 0.6))


@CHECKS.append
def what_is_wrong_on_all_ranks_is_said_on_all():
    model = mlp()
    model[2].weight.data[0, 0] = float("nan")
    cases = [
        (model, {"ratio": 0.5}, ValueError, "the weight of layer '2' holds 1 NaN or infinite values"),
        (mlp(), {"ratio": 3}, ValueError, "ratio must lie strictly between 0 and 1"),
        (mlp(), {"ratio": 0.5, "calibration": []}, ValueError, "calibration is empty"),
        (mlp(), {}, ValueError, "give either ratio"),
        (fill_(nn.Linear(8, 8), 0), {"ratio": 0.5}, ValueError, "the model is itself a Linear"),
    ]
    for one, kwargs, kind, message in cases:
        with left_as_it_was(one), raises(kind, message):
            svd_compress_(one, **kwargs)
    with raises(TypeError, "model must be a torch.nn.Module, got str 'model'"):
        svd_compress_("model", 0.5)
