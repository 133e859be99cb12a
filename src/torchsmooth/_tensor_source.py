"""A checkpoint on the disk: one file, or several with an index."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch

from ._checks import checked_path, quoted
from ._pickle_file import PickleFile
from ._safetensors_file import SafetensorsFile
from ._sharing import names_of_modules

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from ._tensor_entry import Entry

INDEX = ".index.json"


class Checkpoint:
    """The tensors of a checkpoint, read when they are asked for.

    Args:
        path: a file, an index, or a folder that holds one of them.

    Attributes:
        path: the file, or the index.
        files: what holds the tensors, by name.
        index: the content of the index; None for a single file.
        entries: what is known of each tensor, by key.

    Raises:
        ImportError: if the package safetensors is needed and missing.
        OSError: if a file cannot be read.
        ValueError: if a file is broken, or the index and the files contradict each other.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _resolved(checked_path(path, "source"))
        self.index: dict[str, Any] | None = None
        if self.path.name.endswith(".json"):
            self.index = _read_index(self.path)
            names = list(dict.fromkeys(self.index["weight_map"].values()))
        else:
            names = [self.path.name]
        paths = {name: self.path.with_name(name) for name in names}
        self._states = {name: _state_of(path) for name, path in paths.items()}  # before anything in them is read
        self.files = {name: _open(path) for name, path in paths.items()}
        self._places = {key: name for name, file in self.files.items() for key in file.entries}
        if self.index is not None:
            self._check_index(self.index["weight_map"])
        self.entries: dict[str, Entry] = {
            key: entry for file in self.files.values() for key, entry in file.entries.items()
        }

    @property
    def suffix(self) -> str:
        """The end of the name of its index or file, which tells its kind."""
        return INDEX if self.index is not None else self.path.suffix

    @property
    def compressed(self) -> bool:
        """Whether a file says that this library wrote it."""
        return any(isinstance(file, SafetensorsFile) and "torchsmooth" in file.metadata for file in self.files.values())

    def ordered_keys(self) -> list[str]:
        """Return all keys as a reader would have them: as they were saved, or where that is not known, by numbers."""
        if self.index is None and self.path.suffix != ".safetensors":
            return list(self.entries)
        return sorted(self.entries, key=lambda key: [_numbered(part) for part in key.split(".")])

    def read(self, key: str) -> Tensor:
        """Return a tensor."""
        return self.files[self._places[key]].read(key)

    def file_of(self, key: str) -> str:
        """Return the path of the file that holds a tensor."""
        return os.fspath(self.files[self._places[key]].path)

    def equal(self, one: str, other: str) -> bool:
        """Compare the values of two tensors of the same shape and dtype bit for bit."""
        files = [self.files[self._places[key]] for key in (one, other)]
        if all(isinstance(file, SafetensorsFile) for file in files):
            pair = (file.chunks(key) for file, key in zip(files, (one, other), strict=True))  # type: ignore[union-attr]
            return all(left == right for left, right in zip(*pair, strict=True))
        return torch.equal(self.read(one), self.read(other))

    def state(self) -> Mapping[str, Any]:
        """Return all tensors, mapped from the files where that is possible, and what else a pickle holds."""
        if self.index is None:
            return self.files[self.path.name].state()
        return {key: value for file in self.files.values() for key, value in file.state().items()}

    def state_for(self, model: nn.Module) -> dict[str, Any]:
        """Return the same with what a model has under several names, tensors and layers, under all of them."""
        state: dict[str, Any] = OrderedDict(self.state())
        for names in names_of_modules(model).values():
            if len(names) > 1:
                aliases = [f"{name}." for name in names]
                held = {
                    key[len(one) :]: value for one in aliases for key, value in state.items() if key.startswith(one)
                }
                state |= {
                    one + rest: value for one in aliases for rest, value in held.items() if one + rest not in state
                }
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        known = {id(tensor): state[name] for name, tensor in named if name in state}
        missing = {name: id(tensor) for name, tensor in named if name not in state and id(tensor) in known}
        there = model.state_dict().keys()  # buffers that are not saved have names, too
        state |= {name: known[tensor] for name, tensor in missing.items() if name in there}
        metadata = getattr(self.state(), "_metadata", None)
        if metadata is not None:  # the versions of modules, by which some of them read what was saved
            state._metadata = metadata  # type: ignore[attr-defined]
        return state

    def identity(self) -> list[Any]:
        """Return what tells this checkpoint from another one or an earlier state of it, ready for JSON."""
        found = []
        for name, file in self.files.items():
            listed = repr([(key, one.shape, str(one.dtype)) for key, one in file.entries.items()])
            digest = hashlib.sha256(listed.encode("utf-8")).hexdigest()
            found.append([os.fspath(file.path.resolve()), name, *self._states[name], digest])
        return found

    def changed(self) -> list[str]:
        """Return the paths of files that are others, of another size or time, than when they were opened.

        One that is away, as a folder on another machine may be for a moment, is no other one.
        """
        now = {name: _state_of(file.path) for name, file in self.files.items()}
        others = [name for name, one in now.items() if one not in (_NO_FILE, self._states[name])]
        return [os.fspath(self.files[name].path) for name in others]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raise a ValueError if a file changes within, also in the place of what else that leads to."""
        text = "{} changed while the checkpoint was read: call this again when nobody writes there any more."
        try:
            yield
        except Exception as error:
            if changed := self.changed():
                raise ValueError(text.format(quoted(changed))) from error
            raise
        if changed := self.changed():
            raise ValueError(text.format(quoted(changed)))

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        index = str(self.path)
        missing = [key for key, name in weight_map.items() if key not in self.files[name].entries]
        if missing:
            raise ValueError(
                f"index {index!r} says that {missing[0]!r} is in {weight_map[missing[0]]!r}, but it is not there"
                f"{_more(missing)}: are all files of the same version?"
            )
        for name, file in self.files.items():
            extra = [key for key in file.entries if weight_map.get(key) != name]
            if extra:
                told = weight_map.get(extra[0])
                where = "not in the index" if told is None else f"to be read from {told!r} by the index"
                raise ValueError(
                    f"{name!r} beside index {index!r} holds {extra[0]!r}, which is {where}{_more(extra)}: are all "
                    "files of the same version?"
                )


def _resolved(path: Path) -> Path:
    """Find the checkpoint of a folder."""
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        which = f"{len(found)}: {quoted([one.name for one in found])}" if found else "none"
        raise ValueError(
            f"{os.fspath(path)!r} is a folder, which should hold one {INDEX} file or one .safetensors file, but holds "
            f"{which}. Name the file."
        )
    return found[0]


def _open(path: Path) -> SafetensorsFile | PickleFile:
    if path.is_dir():
        raise ValueError(f"{os.fspath(path)!r} is a folder, not a file of tensors.")
    if not path.exists():
        raise FileNotFoundError(f"{os.fspath(path)!r} does not exist.")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


_NO_FILE = -1, -1


def _state_of(path: Path) -> tuple[int, int]:
    """Return the size and the time of a file; those of none if there is none."""
    try:
        status = path.stat()
    except OSError:
        return _NO_FILE
    return status.st_size, status.st_mtime_ns


def _read_index(path: Path) -> dict[str, Any]:
    name = repr(os.fspath(path))
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"index {name} is not JSON, or has a key twice ({error}).") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{name} is no index: expected an object with a field 'weight_map' from keys to file names.")
    for key, file in weight_map.items():
        if not isinstance(file, str) or not is_plain(file):
            raise ValueError(
                f"index {name} names {file!r} as the file of {key!r}: expected the name of a file beside the index, "
                "without a folder."
            )
        if not path.with_name(file).exists():
            raise FileNotFoundError(f"index {name} names {file!r} as the file of {key!r}, which does not exist.")
    return dict(content)


def is_plain(name: str) -> bool:
    """Say whether this is the name of a file and nothing else, on any system."""
    plain = name == PurePosixPath(name).name == PureWindowsPath(name).name
    return plain and name not in {"", ".", ".."} and "\0" not in name and not name.endswith(".json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


def _numbered(part: str) -> tuple[int, str]:
    """Sort numbers by value, and before words."""
    return (int(part), "") if part.isdecimal() else (sys.maxsize, part)


def _more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
