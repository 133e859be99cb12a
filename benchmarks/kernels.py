"""Is a fused kernel faster than two calls of cuBLAS or cuDNN, and how far is it from what the chip allows?

Low-rank layers of ViT-B/16, of a Llama-like block and of the stages of a ResNet-18, at the ranks that leave 30 % of a
layer's parameters (10 % in the Llama-like block: at more, the kernel leaves the products to two calls). Each is timed
as two calls and as one, eagerly and as a CUDA graph. The limit is the roofline: the time to move input, output and
factors once, or to do the multiply-adds, whichever is longer, at the bandwidth of a large copy and the rate of a large
matrix product in the same run. TF32 is off.

On the CPU nothing is timed: the kernels run in Triton's interpreter, on small shapes, and their errors are printed.

    python benchmarks/kernels.py --write
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from harness import graphed, make_parser, median_seconds, publish_tables, read_arguments
from tqdm import tqdm

from torchsmooth import fused
from torchsmooth._fused_availability import has_kernel

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from torch import Tensor

BATCHES = (1, 8, 64, 256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_COPIED = 1 << 30  # bytes of the copy that the bandwidth is taken from
_SIDE = 8192  # of the matrix product that the rate is taken from


@dataclass(frozen=True)
class Case:
    """A low-rank layer and its input.

    Attributes:
        name: what it is part of.
        inside: features or channels of the input.
        outside: those of the output.
        kept: the fraction of the layer's parameters that the factors have.
        rows: inputs of a linear layer, for each sample of the batch.
        side: of the images that a convolution is given; 0 for a linear layer.
        batch: samples.
    """

    name: str
    inside: int
    outside: int
    kept: float = 0.3
    rows: int = 1
    side: int = 0
    batch: int = 1

    @property
    def taps(self) -> int:
        """Entries of the kernel: 3×3 for a convolution."""
        return 9 if self.side else 1

    @property
    def rank(self) -> int:
        """The largest multiple of eight that keeps no more than asked for."""
        inner = self.inside * self.taps
        return max(8, int(self.kept * inner * self.outside / (inner + self.outside)) // 8 * 8)

    @property
    def positions(self) -> int:
        """How often the layer is evaluated."""
        return self.batch * (self.side**2 if self.side else self.rows)

    def operands(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Draw input, factors and bias, of a size that keeps the outputs near one."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, fan_in: int = 1) -> Tensor:
            return (torch.randn(shape, generator=generator) / fan_in**0.5).to(device=device, dtype=dtype)

        inner, rank = self.inside * self.taps, self.rank
        if not self.side:
            shapes = ((rank, inner), (self.outside, rank))
            given = normal(self.batch * self.rows, inner)
        else:
            shapes = ((rank, self.inside, 3, 3), (self.outside, rank, 1, 1))
            given = normal(self.batch, self.inside, self.side, self.side).to(memory_format=torch.channels_last)
        down, up = normal(*shapes[0], fan_in=inner), normal(*shapes[1], fan_in=rank)
        if self.side:
            down = down.to(memory_format=torch.channels_last)
        return [given, down, up, normal(self.outside)]

    def two_calls(self, given: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        """Compute the layer as two."""
        if self.side:
            return F.conv2d(F.conv2d(given, down, padding=1), up, bias)
        return F.linear(F.linear(given, down), up, bias)

    def one_call(self, given: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        """Compute the layer by the fused operator."""
        if self.side:
            return fused.low_rank_conv2d(given, down, up, bias, padding=1)
        return fused.low_rank_linear(given, down, up, bias)

    def limit(self, size: int, bandwidth: float, rate: float) -> float:
        """Return the seconds that the layer takes at least; ``size`` is of a number, in bytes."""
        inner = self.inside * self.taps
        moved = self.positions * (self.inside + self.outside) + self.rank * (inner + self.outside)
        operations = 2 * self.positions * self.rank * (inner + self.outside)
        return max(size * moved / bandwidth, operations / rate)


CASES = (
    Case("ViT-B/16, attention out", 768, 768, rows=197),
    Case("ViT-B/16, attention in", 768, 2304, rows=197),
    Case("ViT-B/16, MLP in", 768, 3072, rows=197),
    Case("ViT-B/16, MLP out", 3072, 768, rows=197),
    Case("Llama-like, attention, one token", 4096, 4096, kept=0.1),
    Case("Llama-like, attention", 4096, 4096, kept=0.1, rows=128),
    Case("Llama-like, MLP in", 4096, 11008, kept=0.1, rows=128),
    Case("ResNet-18, stage 1", 64, 64, side=56),
    Case("ResNet-18, stage 2", 128, 128, side=28),
    Case("ResNet-18, stage 3", 256, 256, side=14),
    Case("ResNet-18, stage 4", 512, 512, side=7),
)
SMALL = (
    Case("linear", 40, 50, kept=0.5, rows=33),
    Case("linear", 100, 70, kept=0.9, rows=5),
    Case("convolution", 20, 30, kept=0.3, side=7),
    Case("convolution", 8, 40, kept=1.0, side=5),
)


def error(case: Case, operands: list[Tensor]) -> float:
    """Return how far one call is from float64 at most, over the largest output."""
    exact = case.two_calls(*(one.double() for one in operands))
    return float((case.one_call(*operands).double() - exact).abs().max() / exact.abs().max())


def peaks(dtype: torch.dtype, device: str, runs: int) -> tuple[float, float]:
    """Measure bytes moved and floating-point operations done in a second."""
    # Random numbers: with zeros a chip draws less power, and is faster than it ever will be with data.
    source = torch.randint(256, (_COPIED,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    square = torch.randn(_SIDE, _SIDE, dtype=dtype, device=device)
    copying, multiplying = median_seconds(
        [partial(target.copy_, source), partial(torch.mm, square, square)], device, runs
    )
    return 2 * _COPIED / copying, 2 * _SIDE**3 / multiplying


def measure(case: Case, dtype: torch.dtype, bandwidth: float, rate: float, arguments: argparse.Namespace) -> list[str]:
    """Time a layer as two calls and as one: a row of the table."""
    device, operands = arguments.device, case.operands(dtype, arguments.device)
    calls: list[Callable[[], object]] = [partial(case.two_calls, *operands), partial(case.one_call, *operands)]
    if device.startswith("cuda"):
        for call in calls:  # what is tuned at the first call has to be before it is recorded
            call()
        calls += [graphed(call) for call in calls]
    else:
        calls += calls
    *eager, two, one = median_seconds(calls, device, arguments.runs)
    limit = case.limit(dtype.itemsize, bandwidth, rate)
    milliseconds = [f"{1e3 * seconds:.4f}" for seconds in (*eager, two, one, limit)]
    row = [case.name, str(dtype).removeprefix("torch."), str(case.batch), str(case.rank), *milliseconds]
    return [*row, f"{two / one:.2f} ×", f"{100 * limit / one:.0f} %", f"{error(case, operands):.0e}"]


def time_all(arguments: argparse.Namespace) -> None:
    """Print times on a GPU."""
    rows, found = [], []
    device = torch.device(arguments.device)
    for name in tqdm(arguments.dtypes, disable=None):
        dtype = DTYPES[name]
        bandwidth, rate = peaks(dtype, arguments.device, arguments.runs)
        found.append(f"{name}: {bandwidth / 1e9:.0f} GB/s, {rate / 1e12:.1f} TFLOP/s")
        cases = [case for case in CASES if has_kernel(device, dtype, case.rank)]
        for case in tqdm(
            [replace(case, batch=batch) for case in cases for batch in arguments.batches], disable=None, leave=False
        ):
            rows.append(measure(case, dtype, bandwidth, rate, arguments))  # noqa: PERF401 - each takes its time
    header = [
        "layer",
        "dtype",
        "batch",
        "rank",
        "two calls, ms",
        "fused, ms",
        "two calls, graph, ms",
        "fused, graph, ms",
    ]
    header += ["limit, ms", "graph over graph", "of the limit", "error"]
    title = f"Fused kernels against two calls, and against the roofline ({'; '.join(found)})"
    publish_tables("kernels", title, (), {"": (header, rows)}, arguments)


def check_all(arguments: argparse.Namespace) -> None:
    """Print errors of small layers in Triton's interpreter."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    reason = fused.why_unavailable("cpu")
    if reason is not None:
        print(f"Nothing is timed without a GPU, and the kernels cannot be checked here: {reason}.")
        return
    rows = []
    for case in SMALL:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = error(case, case.operands(dtype, "cpu"))
            shape = f"{case.inside} → {case.rank} → {case.outside}"
            name = str(dtype).removeprefix("torch.")
            rows.append([case.name, shape, name, f"{found:.1e}", f"{torch.finfo(dtype).eps:.1e}"])
    title = (
        "No GPU here, so nothing is timed: errors of the fused kernels in Triton's interpreter, over the largest output"
    )
    header = ["layer", "in → rank → out", "dtype", "error", "rounding of the dtype"]
    publish_tables("kernels", title, (), {"": (header, rows)}, arguments)


def main() -> None:
    """Time the kernels on a GPU, or check them on the CPU."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each candidate, after one that is not")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = read_arguments(parser)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        if not arguments.device.startswith("cuda"):
            check_all(arguments)
        elif (reason := fused.why_unavailable(arguments.device)) is not None:
            print(f"The fused kernels cannot run here: {reason}.")
        else:
            time_all(arguments)


if __name__ == "__main__":
    main()
