"""Whether the fused kernels can run, and why not: asked at every call, so Triton is imported only where it is used."""

from __future__ import annotations

import functools
import os

import torch

_SWITCH = "TORCHSMOOTH_FUSED"
_OLDEST = (8, 0)  # compute capability: the first with bfloat16 products
# A tile of the intermediate has to fit into registers and shared memory: 512 numbers in half precision, 256 in single.
_MOST_BYTES = 1024


def why_unavailable(device: torch.device) -> str | None:
    """Say why there is no kernel on a device, or ``None`` where there is one."""
    if os.environ.get(_SWITCH) == "0":
        return f"{_SWITCH}=0 turns them off"
    if device.type == "cpu":
        if not _interpreting():
            return "on the CPU only Triton's interpreter runs them: set TRITON_INTERPRET=1 before the first call"
    elif device.type != "cuda":
        return f"they run on CUDA devices, not on {device.type!r}"
    elif not torch.cuda.is_available():
        return "torch finds no CUDA device"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST:
        return "they need a GPU of compute capability 8.0 or later"
    problem, interpreted = _triton()
    if problem is None and device.type == "cpu" and not interpreted:
        return "Triton was imported to compile: set TRITON_INTERPRET=1 before the first call"
    return problem


def has_kernel(device: torch.device, dtype: torch.dtype, rank: int) -> bool:
    """Tell whether a product of this rank is computed by a kernel; otherwise it is by two calls."""
    if dtype not in {torch.float32, torch.bfloat16, torch.float16} or rank * dtype.itemsize > _MOST_BYTES:
        return False
    return why_unavailable(device) is None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes", "y"}


@functools.cache
def _triton() -> tuple[str | None, bool]:
    """Import the kernels: what went wrong, and whether they are interpreted. Neither changes in a process."""
    try:
        from ._triton_tiles import INTERPRETED  # noqa: PLC0415 - needed here only
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton", False
    return None, INTERPRETED
