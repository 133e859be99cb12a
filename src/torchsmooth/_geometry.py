"""How a kernel moves over the input: what a dense convolution and those that stand for it have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import nn

from ._checks import check_choice, check_count, describe

if TYPE_CHECKING:
    from collections.abc import Sequence

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS: dict[int, type[Convolution]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# For code that torch.compile may trace: that of torch 2.4 cannot ask for a union.
ANY_CONVOLUTION: tuple[type[Convolution], ...] = tuple(CONVOLUTIONS.values())
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
TRANSPOSED: dict[int, type[Transposed]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_SIZES = {1: "a number or a tuple of one", 2: "a number or a pair", 3: "a number or a triple"}

_NAMES = ("stride", "padding", "dilation", "groups", "padding_mode")


def geometry_of(conv: Any) -> dict[str, Any]:
    """Return how the kernel of a convolution moves, dense or low-rank, transposed or not: by the names of torch."""
    names = (*_NAMES, "output_padding") if conv.transposed else _NAMES
    return {name: getattr(conv, name) for name in names}


def each(value: Any, axes: int) -> tuple[int, ...]:
    """Spell out what a layer was given after it was made: a single number is as good as one for each axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


def zeros_around(conv: Convolution) -> list[tuple[int, int]]:
    """Return how many zeros a convolution that pads with them puts before and after, for each axis.

    Its padding may have been set after it was made, which only zeros follow.
    """
    axes = len(conv.kernel_size)
    if conv.padding == "valid":
        return [(0, 0)] * axes
    if conv.padding == "same":
        return zeros_for_same(conv.kernel_size, each(conv.dilation, axes))
    return [(size, size) for size in each(conv.padding, axes)]


def zeros_for_same(kernel_size: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Return how many zeros ``padding="same"`` puts before and after, for each axis: what is odd goes to the end."""
    reach = [gap * (size - 1) for gap, size in zip(dilation, kernel_size, strict=True)]
    return [(whole // 2, whole - whole // 2) for whole in reach]


def spelled_out(
    axes: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    *,
    transposed: bool = False,
    **geometry: Any,
) -> Convolution | Transposed:
    """Return the dense convolution of these arguments, without memory for its weight.

    torch's own class checks the other arguments and spells numbers out for each axis; on the meta device that costs
    nothing.

    Args:
        axes: how many kernel axes it has, 1 … 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: a number, or one for each axis.
        transposed: whether it is a transposed one.
        geometry: more arguments of ``nn.Conv2d`` or ``nn.ConvTranspose2d``.

    Raises:
        TypeError: if a size is not an integer, or as ``nn.Conv2d`` does.
        ValueError: if a size is not positive, ``groups`` does not divide the channels, the padding or its mode is
            unknown, the kernel has another number of axes, or as ``nn.Conv2d`` does.
    """
    classes: Any = TRANSPOSED if transposed else CONVOLUTIONS
    check_count(in_channels, "in_channels", None, "channels of the input")
    check_count(out_channels, "out_channels", None, "channels of the output")
    sizes = tuple(kernel_size) if isinstance(kernel_size, (tuple, list)) else (kernel_size,) * axes
    if len(sizes) != axes:
        raise ValueError(f"kernel_size must be {_SIZES[axes]}, got {describe(kernel_size)}.")
    for size in sizes:
        check_count(size, "kernel_size", None, "the size of the kernel on each axis")
    groups = check_count(geometry.get("groups", 1), "groups", None, "the number of groups")
    if in_channels % groups or out_channels % groups:
        raise ValueError(
            f"groups must divide in_channels and out_channels, got groups={groups} for {in_channels} and "
            f"{out_channels}."
        )
    modes = ("zeros",) if transposed else get_args(PaddingMode)
    check_choice(geometry.get("padding_mode", "zeros"), "padding_mode", modes)
    if isinstance(geometry.get("padding"), str):
        check_choice(geometry["padding"], "padding by name", ("same", "valid"))
    dense: Convolution | Transposed = classes[axes](
        in_channels, out_channels, kernel_size, **geometry, bias=False, device="meta"
    )
    return dense


class HasGeometry:
    """The attributes that say what convolution a low-rank layer stands for, by the names of ``nn.Conv2d``.

    Attributes:
        kernel_axes: how many axes its kernel has.
        transposed: whether it is a transposed one; then there is ``output_padding``, too.
    """

    kernel_axes: ClassVar[int] = 2
    transposed: ClassVar[bool] = False
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: PaddingMode

    def _take_geometry_(self, dense: Convolution | Transposed) -> None:
        for name in ("in_channels", "out_channels", "kernel_size", *geometry_of(dense)):
            setattr(self, name, getattr(dense, name))

    def _geometry_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        none, one = (0,) * self.kernel_axes, (1,) * self.kernel_axes
        defaults = {"padding": none, "dilation": one, "output_padding": none, "groups": 1, "padding_mode": "zeros"}
        for name, default in defaults.items():
            value = getattr(self, name, default)
            text += f", {name}={value}" if value != default else ""
        return text
