"""Files in the safetensors format: one tensor at a time is read, and one is written.

The package ``safetensors`` judges whether a file is whole and well formed. The format itself is simple: the length of a
header, the header in JSON, then the values of all tensors without a gap.
"""

from __future__ import annotations

import ctypes
import importlib
import json
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ._tensor_entry import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ._tensor_entry import Changes

# The names of the dtypes in a header; what is not here is copied without a look into it.
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_CHUNK = 2**24  # bytes that are copied at once


def library() -> Any:
    """Import the package safetensors, or say how to get it."""
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            "reading and writing .safetensors files needs the package safetensors: pip install torchsmooth[checkpoint]"
        ) from error


class SafetensorsFile:
    """A file of tensors, of which only the header is in memory.

    Args:
        path: the file.

    Raises:
        ImportError: if the package safetensors is missing.
        OSError: if the file cannot be read.
        ValueError: if it is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        package = library()
        try:
            with package.safe_open(path, framework="pt"):
                pass
        except package.SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} is no whole safetensors file ({error}): was it cut off, or is it of another format?"
            ) from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._start, self._header = 8 + length, header
        self.entries = {key: _entry_of(one) for key, one in header.items()}

    def read(self, key: str) -> Tensor:
        """Return a tensor of a dtype that torch knows, in memory of its own."""
        entry, size = self.entries[key], self.entries[key].size
        if not size:
            return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        buffer = bytearray(size)
        filled = 0
        for chunk in self.chunks(key):
            buffer[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(entry.dtype or torch.uint8).reshape(entry.shape)

    def state(self) -> dict[str, Tensor]:
        """Return all tensors, mapped from the file."""
        with library().safe_open(self.path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in self.entries}

    def write(self, target: BinaryIO, changes: Changes) -> None:
        """Write a file with the tensors of this one but for some changes; no more than one layer is in memory."""
        parts: list[_Part] = []
        for key, described in self._header.items():
            if key in changes.factors:
                parts += [_Part.of(new, key, tensor) for new, tensor in changes.factors[key]().items()]
            else:
                new = changes.renamed.get(key, key)
                parts.append(
                    _Part(new, key, described["dtype"], described["shape"], self.entries[key].size, made=False)
                )
        # The widest dtypes first, so that every tensor begins at a multiple of its own.
        parts.sort(key=lambda part: -_width(part.dtype))
        header: dict[str, Any] = {"__metadata__": {**self.metadata, "torchsmooth": changes.note}}
        end = 0
        for part in parts:
            offsets = [end, end + part.size]
            header[part.key] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": offsets}
            end += part.size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        target.write(len(text).to_bytes(8, "little"))
        target.write(text)
        for part in parts:
            if part.made:
                _write_values(target, changes.factors[part.source]()[part.key])
            else:
                target.writelines(self.chunks(part.source))

    def chunks(self, key: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor."""
        start, end = self._header[key]["data_offsets"]
        with self.path.open("rb") as file:
            file.seek(self._start + start)
            for begin in range(start, end, _CHUNK):
                size = min(_CHUNK, end - begin)
                chunk = file.read(size)
                if len(chunk) != size:
                    raise ValueError(f"{str(self.path)!r} ended early: it has become shorter since it was opened.")
                yield chunk


class _Part(NamedTuple):
    """A tensor to be written: a copy of that at ``source``, or a factor made of it."""

    key: str
    source: str
    dtype: str
    shape: list[int]
    size: int
    made: bool

    @classmethod
    def of(cls, key: str, source: str, tensor: Tensor) -> _Part:
        size = tensor.numel() * tensor.element_size()
        return cls(key, source, _NAMES[tensor.dtype], list(tensor.shape), size, made=True)


def _width(dtype: str) -> int:
    return _DTYPES[dtype].itemsize if dtype in _DTYPES else 1


def _write_values(target: BinaryIO, tensor: Tensor) -> None:
    values = tensor.contiguous()
    size = values.numel() * values.element_size()
    if size:  # through ctypes, as a tensor gives its memory away only with the help of numpy
        target.write(memoryview((ctypes.c_ubyte * size).from_address(values.data_ptr())))


def _entry_of(described: Mapping[str, Any]) -> Entry:
    start, end = described["data_offsets"]
    dtype = _DTYPES.get(described["dtype"])
    problem = f"weight is of {described['dtype']}" if dtype is None else ""
    return Entry(tuple(described["shape"]), dtype, end - start, problem)
