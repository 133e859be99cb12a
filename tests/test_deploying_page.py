"""Every section of docs/deploying.md runs, each on its own after the introduction."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.low_rank_networks import needs_compiler

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "deploying.md").read_text(encoding="utf-8")
INTRODUCTION, *REST = re.split(r"^## (.+)\n", PAGE, flags=re.MULTILINE)
SECTIONS = dict(zip(REST[::2], REST[1::2], strict=True))
COMPILED, SLOW = {"torch.compile", "AOTInductor"}, {"torch.compile", "AOTInductor", "ONNX"}
NEEDS = {"ONNX": ("onnxruntime", "onnxscript"), "int8": ("torchao",)}

# What torch and torchao call among themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]+` is deprecated:DeprecationWarning"),
]


def code_of(text):
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def run(section, folder, monkeypatch):
    for package in NEEDS.get(section, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(folder)
    names = {}
    torch.manual_seed(0)  # the page draws from the global state; the fixture puts it back
    exec(compile(code_of(INTRODUCTION), "introduction", "exec"), names)  # noqa: S102
    if section == "ONNX":  # goes on with the batch of the section before
        exec(compile(code_of(SECTIONS["torch.export"]), "torch.export", "exec"), names)  # noqa: S102
    known = set(names)
    exec(compile(code_of(SECTIONS[section]), section, "exec"), names)  # noqa: S102
    return names.keys() - known


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in SECTIONS
        if name not in COMPILED and code_of(SECTIONS[name])
    ],
)
def test_a_section_runs(section, tmp_path, monkeypatch):
    assert run(section, tmp_path, monkeypatch)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("section", sorted(COMPILED))
def test_a_section_that_compiles_runs(section, tmp_path, monkeypatch):
    torch._dynamo.reset()
    assert run(section, tmp_path, monkeypatch)


def test_what_the_page_points_to_is_there():
    folder = Path(__file__).resolve().parents[1] / "docs"
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE)
    assert links
    assert all((folder / link).exists() for link in links)
    assert set(NEEDS) | COMPILED <= SECTIONS.keys()
