"""Files that are written whole or not at all: a reader sees the old one or the new one."""

from __future__ import annotations

import io
import os
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ._checks import check_no_folder

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a draft beside a file for writing, and put it in the place of the file when all is on the disk.

    Args:
        path: where to; on any error, what is there stays as it is.

    Raises:
        OSError: if it cannot be written; it names the file, also where whoever writes hides it in an error of its own.
    """
    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of {os.fspath(path)!r} does not exist: make it first.")
    check_no_folder(path)
    if target.exists() and not target.is_file():
        raise OSError(f"{os.fspath(path)!r} is no regular file, and would be replaced by one: name another.")
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    problems: list[tuple[Any, ...]] = []
    try:
        with _noting(problems):
            raw = _Draft(draft, problems)
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            with _noting(problems):
                os.fsync(file.fileno())
        with _noting(problems):
            draft.replace(target)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if problems and isinstance(error, Exception):
            raise OSError(*problems[0], os.fspath(path)) from error
        raise


class _Draft(io.FileIO):
    """A new file that notes why it could not be written: ``torch.save`` says no more than that it could not."""

    def __init__(self, path: Path, problems: list[tuple[Any, ...]]) -> None:
        super().__init__(path, "xb")
        self._problems = problems

    def write(self, data: Any) -> int:
        with _noting(self._problems):
            return super().write(data)


@contextmanager
def _noting(problems: list[tuple[Any, ...]]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            problems.append((error.errno, error.strerror))  # not the error: its traceback holds whoever writes
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
