"""What docstrings say in Sphinx's roles and in doctests, said in the site's Markdown.

A griffe extension, named in `zensical.toml`. Formulas become MathML, which browsers draw without any script; names of
the library become links; doctests become blocks of code, also where there is prose between them.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert

ROLE = re.compile(r":(?P<role>class|func|meth|mod|math):`(?P<text>[^`]+)`")
DISPLAYED = re.compile(r"^(?P<indent> *)\.\. math:: (?P<formula>.+(?:\n(?P=indent) {4,}\S.*)*)", re.MULTILINE)
INDEX = re.compile(r"_\{([a-z]{2,})\}")
# From one prompt to the next empty line: what is typed, and what comes out.
SESSION = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent).*\S.*)*", re.MULTILINE)


def mathml(formula: str, display: str = "inline") -> str:
    """Render a formula; line breaks of the docstring mean nothing, and an index that is a word is set as one."""
    formula = INDEX.sub(r"_{\\text{\1}}", formula)
    return str(convert(" ".join(formula.split()), display=display))


def inline(match: re.Match[str]) -> str:
    """Render one role."""
    text = " ".join(match["text"].split())
    if match["role"] == "math":
        return mathml(text)
    name = text.removeprefix("~").removeprefix("torchsmooth.")
    # Only names of this library, in full, have a place to point to.
    return f"[`{name}`][{text}]" if text.startswith("torchsmooth.") else f"`{name}`"


def fenced(match: re.Match[str]) -> str:
    """Put a doctest into a block of code."""
    indent = match["indent"]
    return f"{indent}```pycon\n{match[0]}\n{indent}```"


def translate(text: str) -> str:
    """Translate a docstring."""
    text = SESSION.sub(fenced, text)
    text = DISPLAYED.sub(lambda match: f"{match['indent']}{mathml(match['formula'], 'block')}", text)
    return ROLE.sub(inline, text)


class DocstringRoles(Extension):
    """Translates every docstring that is loaded."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:  # noqa: ARG002 - griffe's signature
        """Translate one docstring, in place."""
        if obj.docstring:
            obj.docstring.value = translate(obj.docstring.value)
