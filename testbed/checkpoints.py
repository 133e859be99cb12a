"""Trained networks by name or by file, each with the scaling of the images that it was trained with."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from testbed.cifar import ResNet18, normalise, normalise_imagenet, shared_data
from testbed.cifar_resnet import CifarResNet

if TYPE_CHECKING:
    from collections.abc import Callable

_SUFFIXES = (".pt", ".th")


class Network(NamedTuple):
    """A trained network, how to scale uint8 pixels for it, and what to call it in a table."""

    model: nn.Module
    normalise: Callable[[Tensor], Tensor]
    description: str


def load_network(spec: str | Path) -> Network:
    """Load a network from the shared data by its name, or any checkpoint of the same architectures by its path.

    Args:
        spec: ``"resnet18_w16/plain"``, ``"cifar_resnet/56"`` and so on; or a path that ends in ``.pt`` or ``.th``, to a
            state dict, or a dictionary with one under ``"state_dict"``, of a ``ResNet18`` of any width or a
            ``CifarResNet`` of any depth. Keys may begin with ``module.``, as ``nn.DataParallel`` leaves them.

    Returns:
        The network in eval mode, on the CPU; the function that scales its images; and a description.

    Raises:
        ValueError: if there is no such network, or the file holds something else.
    """
    path = Path(spec) if Path(spec).suffix in _SUFFIXES else _named_networks().get(str(spec))
    if path is None:
        known = ", ".join(_named_networks()) or f"none, as there are no networks in {shared_data()}"
        raise ValueError(
            f"there is no network named {str(spec)!r}. Known: {known}. A checkpoint of your own is given by its path, "
            f"which must end in {' or '.join(_SUFFIXES)}."
        )
    state = _read_state(path)
    model, scale, architecture = _empty_network(state, path)
    _check_shapes(state, model, architecture, path)
    model.load_state_dict(state)
    count = sum(parameter.numel() for parameter in model.parameters())
    return Network(model.eval(), scale, f"{architecture}, {count:,} parameters ({path.stem})")


def _named_networks() -> dict[str, Path]:
    """Find the networks of the shared data; the public ones go by their depth, without the checksum."""
    resnet18 = {f"resnet18_w16/{path.stem}": path for path in sorted((shared_data() / "resnet18_w16").glob("*.pt"))}
    public = {
        f"cifar_resnet/{path.stem.partition('-')[0].removeprefix('resnet')}": path
        for path in sorted((shared_data() / "cifar_resnet").glob("resnet*.th"))
    }
    return resnet18 | public


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    try:
        saved: Any = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read as tensors alone: save model.state_dict(), not the model itself."
        ) from error
    if isinstance(saved, dict):
        saved = saved.get("state_dict", saved)
    if not isinstance(saved, dict) or not all(isinstance(value, Tensor) for value in saved.values()):
        raise ValueError(f"{path} holds no state dict: expected tensors by name, or that under 'state_dict'.")
    return {name.removeprefix("module."): value for name, value in saved.items()}


def _empty_network(state: dict[str, Tensor], path: Path) -> tuple[nn.Module, Callable[[Tensor], Tensor], str]:
    """Build the network that the names and shapes belong to."""
    blocks = sum(name.startswith("layer1.") and name.endswith(".conv1.weight") for name in state)
    if "layers.0.conv1.weight" in state and "conv1.weight" in state:
        width = len(state["conv1.weight"])
        return ResNet18(width), normalise, f"ResNet-18 of width {width}"
    if blocks and "linear.weight" in state:
        return CifarResNet(6 * blocks + 2), normalise_imagenet, f"CIFAR ResNet-{6 * blocks + 2}"
    first = ", ".join(list(state)[:4]) or "no tensors"
    raise ValueError(
        f"{path} belongs to neither architecture: expected the dense weights of testbed.cifar.ResNet18 (with "
        f"'conv1.weight' and 'layers.0.conv1.weight') or of testbed.cifar_resnet.CifarResNet (with "
        f"'layer1.0.conv1.weight' and 'linear.weight'); got {first}."
    )


def _check_shapes(state: dict[str, Tensor], model: nn.Module, architecture: str, path: Path) -> None:
    """Compare names and shapes; counts of training steps may be missing, as files from before torch 0.4.1 lack them."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    different = [
        f"{name} (expected {wanted.get(name, 'nothing')}, got {found.get(name, 'nothing')})"
        for name in wanted | found
        if wanted.get(name) != found.get(name) and not (name.endswith("num_batches_tracked") and name not in found)
    ]
    if different:
        raise ValueError(
            f"{path} looks like a {architecture}, but {len(different)} of its tensors differ from one: "
            f"{', '.join(different[:3])}{', …' if len(different) > 3 else ''}."
        )
