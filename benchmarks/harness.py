"""Timing shared by the benchmarks: alternating runs, medians, CUDA events on a GPU, and a table that says on what."""

from __future__ import annotations

import argparse
import datetime as dt
import math
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_MOST_REPEATS = 200

# Who runs one model has the primitives of all its layers in oneDNN's cache. A table of many models, run in turn, has
# more of them than the 1,024 that fit by default, and would measure how long it takes to make them. Read at the first
# operation.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")


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
    return [statistics.median(times) for times in alternating_seconds(candidates, device, runs)]


def alternating_seconds(
    candidates: Sequence[Callable[[], object]],
    device: str,
    runs: int,
    least: float = 0.0,
) -> list[list[float]]:
    """Time several candidates in turn, as :func:`median_seconds` does, and return every run.

    Args:
        candidates: functions without arguments.
        device: where they compute; on CUDA the time is taken with events.
        runs: counted runs of each, after one warm-up.
        least: seconds that one run should last; what is shorter is called several times in it.

    Returns:
        The seconds of one call in each of a candidate's runs.
    """
    repeats = []
    for candidate in candidates:
        first = once(candidate, device)
        if least > first:  # the first call of all is longer than the others
            first = once(candidate, device)
        repeats.append(max(1, min(_MOST_REPEATS, math.ceil(least / max(first, 1e-9)))))
    samples: list[list[float]] = [[] for _ in candidates]
    for _ in range(runs):
        for candidate, times, count in zip(candidates, samples, repeats, strict=True):
            times.append(once(candidate, device, count))
    return samples


def once(candidate: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Return the seconds that a call takes, on average over a few."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        for _ in range(repeats):
            candidate()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        candidate()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def graphed(call: Callable[[], object], pool: object = None) -> Callable[[], object]:
    """Record what a function does on the GPU, and return a function that replays it.

    Args:
        call: a function without arguments, whose result nobody needs.
        pool: ``torch.cuda.graph_pool_handle()``, for graphs that are never replayed at once to share their memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay


def circumstances(device: str) -> str:
    """Say on what was measured, and when."""
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    today = dt.datetime.now(tz=dt.timezone.utc).date()
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}; {today}"


def command_of(name: str, arguments: argparse.Namespace) -> str:
    """Return the command line as it was typed, without options that only say where something is on this machine.

    Args:
        name: that of the script.
        arguments: what was read of the command line.
    """
    places = [f"--{key.replace('_', '-')}" for key, value in vars(arguments).items() if isinstance(value, Path)]
    words: list[str] = []
    given = iter(sys.argv[1:])
    for word in given:
        option, equals, _ = word.partition("=")
        if len(option) > len("--") and any(place.startswith(option) for place in places):  # it may be shortened
            if not equals:
                next(given, None)  # the place itself
        else:
            words.append(word)
    return shlex.join(["python", f"benchmarks/{name}.py", *words])


def publish(
    name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], arguments: argparse.Namespace
) -> None:
    """Print a table in Markdown and, if asked to, write it to ``benchmarks/results/NAME-DEVICE.md``."""
    publish_tables(name, title, (), {"": (header, rows)}, arguments)


def publish_tables(
    name: str,
    title: str,
    notes: Sequence[str],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    arguments: argparse.Namespace,
    *,
    show: bool = True,
) -> None:
    """Print several tables in Markdown and, if asked to, write them to ``benchmarks/results/NAME-DEVICE.md``.

    Args:
        name: that of the script.
        title: what is compared.
        notes: paragraphs under the title.
        tables: header and rows of each table, by its heading; an empty heading is left out.
        arguments: the command line.
        show: whether to print them; what is not the whole yet is only written.
    """
    lines = [f"# {title}", "", f"{circumstances(arguments.device)}. `{command_of(name, arguments)}`", ""]
    for note in notes:
        lines += [note, ""]
    for heading, (header, rows) in tables.items():
        lines += [f"## {heading}", ""] if heading else []
        lines += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += [""] if heading else []
    text = "\n".join(lines).rstrip("\n") + "\n"
    if show:
        print(text)
    if arguments.write:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}-{arguments.device.split(':')[0]}.md").write_text(text, encoding="utf-8")
