"""Adding gradients of penalties to those that the backward pass has left in the parameters of an optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from ._registered import Registered

_LOST = (
    "the gradient cannot be sent on to the parameters that these tensors are computed from: {}. They must be computed "
    "anew when they are read, as torch.nn.utils.parametrize does: use torch.nn.utils.parametrizations.weight_norm or "
    "spectral_norm, not the functions without s; call prune.remove where a mask was put on; and step outside of "
    "parametrize.cached()."
)


class Gradients:
    """The gradients of one evaluation of the penalties, on their way to an optimizer's parameters.

    Args:
        optimizer: only its parameters get gradients; those that it maximises, of the other sign.
        factor: what all gradients are multiplied with.

    Attributes:
        sign: of the value of the penalties in what the optimizer minimises or maximises.
    """

    def __init__(self, optimizer: Optimizer, factor: float) -> None:
        groups = [(-1.0 if group.get("maximize") else 1.0, group["params"]) for group in optimizer.param_groups]
        self._trained = {id(one): (one, sign) for sign, group in groups for one in group if one.requires_grad}
        self.sign = max((sign for sign, _ in groups), default=1.0)
        self._factor = factor
        # A GradScaler leaves it to fused optimizers to unscale the gradients, which are still scaled here.
        self._scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        self._computed: dict[int, tuple[Registered, Tensor]] = {}

    def wanted(self, one: Registered) -> bool:
        """Tell whether a gradient for a tensor would reach a parameter; of a computed tensor, whether it could.

        Raises:
            ValueError: if it was computed without gradients, from what is trained.
        """
        tensor = one.tensor
        if tensor.requires_grad:
            return not tensor.is_leaf or id(tensor) in self._trained
        # Parameters that are frozen, and buffers, are not computed.
        if any(id(source) in self._trained for use in one.uses for source in use.known_sources()):
            raise ValueError(_LOST.format(one.label))
        return False

    def add(self, one: Registered, gradient: Tensor, strength: float) -> None:
        """Add strength × gradient for a tensor that is wanted."""
        tensor, gradient = one.tensor, one.gradient_of_tensor(gradient)
        if self._scale is not None:
            gradient = gradient * self._scale.to(gradient.device)
        if tensor.is_leaf:
            _accumulate(tensor, gradient, self._trained[id(tensor)][1] * self._factor * strength)
            return
        before = self._computed.get(id(tensor))
        total = torch.zeros_like(tensor) if before is None else before[1]
        self._computed[id(tensor)] = (one, total.add_(gradient, alpha=self._factor * strength))

    def finish(self) -> None:
        """Send the gradients of computed tensors on to the parameters that they are computed from."""
        parameters = [one for one, _ in self._trained.values()]
        if not self._computed or not parameters:
            return
        tensors = [one.tensor for one, _ in self._computed.values()]
        try:
            found = torch.autograd.grad(
                tensors, parameters, [gradient for _, gradient in self._computed.values()], allow_unused=True
            )
        except RuntimeError as error:
            labels = ", ".join(one.label for one, _ in self._computed.values())
            raise ValueError(_LOST.format(labels)) from error
        with torch.no_grad():
            for (parameter, sign), gradient in zip(self._trained.values(), found, strict=True):
                if gradient is not None:
                    _accumulate(parameter, gradient, sign)


def _accumulate(parameter: Tensor, gradient: Tensor, factor: float) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, requires_grad=False).add_(gradient, alpha=factor)
    elif parameter.grad.layout != torch.strided:  # of a sparse embedding: autograd, too, makes the sum dense
        parameter.grad = (factor * gradient).to(parameter.grad.dtype) + parameter.grad
    else:
        parameter.grad.add_(gradient, alpha=factor)
