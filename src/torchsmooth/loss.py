"""The sum of all registered penalties, as a term of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import check_module
from ._registered import Registered, naming, registered_in, together
from ._sharded import settle
from .penalties import added

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

__all__ = ["penalty_loss"]


def penalty_loss(model: nn.Module) -> Tensor:
    """Add up strength × penalty over everything registered in a model.

    Add it to the loss of each step; :func:`torchsmooth.attach_` does the same at less cost. A weight that is shared
    between layers counts once for each different penalty. The row of an Embedding's ``padding_idx``, which is never
    trained, is left out (unless the penalty is on another layer, too, that shares it). A parametrized weight is read as
    in a forward pass: that of ``spectral_norm`` takes one more power iteration, in training mode. With ``fully_shard``,
    call it on every process, before or after the forward pass; one layer at a time is gathered, and the sharded
    parameters are what is penalised, in their own dtype.

    Args:
        model: a module; wrapped (DataParallel, DistributedDataParallel, torch.compile) or not.

    Returns:
        A differentiable scalar, in float32 or the wider dtype of the weights, on the device of the first penalised
        weight. With nothing registered: zero, on the device of the model's first parameter.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if a penalty cannot be evaluated; the layer is named.

    Example:
        >>> import torch, torchsmooth
        >>> layer = torch.nn.Linear(4, 3)
        >>> with torch.no_grad():
        ...     _ = layer.weight.fill_(1.0)
        >>> model = torchsmooth.smooth_(torch.nn.Sequential(layer), torchsmooth.FirstDerivative(0.1))
        >>> torchsmooth.penalty_loss(model).item()  # constant along the channels
        0.0

    Source: Runkel et al., "Smooth Model Compression without Fine-Tuning", 2025 (arXiv 2505.24469).
    """
    check_module(model)
    terms = [many[0].penalty.strength * _total(many) for many in together(registered_in(model))]
    if terms:
        return added(terms)
    anywhere = next(model.parameters(), None)
    return torch.zeros((), dtype=torch.float32, device="cpu" if anywhere is None else anywhere.device)


def _total(many: Sequence[Registered]) -> Tensor:
    """Add up one penalty over many tensors."""
    with naming(many):
        if many[0].sharded:
            value: Tensor = _ShardedPenalty.apply(many[0].tensor, many[0])  # type: ignore[no-untyped-call]
            return value
        return many[0].penalty.total([one.weight() for one in many])


class _ShardedPenalty(torch.autograd.Function):
    """A penalty on a tensor that is divided among processes: of the gradient, only the part kept here is kept.

    By autograd alone, the graph would hold every gathered weight until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, one: Registered) -> Tensor:  # noqa: ARG004 - autograd sees the tensor
        weight, groups, transposed = one.weight()
        value, gradient = one.penalty.value_and_gradient(weight, groups=groups, transposed=transposed)
        ctx.save_for_backward(one.gradient_of_tensor(gradient.to(one.tensor.dtype)))
        ctx.tensor = one.tensor
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None]:
        settle(ctx.tensor)
        return grad_value * ctx.saved_tensors[0], None
