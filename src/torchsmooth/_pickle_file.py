"""Pickles of tensors and plain containers, as ``torch.save`` writes them; nothing in them is ever executed."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor, nn

from ._checks import kind_of_tensor, quoted, with_article
from ._sharing import span_of
from ._tensor_entry import Entry

if TYPE_CHECKING:
    from pathlib import Path

    from ._tensor_entry import Changes

# Under which of its entries a training checkpoint keeps the state dict.
_NESTED = ("state_dict", "model", "model_state_dict")

# What torch.load raises, depending on how a file is broken.
_BROKEN = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError)

# How it names what it refuses to execute.
_FOREIGN = re.compile(r"GLOBAL ([\w.]+)")

# Bytes that may be looked at before the file is mapped anew, so that those looked at need not stay in memory.
_MAPPED = 2**26


class PickleFile:
    """A file with a state dict, alone or as one entry of a dictionary.

    The values of its tensors are mapped from the file; only a file in the format before torch 1.6 is in memory whole.

    Args:
        path: the file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is broken, holds anything that would have to be executed, or no state dict.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._name = path, repr(os.fspath(path))
        self._content: Any = None
        self._seen = 0
        self._mapped = zipfile.is_zipfile(path)
        self._entry = self._find()
        state = self.state()
        self.entries = {key: _entry_of(value) for key, value in state.items() if isinstance(value, Tensor)}

    def state(self) -> Mapping[str, Any]:
        """Return the state dict."""
        if self._content is None:
            self._content = self._load()
            self._seen = 0
        found: Mapping[str, Any] = self._content if self._entry is None else self._content[self._entry]
        return found

    def read(self, key: str) -> Tensor:
        """Return a tensor, in the ordinary strides."""
        if self._mapped and self._seen > _MAPPED:
            self._content = None
        tensor: Tensor = self.state()[key].detach()
        self._seen += tensor.numel() * tensor.element_size()
        return tensor.contiguous()

    def write(self, target: BinaryIO, changes: Changes) -> None:
        """Write a file like this one but for some changes; what else it holds beside the state dict stays if plain."""
        state = self.state()
        new: dict[str, Any] = OrderedDict()
        for key, value in state.items():
            if key in changes.factors:
                new.update(changes.factors[key]())
            else:
                new[changes.renamed.get(key, key)] = value
        _slim_(new)
        if hasattr(state, "_metadata"):  # the versions of modules, which torch keeps there
            new._metadata = state._metadata  # type: ignore[attr-defined]
        content: Any = new
        if self._entry is not None:
            content = {key: value for key, value in self._content.items() if not _holds_tensors(value)}
            content[self._entry] = new
        torch.save(content, target)
        self._content = None

    def _load(self) -> Any:
        with self.path.open("rb"):
            pass  # who may not read it hears so from the system; what comes later is about its content
        if self._mapped and _is_program(self.path):
            raise ValueError(
                f"{self._name} is a TorchScript archive, which is a program: save model.state_dict() instead."
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickles that torch.save did not write: refused right after
                return torch.load(str(self.path), map_location="cpu", weights_only=True, mmap=self._mapped)
        except _BROKEN as error:
            raise ValueError(self._refused(error)) from error

    def _refused(self, error: Exception) -> str:
        foreign = _FOREIGN.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if foreign:
            return (
                f"{self._name} holds more than tensors and plain containers: reading {foreign[1]} would execute code. "
                "Where you trust the file, load it and save its state_dict() alone."
            )
        return (
            f"{self._name} cannot be read as a checkpoint ({type(error).__name__}): expected a whole file that "
            "torch.save wrote, or one named .safetensors or .index.json."
        )

    def _find(self) -> str | None:
        """Return the entry that is the state dict; None for the whole."""
        content = self._content = self._load()
        if not isinstance(content, Mapping):
            raise ValueError(
                f"{self._name} holds {with_article(type(content).__name__)}: expected a state dict, model.state_dict()."
            )
        nested = [key for key in _NESTED if isinstance(content.get(key), Mapping) and _holds_tensors(content[key])]
        if not nested and not any(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(
                f"{self._name} holds no state dict: expected tensors by name, or those under one of {quoted(_NESTED)}; "
                f"its keys are {quoted([str(key) for key in content]) or 'none'}."
            )
        state = content[nested[0]] if nested else content
        wrong = [key for key in state if not isinstance(key, str)]
        if wrong:
            raise ValueError(f"{self._name} holds a state dict with a key that is no text: {wrong[0]!r}.")
        return nested[0] if nested else None


def _slim_(state: dict[str, Any]) -> None:
    """Copy tensors that lie in larger storages, most of which nobody needs any more: they would be saved with them."""
    views: dict[int, list[str]] = {}
    for key, value in state.items():
        if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta:
            views.setdefault(value.untyped_storage().data_ptr(), []).append(key)
    for keys in views.values():
        spans = sorted({span_of(state[key])[1:] for key in keys})
        whole = state[keys[0]].untyped_storage().nbytes()
        apart = all(end <= begin for (_, end), (begin, _) in pairwise(spans))
        if apart and sum(end - begin for begin, end in spans) < whole:
            copies: dict[Any, Tensor] = {}  # what was the same tensor stays the same
            for key in keys:
                value = state[key]
                place = value.data_ptr(), value.shape, value.stride()
                copies.setdefault(place, value.detach().clone())
                state[key] = copies[place]


def _is_program(path: Path) -> bool:
    """Say whether an archive is one of TorchScript, which the ``torch.load`` of torch 2.4 would load as such."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False  # what is broken is told by torch.load


def _entry_of(tensor: Tensor) -> Entry:
    problem = ""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        problem = f"weight is {kind_of_tensor(tensor)}"
    elif tensor.is_meta:
        problem = "weight is on the meta device and has no values"
    size = tensor.numel() * tensor.element_size()
    return Entry(tuple(tensor.shape), tensor.dtype, size, problem, span_of(tensor))


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple, set)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)
