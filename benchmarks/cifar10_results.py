"""Results as lines of JSON in a file that only grows."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Line = dict[str, Any]

# What a network is known by, and what was measured of it: lines that agree in all of these are of the same number.
RUN = ("network", "width", "epochs", "recipe", "penalty", "strength", "seed", "data", "dtype", "train_images")
_KEY = (*RUN, "split", "images", "method", "ratio")


class Results:
    """The lines of a file; where several are of the same number, the last one counts.

    Args:
        path: the file, which need not exist; its folder is made when the first line is added.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found = {_key(line): line for line in _read(path)}

    def __iter__(self) -> Iterator[Line]:
        return iter(self._found.values())

    def get(self, line: Line) -> Line | None:
        """Return the line of the same number, or None.

        Args:
            line: with at least the fields that identify it.
        """
        return self._found.get(_key(line))

    def add(self, line: Line) -> None:
        """Append a line, in one piece, so that several processes may write to the file.

        Args:
            line: with at least the fields that identify it.
        """
        key = _key(line)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line) + "\n"
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else f"\n{text}"  # after a line that was cut short
            file.write(text.encode())
            os.fsync(file.fileno())
        self._found[key] = line


def _key(line: Line) -> tuple[Any, ...]:
    missing = [name for name in _KEY if name not in line]
    if missing:
        raise ValueError(f"a result must have the fields {', '.join(_KEY)}; {', '.join(missing)} are missing.")
    return tuple(line[name] for name in _KEY)


def _read(path: Path) -> Iterator[Line]:
    if not path.exists():
        return
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            print(f"{path}, line {number}: cut short by an interruption, left out.", file=sys.stderr)
