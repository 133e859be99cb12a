"""Build the documentation site: lay its pages out in one folder, then have Zensical render them.

The pages in `docs/` link to tables, examples and the changelog beside that folder, as a reader of the repository needs
it. A site has one root, so everything is copied to `build/pages`, and those links lose their `../`. Nothing else is
changed, and nothing is fetched. Run it with `make docs`; a warning is an error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
SITE = ROOT / "build" / "site"
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md")  # pages that lie at the root of the repository


def from_the_docs(text: str) -> str:
    """Make links of a page of `docs/` those of a page at the root of the site."""
    return re.sub(r"\]\(\.\./", "](", text)


def from_the_root(text: str) -> str:
    """The same for a page at the root of the repository."""
    return re.sub(r"\]\(docs/", "](", text)


def lay_out() -> None:
    """Copy pages, pictures, tables and examples to where the site is built from."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    for page in PAGES.glob("*.md"):
        page.write_text(from_the_docs(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name in BESIDE:
        text = (ROOT / name).read_text(encoding="utf-8")
        (PAGES / name).write_text(from_the_root(text), encoding="utf-8")
    # A verdict is a part of a page already.
    parts = shutil.ignore_patterns("*-verdict.md")
    shutil.copytree(ROOT / "benchmarks" / "results", PAGES / "benchmarks" / "results", ignore=parts)
    shutil.copytree(ROOT / "examples", PAGES / "examples", ignore=shutil.ignore_patterns("__pycache__"))


def main() -> int:
    """Lay out and render; return the exit status."""
    lay_out()
    shutil.rmtree(SITE, ignore_errors=True)
    zensical = Path(sys.executable).with_name("zensical")
    if not zensical.exists():
        print("Zensical is not installed beside this Python: pip install '.[docs]'", file=sys.stderr)
        return 1
    # Without its cache: a page that did not change is not checked again, though what it links to may be gone.
    return subprocess.run([zensical, "build", "--strict", "--clean"], cwd=ROOT, check=False).returncode  # noqa: S603


if __name__ == "__main__":
    sys.exit(main())
