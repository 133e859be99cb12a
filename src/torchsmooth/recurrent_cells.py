"""LowRankRNNCell, LowRankLSTMCell, LowRankGRUCell: one step of a recurrence, by two linear children that are called.

Unlike the whole layers, a cell is no fused kernel over a sequence: low-rank children save operations as well as
parameters, and hooks, FLOP counters and quantisers see what they know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._checks import check_choice
from ._linear_parts import check_exact_type, copy_of, dense_parts, linear_over, why_not_expandable

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LowRankGRUCell", "LowRankLSTMCell", "LowRankRNNCell"]

_GATES: Mapping[type[nn.RNNCellBase], int] = {nn.RNNCell: 1, nn.LSTMCell: 4, nn.GRUCell: 3}
_NONLINEARITIES = ("tanh", "relu")


class _LowRankCell(nn.Module):
    """What the three have in common: sizes, and the children ``ih`` and ``hh``."""

    ih: nn.Module
    hh: nn.Module
    input_size: int
    hidden_size: int
    bias: bool

    def _take_(self, cell: nn.RNNCellBase) -> None:
        """Take over the settings and the very parameters of a cell."""
        nn.Module.__init__(self)
        self.input_size, self.hidden_size, self.bias = cell.input_size, cell.hidden_size, cell.bias
        if isinstance(cell, nn.RNNCell):
            self.nonlinearity = cell.nonlinearity
        parameters: dict[str, Any] = cell._parameters
        for child in ("ih", "hh"):
            self.add_module(child, linear_over(parameters[f"weight_{child}"], parameters[f"bias_{child}"]))

    @classmethod
    def _from(cls, cell: Any, expected: type[nn.RNNCellBase]) -> Any:
        check_exact_type(cell, expected)
        reason = why_cell_stays(cell)
        if reason:
            raise ValueError(f"this {expected.__name__} cannot be taken apart: {reason}.")
        taken = cls.__new__(cls)
        taken._take_(cell)
        return taken.train(cell.training)

    def _to(self, expected: type[nn.RNNCellBase], **options: Any) -> Any:
        """Put copies of what the children hold into a new cell of torch."""
        rows = _GATES[expected] * self.hidden_size
        parts = dense_parts(self, {"ih": (rows, self.input_size), "hh": (rows, self.hidden_size)})
        dense: Any = expected(self.input_size, self.hidden_size, bias=self.bias, **options, device="meta")
        for child, (weight, bias) in parts.items():
            if self.bias and bias is None:
                raise ValueError(f"child {child!r} of this {type(self).__name__} has no bias: give it one of zeros.")
            setattr(dense, f"weight_{child}", copy_of(weight))
            setattr(dense, f"bias_{child}", None if bias is None else copy_of(bias))
        return dense.train(self.training)

    def _state(self, input: Tensor, state: Tensor | None, name: str) -> Tensor:  # noqa: A002 - the name in torch
        """Return a state that fits the input: the one given, or zeros."""
        if input.dim() not in {1, 2} or input.shape[-1] != self.input_size:
            raise ValueError(
                f"expected input of shape ({self.input_size},) or (N, {self.input_size}), got {tuple(input.shape)}."
            )
        shape = (*input.shape[:-1], self.hidden_size)
        if state is None:
            return torch.zeros(shape, dtype=input.dtype, device=input.device)
        if tuple(state.shape) != tuple(shape):
            raise ValueError(f"expected {name} of shape {tuple(shape)}, as the input has it, got {tuple(state.shape)}.")
        return state

    def extra_repr(self) -> str:
        """Show the sizes, as the cells of torch do."""
        shown = f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")
        nonlinearity = vars(self).get("nonlinearity", "tanh")
        return shown if nonlinearity == "tanh" else f"{shown}, nonlinearity={nonlinearity}"


class LowRankRNNCell(_LowRankCell):
    r"""One step of an Elman network, what ``nn.RNNCell`` computes, by two children: ``tanh(ih(x) + hh(h))``.

    Args:
        input_size: features of the input.
        hidden_size: features of the state.
        bias: whether there are biases.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device: device of the parameters.
        dtype: floating dtype of the parameters.

    Shape:
        Input ``(N, input_size)`` or ``(input_size,)``, state and output ``(N, hidden_size)`` or ``(hidden_size,)``;
        ``ih.weight`` stands for ``(hidden_size, input_size)``, ``hh.weight`` for ``(hidden_size, hidden_size)``.

    Raises:
        ValueError: if the nonlinearity is unknown.

    Example:
        >>> import torch, torchsmooth
        >>> cell = torchsmooth.LowRankRNNCell.from_cell(torch.nn.RNNCell(10, 20))
        >>> cell.hh = torchsmooth.LowRankLinear.from_linear(cell.hh, rank=4)
        >>> cell(torch.randn(3, 10)).shape
        torch.Size([3, 20])

    Source: Elman, "Finding Structure in Time", 1990.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,  # noqa: FBT001, FBT002 - as in nn.RNNCell
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(nonlinearity, "nonlinearity", _NONLINEARITIES)
        self._take_(nn.RNNCell(input_size, hidden_size, bias, nonlinearity, device, dtype))

    @classmethod
    def from_cell(cls, cell: nn.RNNCell) -> LowRankRNNCell:
        """Take a cell apart; the new one holds its very parameters, and the cell itself is not changed.

        Args:
            cell: exactly an ``nn.RNNCell``.

        Returns:
            A cell of the same settings and mode, with dense children.

        Raises:
            TypeError: if it is of another type, or a subclass.
            ValueError: if it holds more than its own plain weights (pruned, with other parameters, or patched).
        """
        taken: LowRankRNNCell = cls._from(cell, nn.RNNCell)
        return taken

    def to_cell(self) -> nn.RNNCell:
        """Put the children together to an ``nn.RNNCell``; this cell is not changed.

        Returns:
            A cell of its own memory with the same values, settings, mode, dtype, device and ``requires_grad``.

        Raises:
            ValueError: naming the child that is not an ordinary linear layer (restore the dense layers first).
        """
        dense: nn.RNNCell = self._to(nn.RNNCell, nonlinearity=self.nonlinearity)
        return dense

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: A002 - the name in torch
        """Return the next state.

        Args:
            input: ``(N, input_size)`` or ``(input_size,)``, in the dtype of the weights.
            hx: the state before, ``(N, hidden_size)`` or ``(hidden_size,)``; None for zeros.

        Returns:
            The next state, of the shape of ``hx``.

        Raises:
            ValueError: if a shape does not fit.
        """
        hidden = self._state(input, hx, "hx")
        total: Tensor = self.ih(input) + self.hh(hidden)
        return total.tanh() if self.nonlinearity == "tanh" else total.relu()


class LowRankLSTMCell(_LowRankCell):
    r"""One step of a long short-term memory, what ``nn.LSTMCell`` computes, by two children, ``ih`` and ``hh``.

    With the gates :math:`i, f, o = \sigma(\cdot)` and :math:`g = \tanh(\cdot)` of ``ih(x) + hh(h)``: :math:`c' = f c +
    i g`, :math:`h' = o \tanh(c')`. The four gates are stacked to one weight, and share its rank.

    Args:
        input_size: features of the input.
        hidden_size: features of the states.
        bias: whether there are biases.
        device: device of the parameters.
        dtype: floating dtype of the parameters.

    Shape:
        Input ``(N, input_size)`` or ``(input_size,)``, states ``(N, hidden_size)`` or ``(hidden_size,)``;
        ``ih.weight`` stands for ``(4 · hidden_size, input_size)``, ``hh.weight`` for ``(4 · hidden_size,
        hidden_size)``.

    Raises:
        RuntimeError: if a size is negative. (As torch has it.)

    Example:
        >>> import torch, torchsmooth
        >>> cell = torchsmooth.LowRankLSTMCell.from_cell(torch.nn.LSTMCell(10, 20))
        >>> cell.ih = torchsmooth.LowRankLinear.from_linear(cell.ih, rank=4)
        >>> hidden, memory = cell(torch.randn(3, 10))
        >>> hidden.shape, memory.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,  # noqa: FBT001, FBT002 - as in nn.LSTMCell
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._take_(nn.LSTMCell(input_size, hidden_size, bias, device, dtype))

    @classmethod
    def from_cell(cls, cell: nn.LSTMCell) -> LowRankLSTMCell:
        """Take a cell apart; the new one holds its very parameters, and the cell itself is not changed.

        Args:
            cell: exactly an ``nn.LSTMCell``.

        Returns:
            A cell of the same settings and mode, with dense children.

        Raises:
            TypeError: if it is of another type, or a subclass.
            ValueError: if it holds more than its own plain weights (pruned, with other parameters, or patched).
        """
        taken: LowRankLSTMCell = cls._from(cell, nn.LSTMCell)
        return taken

    def to_cell(self) -> nn.LSTMCell:
        """Put the children together to an ``nn.LSTMCell``; this cell is not changed.

        Returns:
            A cell of its own memory with the same values, settings, mode, dtype, device and ``requires_grad``.

        Raises:
            ValueError: naming the child that is not an ordinary linear layer (restore the dense layers first).
        """
        dense: nn.LSTMCell = self._to(nn.LSTMCell)
        return dense

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:  # noqa: A002
        """Return the next hidden and cell states.

        Args:
            input: ``(N, input_size)`` or ``(input_size,)``, in the dtype of the weights.
            hx: those before, each ``(N, hidden_size)`` or ``(hidden_size,)``; None for zeros.

        Returns:
            The next two, of the same shapes.

        Raises:
            ValueError: if a shape does not fit.
        """
        hidden, memory = (self._state(input, None if hx is None else hx[i], f"hx[{i}]") for i in range(2))
        into, forget, new, out = (self.ih(input) + self.hh(hidden)).chunk(4, -1)
        memory = forget.sigmoid() * memory + into.sigmoid() * new.tanh()
        return out.sigmoid() * memory.tanh(), memory


class LowRankGRUCell(_LowRankCell):
    r"""One step of a gated recurrent unit, what ``nn.GRUCell`` computes, by two children, ``ih`` and ``hh``.

    With :math:`r, z = \sigma(\cdot)` of ``ih(x) + hh(h)`` and :math:`n = \tanh(\cdot)` of ``ih(x) + r · hh(h)``:
    :math:`h' = (1 - z) n + z h`. The three gates are stacked to one weight, and share its rank.

    Args:
        input_size: features of the input.
        hidden_size: features of the state.
        bias: whether there are biases.
        device: device of the parameters.
        dtype: floating dtype of the parameters.

    Shape:
        Input ``(N, input_size)`` or ``(input_size,)``, state and output ``(N, hidden_size)`` or ``(hidden_size,)``;
        ``ih.weight`` stands for ``(3 · hidden_size, input_size)``, ``hh.weight`` for ``(3 · hidden_size,
        hidden_size)``.

    Raises:
        RuntimeError: if a size is negative. (As torch has it.)

    Example:
        >>> import torch, torchsmooth
        >>> cell = torchsmooth.LowRankGRUCell.from_cell(torch.nn.GRUCell(10, 20))
        >>> cell.ih = torchsmooth.LowRankLinear.from_linear(cell.ih, rank=4)
        >>> cell(torch.randn(10)).shape
        torch.Size([20])

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,  # noqa: FBT001, FBT002 - as in nn.GRUCell
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._take_(nn.GRUCell(input_size, hidden_size, bias, device, dtype))

    @classmethod
    def from_cell(cls, cell: nn.GRUCell) -> LowRankGRUCell:
        """Take a cell apart; the new one holds its very parameters, and the cell itself is not changed.

        Args:
            cell: exactly an ``nn.GRUCell``.

        Returns:
            A cell of the same settings and mode, with dense children.

        Raises:
            TypeError: if it is of another type, or a subclass.
            ValueError: if it holds more than its own plain weights (pruned, with other parameters, or patched).
        """
        taken: LowRankGRUCell = cls._from(cell, nn.GRUCell)
        return taken

    def to_cell(self) -> nn.GRUCell:
        """Put the children together to an ``nn.GRUCell``; this cell is not changed.

        Returns:
            A cell of its own memory with the same values, settings, mode, dtype, device and ``requires_grad``.

        Raises:
            ValueError: naming the child that is not an ordinary linear layer (restore the dense layers first).
        """
        dense: nn.GRUCell = self._to(nn.GRUCell)
        return dense

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: A002 - the name in torch
        """Return the next state.

        Args:
            input: ``(N, input_size)`` or ``(input_size,)``, in the dtype of the weights.
            hx: the state before, ``(N, hidden_size)`` or ``(hidden_size,)``; None for zeros.

        Returns:
            The next state, of the shape of ``hx``.

        Raises:
            ValueError: if a shape does not fit.
        """
        hidden = self._state(input, hx, "hx")
        from_input, from_hidden = self.ih(input), self.hh(hidden)
        (reset, update, new), (reset_h, update_h, new_h) = from_input.chunk(3, -1), from_hidden.chunk(3, -1)
        candidate = (new + (reset + reset_h).sigmoid() * new_h).tanh()
        state: Tensor = candidate + (update + update_h).sigmoid() * (hidden - candidate)
        return state


def why_cell_stays(cell: nn.RNNCellBase) -> str:
    """Say why an ``nn.RNNCell``, ``nn.LSTMCell`` or ``nn.GRUCell`` cannot be taken apart; empty if it can."""
    nonlinearity = vars(cell).get("nonlinearity", "tanh")
    if nonlinearity not in _NONLINEARITIES:
        return f"its nonlinearity is {nonlinearity!r}, which torch has not"
    rows = _GATES[type(cell)] * cell.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, cell.input_size), "weight_hh": (rows, cell.hidden_size)}
    if cell.bias:
        shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
    return why_not_expandable(cell, shapes)
