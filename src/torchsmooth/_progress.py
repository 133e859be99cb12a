"""Progress of long loops: a bar if tqdm is installed, a plain line if not, and nothing where nobody looks."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sized
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_Item = TypeVar("_Item")

_DELAY = 2.0  # seconds that a loop may take before it says anything


def progress(
    iterable: Iterable[_Item],
    description: str,
    total: int | None = None,
    enabled: bool | None = None,  # noqa: FBT001 - three states
) -> Iterable[_Item]:
    """Pass the items of an iterable on, and show on the standard error stream how far that has come.

    Args:
        iterable: what to loop over.
        description: what is being done.
        total: number of items, if the iterable has no length.
        enabled: True shows it, False does not; None where the standard error stream is a terminal, after two seconds.
    """
    shown = enabled if enabled is not None else bool(sys.stderr and sys.stderr.isatty())
    if not shown:
        return iterable
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    delay = 0.0 if enabled else _DELAY
    bar = _tqdm()
    if bar is not None:
        options = {"desc": description, "total": total, "file": sys.stderr, "delay": delay, "leave": bool(enabled)}
        items: Iterable[_Item] = bar(iterable, **options)
        return items
    return _plain(iterable, description, total, delay)


def _tqdm() -> Any:
    try:
        return importlib.import_module("tqdm").tqdm
    except ImportError:
        return None


def _plain(iterable: Iterable[_Item], description: str, total: int | None, delay: float) -> Iterator[_Item]:
    start = time.monotonic()
    width = 0
    for count, item in enumerate(iterable, 1):
        yield item
        if time.monotonic() - start >= delay:
            line = f"{description}: {count}" + (f" of {total}" if total else "")
            width = max(width, len(line))
            sys.stderr.write(f"\r{line.ljust(width)}")
            sys.stderr.flush()
    if width:
        sys.stderr.write("\n")
