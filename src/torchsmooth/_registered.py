"""What is registered in a model: each tensor with its penalties, tied tensors together, and how to read it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._checks import quoted
from ._computed import sources_of
from ._sharded import is_sharded, part_like, sharded_for, whole
from ._weight import Weight

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from .penalties import Penalty

# A plain attribute of a module, with its penalties by the name of the tensor.
ATTRIBUTE = "_torchsmooth_penalties"

# Layers whose weight `smooth_` finds by itself, and their subclasses (a parametrized layer is one).
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Embedding, *_CONVOLUTIONS, *_TRANSPOSED)

# Steps of a path that are not of the model's own: none, and what torch.compile and checkpoint_wrapper put in between.
_WRAPPERS = ("", "_orig_mod", "_checkpoint_wrapped_module")

# Tensors of these that are laid out alike: beside the weight, what pruning and the older weight_norm compute it from.
_LAID_OUT_ALIKE = ("weight", "weight_orig", "weight_v")


def penalties_of(module: nn.Module) -> dict[str, tuple[Penalty, ...]]:
    """Return what is registered on a module itself."""
    penalties: dict[str, tuple[Penalty, ...]] = module.__dict__.get(ATTRIBUTE, {})
    return penalties


def key_of(penalty: Penalty) -> object:
    """Return what equal penalties share: themselves, or class and attributes; without a hash, the identity.

    The equality of a dataclass knows its fields. A class derived from one, and no dataclass itself, inherits that, and
    may have attributes beyond these: all of them count then.
    """
    kind = type(penalty)
    key = penalty if "__eq__" in vars(kind) else (kind, frozenset(vars(penalty).items()))
    try:
        hash(key)
    except TypeError:
        return id(penalty)
    return key


def label_of(module: nn.Module, tensor_name: str, qualified_name: str = "") -> str:
    """Name a tensor in an error."""
    owner = f"{qualified_name!r} ({type(module).__name__})" if qualified_name else type(module).__name__
    return f"tensor {tensor_name!r} of {owner}"


def name_of(qualified_name: str, tensor_name: str) -> str:
    """Name a tensor by the path to it; ``torch.compile`` and activation checkpointing do not change the name."""
    path = [*qualified_name.split("."), tensor_name]
    return ".".join(part for part in path if part not in _WRAPPERS)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of DataParallel, its distributed kind and torch.compile: tensors and names are its."""
    while True:
        wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        inner = model.module if wrapped else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def padding_row(module: nn.Module, rows: int) -> int | None:
    """Return the row of a table of so many that pads an embedding, and is never trained."""
    padding = module.padding_idx if isinstance(module, nn.Embedding) else None
    return None if padding is None else padding % rows


def without_row(tensor: Tensor, row: int | None) -> Tensor:
    """Leave a row out."""
    return tensor if row is None else torch.cat([tensor[:row], tensor[row + 1 :]])


@dataclass(frozen=True)
class Use:
    """One registration: a tensor, as the module that it was registered on sees it."""

    qualified_name: str
    module: nn.Module
    tensor_name: str

    @property
    def name(self) -> str:
        """The qualified name of the tensor."""
        return name_of(self.qualified_name, self.tensor_name)

    def geometry(self, rows: int) -> tuple[int, bool, int | None]:
        """Return the groups, whether the weight is laid out as transposed, and the row that is never trained."""
        if self.tensor_name in _LAID_OUT_ALIKE:
            if isinstance(self.module, (*_CONVOLUTIONS, *_TRANSPOSED)):
                return self.module.groups, isinstance(self.module, _TRANSPOSED), None
            return 1, False, padding_row(self.module, rows)
        return 1, False, None

    def parameter(self) -> nn.Parameter | None:
        """Return the parameter that the tensor is, if it is one."""
        return self.module._parameters.get(self.tensor_name)

    def sources(self) -> list[nn.Parameter]:
        """Return the parameter that the tensor is, or those that it may be computed from; nothing is computed."""
        own = self.parameter()
        if own is not None:
            return [own]
        return self.known_sources() or list(self.module.parameters())

    def known_sources(self) -> list[nn.Parameter]:
        """Return the parameters that a tensor is computed from, by parametrizations or hooks of torch; else none."""
        # Pruning and the older norms set a plain attribute.
        module, name = self.module, self.tensor_name
        is_computed = parametrize.is_parametrized(module, name) or name in vars(module)
        return sources_of(module, name) if is_computed else []


@dataclass(frozen=True, eq=False)
class Registered:
    """One tensor under one penalty, with every place in which it is registered.

    It holds the tensor, so that the id of a freshly computed (parametrized) one is not given out again.
    """

    tensor: Tensor
    penalty: Penalty
    uses: list[Use] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The qualified name of the tensor, in its first place."""
        return self.uses[0].name

    @property
    def label(self) -> str:
        """What to call it in an error."""
        first = self.uses[0]
        return f"{type(self.penalty).__name__} on {label_of(first.module, first.tensor_name, first.qualified_name)}"

    @property
    def sharded(self) -> bool:
        """Whether the tensor is divided among processes."""
        return is_sharded(self.tensor)

    def weight(self) -> Weight:
        """Return what is penalised; a sharded tensor is gathered."""
        if self.tensor.dim() < 2:  # noqa: PLR2004 - it had two axes when it was registered
            raise ValueError(
                f"its shape is {tuple(self.tensor.shape)} now, as that of a part in FullyShardedDataParallel, which "
                "cannot be put together again: use fully_shard, the newer way to shard."
            )
        tensor = without_row(whole(self.tensor), self._untrained())
        groups, transposed, _ = self.uses[0].geometry(len(self.tensor))
        return Weight(tensor, groups, transposed)

    def gradient_of_tensor(self, gradient: Tensor) -> Tensor:
        """Turn the gradient of :meth:`weight` into that of the tensor; of a sharded one, into the part kept here."""
        untrained = self._untrained()
        if untrained is not None:
            gradient = torch.cat(
                [gradient[:untrained], gradient.new_zeros(1, *gradient.shape[1:]), gradient[untrained:]]
            )
        return part_like(gradient, self.tensor)

    def _untrained(self) -> int | None:
        """A row that pads an embedding; it is trained after all where the weight is also, say, the output layer's."""
        rows = {use.geometry(len(self.tensor))[2] for use in self.uses}
        return rows.pop() if len(rows) == 1 else None


def uses_in(model: nn.Module) -> Iterator[tuple[Use, Penalty]]:
    """Yield every registration in a model, whatever its strength, in the order of its modules; nothing is computed."""
    for name, module in model.named_modules():
        for tensor_name, penalties in penalties_of(module).items():
            for penalty in penalties:
                yield Use(name, module, tensor_name), penalty


def checked_names(names: Collection[str], model: nn.Module, penalty: Penalty) -> set[str]:
    """Return those of the tensors in a state that carry the penalty now.

    Args:
        names: qualified names, of tensors that carried it when the state was made.
        model: the model that the state is loaded for.
        penalty: whose state it is.

    Raises:
        ValueError: if the model has no tensor of such a name.
    """
    there = {
        name_of(qualified_name, tensor_name)
        for qualified_name, module in model.named_modules()
        for tensor_name in _tensors_by(module, {name.rpartition(".")[2] for name in names})
    }
    unknown = set(names) - there
    if unknown:
        raise ValueError(
            f"the state of {penalty} is that of another model: {quoted(unknown)} carry no such penalty in this one."
        )
    return set(names) & names_under(model, penalty)


def names_under(model: nn.Module, penalty: Penalty) -> set[str]:
    """Return the qualified names of the tensors that carry a penalty."""
    return {use.name for use, one in uses_in(model) if key_of(one) == key_of(penalty)}


def _tensors_by(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of some names that a module has something by; what is computed is not computed for it."""
    own = vars(module).keys() | module._parameters.keys() | module._buffers.keys()
    return [name for name in names if name in own or hasattr(type(module), name)]


def registered_in(model: nn.Module) -> list[Registered]:
    """Gather what is registered in a model, with a strength above zero, in the order of its modules."""
    found: dict[tuple[int, object], Registered] = {}
    model = unwrapped(model)
    sharded = sharded_for(model)
    for name, module in model.named_modules():
        for tensor_name, penalties in penalties_of(module).items():
            tensor = getattr(module, tensor_name)
            tensor = sharded.get(id(tensor), tensor)
            for penalty in penalties:
                if penalty.strength > 0.0:
                    one = found.setdefault((id(tensor), key_of(penalty)), Registered(tensor, penalty))
                    one.uses.append(Use(name, module, tensor_name))
    return list(found.values())


def together(registered: Iterable[Registered]) -> list[list[Registered]]:
    """Put tensors under one penalty and on one device together; those that have to be gathered stay alone."""
    groups: dict[object, list[Registered]] = {}
    for one in registered:
        groups.setdefault(one if one.sharded else (key_of(one.penalty), one.tensor.device), []).append(one)
    return list(groups.values())


@contextmanager
def naming(many: Sequence[Registered]) -> Iterator[None]:
    """Have an error name the tensor on which the penalty could not be evaluated."""
    try:
        yield
    except (TypeError, ValueError) as error:
        one = many[0] if len(many) == 1 else next(filter(_fails, many), many[0])
        kind = TypeError if isinstance(error, TypeError) else ValueError  # a subclass may take other arguments
        raise kind(f"{one.label}: {error}") from error


def _fails(one: Registered) -> bool:
    try:
        tensor, groups, transposed = one.weight()
        one.penalty.value_and_gradient(tensor, groups=groups, transposed=transposed)
    except (TypeError, ValueError):
        return True
    return False
