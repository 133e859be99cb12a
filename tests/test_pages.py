"""Every block of code in README and docs/ runs, every command is one that there is, every link leads somewhere."""

from __future__ import annotations

import ast
import re
import shlex

import pytest
import tomllib
import torch

import torchsmooth
from tests.low_rank_networks import needs_compiler
from tests.pages import NOT_RUN, PAGES, ROOT, anchors_of, blocks_of, links_of
from torchsmooth import functional, fused
from torchsmooth._command_line import _parser
from torchsmooth.layer_types import _TYPES

TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
PYTHON = {name: [one for one in blocks_of(text) if one.language == "python"] for name, text in TEXTS.items()}
# Sections that take long, or a compiler: in the slow tests the whole page runs, in the fast ones all but these.
SLOW = {"docs/deploying.md": {"torch.compile", "ONNX", "AOTInductor"}}
# What torch and torchao call among themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]+` is deprecated"),
]


@pytest.fixture
def registered_types():
    """Pages may register layers of their own: forget them afterwards."""
    before = dict(_TYPES)
    yield
    _TYPES.clear()
    _TYPES.update(before)


def run(name, folder, monkeypatch, without=()):
    """Run a page as its reader would: block after block, in one namespace, in one folder."""
    monkeypatch.chdir(folder)
    torch.manual_seed(0)  # pages draw from the global state; the fixture of all tests puts it back
    names = {"__name__": "page"}
    for block in PYTHON[name]:
        if block.runs and block.section not in without:
            # Empty lines in front, such that an error points to the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), names)  # noqa: S102 - it is ours


@pytest.mark.usefixtures("registered_types")
@pytest.mark.parametrize("name", [name for name, blocks in PYTHON.items() if any(one.runs for one in blocks)])
def test_a_page_runs(name, tmp_path, monkeypatch):
    run(name, tmp_path, monkeypatch, without=SLOW.get(name, ()))


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("registered_types")
@pytest.mark.parametrize("name", SLOW)
def test_a_page_with_slow_sections_runs(name, tmp_path, monkeypatch):
    torch._dynamo.reset()
    run(name, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", TEXTS)
def test_what_does_not_run_says_why(name):
    for block in PYTHON[name]:
        ast.parse(block.code)
        if not block.runs:
            assert len(block.code.splitlines()[0]) > len(NOT_RUN) + 10
    sections = {block.section for block in PYTHON[name]}
    assert SLOW.get(name, set()) <= sections
    # Another language would be code that nobody runs.
    assert {block.language for block in blocks_of(TEXTS[name])} <= {"python", "sh", "text"}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    for path, anchor in links_of(TEXTS[name]):
        target = (folder / path).resolve() if path else ROOT / name
        assert target.exists(), f"{name} links to {path}, which is not there"
        assert target.is_relative_to(ROOT)
        if anchor:
            anchors = anchors_of(target.read_text(encoding="utf-8"))
            assert anchor in anchors, f"{name} links to {path}#{anchor}; there are {sorted(anchors)}"


def commands():
    """Return each command of the pages, without its comment."""
    for name, text in TEXTS.items():
        for block in blocks_of(text):
            if block.language == "sh":
                for line in block.code.replace("\\\n", " ").splitlines():
                    if words := shlex.split(line, comments=True):
                        yield pytest.param(words, id=f"{name}: {line.strip()}")


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_is_one_that_there_is(words):
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(rules)
    elif program == "python" and arguments[:2] == ["-m", "torchsmooth"]:
        assert _parser().parse_args(arguments[2:])
    elif program == "python" and arguments[0].endswith(".py"):
        script = (ROOT / arguments[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in script for word in arguments if word.startswith("--"))
    elif program == "torchrun":
        assert (ROOT / next(word for word in arguments if word.endswith(".py"))).exists()
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        asked = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
        assert arguments[0] == "install"
        assert {extra for group in asked for extra in group.split(",")} <= project["optional-dependencies"].keys()
    else:
        assert program in {"git", "tensorboard"}


def test_the_reference_has_every_public_name_once():
    named = re.findall(r"^::: torchsmooth\.(\S+)$", "".join(TEXTS.values()), re.MULTILINE)
    public = set(torchsmooth.__all__) - {"functional"} | {f"functional.{name}" for name in functional.__all__}
    public |= {f"fused.{name}" for name in fused.__all__}
    assert len(named) == len(set(named))
    assert public <= set(named)
    overview = set(re.findall(r"`(\w+)`", TEXTS["docs/reference.md"]))
    assert set(torchsmooth.__all__) <= overview


def test_the_navigation_has_every_page_and_every_table_and_the_page_of_measurements_every_table():
    site = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    pages = set(re.findall(r'"([\w-]+\.md)"', site))
    assert pages == {name.removeprefix("docs/") for name in TEXTS if name != "README.md"} | {"CHANGELOG.md"}
    linked = {path for path, _ in links_of(TEXTS["docs/measured.md"])}
    # A verdict is a part of a page, not one of its own.
    pages_of_results = [path for path in (ROOT / "benchmarks" / "results").glob("*.md") if "verdict" not in path.stem]
    results = {f"../benchmarks/results/{path.name}" for path in pages_of_results}
    assert results <= linked
    in_the_site = set(re.findall(r'"(benchmarks/results/[\w-]+\.md)"', site))
    assert results == {f"../{path}" for path in in_the_site}


def test_every_picture_is_drawn_by_a_script():
    scripts = [path for folder in ("tools", "examples", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    drawn = "".join(path.read_text(encoding="utf-8") for path in scripts)
    shown = {path.name for path in (ROOT / "docs" / "images").glob("*.png")}
    assert all(f'"{name}"' in drawn for name in shown)
    linked = {path for text in TEXTS.values() for path, _ in links_of(text)}
    assert shown <= {path.rsplit("/", 1)[-1] for path in linked}


def test_the_helpers_see_what_is_wrong():
    code = "```python\n# Not run in the tests: it needs a GPU.\nx = 1\n```"
    text = f"# A title\n\n{code}\n\n## B: c-d `e`\n\n[x](y.md#z) `[n](o)`"
    (block,) = blocks_of(text)
    assert (block.language, block.section, block.line, block.runs) == ("python", "A title", 4, False)
    assert links_of(text) == [("y.md", "z")]
    assert anchors_of(text) == {"a-title", "b-c-d-e"}
    with pytest.raises(ValueError, match="never closed"):
        blocks_of("```python\nx = 1\n")
    with pytest.raises(ValueError, match="not understood"):
        blocks_of("``` python\nx = 1\n```\n")
