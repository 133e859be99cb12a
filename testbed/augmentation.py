"""Random crops and flips of a whole batch of images at once, on the device where they are."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_PADDING = 4


def augmented(images: Tensor, generator: torch.Generator, border: Literal["zeros", "reflection"] = "zeros") -> Tensor:
    """Crop each image at random after padding it by four pixels on all sides, and mirror every second one or so.

    Args:
        images: ``(batch, channels, height, width)``, any dtype, more than four pixels high and wide.
        generator: on the device of the images.
        border: what they are padded with. Zeros change the statistics that BatchNorm sees, so that those of images as
            they are differ; reflections of the image hardly do.

    Returns:
        The same shape and dtype, in channels-last memory format.
    """
    count, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(0, 2 * _PADDING + 1, (2, count, 1, 1), generator=generator, device=device)
    rows, columns = top + torch.arange(height, device=device)[:, None], left + torch.arange(width, device=device)
    mirrored = torch.rand(count, 1, 1, generator=generator, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(-1), columns)
    if border == "zeros":
        images = F.pad(images, (_PADDING,) * 4)
    else:
        rows, columns = _reflected(rows - _PADDING, height), _reflected(columns - _PADDING, width)
    return images[torch.arange(count, device=device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def _reflected(places: Tensor, size: int) -> Tensor:
    """Bring places outside of an image back into it, as in a mirror on its outermost pixels."""
    last = size - 1
    return last - (last - places.abs()).abs()
