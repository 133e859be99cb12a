"""The page on layers runs, from the first block to the last."""

from __future__ import annotations

import re
from pathlib import Path

from torchsmooth.layer_types import _TYPES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "layers.md"


def test_the_page_on_layers_runs(monkeypatch):
    for kind, known in dict(_TYPES).items():
        monkeypatch.setitem(_TYPES, kind, known)
    before = set(_TYPES)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    try:
        exec(compile("\n".join(blocks), PAGE.name, "exec"), {"__name__": "page"})  # noqa: S102 - it is ours
    finally:
        for kind in set(_TYPES) - before:
            del _TYPES[kind]
    assert len(blocks) >= 4
