"""Measuring times: medians of alternating runs."""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ROUNDS = 9
_WARM_UP = 2
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


def median_nanoseconds(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    before: Sequence[Callable[[], object]] | None = None,
) -> list[int]:
    """Time several calls in turn, so that what slows the machine down for a while slows all of them.

    Args:
        calls: what to time.
        device: where they compute.
        before: what to do before each of them, outside of the measured time.

    Returns:
        The median of each, at least 1.
    """
    ready = before or [lambda: None] * len(calls)
    repeats = []
    for prepare, call in zip(ready, calls, strict=True):
        prepare()
        first = min(seconds(call, device, 1) for _ in range(_WARM_UP))
        repeats.append(max(1, min(_MOST_REPEATS, math.ceil(_LEAST / max(first, 1e-9)))))
    readings: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for prepare, call, times, reading in zip(ready, calls, repeats, readings, strict=True):
            prepare()
            reading.append(seconds(call, device, times))
    return [max(1, round(1e9 * statistics.median(reading))) for reading in readings]
