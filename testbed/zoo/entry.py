"""One architecture of the zoo: how to build it, what to feed it, and how to read what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Entry:
    """An architecture with random weights.

    Attributes:
        name: the package that it is from and its name there, such as ``"torchvision/resnet18"``.
        family: what it is for, in a word.
        builder: makes the model; it draws its weights from the global random state, as torch does.
        feed: ``feed(training)`` to the positional and the keyword arguments of a call.
        ratio: fraction of the parameters to remove.
        note: how it differs from the published one, or why the ratio is another than 0.5; empty if neither.
        counts_vary: whether the length of its outputs depends on the weights, as the number of found objects does.
    """

    name: str
    family: str
    builder: Callable[[], nn.Module]
    feed: Callable[[bool], tuple[tuple[Any, ...], dict[str, Any]]]
    ratio: float = 0.5
    note: str = ""
    counts_vary: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        """Build the model with the weights that a seed gives; the global random state is put back."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.builder()

    def run(self, model: nn.Module, seed: int = 0) -> list[Tensor]:
        """Run the model on its inputs in the mode that it is in, and list all tensors of what it returns.

        Args:
            model: as :meth:`build` makes it, or that after compression.
            seed: of what it draws on the way, such as dropout; the global random state is put back.

        Returns:
            The tensors, in the order of the output.
        """
        arguments, keywords = self.feed(model.training)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return tensors_of(model(*arguments, **keywords))


def tensors_of(value: Any) -> list[Tensor]:
    """List the tensors inside nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for one in value for tensor in tensors_of(one)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Draw token numbers, none of them below 5, where the special ones are."""
    return torch.randint(5, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
