"""How long does compressing take, and how much memory, against one SVD of every layer and against other libraries?

Every way compresses to 70 % fewer parameters, in alternating runs on fresh copies of the model. Beside the library
stand: ``torch.linalg.svd`` of each weight flattened to ``(out, -1)``, which is what a plan in scheme ``channel``
replaces; the same of each matrix that the default plan looks at, every scheme of every layer, and query, key and value
apart; the eigenproblem of ``W @ W.T`` for each weight, the least that any way takes by which all singular values of one
scheme are known (in float32 those of steep spectra are wrong); the products ``W @ W.T`` alone, the least that anything
takes which reads the weights; and the libraries that decompose a model, at the ratio as each of them means it. They
do not spend what the library spends on ranks for the whole model. Memory is the peak of a process of its own, over that
of the model alone.

The last table shows that nothing is lost by it: in scheme ``channel``, the relative error of each layer of the
compressed model against that of a float64 SVD cut at the same rank.

    python benchmarks/compress_time.py --write
    python benchmarks/compress_time.py --models resnet18_224 --runs 1 --without-peers
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import statistics
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compress_ways import PEERS, WAYS, Way, largest_difference, planned_matrices
from harness import make_parser, once, publish_tables, read_arguments
from timed_models import ABOUT_WEIGHTS, LARGE, MODELS, import_torchvision
from torch import nn
from tqdm import tqdm

if TYPE_CHECKING:
    import argparse

RATIO = 0.7
ENTRIES = MODELS | LARGE
ON_CPU = ("resnet18_224", "resnet50_224", "vit_b_16_224", "vit_l_16_224", "llama_linears_quarter")
ON_CUDA = ("resnet18_224", "resnet50_224", "vit_b_16_224", "vit_l_16_224", "llama_linears")
BASE, LIMIT = "torch.linalg.svd, each layer", "W @ W.T, each layer"


@dataclass
class Measured:
    """Seconds (median) and MiB of one way, or why there are none."""

    seconds: float = math.nan
    memory: float = math.nan
    note: str = ""


def timed(model: nn.Module, ways: dict[str, Way], arguments: argparse.Namespace) -> dict[str, Measured]:
    """Time all ways in turn, each on a fresh copy of the model that is made outside of the measured time."""

    def run(name: str) -> float:
        small = copy.deepcopy(model)
        return once(partial(ways[name].run, small, RATIO, arguments.limit), arguments.device)

    found: dict[str, Measured] = {}
    samples: dict[str, list[float]] = {}
    for name in ways:
        try:
            taken = run(name)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            found[name] = Measured(note=str(error).splitlines()[0][:120])
            continue
        found[name] = Measured(taken)
        if taken > arguments.limit:
            found[name].note = "one run, the first"
        else:
            samples[name] = []
    for _ in range(arguments.runs):
        for name, times in samples.items():
            times.append(run(name))
    for name, times in samples.items():
        found[name].seconds = statistics.median(times)
    return found


def peak_memory(path: Path, way: str, limit: float, device: str, threads: int) -> float:
    """Return the MiB that one way takes over the model: on a GPU what was allocated, else the resident size."""
    torch.set_num_threads(threads)
    with suppress(ImportError):
        import_torchvision()  # the model that is read may be one of its
    run = (WAYS | PEERS)[way].run
    tiny = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(64, 64, 3))
    run(tiny.to(device), RATIO, limit)  # what is loaded at the first call does not count
    model = torch.load(path, weights_only=False, map_location=device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(model, RATIO, limit)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident("VmRSS")
    run(model, RATIO, limit)
    return resident("VmHWM") - before


def resident(which: str) -> float:
    """Return the resident size of this process, or its peak, in MiB; NaN where the system does not tell."""
    # Not by getrusage: there a process starts with the peak of the one that started it.
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return math.nan
    (size,) = (line.split()[1] for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(which))
    return int(size) / 2**10


def apart(path: Path, way: str, arguments: argparse.Namespace) -> tuple[float, str]:
    """Measure memory in a process of its own, whose peak nothing else has raised; or say why it was not."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        given = (path, way, arguments.limit, arguments.device, torch.get_num_threads())
        try:
            return pool.apply(peak_memory, given), ""
        except RuntimeError as error:  # out of memory or of time
            return math.nan, f"memory: {error}".splitlines()[0][:120]


def row(name: str, one: Measured, found: dict[str, Measured]) -> list[str]:
    """Lay out one way."""
    if math.isnan(one.seconds):
        return [name, one.note, "–", "–", "–"]
    against = [f"{found[BASE].seconds / one.seconds:.2f} ×", f"{one.seconds / found[LIMIT].seconds:.1f} ×"]
    memory = "–" if math.isnan(one.memory) else f"{one.memory:+.0f} MiB"
    return [name, f"{one.seconds:.2f} s" + (f" ({one.note})" if one.note else ""), *against, memory]


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=ENTRIES, help="five of them if not given")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each, after one that is not")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds after which a way is run only once, or ended"
    )
    parser.add_argument("--without-peers", action="store_true", help="leave the other libraries out")
    parser.add_argument("--without-memory", action="store_true", help="measure no memory, which takes another run each")
    return read_arguments(parser)


def publish(tables: dict[str, Any], same: list[list[str]], arguments: argparse.Namespace, *, show: bool) -> None:
    """Write the tables, and print them at the end."""
    header = ["model", "low-rank layers", "largest difference of a layer's relative error"]
    whole = tables | {"Against a float64 SVD of each layer, scheme channel": (header, same)}
    missing = ", ".join(name for name, way in PEERS.items() if way.missing)
    notes = [ABOUT_WEIGHTS, *([f"Not installed here, and left out: {missing} (see `peers.py`)."] if missing else [])]
    title = f"Compressing to {RATIO:.0%} fewer parameters: time (medians of alternating runs) and memory over the model"
    publish_tables("compress_time", title, notes, whole, arguments, show=show)


def main() -> None:
    """Measure and print the tables."""
    arguments = read_options()
    models = arguments.models or (ON_CUDA if arguments.device.startswith("cuda") else ON_CPU)
    installed = {} if arguments.without_peers else {name: way for name, way in PEERS.items() if not way.missing}
    ways = WAYS | installed
    tables, same = {}, []
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(models) * (2 + len(ways) * (not arguments.without_memory)), disable=None) as bar,
    ):
        for name in models:
            bar.set_description(f"{name}, times")
            model = ENTRIES[name].model().to(arguments.device)
            parameters = sum(one.numel() for one in model.parameters())
            heading = f"{name}: {parameters:,} parameters, {len(planned_matrices(model))} matrices to plan with"
            path = Path(folder) / "model.pt"
            torch.save(model, path)
            found = timed(model, ways, arguments)
            bar.update()
            bar.set_description(f"{name}, errors")
            difference, layers = largest_difference(model, RATIO)
            same.append([name, f"{layers}", f"{difference:.1e}"])
            del model
            bar.update()
            for way in () if arguments.without_memory else ways:
                bar.set_description(f"{name}, memory of {way}")
                if not math.isnan(found[way].seconds):
                    found[way].memory, problem = apart(path, way, arguments)
                    found[way].note = found[way].note or problem
                bar.update()
            header = ["way", "time", f"faster than {BASE}, by", f"as long as {LIMIT}, times", "memory"]
            rows = [row(way, one, found) for way, one in found.items()]
            tables[heading] = header, rows
            for one in rows:
                tqdm.write(f"{name} | {' | '.join(one)}", file=sys.stderr)
            publish(tables, same, arguments, show=name == models[-1])  # an interruption leaves what is there so far


if __name__ == "__main__":
    main()
