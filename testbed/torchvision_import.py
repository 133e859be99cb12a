"""Import torchvision beside a torch that lacks its compiled operators (a CPU torch with the registry's torchvision).

torchvision registers fake implementations of its detection operators when it is imported, and fails where their schemas
are not known, so they are declared here first. Of these operators its models call two: RoIAlign, which torchvision can
do in Python, and non-maximum suppression, which stands here in Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

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
    torchvision = importlib.import_module("torchvision")
    torch.library.impl("torchvision::nms", "CPU", suppress_overlaps)
    boxes: Any = importlib.import_module("torchvision.ops.boxes")
    boxes._assert_has_ops = lambda: None  # it would refuse for want of the compiled ones
    return torchvision


def suppress_overlaps(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Choose boxes by non-maximum suppression: from the best score on, each that no chosen one overlaps too much.

    Args:
        boxes: ``(n, 4)``: left, top, right and bottom of each.
        scores: ``(n,)``.
        threshold: the largest intersection over union that a box may have with one that was chosen.

    Returns:
        The places of the chosen boxes in int64, of the best score first.
    """
    order = scores.argsort(descending=True, stable=True)
    ordered = boxes[order]
    areas = (ordered[:, 2:] - ordered[:, :2]).prod(1)
    low = torch.maximum(ordered[:, None, :2], ordered[None, :, :2])
    high = torch.minimum(ordered[:, None, 2:], ordered[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    clash = shared > threshold * (areas[:, None] + areas - shared)
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for place in range(len(boxes)):
        if kept[place]:
            kept[place + 1 :] &= ~clash[place, place + 1 :]
    return order[kept]
