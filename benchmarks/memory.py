"""How much memory does compressing take beyond the model, in float32 layers of the largest size?

Two equal layers are compressed to half, each case in a process of its own, whose peak resident memory before and after
is compared: what comes out, the bases that are kept, and the work in float64 on one layer are all in it.

    python benchmarks/memory.py --write
"""

from __future__ import annotations

import os
import subprocess
import sys

from harness import make_parser, publish, read_arguments

_MEASURE = """
import resource, sys, torch, torchsmooth

rows, columns, dtype, form = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3]), sys.argv[4]

def build(*sizes):
    return torch.nn.Sequential(*[torch.nn.Linear(*sizes, dtype=dtype) for _ in range(2)])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torchsmooth.svd_compress_(build(64, 64), 0.5, form=form)  # what is loaded at the first call does not count
model = build(columns, rows)
before = peak()
torchsmooth.svd_compress_(model, 0.5, form=form)
print(peak() - before)
"""
CASES = [(1536, 1536), (512, 4608)]


def measured(rows: int, columns: int, dtype: str, form: str) -> float:
    """Return the MiB that compressing two layers takes beyond what was there."""
    done = subprocess.run(  # noqa: S603 - it is this very interpreter
        [sys.executable, "-c", _MEASURE, str(rows), str(columns), dtype, form],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return float(done.stdout)


def main() -> None:
    """Measure and print the table."""
    parser = make_parser(__doc__ or "")
    parser.set_defaults(device="cpu")
    arguments = read_arguments(parser)
    if arguments.device != "cpu":
        parser.error("the memory of a process is measured, which is the CPU's: run with --device cpu")
    rows = []
    for high, wide in CASES:
        layer = high * wide * 4 / 2**20
        for dtype in ("float32", "bfloat16"):
            taken = [measured(high, wide, dtype, form) for form in ("factored", "pivoted")]
            cells = [f"{one:.0f} MiB, {one / layer:.1f}" for one in taken]
            rows.append([f"{high}×{wide}", dtype, f"{layer:.0f} MiB", *cells])
    title = "Memory to compress two linear layers to half: MiB, and times one layer in float32"
    publish("memory", title, ["layer", "dtype", "in float32", "factored", "pivoted"], rows, arguments)


if __name__ == "__main__":
    main()
