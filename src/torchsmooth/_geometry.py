"""How a kernel moves over the input: what a dense convolution and those that stand for it have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ._checks import describe

if TYPE_CHECKING:
    from collections.abc import Sequence

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

_NAMES = ("stride", "padding", "dilation", "groups", "padding_mode")


def geometry_of(conv: Any) -> dict[str, Any]:
    """Return stride, padding, dilation, groups and padding mode of a convolution, dense or low-rank."""
    return {name: getattr(conv, name) for name in _NAMES}


def spelled_out(in_channels: int, out_channels: int, kernel_size: int | Sequence[int], **geometry: Any) -> nn.Conv2d:
    """Return the dense convolution of these arguments, without memory for its weight.

    torch's own class checks the arguments and spells numbers out as pairs; on the meta device that costs nothing.

    Raises:
        TypeError: as ``nn.Conv2d`` does.
        ValueError: as ``nn.Conv2d`` does, or if the kernel is no number and no pair.
    """
    dense = nn.Conv2d(in_channels, out_channels, kernel_size, **geometry, bias=False, device="meta")  # type: ignore[arg-type]
    if len(dense.kernel_size) != 2:  # noqa: PLR2004 - height and width
        raise ValueError(f"kernel_size must be a number or a pair, got {describe(kernel_size)}.")
    return dense


class HasGeometry:
    """The attributes that say what convolution a low-rank layer stands for, by the names of ``nn.Conv2d``."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: PaddingMode

    def _take_geometry_(self, dense: nn.Conv2d) -> None:
        for name in ("in_channels", "out_channels", "kernel_size", *_NAMES):
            setattr(self, name, getattr(dense, name))

    def _geometry_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            value = getattr(self, name)
            text += f", {name}={value}" if value != default else ""
        return text
