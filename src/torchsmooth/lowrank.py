"""LowRankLinear: a linear layer whose weight is a product of two, kept as two ordinary layers.

The children ``down`` (from the input to ``rank`` numbers) and ``up`` (on to the output, with the bias) are plain
``nn.Linear``, so quantisers, FLOP counters and exporters see what they know. ``weight`` multiplies the factors out, for
callers that read it (``nn.TransformerEncoderLayer`` in eval mode, Swin's attention).

In the pivoted form ``up`` is smaller by rank × rank, and a third child, ``merge``, puts the outputs together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ._checks import check_count, check_values
from ._lowrank_layer import TwoFactorLayer, inherit, merged, uninitialised
from ._matricise import matricise
from ._pivoted_modules import ChannelMerge
from ._source_layer import check_rank, check_source

if TYPE_CHECKING:
    import torch

    from ._matricise import Form

__all__ = ["LowRankLinear"]


class LowRankLinear(TwoFactorLayer):
    r"""A linear layer with a weight of rank r: ``up(down(x))``, :math:`W = W_{up} W_{down}`.

    In the pivoted form ``down`` computes r of the outputs themselves, ``up`` the others from them, and ``merge`` puts
    them in order: :math:`W = P \begin{bmatrix} I \\ W_{up} \end{bmatrix} W_{down}`.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        rank: 1 … min(in_features, out_features), in the pivoted form one less.
        bias: whether there is a bias.
        device: device of the parameters.
        dtype: floating dtype of the parameters.
        form: ``"factored"``, of rank · (in_features + out_features) parameters, or ``"pivoted"``, of rank² fewer.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``; ``down.weight`` ``(rank, in_features)``, ``up.weight``
        ``(out_features, rank)``, ``up.bias`` ``(out_features,)``. In the pivoted form, ``up.weight``
        ``(out_features - rank, rank)``, ``merge.bias`` ``(out_features,)`` and the int32 buffer ``merge.order``
        ``(out_features,)``.

    Raises:
        TypeError: if the rank is not an integer.
        ValueError: if it is out of range.

    Example:
        >>> import torch, torchsmooth
        >>> layer = torchsmooth.LowRankLinear.from_linear(torch.nn.Linear(20, 10), rank=4)
        >>> layer(torch.zeros(2, 20)).shape, layer.weight.shape
        (torch.Size([2, 10]), torch.Size([10, 20]))

    Source: Eckart and Young, 1936; pivoted: Zhao et al., "Pivoting Factorization", 2025.
    """

    down: nn.Linear
    up: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,  # noqa: FBT001, FBT002 - as in nn.Linear
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        form: Form = "factored",
    ) -> None:
        super().__init__()
        check_count(in_features, "in_features", None, "features of the input")
        check_count(out_features, "out_features", None, "features of the output")
        self.in_features, self.out_features = in_features, out_features
        self.matricisation = matricise((out_features, in_features), "channel")
        self.rank = rank = check_rank(rank, self.matricisation, form, "the full rank")
        self.form = form
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        if form == "factored":
            self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        else:
            self.up = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
            self.merge = ChannelMerge(1, rank, out_features, dim=-1, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, form: Form = "factored") -> LowRankLinear:
        """Factor a linear layer by truncated SVD; the layer itself is not changed.

        Args:
            linear: weight ``(out_features, in_features)`` in float64, float32, bfloat16 or float16.
            rank: 1 … min(in_features, out_features), at which the layer is reproduced to rounding; less than that in
                the pivoted form.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer on the same device, with the same dtype, mode, ``requires_grad`` and a copy of the bias.

        Raises:
            TypeError: if it is not a Linear, or of another dtype.
            ValueError: if the rank is out of range, the form unknown, or the weight not a plain, finite parameter.
        """
        layer = cls.like(linear, rank, form)
        check_values(linear.weight, linear)
        layer.truncate_(linear.weight)
        return layer

    @classmethod
    def like(cls, linear: nn.Linear, rank: int, form: Form = "factored") -> LowRankLinear:
        """Make a layer to take the place of ``linear``, with factors that are still to be filled in.

        Args:
            linear: the layer to replace.
            rank: 1 … min(in_features, out_features), in the pivoted form one less.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer with uninitialised factors; device, dtype, mode, ``requires_grad`` and bias as in ``linear``.

        Raises:
            TypeError: if it is not a Linear, or of another dtype.
            ValueError: if the rank is out of range, or the form unknown.
        """
        weight = check_source(linear, nn.Linear, cls.shape_of)
        layer = uninitialised(
            cls, linear.in_features, linear.out_features, rank,
            bias=False, device=weight.device, dtype=weight.dtype, form=form,
        )  # fmt: skip
        return inherit(layer, linear, weight)

    @staticmethod
    def shape_of(linear: nn.Linear) -> tuple[int, ...]:
        """Return the shape that the weight of a dense layer has by its attributes.

        Args:
            linear: the dense layer.

        Returns:
            ``(out_features, in_features)``.
        """
        return linear.out_features, linear.in_features

    def to_linear(self) -> nn.Linear:
        """Merge the factors into an ``nn.Linear``; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device and ``requires_grad`` kept.
        """
        return merged(self, nn.Linear, self.in_features, self.out_features)

    def to_dense(self) -> nn.Linear:
        """Do what :meth:`to_linear` does, under the name that all low-rank layers share."""
        return self.to_linear()

    def extra_repr(self) -> str:
        """Show the sizes, as ``nn.Linear`` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}{self._form_repr()}"
        )
