"""The page on fused kernels runs, from the first block to the last."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "fused-kernels.md"


def test_the_page_on_fused_kernels_runs():
    torch.manual_seed(0)  # the page draws from the global state; the fixture puts it back
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile("\n".join(blocks), PAGE.name, "exec"), names)  # noqa: S102 - it is ours
    assert "program" in names
    assert len(blocks) == 4
