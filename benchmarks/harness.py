"""Timing shared by the benchmarks: alternating runs, medians, CUDA events on a GPU, and a table that says on what."""

from __future__ import annotations

import argparse
import datetime as dt
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def parse_arguments(description: str) -> argparse.Namespace:
    """Read the options of a benchmark that measures time."""
    parser = make_parser(description)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each candidate, after one that is not")
    return read_arguments(parser)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/ as well")
    return parser


def read_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, and say so where there is no GPU."""
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: run with --device cpu")
    if not torch.cuda.is_available():
        print("No GPU here: measured on the CPU only.\n")
    return arguments


def median_seconds(candidates: Sequence[Callable[[], object]], device: str, runs: int) -> list[float]:
    """Time several candidates in turn, A B A B …, so that a drift of the machine meets all alike.

    Args:
        candidates: functions without arguments.
        device: where they compute; on CUDA the time is taken with events.
        runs: counted runs of each, after one warm-up.

    Returns:
        The median of each candidate's runs, in seconds.
    """
    for candidate in candidates:
        candidate()
    samples: list[list[float]] = [[] for _ in candidates]
    for _ in range(runs):
        for candidate, times in zip(candidates, samples, strict=True):
            times.append(_once(candidate, device))
    return [statistics.median(times) for times in samples]


def _once(candidate: Callable[[], object], device: str) -> float:
    if not device.startswith("cuda"):
        start = time.perf_counter()
        candidate()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    candidate()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """Record what a function does on the GPU, and return a function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def circumstances(device: str) -> str:
    """Say on what was measured, and when."""
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    today = dt.datetime.now(tz=dt.timezone.utc).date()
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}; {today}"


def publish(
    name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], arguments: argparse.Namespace
) -> None:
    """Print a table in Markdown and, if asked to, write it to ``benchmarks/results/NAME-DEVICE.md``."""
    lines = [f"# {title}", "", f"{circumstances(arguments.device)}. `python benchmarks/{name}.py --write`", ""]
    lines += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}-{arguments.device.split(':')[0]}.md").write_text(text, encoding="utf-8")
