"""Import torchvision beside a torch that lacks its compiled operators (a CPU torch with the registry's torchvision).

torchvision registers fake implementations of its detection operators when it is imported, and fails where their schemas
are not known. Classification models never call them, so declaring the two schemas is enough.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import ModuleType

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """Return the torchvision module, declaring its operators first where they are missing."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", _SCHEMA)
    return importlib.import_module("torchvision")
