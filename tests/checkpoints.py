"""Checkpoints of every kind on the disk, for tests of reading and compressing them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ("pickle", "nested", "safetensors", "sharded", "sharded_pickle")


def save(state: dict[str, Tensor], folder: Path, kind: str, name: str = "model") -> Path:
    """Save a state dict as a checkpoint of a kind, and return its path."""
    if kind == "safetensors":
        path = folder / f"{name}.safetensors"
        save_file({key: value.clone().contiguous() for key, value in state.items()}, path, {"format": "pt"})
        return path
    if kind == "pickle":
        torch.save(state, folder / f"{name}.pt")
        return folder / f"{name}.pt"
    if kind == "nested":
        torch.save({"state_dict": state, "epoch": 3, "optimizer": {"moment": torch.ones(3)}}, folder / f"{name}.pth")
        return folder / f"{name}.pth"
    place = folder / name
    place.mkdir()
    inner, suffix = ("pickle", ".pt") if kind == "sharded_pickle" else ("safetensors", ".safetensors")
    # Dealt out one by one, so that the bias of a layer is in another file than its weight.
    weight_map = {}
    for number in range(2):
        part = dict(list(state.items())[number::2])
        shard = save(part, place, inner, f"part-{number}")
        weight_map |= dict.fromkeys(part, shard.name)
    index = place / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1, "by": "a test"}, "weight_map": weight_map}))
    return index


def out(folder: Path, kind: str, name: str = "small") -> Path:
    """Return where the result of compressing a checkpoint of a kind may go."""
    ends = {"safetensors": ".safetensors", "pickle": ".pt", "nested": ".pth"}
    return folder / f"{name}{ends.get(kind, '')}"


def load(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint with the libraries that others use."""
    if path.is_dir():
        (path,) = path.glob("*.index.json")
    if path.name.endswith(".json"):
        weight_map = json.loads(path.read_text())["weight_map"]
        parts = {name: load(path.with_name(name)) for name in set(weight_map.values())}
        assert {key for part in parts.values() for key in part} == weight_map.keys()
        return {key: parts[name][key] for key, name in weight_map.items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    return content.get("state_dict", content)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Compare keys, dtypes and values, bit for bit."""
    return one.keys() == other.keys() and all(
        value.dtype == other[key].dtype
        and value.shape == other[key].shape
        and torch.equal(
            value.contiguous().flatten().view(torch.uint8), other[key].contiguous().flatten().view(torch.uint8)
        )
        for key, value in one.items()
    )


def names(folder: Path) -> list[str]:
    """List the names in a folder, in order."""
    return sorted(one.name for one in folder.iterdir())
