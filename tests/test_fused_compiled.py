"""The fused kernels compile for GPUs that are not here, and fit into the shared memory that those have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each line is a kernel, a dtype, a rank, a compute capability, and which of the configurations.
SCRIPT = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torchsmooth import _triton_conv2d, _triton_linear
from torchsmooth._triton_tiles import CONFIGS, rank_tiles

POINTERS = ("inputs", "down", "up", "bias", "output")
ONES = ("input_in", "down_in", "input_channel", "down_channel", "up_rank", "bias_step", "output_out")

for line in sys.stdin:
    name, dtype, rank, capability, config = line.split()
    kernel = {"linear": _triton_linear, "conv2d": _triton_conv2d}[name]._kernel
    config = CONFIGS[int(config)]
    head, tail = rank_tiles(int(rank))
    constants = {"has_bias": True, "relu": True, "head": head, "tail": tail, "precision": "tf32", **config.kwargs}
    constants |= {one: 1 for one in ONES if one in kernel.arg_names}
    signature = {}
    for one in kernel.arg_names:
        signature[one] = "constexpr" if one in constants else "*" + dtype if one in POINTERS else "i32"
    places = {(kernel.arg_names.index(one),): value for one, value in constants.items()}
    aligned = {(kernel.arg_names.index(one),): [["tt.divisibility", 16]] for one in POINTERS}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    target = GPUTarget("cuda", int(capability), 32)
    compiled = triton.compile(ASTSource(kernel, signature, places, aligned), target=target, options=options)
    print(compiled.metadata.shared, "mma" in compiled.asm["ptx"])
"""

CASES = [
    "linear fp16 16 80 0",
    "linear bf16 184 90 0",
    "linear fp32 33 80 2",
    "linear fp16 512 80 7",
    "linear fp32 256 80 7",
    "conv2d bf16 48 90 0",
    "conv2d fp16 7 80 4",
    "conv2d fp32 64 90 2",
    "conv2d fp32 256 80 7",
]


@pytest.mark.slow
def test_kernels_compile_and_fit(tmp_path):
    pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4 or later")
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", SCRIPT],
        input="\n".join(CASES),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    shared, products = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert len(shared) == len(CASES)
    for case, taken in zip(CASES, shared, strict=True):
        # 99 KiB is what a block gets on the smallest chips, 163 on a large one.
        assert int(taken) <= (99 if case.endswith("7") else 163) * 1024, case
    assert set(products) == {"True"}  # tensor cores everywhere, float32 in TF32
