"""Files that are written whole or not at all: a reader sees the old one or the new one."""

from __future__ import annotations

import os
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a draft beside a file for writing, and put it in the place of the file when all is on the disk.

    Args:
        path: where to; on any error, what is there stays as it is.

    Raises:
        OSError: if it cannot be written.
    """
    target = Path(path)
    if not target.absolute().parent.is_dir():  # or the error would name the draft
        raise FileNotFoundError(f"the folder of {os.fspath(path)!r} does not exist: make it first.")
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def settle(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can say so."""
    with suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
