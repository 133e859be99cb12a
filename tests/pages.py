"""The pages of the documentation as the tests see them: their blocks of code, and where their links lead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "# Not run in the tests: "  # the first line of a block that is only to be read; a reason follows


class Block(NamedTuple):
    """A block of code: its language, the heading that it stands under, its first line, its text."""

    language: str
    section: str
    line: int
    code: str

    @property
    def runs(self):
        return not self.code.startswith(NOT_RUN)


def blocks_of(text):
    """Return the fenced blocks of a page, in order."""
    blocks, language, section, first, code = [], None, "", 0, []
    for number, line in enumerate(text.splitlines(), start=1):
        if language is None:
            if heading := re.match(r"#+ (.+)", line):
                section = heading[1]
            elif fence := re.match(r"```(\w*)$", line):
                language, first, code = fence[1], number + 1, []
            elif "```" in line:
                raise ValueError(f"line {number}: a fence that is not understood: {line}")
        elif line == "```":
            blocks.append(Block(language, section, first, "\n".join(code) + "\n"))
            language = None
        else:
            code.append(line)
    if language is not None:
        raise ValueError(f"the fence of line {first - 1} is never closed")
    return blocks


def prose_of(text):
    """Return a page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors_of(text):
    """Return the names of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in kept}


def links_of(text):
    """Return what a page links to within the repository, pictures included: (path, anchor) of each."""
    found = re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)", prose_of(text))
    return [(path, anchor) for path, anchor in found if path or anchor]
