"""Work that survives being stopped: what is finished lies in a folder beside the destination until all is done."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import torch

from ._atomic_file import settle, whole_file, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ._tensor_entry import Changes
    from ._tensor_source import Checkpoint

_FORMAT = 1
_JOB, _NAMES = "job.json", "names.json"


class WorkFolder:
    """A folder of results, each written whole; another start with the same job finds them.

    Args:
        path: where it is, or is made.
        source: what is decomposed, ready for JSON: if it was another one, everything is begun anew.
        asked: what is made of it: if that was something else, only what was decomposed is kept.

    Attributes:
        mark: a few letters and digits that stand for the job.
    """

    def __init__(self, path: Path, source: Any, asked: Any) -> None:
        self.path = path
        job = {"format": _FORMAT, "torch": torch.__version__, "source": source, "asked": asked}
        job = json.loads(json.dumps(job))
        self.mark = hashlib.sha256(json.dumps(job).encode("utf-8")).hexdigest()[:8]
        earlier = self._remembered(_JOB)
        if earlier != job:
            same = earlier is not None and {**earlier, "asked": asked} == {**job, "asked": asked}
            self._clear(("spectra", "factors") if same else ())
            path.mkdir(exist_ok=True)
            write_text(path / _JOB, json.dumps(job))
        for name in ("spectra", "factors", "files"):
            (path / name).mkdir(exist_ok=True)

    @property
    def files(self) -> Path:
        """The folder of the finished files."""
        return self.path / "files"

    def result(self, kind: str, name: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return a result of plain containers and tensors: an earlier one, or one that is made now and kept.

        Args:
            kind: ``"spectra"`` or ``"factors"``.
            name: of the result: letters and digits.
            make: makes it.
        """
        found = self.known(kind, name)
        if found is None:
            found = make()
            with whole_file(self._place(kind, name)) as file:
                torch.save(dict(found), file)
        return found

    def known(self, kind: str, name: str) -> Mapping[str, Any] | None:
        """Return an earlier result, or None; factors are mapped from their file."""
        path = self._place(kind, name)
        if not path.exists():
            return None
        try:
            found: Mapping[str, Any] = torch.load(
                str(path), map_location="cpu", weights_only=True, mmap=kind == "factors"
            )
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
            return None  # a disk that failed: made anew
        return found

    def write_files(self, checkpoint: Checkpoint, changes: Changes, show: Callable[[list[str]], Any]) -> None:
        """Write every file of a checkpoint with some changes, but for those that are there already."""
        for draft in self.files.iterdir():  # of a run that was killed while it wrote
            if draft.name not in checkpoint.files:
                draft.unlink()
        for name in show([name for name in checkpoint.files if not (self.files / name).exists()]):
            with whole_file(self.files / name) as file:
                checkpoint.files[name].write(file, changes)
        settle(self.files)

    def names(self, choose: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Return what was chosen once, also if it would be chosen otherwise now."""
        found: dict[str, str] | None = self._remembered(_NAMES)
        if found is None:
            found = choose()
            write_text(self.path / _NAMES, json.dumps(found))
        return found

    def tidy(self) -> None:
        """Remove the folder if nothing in it would save work."""
        if not any(any((self.path / kind).glob("*")) for kind in ("spectra", "factors")):
            self.remove()

    def remove(self) -> None:
        """Remove the folder; everything is where it should be."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _remembered(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _place(self, kind: str, name: str) -> Path:
        return self.path / kind / f"{name}.pt"

    def _clear(self, kept: tuple[str, ...]) -> None:
        """Remove what belongs to another job: what was written last goes first."""
        for name in ("names.json", "files", "factors", "spectra", "job.json"):
            if name not in kept:
                target = self.path / name
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
