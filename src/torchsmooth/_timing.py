"""Measuring times: medians of alternating runs."""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING

import torch

from ._progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ROUNDS = 9
_WARM_UP = 2
# A call that takes as long as this (in seconds) is itself a mean over what comes and goes on the machine. A shorter
# one is slowed down by what was in the caches before: oneDNN's cache of 1,024 primitives, too, is filled by a few ways
# to run a ResNet-50, and each call would make its own anew.
_LONG = 0.25
_ROUNDS_IF_LONG = 5
_LEAST = 1e-3  # seconds that one reading should last, or the clock itself would be what is measured
_MOST_REPEATS = 50


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return how long a call takes on average; everything that reads a clock is here."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats
    wait = getattr(getattr(torch, device.type, None), "synchronize", lambda: None)
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - began) / repeats


def recorded(
    calls: Sequence[Callable[[], object]], device: torch.device, before: Sequence[Callable[[], object]]
) -> list[Callable[[], object]]:
    """Record what each call does on a GPU as a CUDA graph, and return what replays them, one at a time.

    Args:
        calls: what to record.
        device: a CUDA device.
        before: what to do before each of them, once.

    Raises:
        ValueError: if a call does what cannot be recorded, such as reading a value back from the GPU.
    """
    replays: list[Callable[[], object]] = []
    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()
        for prepare, call in zip(before, calls, strict=True):
            prepare()
            # What is done only once, such as choosing an algorithm, must not be recorded.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool):
                    call()
            except RuntimeError as error:
                raise ValueError(
                    "cuda_graphs=True times CUDA graphs, and what the model does cannot be recorded as one "
                    f"({str(error).splitlines()[0]}): leave cuda_graphs out."
                ) from error
            replays.append(graph.replay)
    return replays


def median_nanoseconds(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    before: Sequence[Callable[[], object]] | None = None,
    *,
    cuda_graphs: bool = False,
    show: bool | None = False,
) -> list[int]:
    """Time several calls in turn, so that what slows the machine down for a while slows all of them.

    Args:
        calls: what to time.
        device: where they compute.
        before: what to do before each of them, outside of the measured time. Calls that are not long are then made
            once before they are measured.
        cuda_graphs: whether to record each call as a CUDA graph, once, and time its replays: without what it takes
            the processor to launch it.
        show: whether to show how far it is; None where the standard error stream is a terminal.

    Returns:
        The median of each, at least 1.
    """
    ready = before or [lambda: None] * len(calls)
    if cuda_graphs:
        calls, ready = recorded(calls, device, ready), [lambda: None] * len(calls)
    repeats, warm, longest = [], [], 0.0
    for prepare, call in zip(ready, calls, strict=True):
        prepare()
        first = seconds(call, device, 1)
        for _ in range(_WARM_UP - 1 if first < _LONG else 0):
            first = min(first, seconds(call, device, 1))
        repeats.append(max(1, min(_MOST_REPEATS, math.ceil(_LEAST / max(first, 1e-9)))))
        warm.append(call if before and first < _LONG else lambda: None)
        longest = max(longest, first)
    readings: list[list[float]] = [[] for _ in calls]
    rounds = _ROUNDS if longest < _LONG else _ROUNDS_IF_LONG
    for index in progress(list(range(len(calls))) * rounds, "Timing the model", enabled=show):
        ready[index]()
        warm[index]()
        readings[index].append(seconds(calls[index], device, repeats[index]))
    return [max(1, round(1e9 * statistics.median(reading))) for reading in readings]
