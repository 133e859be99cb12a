"""Random crops and flips of a whole batch of images at once, on the device where they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PADDING = 4


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop each image at random after padding it by four zeros on all sides, and mirror every second one or so.

    Args:
        images: ``(batch, channels, height, width)``, any dtype.
        generator: on the device of the images.

    Returns:
        The same shape and dtype, in channels-last memory format.
    """
    count, _, height, width = images.shape
    device = images.device
    padded = F.pad(images, (_PADDING,) * 4)
    top, left = torch.randint(0, 2 * _PADDING + 1, (2, count, 1, 1), generator=generator, device=device)
    rows, columns = top + torch.arange(height, device=device)[:, None], left + torch.arange(width, device=device)
    mirrored = torch.rand(count, 1, 1, generator=generator, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(-1), columns)
    return padded[torch.arange(count, device=device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
