"""Layers that are none of torch's plain ones, and how they are written in those: a registry that users can extend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ._checks import check_function, describe
from ._source_layer import PLAIN_LAYERS
from .attention import LowRankMultiheadAttention
from .recurrent import LowRankGRU, LowRankLSTM, LowRankRNN
from .recurrent_cells import LowRankGRUCell, LowRankLSTMCell, LowRankRNNCell

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["register_layer"]


@dataclass(frozen=True)
class LayerType:
    """How one type of layer is written in plain layers, and back.

    Attributes:
        expand: the layer to an equivalent module of plain layers, which shares its memory.
        collapse: the way back, where all layers are dense again; None if there is none.
    """

    expand: Callable[[Any], nn.Module]
    collapse: Callable[[Any], nn.Module] | None


_TYPES: dict[type[nn.Module], LayerType] = {
    nn.MultiheadAttention: LayerType(LowRankMultiheadAttention.from_attention, LowRankMultiheadAttention.to_attention),
    nn.RNN: LayerType(LowRankRNN.from_recurrent, LowRankRNN.to_recurrent),
    nn.LSTM: LayerType(LowRankLSTM.from_recurrent, LowRankLSTM.to_recurrent),
    nn.GRU: LayerType(LowRankGRU.from_recurrent, LowRankGRU.to_recurrent),
    nn.RNNCell: LayerType(LowRankRNNCell.from_cell, LowRankRNNCell.to_cell),
    nn.LSTMCell: LayerType(LowRankLSTMCell.from_cell, LowRankLSTMCell.to_cell),
    nn.GRUCell: LayerType(LowRankGRUCell.from_cell, LowRankGRUCell.to_cell),
}


def layer_type(module: nn.Module) -> LayerType | None:
    """Return what is registered for the exact type of a module."""
    return layer_type_of(type(module))


def layer_type_of(kind: type[nn.Module]) -> LayerType | None:
    """Return what is registered for a type."""
    return _TYPES.get(kind)


def layer_type_called(name: str) -> LayerType | None:
    """Return what is registered for a type, by the name that :func:`name_of_type` gives it."""
    return next((known for kind, known in _TYPES.items() if name_of_type(kind) == name), None)


def name_of_type(kind: type[nn.Module]) -> str:
    """Return what identifies a type beyond this process."""
    return f"{kind.__module__}.{kind.__qualname__}"


def register_layer(
    layer_type: type[nn.Module],
    expand: Callable[[Any], nn.Module],
    collapse: Callable[[Any], nn.Module] | None = None,
) -> None:
    """Let layers of a type of your own be compressed: say how they are written in plain layers of torch.

    ``svd_compress_`` factors the plain layers that ``expand`` returns, and puts the result where the layer was; a layer
    of which nothing was compressed stays the very object that it was. ``load_compressed_`` expands where a state dict
    has the factors, ``restore_dense_`` collapses again. Attention and recurrent layers of torch are known in this way.

    Registration is by exact type: a subclass may use its weight in another way, and has to be registered itself.
    Registering a type again replaces what was said before.

    Args:
        layer_type: the class.
        expand: takes a layer, returns an equivalent module: a plain layer (``nn.Linear``, ``nn.Conv1d/2d/3d``,
            ``nn.ConvTranspose1d/2d/3d``, ``nn.Embedding``), or a module of yours that *calls* such children. Make the
            new parameters views of the layer's (``nn.Parameter(layer.weight.T)``), or the very same objects; the layer
            itself must not be changed. A ``ValueError`` says why this one cannot be compressed: it stays dense, and the
            report gives the message.
        collapse: takes what ``expand`` returned, with its layers dense, returns a layer of ``layer_type`` with
            memory of its own. None: ``restore_dense_`` leaves the plain layers.

    Returns:
        Nothing.

    Raises:
        TypeError: if ``layer_type`` is not a class of modules, or one of the functions cannot be called with a
            layer.
        ValueError: if ``layer_type`` is a plain layer itself.

    Example:
        A linear layer with the weight as (in, out), like the ``Conv1D`` of Hugging Face's GPT-2:

        >>> import torch, torchsmooth
        >>> class Conv1D(torch.nn.Module):
        ...     def __init__(self, outputs, inputs):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(inputs, outputs))
        ...         self.bias = torch.nn.Parameter(torch.zeros(outputs))
        ...     def forward(self, x):
        ...         return x @ self.weight + self.bias
        >>> def as_linear(layer):
        ...     linear = torch.nn.Linear(*layer.weight.shape, device="meta")
        ...     linear.weight, linear.bias = torch.nn.Parameter(layer.weight.T), layer.bias
        ...     return linear
        >>> def as_conv1d(linear):
        ...     layer = Conv1D(linear.out_features, linear.in_features)
        ...     layer.weight, layer.bias = torch.nn.Parameter(linear.weight.T.contiguous()), linear.bias
        ...     return layer
        >>> torchsmooth.register_layer(Conv1D, as_linear, as_conv1d)
        >>> model = torch.nn.Sequential(Conv1D(32, 16))
        >>> report = torchsmooth.svd_compress_(model, 0.5)
        >>> report["0"].type, type(model[0]).__name__, type(torchsmooth.restore_dense_(model)[0]).__name__
        ('Conv1D', 'LowRankLinear', 'Conv1D')
    """
    given: object = layer_type
    if not isinstance(given, type) or not issubclass(given, nn.Module):
        raise TypeError(f"layer_type must be a class of torch.nn.Module, got {describe(layer_type)}.")
    for name, function in (("expand", expand), ("collapse", collapse)):
        if name == "expand" or function is not None:
            check_function(function, name, "a layer", 1)
    if layer_type in PLAIN_LAYERS:
        raise ValueError(f"layer_type must not be a plain layer, got {layer_type.__name__}: it is known already.")
    _TYPES[layer_type] = LayerType(expand, collapse)
