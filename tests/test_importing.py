"""What importing the library costs: neither the compiler nor Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from torchsmooth import LowRankEmbedding
from torchsmooth._swap import _STANDARD

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import torchsmooth, torchsmooth.fused
assert "torch._dynamo" not in sys.modules
assert not [name for name in sys.modules if name.split(".")[0] == "triton" and sys.modules[name] is not None]
assert not [name for name in sys.modules if name.startswith("torchsmooth._triton")]
layer = torchsmooth.LowRankLinear(6, 4, 2)
inputs = torch.ones(3, 6)
output = torchsmooth.fused.low_rank_linear(inputs, layer.down.weight, layer.up.weight, layer.bias)
assert torch.equal(output, layer(inputs))
print(torchsmooth.fused.why_unavailable("cpu"))
"""


def test_the_library_imports_neither_the_compiler_nor_triton_and_works_without():
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "error", "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "TORCHSMOOTH_FUSED": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "Triton cannot be imported" in done.stdout
    assert "pip install triton" in done.stdout


def test_what_the_layers_keep_is_told_from_what_a_user_has_put_there():
    for layer in (nn.Embedding(2, 2, device="meta"), LowRankEmbedding(2, 2, 1, device="meta", form="pivoted")):
        assert vars(layer).keys() <= _STANDARD
    layer.mine = torch.zeros(1)
    assert "mine" not in _STANDARD
