"""Work divided among processes that hold the same model: who does what, and how all of them get the results.

Planning and factoring are written against :class:`Team` and know nothing of ``torch.distributed``. A process on its own
is :data:`ALONE`, for which every step is a plain loop or nothing at all.

Among :class:`Ranks`, every step is an exchange of one form, in which a rank tells either its results or its failure. So
a rank may fail anywhere: it tells so instead of its next results, all others hear it at their next exchange, whichever
that is, and every rank raises. Tensors are sent right after an exchange in which nobody had failed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed as dist

from ._arrival import await_all
from ._checks import describe
from ._progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

_Result = TypeVar("_Result")


class Team:
    """One process, which does everything itself.

    Attributes:
        rank: its place among the processes that share the work.
        numbers: what the user calls each of them: global ranks.
    """

    rank = 0
    numbers: Sequence[int] = (0,)

    def __enter__(self) -> None:
        """Begin; what is raised from here on reaches all ranks."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """End, by an error or not."""

    def shown(self, show: bool | None) -> bool | None:  # noqa: FBT001 - three states
        """Say whether this process shows progress: the first one speaks for all."""
        return show

    def divide(self, costs: Mapping[str, int]) -> dict[str, int]:
        """Give each piece of work to a rank, by name, so that the costs are about even; the same on all ranks."""
        return dict.fromkeys(costs, 0)

    def share(
        self,
        owners: Mapping[str, int],
        work: Callable[[str], _Result],
        label: str = "",
        *,
        show: bool | None = False,
    ) -> dict[str, _Result]:
        """Do what is this rank's and get the rest from the others, pickled; its own comes back as it is.

        Args:
            owners: who does what; the same on all ranks.
            work: a piece of work, by name.
            label: what progress is called.
            show: whether to show it.
        """
        return {name: work(name) for name in progress(owners, label, enabled=show)}

    def first(self, work: Callable[[], _Result]) -> _Result:
        """Let the first rank do something, and give all of them what comes out, pickled."""
        return work()

    def gather(self, value: _Result) -> list[_Result]:
        """Return what every rank has, in order of rank, pickled."""
        return [value]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over the ranks, in place; of the same shapes on all of them."""

    def take_(self, tensors: Iterable[tuple[Tensor, int]]) -> None:
        """Fill each tensor with what its owner has in it; of the same shapes and dtypes on all ranks."""


ALONE = Team()


def team_of(process_group: Any, model: Any) -> Team:
    """Assemble the ranks that share a compression; this process alone, if there is no process group.

    Args:
        process_group: what the user gave; None for the default group, where there is one.
        model: the model, which says on which device the ranks talk, if that has to be an accelerator.

    Raises:
        TypeError: if it is not a process group.
        ValueError: if this process is not in it.
        RuntimeError: if another rank does not come.
    """
    initialised = dist.is_available() and dist.is_initialized()
    if process_group is None:
        return Ranks.assemble(dist.group.WORLD, model) if initialised else ALONE
    if initialised and process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "this process is not in process_group: call svd_compress_ only on the ranks that the group was made of."
        )
    if not initialised or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that is initialised (of a DeviceMesh: "
            f"mesh.get_group()), or None, got {describe(process_group)}."
        )
    return Ranks.assemble(process_group, model)


class Ranks(Team):
    """The processes of a process group.

    Tensors travel on the CPU where the group has a backend for it, otherwise on this rank's accelerator.

    Args:
        group: at least one process.
        model: says which accelerator is this rank's: without one, it is the current one.
    """

    def __init__(self, group: ProcessGroup | None, model: nn.Module) -> None:
        self._group = group
        self.rank, self.numbers = dist.get_rank(group), dist.get_process_group_ranks(group)
        kinds = [one.split(":")[0] for one in dist.get_backend_config(group).split(",")]
        self._device = torch.device("cpu" if "cpu" in kinds else kinds[0])
        self._current: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._device.type == "cuda":
            # Pickled results go by the current device, which may still be that of another rank.
            own = [one.device for one in model.parameters() if one.device.type == "cuda"]
            self._device = own[0] if own else torch.device("cuda", torch.cuda.current_device())
            self._current = torch.cuda.device(self._device)
        self._silent = False  # whether others can no longer be talked to: they know of a failure, or are gone

    @classmethod
    def assemble(cls, group: ProcessGroup | None, model: Any) -> Team:
        """Wait for all processes of a group."""
        if dist.get_world_size(group) == 1:
            return ALONE
        await_all(group)
        return cls(group, model if isinstance(model, torch.nn.Module) else torch.nn.Module())

    def __enter__(self) -> None:
        """Begin; what is raised from here on reaches all ranks."""
        self._current.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Tell the others of an error that they have not heard of."""
        try:
            if error is not None and not self._silent:
                self._exchange(None, error)
        finally:
            self._current.__exit__(kind, error, at)

    def shown(self, show: bool | None) -> bool | None:  # noqa: FBT001 - three states
        """Say whether this process shows progress: the first one speaks for all."""
        return show if self.rank == 0 else False

    def divide(self, costs: Mapping[str, int]) -> dict[str, int]:
        """Give each piece of work, the dearest first, to the rank with the least so far."""
        loads = [0] * len(self.numbers)
        owners = {}
        for name in sorted(costs, key=lambda one: -costs[one]):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += costs[name]
        return {name: owners[name] for name in costs}

    def share(
        self,
        owners: Mapping[str, int],
        work: Callable[[str], _Result],
        label: str = "",
        *,
        show: bool | None = False,
    ) -> dict[str, _Result]:
        """Do what is this rank's and get the rest from the others."""
        self._check_same(owners)
        own = [name for name, owner in owners.items() if owner == self.rank]
        done = {name: work(name) for name in progress(own, label, enabled=show)}
        everywhere = self._exchange(done)
        return {name: done[name] if owner == self.rank else everywhere[owner][name] for name, owner in owners.items()}

    def first(self, work: Callable[[], _Result]) -> _Result:
        """Let the first rank do something, and give all of them what comes out."""
        value: Any = work() if self.rank == 0 else None
        others: _Result = self._exchange(value)[0]
        return value if self.rank == 0 else others

    def gather(self, value: _Result) -> list[_Result]:
        """Return what every rank has."""
        return self._exchange(value)

    @torch.no_grad()
    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over the ranks."""
        sums = [(one, one.detach().to(self._device, copy=True).contiguous()) for one in tensors if one.numel()]
        self._exchange(None)
        for tensor, sent in sums:
            self._collective(dist.all_reduce, sent)
            tensor.copy_(sent)

    @torch.no_grad()
    def take_(self, tensors: Iterable[tuple[Tensor, int]]) -> None:
        """Fill each tensor with what its owner has in it."""
        listed = list(tensors)
        self._exchange(None)
        for tensor, owner in listed:
            if tensor.numel():
                sent = tensor.detach().to(self._device).contiguous()
                # As bytes, since not every backend knows every dtype.
                self._collective(dist.broadcast, sent.flatten().view(torch.uint8), src=self.numbers[owner])
                if owner != self.rank:
                    tensor.copy_(sent)

    def _check_same(self, names: Iterable[str]) -> None:
        """Refuse to share work of which the ranks have different ideas."""
        first, *others = self._exchange(set(names))
        for number, theirs in zip(self.numbers[1:], others, strict=True):
            if theirs != first:
                name = min(theirs ^ first)
                does, does_not = (number, self.numbers[0]) if name in theirs else (self.numbers[0], number)
                raise ValueError(
                    f"layer {name!r} can be compressed on rank {does} but not on rank {does_not}: filter_fn has to "
                    "answer alike, and the models have to be the same, on every rank."
                )

    def _exchange(self, value: _Result, error: BaseException | None = None) -> list[_Result]:
        """Tell all ranks a value, or an error, and hear theirs.

        Raises:
            TypeError, ValueError, RuntimeError: if another rank tells an error, and this one does not.
        """
        told = (value, "" if error is None else f"{type(error).__name__}: {error}", _kind_of(error))
        heard: list[Any] = [None] * len(self.numbers)
        self._collective(dist.all_gather_object, heard, told)
        for number, (_, failure, kind) in zip(self.numbers, heard, strict=True):
            if failure:
                self._silent = True  # everybody has heard it, and nobody will exchange anything more
                if error is None:
                    raise kind(
                        f"svd_compress_ failed on rank {number}, so that no rank has compressed its model; there: "
                        f"{failure}"
                    )
        return [one for one, _, _ in heard]

    def _collective(self, operation: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        # If this raises, a connection is lost or it was interrupted, and telling that to the others would only hang.
        silent, self._silent = self._silent, True
        operation(*args, **kwargs, group=self._group)
        self._silent = silent


def _kind_of(error: BaseException | None) -> type[Exception]:
    """Return what an error on another rank is raised as: wrong arguments as such, all else as a RuntimeError."""
    return next((kind for kind in (ValueError, TypeError) if isinstance(error, kind)), RuntimeError)
