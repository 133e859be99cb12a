"""How much faster than an SVD is the gradient of the nuclear norm, by each method?

The gradient is the polar factor U Vᵀ of the weight. Against ``torch.linalg.svd`` of the weight in single precision,
which is what autograd through ``torch.linalg.matrix_norm(ord="nuc")`` needs at least, are timed: ``"svd"``, the
reference in double precision; ``"eigh"``, the default on a CPU; and the matrix products, the default on a GPU, there
also replayed as a CUDA graph. The last columns say how far from one a singular value of the factor is at most; a square
matrix has some that are too small for the products (below 1e-3 of the largest, about).

    python benchmarks/polar.py --write
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from harness import graphed, median_seconds, parse_arguments, publish
from tqdm import tqdm

from torchsmooth._polar import nuclear_norms_and_polars

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

METHODS = ("svd", "eigh", "polar_express", "polar_express_bf16")
# Layers of a ResNet-18 and of a ViT-B/16, and eight like the first at once.
SHAPES = ((1, 64, 576), (1, 256, 2304), (1, 512, 4608), (1, 768, 768), (1, 3072, 768), (8, 64, 576))


def defect(polars: Tensor) -> float:
    """Return how far from one a singular value of a factor is, at most."""
    return float((torch.linalg.svdvals(polars.double()) - 1).abs().max())


def measure(shape: tuple[int, int, int], device: str, runs: int) -> list[str]:
    """Time every method on matrices of one shape, as initialised for training: a row of the table."""
    batch, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    matrices = (torch.randn(shape, generator=generator) * (2.0 / columns) ** 0.5).to(device)
    calls: dict[str, Callable[[], object]] = {
        "torch.linalg.svd": partial(torch.linalg.svd, matrices, full_matrices=False)
    }
    calls |= {method: partial(nuclear_norms_and_polars, matrices, method) for method in METHODS}
    if device.startswith("cuda"):
        calls |= {f"{method}, graph": graphed(calls[method]) for method in METHODS[2:]}
    seconds = dict(zip(calls, median_seconds(list(calls.values()), device, runs), strict=True))
    user = seconds.pop("torch.linalg.svd")
    row = [f"{batch} × {rows} × {columns}", f"{user * 1e3:.1f} ms" if device.startswith("cuda") else "1"]
    row += [f"{user / one:.1f} ×" for one in seconds.values()]
    return row + [f"{defect(nuclear_norms_and_polars(matrices, method)[1]):.0e}" for method in METHODS[1:]]


def main() -> None:
    """Print how many times faster than an SVD each method is."""
    arguments = parse_arguments(__doc__ or "")
    with torch.no_grad():
        rows = [measure(shape, arguments.device, arguments.runs) for shape in tqdm(SHAPES, disable=None)]
    graphs = [f"{method}, graph" for method in METHODS[2:]] if arguments.device.startswith("cuda") else []
    header = ["matrices", "torch.linalg.svd", *METHODS, *graphs, *(f"defect of {method}" for method in METHODS[1:])]
    title = (
        "The gradient of the nuclear norm: how many times faster than torch.linalg.svd in float32 (medians of one run)"
    )
    publish("polar", title, header, rows, arguments)


if __name__ == "__main__":
    main()
