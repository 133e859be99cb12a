"""Waiting, for a while, until all ranks have come to the same call, before any of them talks to another.

A collective that not every rank enters hangs for as long as the process group allows, half an hour by default, and what
follows it is out of step. The store under the process group can be asked without waiting, so it is where ranks meet.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

# Seconds for which a rank waits for the others.
PATIENCE = 120.0

_SHOWN = 8  # ranks that an error names
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1  # seconds between two looks


def await_all(group: ProcessGroup | None) -> None:
    """Return on every rank of a group when all of them have come here.

    Raises:
        RuntimeError: on those that have come, if others do not within :data:`PATIENCE`. A later call starts afresh.
    """
    store = _store()
    if store is None:  # a backend that keeps none, such as MPI
        return
    own, ranks = dist.get_rank(), dist.get_process_group_ranks(group)
    place = f"torchsmooth/{hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]}"
    # A meeting at which somebody gave up is over for all, so that nobody is kept by one who has left.
    while _outcome(store, meeting := f"{place}/{_add(store, f'{place}/meetings of {own}', 0)}") == "off":
        _add(store, f"{place}/meetings of {own}", 1)
    _add(store, f"{place}/meetings of {own}", 1)
    _add(store, f"{meeting}/rank {own}", 1)
    arrived = _add(store, f"{meeting}/arrived", 1)
    end, pause = time.monotonic() + PATIENCE, _FIRST_PAUSE
    outcome = ""
    while not outcome:
        if arrived == len(ranks):
            outcome = _decide(store, meeting, "on")
        elif time.monotonic() > end:
            outcome = _decide(store, meeting, "off")
        else:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            outcome = _outcome(store, meeting)
            arrived = _add(store, f"{meeting}/arrived", 0)
    if outcome == "off":
        missing = [rank for rank in ranks if not _add(store, f"{meeting}/rank {rank}", 0)]
        raise RuntimeError(
            f"svd_compress_ was called on rank {own}, but within {PATIENCE:g} s not on rank {_listed(missing)}. It "
            "shares the work among the ranks, so every rank of the process group has to call it, not only `if rank == "
            "0`. To compress on one rank alone, use plan_compression(model, ratio).apply_(model), which talks to "
            "nobody. If the others only need longer, wait for them first with torch.distributed.barrier(). The model "
            "is unchanged."
        )


def _listed(ranks: list[int]) -> str:
    more = len(ranks) - _SHOWN
    return ", ".join(map(str, ranks[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _store() -> Store | None:
    # Not public, but the only way to the store that init_process_group made, in all versions of torch so far.
    find: Any = getattr(dist.distributed_c10d, "_get_default_store", None)
    store: Store | None = None if find is None else find()
    return store


def _add(store: Store, key: str, amount: int) -> int:
    # Adding is the one operation that is atomic, waits for nobody and is known to every kind of store.
    return int(store.add(key, amount))


def _decide(store: Store, meeting: str, outcome: str) -> str:
    """Propose how a meeting ends, and return how it does: the first proposal counts."""
    if _add(store, f"{meeting}/decided", 1) == 1:
        store.set(f"{meeting}/outcome", outcome)
    return _outcome(store, meeting)


def _outcome(store: Store, meeting: str) -> str:
    """Return how a meeting has ended, empty if it has not."""
    return store.get(f"{meeting}/outcome").decode() if _add(store, f"{meeting}/decided", 0) else ""
