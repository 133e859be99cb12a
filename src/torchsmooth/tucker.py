"""TuckerConv2d: a convolution whose weight is a core between a basis of the inputs and one of the outputs.

The children are ordinary layers: ``down`` 1×1, ``core`` with the whole kernel, ``up`` 1×1 with the bias. In the pivoted
form ``split`` takes r_in of the input channels out and ``down`` makes of the others what is added to them; ``core``
computes r_out of the output channels themselves, ``up`` the others from them, and ``merge`` puts them in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_values
from ._execution import active
from ._geometry import HasGeometry, geometry_of, spelled_out
from ._given_factors import checked_copies
from ._linalg import eigen
from ._lowrank_layer import LowRankLayer, check_writable, inherit, merged, uninitialised
from ._matricise import FORMS, matricise
from ._pivoted_modules import ChannelMerge, ChannelSplit, Ordered
from ._pivoting import pivoted_rows, with_identity
from ._source_layer import check_source
from ._tucker import signed, tucker_balanced, tucker_factors, tucker_product
from ._tucker_layout import TuckerLayout
from ._whitening import first_factor, second_factor
from .lowrank_conv import LowRankConv2d

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._geometry import PaddingMode
    from ._matricise import Form
    from ._spectrum import Decomposition

__all__ = ["TuckerConv2d"]


class TuckerConv2d(LowRankLayer, HasGeometry):
    r"""A convolution in three, Tucker-2: ``up(core(down(x)))``, of ranks (r_in, r_out) in each group.

    Args:
        in_channels: channels of the input, at least two in each group.
        out_channels: channels of the output, at least two in each group.
        kernel_size: a number or a pair; not 1×1.
        rank: ``(r_in, r_out)``, or one number for both: 1 … the channels of each group on that side, and no more than
            the other side's channels times the entries of the kernel; in the pivoted form less than the channels.
        stride: a number or a pair.
        padding: a number, a pair, ``"same"`` or ``"valid"``.
        dilation: a number or a pair.
        groups: number of groups.
        bias: whether there is a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: device of the parameters.
        dtype: floating dtype of the parameters.
        form: ``"factored"``, of r_in · in + k · r_in · r_out + r_out · out parameters in each group, k the entries of
            the kernel; or ``"pivoted"``, of r_in² + r_out² fewer.

    Shape:
        Input and output as of ``nn.Conv2d``. With g groups: ``down.weight`` ``(g · r_in, in / g, 1, 1)``,
        ``core.weight`` ``(g · r_out, r_in, kh, kw)``, ``up.weight`` ``(out, r_out, 1, 1)``, ``up.bias`` ``(out,)``. In
        the pivoted form ``down.weight`` has r_in input channels fewer, ``up.weight`` g · r_out output channels fewer,
        and there are ``merge.bias`` ``(out,)`` and the int32 buffers ``split.order`` ``(in,)`` and ``merge.order``
        ``(out,)``.

    Raises:
        TypeError: if a rank is not an integer.
        ValueError: if one is out of range, the form is unknown, or the kernel 1×1 or a side of one channel.

    Example:
        >>> import torch, torchsmooth
        >>> conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        >>> layer = torchsmooth.TuckerConv2d.from_conv2d(conv, rank=(4, 6))
        >>> layer.down.weight.shape[:2], layer.core.weight.shape, layer.up.weight.shape[:2]
        (torch.Size([4, 8]), torch.Size([6, 4, 3, 3]), torch.Size([16, 6]))

    Source: Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications",
    2016; the factors: De Lathauwer, De Moor and Vandewalle, 2000; pivoted: Zhao et al., "Pivoting Factorization", 2025.
    """

    factor_children: ClassVar[tuple[str, ...]] = ("up", "core", "down")
    scheme: ClassVar[str] = "tucker"
    down: nn.Conv2d
    core: nn.Conv2d
    up: nn.Conv2d
    split: ChannelSplit
    merge: ChannelMerge
    rank: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        rank: int | tuple[int, int],
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        form: Form = "factored",
    ) -> None:
        super().__init__()
        dense: Any = spelled_out(
            2, in_channels, out_channels, kernel_size,
            stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip
        check_choice(form, "form", FORMS)
        layout = TuckerLayout.of(dense.weight.shape, groups)
        if layout is None:
            raise ValueError(
                "scheme 'tucker' needs a kernel larger than 1×1 and at least two input and output channels in each "
                f"group, got a weight of shape {tuple(dense.weight.shape)} with groups={groups}: use LowRankConv2d."
            )
        self._take_geometry_(dense)
        self.layout, self.form = layout, form
        self.rank = r_in, r_out = layout.checked(rank, "rank", "tucker", form)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        pivoted, inner, outer = form == "pivoted", groups * r_in, groups * r_out
        if pivoted:
            self.split = ChannelSplit(groups, r_in, layout.in_channels, device)
        down_in, up_out = in_channels - (inner if pivoted else 0), out_channels - (outer if pivoted else 0)
        self.down = nn.Conv2d(down_in, inner, 1, groups=groups, bias=False, **options)
        self.core = nn.Conv2d(inner, outer, dense.kernel_size, bias=False, **geometry_of(self), **options)
        self.up = nn.Conv2d(outer, up_out, 1, groups=groups, bias=bias and not pivoted, **options)
        if pivoted:
            self.merge = ChannelMerge(groups, r_out, layout.out_channels, dim=-3, bias=bias, **options)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """Apply ``down``, ``core`` and ``up``; in the pivoted form, the pivots go past the first and the last.

        Args:
            input: ``(N, in, H, W)`` or ``(in, H, W)``, in the dtype of the factors.

        Returns:
            ``(N, out, H', W')`` or ``(out, H', W')``, of the size that ``nn.Conv2d`` makes.
        """
        output: Tensor
        derived = active(self, input)
        if derived is not None:
            output = derived(input)
            return output
        if "merge" not in self._modules:
            output = self.up(self.core(self.down(input)))
            return output
        pivots, others = self.split(input)
        kept = self.core(pivots + self.down(others))
        output = self.merge(kept, self.up(kept))
        return output

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, rank: int | tuple[int, int], form: Form = "factored") -> TuckerConv2d:
        """Factor a convolution by a refined higher-order SVD, each group on its own; the layer itself is not changed.

        The error is at most that of the truncated higher-order SVD, which never grows with either rank. The refinement
        ends in a local optimum, so on rare occasions a larger rank gains less by it than the smaller one did.

        Args:
            conv: weight ``(out, in / groups, kh, kw)`` in float64, float32, bfloat16 or float16.
            rank: ``(r_in, r_out)``, or one number for both; at full ranks the layer is reproduced to rounding.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer on the same device, with the same dtype, memory format, mode, ``requires_grad`` and a copy of the
            bias.

        Raises:
            TypeError: if it is not a Conv2d, or of another dtype.
            ValueError: if a rank is out of range, the form unknown, or the weight no plain, finite parameter.
        """
        layer = cls.like(conv, rank, form)
        check_values(conv.weight, conv)
        layer.truncate_(conv.weight)
        return layer

    @classmethod
    def like(cls, conv: nn.Conv2d, rank: int | tuple[int, int], form: Form = "factored") -> TuckerConv2d:
        """Make a layer to take the place of ``conv``, with factors that are still to be filled in.

        Args:
            conv: the layer to replace.
            rank: ``(r_in, r_out)``, or one number for both.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer with uninitialised factors; device, dtype, mode, ``requires_grad`` and bias as in ``conv``.

        Raises:
            TypeError: if it is not a Conv2d, or of another dtype.
            ValueError: if a rank is out of range, or the form unknown.
        """
        weight = check_source(conv, nn.Conv2d, cls.shape_of)
        layer = uninitialised(
            cls, conv.in_channels, conv.out_channels, conv.kernel_size, rank, **geometry_of(conv),
            bias=False, device=weight.device, dtype=weight.dtype, form=form,
        )  # fmt: skip
        return inherit(layer, conv, weight)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three factors of every group, whole in either form.

        Returns:
            up ``(groups, out, r_out)``, core ``(groups, r_out, r_in, k)`` and down ``(groups, r_in, in)``, channels
            counted per group and k the entries of the kernel; in float32 or better, differentiable. In the pivoted form
            the first and the last hold rows and columns of the identity.
        """
        up, core, down = (self._factor(child) for child in self.factor_children)
        wide = torch.promote_types(core.dtype, torch.float32)
        groups, (r_in, r_out) = self.groups, self.rank
        middle = core.to(wide).reshape(groups, r_out, r_in, -1)
        outer, inner = up.to(wide).reshape(groups, -1, r_out), down.to(wide).reshape(groups, r_in, -1)
        if self.form == "pivoted":
            outer = with_identity(outer, self.merge.order_places(), groups, r_out)
            inner = with_identity(inner.mT, self.split.order_places(), groups, r_in).mT
        return outer, middle, inner

    @torch.no_grad()
    def set_factors_(self, up: Tensor, core: Tensor, down: Tensor) -> None:
        """Store a product in the layer's own form: computed in float64, cast once, into the parameters that are there.

        Args:
            up: ``(groups, out, r_out)``, any floating dtype, finite.
            core: ``(groups, r_out, r_in, k)``, any floating dtype, finite.
            down: ``(groups, r_in, in)``, any floating dtype, finite.

        Raises:
            TypeError: if one is not a tensor of a floating dtype.
            ValueError: if a shape is not that, a value NaN or infinite, or a factor no plain parameter any more.
        """
        check_writable(self, "filled")
        layout, (r_in, r_out) = self.layout, self.rank
        shapes = {
            "up": (layout.groups, layout.out_channels, r_out),
            "core": (layout.groups, r_out, r_in, layout.positions),
            "down": (layout.groups, r_in, layout.in_channels),
        }
        up, core, down = checked_copies({"up": up, "core": core, "down": down}, shapes)
        if self.form == "factored":
            up, core, down = tucker_balanced(up, core, down)
        else:
            outer = pivoted_rows(up, torch.eye(r_out, dtype=up.dtype, device=up.device).expand(layout.groups, -1, -1))
            inner = pivoted_rows(
                down.mT, torch.eye(r_in, dtype=up.dtype, device=up.device).expand(layout.groups, -1, -1)
            )
            core = torch.einsum("gca,gabk,gdb->gcdk", outer.kept, core, inner.kept)
            up, down = outer.free, inner.free.mT
            self.merge.set_pivots_(outer.pivots, outer.others)
            self.split.set_pivots_(inner.pivots, inner.others)
        for child, values in zip(self.factor_children, (up, core, down), strict=True):
            self._store_(child, values.reshape(self._factor(child).shape))

    def product_of(self, factors: tuple[Tensor, ...]) -> Tensor:
        """Multiply factors out to a weight."""
        return self.layout.to_weight(tucker_product(*factors))

    def truncate_(self, weight: Tensor, spectrum: Decomposition | None = None) -> None:
        """Set the factors to the refined higher-order SVD of a weight."""
        known = tucker_factors if spectrum is None else spectrum.factors
        self.set_factors_(*known(self.layout.to_tensors(weight.detach()), self.rank))

    def fit_(self, target: Tensor, inner: Tensor) -> None:
        """Set the factors to those that fit a weight in the sense of a moment: optimal for the ``down`` that is found.

        ``down`` is that of the ``input`` scheme; of the least squares solution of what follows it, the eigenvectors of
        the second moment of the output are kept.
        """
        layout, (r_in, r_out) = self.layout, self.rank
        shape = (layout.groups * layout.out_channels, layout.in_channels, *layout.kernel)
        plain = matricise(shape, "input", layout.groups)
        down = first_factor(target, inner, plain, r_in)
        rest, fitted = second_factor(target, inner, down, plain)
        vectors = eigen(fitted @ inner @ fitted.mT)[1]
        up = signed(vectors.flip(-1)[..., :r_out])
        core = up.mT @ rest.reshape(layout.groups, layout.out_channels, -1)
        core = core.reshape(layout.groups, r_out, layout.positions, r_in).transpose(-1, -2)
        self.set_factors_(up, core, down)

    def orders(self) -> dict[str, Ordered]:
        """Return the children that know pivots, by name."""
        return {} if self.form == "factored" else {"split": self.split, "merge": self.merge}

    def to_conv2d(self) -> nn.Conv2d:
        """Merge the factors into an ``nn.Conv2d``; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device, memory format and ``requires_grad``
            kept.
        """
        sizes = (self.in_channels, self.out_channels, self.kernel_size)
        return merged(self, nn.Conv2d, *sizes, **geometry_of(self))

    @staticmethod
    def shape_of(conv: Any) -> tuple[int, ...]:
        """Return the shape that the weight of a dense layer has by its attributes.

        Args:
            conv: the dense layer.

        Returns:
            ``(out_channels, in_channels / groups, *kernel_size)``.
        """
        return LowRankConv2d.shape_of(conv)

    def to_dense(self) -> nn.Conv2d:
        """Do what :meth:`to_conv2d` does, under the name that all low-rank layers share."""
        return self.to_conv2d()

    def extra_repr(self) -> str:
        """Show the sizes, as ``nn.Conv2d`` does."""
        return f"{self._geometry_repr()}, rank={self.rank}, bias={self.bias is not None}{self._form_repr()}"
