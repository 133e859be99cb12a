"""LowRankRNN, LowRankLSTM, LowRankGRU: recurrent layers whose weights are children, so that each can be low-rank.

The layers of torch keep raw weights and give all of them to one fused kernel. These do the same, with the weights of
their children, ``nn.Linear`` or whatever takes its place: low-rank ones are multiplied out at each call. That saves
parameters, not operations, and keeps every feature of the kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ._recurrent import LowRankRecurrent

if TYPE_CHECKING:
    import torch

__all__ = ["LowRankGRU", "LowRankLSTM", "LowRankRNN"]


class LowRankRNN(LowRankRecurrent, nn.RNN):
    r"""An Elman network, ``nn.RNN``, whose weights are children.

    :math:`h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})`, in ``num_layers`` layers, one direction or two.

    Made new, its children are dense; :meth:`from_recurrent` takes the weights of a trained layer, and compression puts
    ``LowRankLinear`` layers in the places of children. They are not called: their weights are multiplied out and given
    to torch's own kernel, which saves parameters, not operations. (On CUDA, cuDNN copies the weights together at each
    call.)

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        num_layers: number of layers, each on the output of the one before.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether there are biases.
        batch_first: whether batches are ``(N, L, features)``, not ``(L, N, features)``.
        dropout: probability in [0, 1] with which an output of a layer but the last is dropped in training.
        bidirectional: whether there is a second network for the sequence from its end.
        device: device of the parameters.
        dtype: floating dtype of the parameters.

    Shape:
        Inputs and outputs as of ``nn.RNN``. For each layer k the children ``ih_lk``, whose weight stands for
        ``(hidden_size, features of its input)``, and ``hh_lk``, ``(hidden_size, hidden_size)``; ``ih_lk_reverse`` and
        ``hh_lk_reverse`` for the other direction.

    Raises:
        TypeError: if a size is not an integer, or a flag not a bool.
        ValueError: if a size is not positive, or another option out of its range. (Both as torch has them.)

    Example:
        >>> import torch, torchsmooth
        >>> layer = torchsmooth.LowRankRNN.from_recurrent(torch.nn.RNN(10, 20))
        >>> layer.hh_l0 = torchsmooth.LowRankLinear.from_linear(layer.hh_l0, rank=4)
        >>> output, hidden = layer(torch.randn(7, 3, 10))
        >>> output.shape, hidden.shape
        (torch.Size([7, 3, 20]), torch.Size([1, 3, 20]))

    Source: Elman, "Finding Structure in Time", 1990.
    """

    def __init__(  # noqa: PLR0917 - as in nn.RNN
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,  # noqa: FBT001, FBT002
        batch_first: bool = False,  # noqa: FBT001, FBT002
        dropout: float = 0.0,
        bidirectional: bool = False,  # noqa: FBT001, FBT002
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.take_(
            nn.RNN(
                input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional,
                device=device, dtype=dtype,
            )
        )  # fmt: skip

    @classmethod
    def from_recurrent(cls, layer: nn.RNN) -> LowRankRNN:
        """Take a layer apart; the new one holds its very parameters, and the layer itself is not changed.

        Args:
            layer: exactly an ``nn.RNN``.

        Returns:
            A layer of the same settings and mode, with dense children.

        Raises:
            TypeError: if it is of another type, or a subclass.
            ValueError: if it holds more than its own plain weights (pruned, with other parameters, or patched).
        """
        taken: LowRankRNN = cls.taken_from(layer, nn.RNN)
        return taken

    def to_recurrent(self) -> nn.RNN:
        """Put the children together to an ``nn.RNN``; this layer is not changed.

        Returns:
            A layer of its own memory with the same values, settings, mode, dtype, device and ``requires_grad``.

        Raises:
            ValueError: naming the child that is not an ordinary linear layer (restore the dense layers first).
        """
        dense: nn.RNN = self.put_together(nn.RNN, nonlinearity=self.nonlinearity)
        return dense


class LowRankLSTM(LowRankRecurrent, nn.LSTM):
    r"""A long short-term memory, ``nn.LSTM``, whose weights are children.

    With the gates :math:`i, f, o = \sigma(\cdot)` and :math:`g = \tanh(\cdot)` of :math:`W_{ih} x_t + b_{ih} +
    W_{hh} h_{t-1} + b_{hh}`: :math:`c_t = f c_{t-1} + i g` and :math:`h_t = o \tanh(c_t)`, of which ``proj_size`` makes
    :math:`W_{hr} h_t`.

    The four gates of a layer are stacked to one weight, and share its rank. Made new, its children are dense;
    :meth:`from_recurrent` takes the weights of a trained layer, and compression puts ``LowRankLinear`` layers in the
    places of children. They are not called: their weights are multiplied out and given to torch's own kernel, which
    saves parameters, not operations. (On CUDA, cuDNN copies the weights together at each call.)

    Args:
        input_size: features of the input.
        hidden_size: features of the cell, and of the hidden state unless it is projected.
        num_layers: number of layers, each on the output of the one before.
        bias: whether there are biases.
        batch_first: whether batches are ``(N, L, features)``, not ``(L, N, features)``.
        dropout: probability in [0, 1] with which an output of a layer but the last is dropped in training.
        bidirectional: whether there is a second network for the sequence from its end.
        proj_size: features that the hidden state is projected to, fewer than ``hidden_size``; 0 for no projection.
        device: device of the parameters.
        dtype: floating dtype of the parameters.

    Shape:
        Inputs and outputs as of ``nn.LSTM``. For each layer k the children ``ih_lk``, whose weight stands for
        ``(4 · hidden_size, features of its input)``, ``hh_lk``, ``(4 · hidden_size, features of the hidden state)``,
        and with ``proj_size`` also ``hr_lk``, ``(proj_size, hidden_size)``; ``ih_lk_reverse`` and so on for the other
        direction.

    Raises:
        TypeError: if a size is not an integer, or a flag not a bool.
        ValueError: if a size is not positive, or another option out of its range. (Both as torch has them.)

    Example:
        >>> import torch, torchsmooth
        >>> layer = torchsmooth.LowRankLSTM.from_recurrent(torch.nn.LSTM(10, 20, batch_first=True))
        >>> layer.ih_l0 = torchsmooth.LowRankLinear.from_linear(layer.ih_l0, rank=4)
        >>> output, (hidden, cell) = layer(torch.randn(3, 7, 10))
        >>> output.shape, cell.shape
        (torch.Size([3, 7, 20]), torch.Size([1, 3, 20]))

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; ``proj_size``: Sak et al., 2014.
    """

    def __init__(  # noqa: PLR0917 - as in nn.LSTM
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,  # noqa: FBT001, FBT002
        batch_first: bool = False,  # noqa: FBT001, FBT002
        dropout: float = 0.0,
        bidirectional: bool = False,  # noqa: FBT001, FBT002
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.take_(
            nn.LSTM(
                input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
            )
        )

    @classmethod
    def from_recurrent(cls, layer: nn.LSTM) -> LowRankLSTM:
        """Take a layer apart; the new one holds its very parameters, and the layer itself is not changed.

        Args:
            layer: exactly an ``nn.LSTM``.

        Returns:
            A layer of the same settings and mode, with dense children.

        Raises:
            TypeError: if it is of another type, or a subclass.
            ValueError: if it holds more than its own plain weights (pruned, with other parameters, or patched).
        """
        taken: LowRankLSTM = cls.taken_from(layer, nn.LSTM)
        return taken

    def to_recurrent(self) -> nn.LSTM:
        """Put the children together to an ``nn.LSTM``; this layer is not changed.

        Returns:
            A layer of its own memory with the same values, settings, mode, dtype, device and ``requires_grad``.

        Raises:
            ValueError: naming the child that is not an ordinary linear layer (restore the dense layers first).
        """
        dense: nn.LSTM = self.put_together(nn.LSTM, proj_size=self.proj_size)
        return dense


class LowRankGRU(LowRankRecurrent, nn.GRU):
    r"""A network of gated recurrent units, ``nn.GRU``, whose weights are children.

    With :math:`r, z = \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})` and :math:`n = \tanh(W_{in} x_t + b_{in}
    + r (W_{hn} h_{t-1} + b_{hn}))`: :math:`h_t = (1 - z) n + z h_{t-1}`.

    The three gates of a layer are stacked to one weight, and share its rank. Made new, its children are dense;
    :meth:`from_recurrent` takes the weights of a trained layer, and compression puts ``LowRankLinear`` layers in the
    places of children. They are not called: their weights are multiplied out and given to torch's own kernel, which
    saves parameters, not operations. (On CUDA, cuDNN copies the weights together at each call.)

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        num_layers: number of layers, each on the output of the one before.
        bias: whether there are biases.
        batch_first: whether batches are ``(N, L, features)``, not ``(L, N, features)``.
        dropout: probability in [0, 1] with which an output of a layer but the last is dropped in training.
        bidirectional: whether there is a second network for the sequence from its end.
        device: device of the parameters.
        dtype: floating dtype of the parameters.

    Shape:
        Inputs and outputs as of ``nn.GRU``. For each layer k the children ``ih_lk``, whose weight stands for
        ``(3 · hidden_size, features of its input)``, and ``hh_lk``, ``(3 · hidden_size, hidden_size)``;
        ``ih_lk_reverse`` and ``hh_lk_reverse`` for the other direction.

    Raises:
        TypeError: if a size is not an integer, or a flag not a bool.
        ValueError: if a size is not positive, or another option out of its range. (Both as torch has them.)

    Example:
        >>> import torch, torchsmooth
        >>> layer = torchsmooth.LowRankGRU.from_recurrent(torch.nn.GRU(10, 20, bidirectional=True))
        >>> layer.hh_l0_reverse = torchsmooth.LowRankLinear.from_linear(layer.hh_l0_reverse, rank=4)
        >>> layer(torch.randn(7, 3, 10))[0].shape
        torch.Size([7, 3, 40])

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014.
    """

    def __init__(  # noqa: PLR0917 - as in nn.GRU
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,  # noqa: FBT001, FBT002
        batch_first: bool = False,  # noqa: FBT001, FBT002
        dropout: float = 0.0,
        bidirectional: bool = False,  # noqa: FBT001, FBT002
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.take_(
            nn.GRU(
                input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                device=device, dtype=dtype,
            )
        )  # fmt: skip

    @classmethod
    def from_recurrent(cls, layer: nn.GRU) -> LowRankGRU:
        """Take a layer apart; the new one holds its very parameters, and the layer itself is not changed.

        Args:
            layer: exactly an ``nn.GRU``.

        Returns:
            A layer of the same settings and mode, with dense children.

        Raises:
            TypeError: if it is of another type, or a subclass.
            ValueError: if it holds more than its own plain weights (pruned, with other parameters, or patched).
        """
        taken: LowRankGRU = cls.taken_from(layer, nn.GRU)
        return taken

    def to_recurrent(self) -> nn.GRU:
        """Put the children together to an ``nn.GRU``; this layer is not changed.

        Returns:
            A layer of its own memory with the same values, settings, mode, dtype, device and ``requires_grad``.

        Raises:
            ValueError: naming the child that is not an ordinary linear layer (restore the dense layers first).
        """
        dense: nn.GRU = self.put_together(nn.GRU)
        return dense
