"""How pages and docstrings are made into the site; that it builds without a warning is seen by `make docs`."""

from __future__ import annotations

import importlib.util

import pytest

from tests.pages import ROOT


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def roles():
    pytest.importorskip("griffe", reason="needs the extra `docs`")
    pytest.importorskip("latex2mathml", reason="needs the extra `docs`")
    return tool("docstring_roles")


def test_links_lose_the_folder_that_the_site_has_not():
    site = tool("build_site")
    assert site.from_the_docs("[a](../benchmarks/a.md), [b](b.md), ![c](images/c.png)") == (
        "[a](benchmarks/a.md), [b](b.md), ![c](images/c.png)"
    )
    assert site.from_the_root("[a](docs/a.md#b), [c](CHANGELOG.md)") == "[a](a.md#b), [c](CHANGELOG.md)"


def test_pages_are_laid_out(tmp_path, monkeypatch):
    site = tool("build_site")
    monkeypatch.setattr(site, "PAGES", tmp_path / "pages")
    site.lay_out()
    made = {path.relative_to(tmp_path / "pages").as_posix() for path in (tmp_path / "pages").rglob("*")}
    assert {"index.md", "CONTRIBUTING.md", "images/digits.png", "examples/digits.py"} <= made
    results = {f"benchmarks/results/{path.name}" for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert results - made == {"benchmarks/results/cifar10-verdict.md"}  # which is a part of the page
    assert not any("](../" in path.read_text(encoding="utf-8") for path in (tmp_path / "pages").glob("*.md"))


def test_roles_become_links_and_code(roles):
    assert roles.translate("See :func:`torchsmooth.smooth_`.") == "See [`smooth_`][torchsmooth.smooth_]."
    assert roles.translate("Like :meth:`__call__`.") == "Like `__call__`."
    assert roles.translate("No role: `x`, ``y``.") == "No role: `x`, ``y``."


def test_formulas_become_mathml(roles):
    inline = roles.translate(r"Of :math:`\lVert W" + "\n" + r"\rVert`, a norm.")
    assert inline.startswith('Of <math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">')
    assert inline.endswith("</math>, a norm.")
    assert "\n" not in inline
    shown = roles.translate("Before.\n\n.. math:: a +\n    b\n\nAfter.")
    assert 'display="block"' in shown
    assert shown.startswith("Before.\n\n<math")
    assert shown.endswith("</math>\n\nAfter.")
    assert "<mtext>down</mtext>" in roles.translate(":math:`W_{down}`")  # not the product of four letters


def test_doctests_become_blocks(roles):
    text = "Example:\n    In words:\n\n    >>> 1 + 1\n    2\n    >>> [\n    ...     3]\n    [3]\n\nSource: none."
    assert roles.translate(text) == (
        "Example:\n    In words:\n\n    ```pycon\n    >>> 1 + 1\n    2\n    >>> [\n    ...     3]\n    [3]\n    ```\n\n"
        "Source: none."
    )
