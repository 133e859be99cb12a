"""Where a compressed checkpoint goes, and the last step: names that change from one moment to the next."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._atomic_file import settle, write_text
from ._checks import checked_path
from ._tensor_source import INDEX, is_plain

if TYPE_CHECKING:
    from ._tensor_entry import Changes
    from ._tensor_source import Checkpoint
    from ._work_folder import WorkFolder

_FILES = (".safetensors", ".json", ".pt", ".pth", ".bin", ".ckpt", ".th")


@dataclass(frozen=True)
class Destination:
    """A file, or a folder with several files and an index.

    Attributes:
        path: the file or the folder.
        index: name of the index; None for a single file.
    """

    path: Path
    index: str | None

    @classmethod
    def of(cls, path: Any, checkpoint: Checkpoint) -> Destination:
        """Check where the result of compressing a checkpoint is to go.

        Raises:
            TypeError: if it is not a path.
            OSError: if the folder that it is to be in does not exist.
            ValueError: if it is of another kind than the checkpoint, or the checkpoint itself.
        """
        target = checked_path(path, "destination")
        shown = repr(os.fspath(target))
        if checkpoint.index is None:
            place, index = target, None
            if (target.suffix == ".safetensors") != (checkpoint.suffix == ".safetensors") or target.suffix == ".json":
                raise ValueError(
                    f"destination {shown} must be a file of the same kind as the source, {checkpoint.path.name!r}: "
                    f"name it something{checkpoint.suffix}."
                )
            if target.is_dir():
                raise ValueError(f"destination {shown} is a folder: name the file in it.")
        else:
            named = target.name.endswith(INDEX)
            place, index = (target.parent, target.name) if named else (target, checkpoint.path.name)
            if not named and (target.suffix in _FILES or (target.exists() and not target.is_dir())):
                raise ValueError(
                    f"the source has several files, so destination {shown} must be a folder, or an index in it with a "
                    f"name that ends in {INDEX}."
                )
        if not place.absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder of destination {shown} does not exist: make it first.")
        for one in (checkpoint.path, *(file.path for file in checkpoint.files.values())):
            if _same(place, one.parent if index else one):
                raise ValueError(f"destination {shown} is the source itself: it would be lost; choose another name.")
            if index and _same(place, one.resolve().parent):
                raise ValueError(
                    f"destination {shown} is where {one.name!r} of the source links to, which would be lost; choose "
                    "another name."
                )
        return cls(place.absolute(), index)

    @property
    def exists(self) -> bool:
        """Whether there is something that would be replaced."""
        return (self.path / self.index).exists() if self.index else self.path.exists()

    @property
    def work_folder(self) -> Path:
        """Where unfinished work lies: where its last step is a new name for a file, and no copy."""
        name = f".{self.path.name}.torchsmooth-partial"
        # A folder that is there may be on another disk than its parent.
        return self.path / name if self.index is not None and self.path.is_dir() else self.path.with_name(name)

    def commit(self, work: WorkFolder, checkpoint: Checkpoint, changes: Changes, parameters: int) -> None:
        """Put finished files where they belong; until the last step of it, what was there is there, and whole.

        Args:
            work: with a file of each name that the checkpoint has.
            checkpoint: what was compressed.
            changes: what became of its tensors.
            parameters: those of the result.
        """
        if self.index is None:
            (work.files / checkpoint.path.name).replace(self.path)
            settle(self.path.parent)
            return
        names = work.names(lambda: self._free_names(work, checkpoint))
        text = json.dumps(_index_of(checkpoint, changes, names, parameters), indent=2)
        if not self.path.exists():
            write_text(work.files / self.index, text)
            work.files.replace(self.path)
            settle(self.path.parent)
            return
        earlier = _files_of(self.path / self.index)
        for name in checkpoint.files:
            (work.files / name).replace(self.path / names[name])
        settle(self.path)
        write_text(self.path / self.index, text)
        settle(self.path)
        sources = [file.path for file in checkpoint.files.values()]
        for name in earlier - set(names.values()):
            if not any(_same(self.path / name, one) for one in sources):  # one of them may lead there over links
                (self.path / name).unlink(missing_ok=True)

    def _free_names(self, work: WorkFolder, checkpoint: Checkpoint) -> dict[str, str]:
        """Choose names for the files: their own, but where files of these names are in use."""
        if not any((self.path / name).exists() for name in checkpoint.files):
            return {name: name for name in checkpoint.files}
        return {name: f"{Path(name).stem}-{work.mark}{Path(name).suffix}" for name in checkpoint.files}


def _index_of(checkpoint: Checkpoint, changes: Changes, names: dict[str, str], parameters: int) -> dict[str, Any]:
    weight_map: dict[str, str] = {}
    size = 0
    for name, file in checkpoint.files.items():
        for key, entry in file.entries.items():
            sizes = changes.sizes(key, entry)
            weight_map |= dict.fromkeys(sizes, names[name])
            size += sum(sizes.values())
    content: dict[str, Any] = {**(checkpoint.index or {}), "weight_map": weight_map}
    metadata = content.get("metadata")
    content["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
    if "total_parameters" in content["metadata"]:
        content["metadata"]["total_parameters"] = parameters
    return content


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _files_of(index: Path) -> set[str]:
    """Return the files that an index names; none if it is no index."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str) and is_plain(name)}
