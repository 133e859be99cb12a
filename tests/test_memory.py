"""What compressing takes beyond the model: what comes out, and the work on a few of the largest layer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Peaks only rise, so the small model goes first; what the large one adds is what grows with the number of layers.
PEAK = """
import resource, sys, torch, torchsmooth
from torchsmooth import _options

_options._ROOM = 0  # as if the layers were so large that their bases do not fit
dtype, steps = getattr(torch, sys.argv[1]), eval(sys.argv[2])

def build(layers):
    with torch.no_grad():
        return torch.nn.Sequential(*[torch.nn.Linear(512, 512, dtype=dtype) for _ in range(layers)])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.manual_seed(0)
small, large = build(2), build(18)
steps(small)
before = peak()
steps(large)
print(peak() - before)
"""

CASES = {
    "factored": "lambda model: torchsmooth.svd_compress_(model, 0.5, form='factored')",
    "either form": "lambda model: torchsmooth.svd_compress_(model, 0.5)",
    "planned": "lambda model: torchsmooth.plan_compression(model, 0.5)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured in units that differ by system")
@pytest.mark.parametrize(
    ("case", "dtype", "size"),
    [
        ("either form", "bfloat16", 2),
        pytest.param("planned", "float32", 4, marks=pytest.mark.slow),
        pytest.param("factored", "float32", 4, marks=pytest.mark.slow),
        pytest.param("either form", "float32", 4, marks=pytest.mark.slow),
        pytest.param("planned", "bfloat16", 2, marks=pytest.mark.slow),
    ],
)
def test_memory_is_that_of_what_comes_out_and_of_a_few_layers(case, dtype, size):
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", PEAK, dtype, CASES[case]],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    layer = 512 * 512 * size / 2**20  # MiB
    comes_out = 0 if case == "planned" else 16 * layer / 2
    # Bases of all layers would be 32 MiB, copies in float64 as much.
    assert float(done.stdout) < comes_out + 6
