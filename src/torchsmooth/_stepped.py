"""Steps of optimizers, told to whom keeps something that was made of the parameters.

A fused optimizer writes to parameters without a new version of them, so that a step must be seen when it is made.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from torch.optim import Optimizer


class Keeper(Protocol):
    """Whoever keeps something that was made of parameters."""

    def made_of(self) -> Iterable[Tensor]:
        """Return those."""

    def outdate_(self) -> None:
        """Take note that they were changed."""


# No WeakSet: that cannot be copied while another thread adds to it.
_keepers: set[weakref.ref[Keeper]] = set()
_is_registered = False


def watch_steps_(keeper: Keeper) -> None:
    """Have somebody told of the steps of any optimizer, until the first one that changes what it was made of."""
    global _is_registered  # noqa: PLW0603 - torch has one list of hooks for the whole process, too
    _keepers.add(weakref.ref(keeper, _keepers.discard))
    if not _is_registered:
        _is_registered = True
        register_optimizer_step_post_hook(_tell)


def _tell(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[Any, Any]) -> None:
    if not _keepers:
        return
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    # Those without a gradient were passed over; if no one has any, the step itself may have ended in zero_grad.
    stepped = {id(one) for one in parameters if one.grad is not None} or set(map(id, parameters))
    for known in _keepers.copy():
        keeper = known()
        if keeper is not None and any(id(one) in stepped for one in keeper.made_of()):
            keeper.outdate_()
            _keepers.discard(known)
