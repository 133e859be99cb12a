"""What the low-rank recurrent layers share: children instead of parameters, and weights listed when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._linear_parts import check_exact_type, copy_of, dense_parts, linear_over, multiplied_out, why_not_expandable

if TYPE_CHECKING:
    from collections.abc import Iterator

_SETTINGS = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")
_MORE_SETTINGS = ("mode", "dropout", "proj_size", "nonlinearity")  # the last of nn.RNN alone
# What to say of a layer that runs, and is never called.
FUSED = "part of a fused recurrent layer"
_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


class LowRankRecurrent(nn.RNNBase):
    """A recurrent layer of torch without parameters of its own: its kernel is given the weights of its children.

    The forward pass is that of the class of torch, which asks for ``_flat_weights``; what there keeps such a list up to
    date has nothing to do here.
    """

    def take_(self, layer: nn.RNNBase) -> None:
        """Take over the settings and the very parameters of a layer."""
        nn.Module.__init__(self)
        for name in (*_SETTINGS, *_MORE_SETTINGS):
            if name in vars(layer):
                setattr(self, name, vars(layer)[name])
        parameters: dict[str, Any] = layer._parameters
        for child in _shapes(layer):
            self.add_module(child, linear_over(parameters[f"weight_{child}"], parameters.get(f"bias_{child}")))

    @classmethod
    def taken_from(cls, layer: Any, expected: type[nn.RNNBase]) -> Any:
        """Take a layer of one exact type of torch apart, or say why not."""
        check_exact_type(layer, expected)
        reason = why_recurrent_stays(layer)
        if reason:
            raise ValueError(f"this {expected.__name__} cannot be taken apart: {reason}.")
        taken = cls.__new__(cls)
        taken.take_(layer)
        return taken.train(layer.training)

    def put_together(self, expected: type[nn.RNNBase], **options: Any) -> Any:
        """Put copies of what the children hold into a new layer of torch."""
        parts = dense_parts(self, _shapes(self))
        settings = {name: getattr(self, name) for name in _SETTINGS}
        dense: Any = expected(**settings, **options, device="meta")
        dense.dropout = self.dropout  # torch warns of it in a single layer, as it did when this one was made
        for name in _flat_names(self):
            kind, child = name.split("_", 1)
            own = parts[child][kind == "bias"]
            if own is None:
                raise ValueError(f"child {child!r} of this {type(self).__name__} has no bias: give it one of zeros.")
            setattr(dense, name, copy_of(own))
        dense._init_flat_weights()
        return dense.train(self.training)

    def _flat_weight(self, name: str) -> Tensor:
        """Return one of the tensors that a layer of torch has under a name like ``weight_hh_l0``."""
        kind, child = name.split("_", 1)
        module = getattr(self, child)
        if kind == "weight":
            return multiplied_out(module, type(self).__name__, child)
        bias: Tensor | None = module.bias
        if bias is None:
            raise ValueError(f"child {child!r} of this {type(self).__name__} has no bias: give it one of zeros.")
        return bias

    @property
    def _flat_weights(self) -> list[Tensor]:  # type: ignore[override]
        return [self._flat_weight(name) for name in _flat_names(self)]

    @property
    def all_weights(self) -> list[list[Tensor]]:  # type: ignore[override]
        """The weights and biases of each layer and direction, low-rank ones multiplied out. Read-only, never kept."""
        flat = self._flat_weights
        size = len(flat) // (self.num_layers * (1 + self.bidirectional))
        return [flat[start : start + size] for start in range(0, len(flat), size)]

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:  # noqa: A002 - the name in torch
        """Refuse an input of another dtype, or of other sizes, without multiplying anything out."""
        own = next(self.parameters()).dtype
        if input.dtype != own and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(f"expected input of the weights' {own}, got {input.dtype}: convert one of them by .to().")
        axes = 3 if batch_sizes is None else 2
        if input.dim() != axes or input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"expected input of {axes} axes, the last of size {self.input_size}, got shape {tuple(input.shape)}."
            )

    def flatten_parameters(self) -> None:
        """Do nothing: the weights are made anew at each call, and models call this before each."""

    def _init_flat_weights(self) -> None:
        """Do nothing: there is no list to keep."""

    def _update_flat_weights(self) -> None:
        """Do nothing: there is no list to keep."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]

    def _replicate_for_data_parallel(self) -> Any:
        return nn.Module._replicate_for_data_parallel(self)  # type: ignore[no-untyped-call]


def fused_parts(model: nn.Module) -> set[nn.Module]:
    """Return the layers whose weights are given to a kernel that computes many of them at once."""
    return {part for one in model.modules() if isinstance(one, nn.RNNBase) for part in one.children()}


def why_recurrent_stays(layer: nn.RNNBase) -> str:
    """Say why an ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` cannot be taken apart; empty if it can."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _flat_names(layer):
        kind, child = name.split("_", 1)
        rows, columns = _shapes(layer)[child]
        shapes[name] = (rows, columns) if kind == "weight" else (rows,)
    return why_not_expandable(layer, shapes)


def _cells(layer: nn.RNNBase) -> Iterator[tuple[str, int]]:
    """Yield what the names of a cell's weights end in, and the features of its input."""
    hidden = layer.proj_size or layer.hidden_size
    for number in range(layer.num_layers):
        features = layer.input_size if number == 0 else hidden * (1 + layer.bidirectional)
        for direction in ("", "_reverse")[: 1 + layer.bidirectional]:
            yield f"l{number}{direction}", features


def _shapes(layer: nn.RNNBase) -> dict[str, tuple[int, int]]:
    """Return the shapes of the weights, by the names of the children that hold them."""
    shapes: dict[str, tuple[int, int]] = {}
    rows = _GATES[layer.mode] * layer.hidden_size
    for cell, features in _cells(layer):
        shapes[f"ih_{cell}"] = rows, features
        shapes[f"hh_{cell}"] = rows, layer.proj_size or layer.hidden_size
        if layer.proj_size:
            shapes[f"hr_{cell}"] = layer.proj_size, layer.hidden_size
    return shapes


def _flat_names(layer: nn.RNNBase) -> Iterator[str]:
    """Yield the names that torch has for the weights, in the order in which its kernels take them."""
    for cell, _ in _cells(layer):
        yield from (f"weight_ih_{cell}", f"weight_hh_{cell}")
        if layer.bias:
            yield from (f"bias_ih_{cell}", f"bias_hh_{cell}")
        if layer.proj_size:
            yield f"weight_hr_{cell}"
