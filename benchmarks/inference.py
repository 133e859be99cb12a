"""How much faster is a compressed model, and how much of what it saves in multiply-adds is that?

Each model is timed dense and compressed at several ratios: for each target of a plan, as it comes and after ``tune_``;
and at equal ranks (scheme ``channel``, form ``factored``) beside the layers of others (`peers.py`). All candidates of
one ratio and one batch are timed in turn, in one run. What cannot be made, compiled or held in memory, or takes too
long, is said in the table.

On a CPU a few models are measured by default, which takes some minutes; ``--all`` takes everything.

    python benchmarks/inference.py --write
    python benchmarks/inference.py --models resnet50_224 --batches 1 8 --ratios 0.7 --dtypes bfloat16 --modes eager
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import sys
import types
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from harness import alternating_seconds, graphed, make_parser, once, publish_tables, read_arguments
from inference_candidates import DENSE, EQUAL, FOLDED, GROUPS, PACKED, Candidate, Subject
from peers import PEERS
from timed_models import ABOUT_WEIGHTS, MODELS
from tqdm import tqdm

from torchsmooth._execution import Execution

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("eager", "compile", "graphs")
BATCHES = (1, 8, 64, 256)
RATIOS = (0.5, 0.7, 0.9)


class Cell(NamedTuple):
    """Times of one candidate, in seconds for one batch."""

    median: float
    lower: float
    upper: float


class Setting(NamedTuple):
    """One table: a model, and how it is run."""

    model: str
    dtype: str
    mode: str


class Run(NamedTuple):
    """What is measured in a setting."""

    batches: Sequence[int]
    ratios: Sequence[float]


# What fits in some minutes on two cores.
ON_CPU: dict[Setting, Run] = {
    Setting("resnet18_cifar", "float32", "eager"): Run((1, 8, 64), (0.7,)),
    Setting("resnet18_w16/plain", "float32", "eager"): Run((1, 8, 64), (0.7,)),
    Setting("resnet50_224", "float32", "eager"): Run((1,), (0.7,)),
    Setting("vit_b_16_224", "float32", "eager"): Run((1,), (0.7,)),
    Setting("llama_block_1024", "float32", "eager"): Run((1, 8), (0.7,)),
    Setting("llama_block_1024", "float32", "compile"): Run((1,), (0.7,)),
}


def settings_of(arguments: argparse.Namespace) -> dict[Setting, Run]:
    """List what is to be measured: the defaults of the device, or all, as far as the options say nothing else."""
    given = (arguments.models, arguments.batches, arguments.ratios, arguments.dtypes, arguments.modes)
    on_cuda = arguments.device.startswith("cuda")
    if not (on_cuda or arguments.all or any(given)):
        return ON_CPU
    modes = [mode for mode in arguments.modes or MODES if on_cuda or mode != "graphs"]
    tables = itertools.product(arguments.models or MODELS, arguments.dtypes or DTYPES, modes)
    run = Run(arguments.batches or BATCHES, arguments.ratios or RATIOS)
    return {Setting(*one): run for one in tables}


def prepared(candidate: Candidate, mode: str, pool: object) -> Callable[[], object]:
    """Return a function that runs a candidate once on its inputs."""
    model, inputs = candidate.model, candidate.inputs
    if mode == "eager" or model is None:
        return partial(_call, model, inputs)
    if mode == "graphs":
        return graphed(partial(_call, model, inputs), pool)
    compiled = torch.compile(apart(model), dynamic=False)
    return partial(_call, compiled, inputs)


def apart(model: nn.Module) -> Callable[[Tensor], object]:
    """Wrap a model in a function with code of its own.

    What was compiled is kept with the code, and looked up there by trying one after the other: models of one class
    would slow each other down, and soon be too many.
    """

    def run(inputs: Tensor) -> object:
        return model(inputs)

    return types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)


def _call(run: Callable[[Tensor], object], inputs: Tensor) -> None:
    with torch.no_grad():
        run(inputs)


def measure(candidates: list[Candidate], mode: str, arguments: argparse.Namespace) -> dict[str, Cell]:
    """Time candidates in turn; what fails is left out, with the reason noted in the candidate."""
    calls: dict[str, Callable[[], object]] = {}
    pool = torch.cuda.graph_pool_handle() if mode == "graphs" else None
    for one in candidates:
        if one.problem:
            continue
        try:
            call = prepared(one, mode, pool)
            call()  # compiles
            taken = once(call, arguments.device)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            one.problem = problem_of(error)
            gc.collect()
            continue
        if taken > arguments.limit:
            one.problem = f"takes {taken:.0f} s"
        else:
            calls[one.name] = call
    try:
        samples = alternating_seconds(list(calls.values()), arguments.device, arguments.runs, arguments.least)
    except RuntimeError as error:  # all together, they may need more memory than each
        for one in candidates:
            one.problem = one.problem or problem_of(error)
        return {}
    return {name: cell_of(times) for name, times in zip(calls, samples, strict=True)}


def problem_of(error: BaseException) -> str:
    """Say in a few words why something could not be timed."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or "not enough memory" in str(error):
        return "out of memory"
    return shortened(f"{type(error).__name__}: {error}")


def shortened(text: str) -> str:
    """Fit a message into a cell."""
    first = text.strip().splitlines()[0].replace("|", "/")
    return first if len(first) <= 120 else f"{first[:119]}…"


def cell_of(times: Sequence[float]) -> Cell:
    """Return the median and the quartiles of times."""
    if len(times) == 1:
        return Cell(times[0], times[0], times[0])
    lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
    return Cell(statistics.median(times), lower, upper)


def text_of(one: Candidate, cells: dict[str, Cell], batch: int) -> str:
    """Lay out a cell: time and spread, samples per second, and the speed-up with what it could be at most."""
    cell = cells.get(one.name)
    if cell is None:
        return shortened(one.problem) or "–"
    text = f"{milliseconds(cell)}, {batch / cell.median:,.0f}/s"
    dense = [cells[name].median for name in cells if name.startswith(DENSE)]
    if one.is_dense or not dense:
        return text
    text += f", {speed_of(min(dense), cell, one, bold='**')}"
    dense = [cells[name].median for name in cells if name.startswith(f"{FOLDED}, {DENSE}")]
    if not one.is_folded or one.name.startswith(FOLDED) or not dense:
        return text
    return f"{text}; over the dense one folded {speed_of(min(dense), cell, one)}"


def speed_of(dense: float, cell: Cell, one: Candidate, bold: str = "") -> str:
    """Say how much faster a candidate is, and of what."""
    speed = dense / cell.median
    return f"{bold}{speed:.2f} ×{bold} of {one.fewer:.2f} × ({speed / one.fewer:.0%})"


def milliseconds(cell: Cell) -> str:
    """Write a time and its quartiles, with three digits of the median."""
    digits = max(0, 2 - math.floor(math.log10(max(cell.median, 1e-9) * 1e3)))
    values = (f"{1e3 * value:.{digits}f}" for value in cell)
    return "{} ({}–{}) ms".format(*values)


def table_of(
    subject: Subject, mode: str, run: Run, arguments: argparse.Namespace, bar: tqdm[None]
) -> tuple[list[str], list[list[str]]]:
    """Measure one model in one dtype and mode; a column for each size of the batch."""
    cells: dict[tuple[float, str], dict[int, str]] = {}
    for batch in run.batches:
        for ratio in run.ratios:
            try:
                candidates = list(subject.candidates(batch, ratio, arguments.groups, **tuning_of(arguments, mode)))
            except RuntimeError as error:  # already planning or tuning runs the model
                candidates = [Candidate(DENSE, problem=problem_of(error))]
            found = measure(candidates, mode, arguments)
            for one in candidates:
                text = text_of(one, found, batch)
                cells.setdefault((ratio, one.name), {})[batch] = text
                tqdm.write(f"{mode}, batch {batch}, −{ratio:.0%} | {one.name} | {text}", file=sys.stderr)
            del candidates
            gc.collect()
            bar.update()
    header = ["removed", "model", *(f"batch {batch}" for batch in run.batches)]
    order = {ratio: place for place, ratio in enumerate(run.ratios)}
    rows = [
        [f"{ratio:.0%}", name, *(row.get(batch, "–") for batch in run.batches)]
        for (ratio, name), row in sorted(cells.items(), key=lambda item: order[item[0][0]])
    ]
    return header, rows


def tuning_of(arguments: argparse.Namespace, mode: str) -> dict[str, object]:
    """Return the options of ``tune_``: models are timed as they will be run."""
    options: dict[str, object] = {"cuda_graphs": True} if mode == "graphs" else {}
    return options | ({"executions": get_args(Execution)} if arguments.fused else {})


def notes_of(arguments: argparse.Namespace, absent: Sequence[str]) -> Iterator[str]:
    """Say what the tables show."""
    yield (
        f"Cells: the median of {arguments.runs} alternating runs (quartiles), samples per second; **the speed-up over "
        "the faster of the two dense models**, contiguous and channels_last, of the ratio of multiply-adds (counted by "
        "torch.utils.flop_counter), which is the limit, and the share of the limit that was reached. A tuned model "
        "is held to the limit of the same model before it was tuned. Target latency: planned and run with the channels "
        "of images last. BatchNorm folded: by ``fold_batchnorm_``, which the dense model can have, too; so there the "
        "speed-up over that one comes second. On a CPU ``tune_`` packs weights, which the dense model's are not: "
        f"{PACKED} is the model for parameters with each layer that was compressed merged to a dense weight again, and "
        "packed."
    )
    yield f"{ABOUT_WEIGHTS} A sample of the Llama-like block is 128 tokens."
    if arguments.device.startswith("cuda"):
        yield (
            f"TF32 in float32: {_yes(torch.backends.cuda.matmul.allow_tf32)} in matrix products, "
            f"{_yes(torch.backends.cudnn.allow_tf32)} in convolutions, as torch has it by default."
        )
    if EQUAL in arguments.groups:
        shared = "; ".join(f"{name}: {one.equal}" for name, one in PEERS.items())
        yield f"Equal ranks: scheme channel, form factored, the ranks of one plan. {shared}."
    missing = ", ".join(name for name, one in PEERS.items() if one.missing)
    if missing:
        yield f"Not installed here, and left out: {missing} (see `peers.py`)."
    if absent:
        yield "Left out: " + "; ".join(absent)


def _yes(setting: object) -> str:
    return "on" if setting else "off"


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--all", action="store_true", help="everything, also on a CPU")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--ratios", nargs="+", type=float)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--modes", nargs="+", choices=MODES, help="graphs: on CUDA only")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="what to compress for")
    parser.add_argument("--fused", action="store_true", help="let tune_ try the fused kernels, which it has to compile")
    parser.add_argument("--runs", type=int, default=9, help="counted runs of each candidate")
    parser.add_argument("--least", type=float, default=5e-3, help="seconds of one run, of several calls if need be")
    parser.add_argument("--limit", type=float, default=30.0, help="longest call to be measured, in seconds")
    arguments = read_arguments(parser)
    if not all(0 < ratio < 1 for ratio in arguments.ratios or RATIOS):
        parser.error("--ratios must be strictly between 0 and 1")
    if "graphs" in (arguments.modes or ()) and not arguments.device.startswith("cuda"):
        parser.error("--modes graphs are CUDA's: run with --device cuda, or in the modes eager and compile")
    return arguments


def main() -> None:
    """Measure and print the tables."""
    arguments = read_options()
    settings = settings_of(arguments)
    tables: dict[str, tuple[list[str], list[list[str]]]] = {}
    absent: list[str] = []

    def publish(*, show: bool = True) -> None:
        title, notes = "Inference: how much faster a compressed model is", list(notes_of(arguments, absent))
        publish_tables("inference", title, notes, tables, arguments, show=show)

    total = sum(len(run.batches) * len(run.ratios) for run in settings.values())
    with tqdm(total=total, disable=None) as bar:
        for (model, dtype), some in itertools.groupby(settings, key=lambda one: one[:2]):
            chosen = list(some)
            bar.set_description(f"{model}, {dtype}")
            ratios = sorted({ratio for one in chosen for ratio in settings[one].ratios})
            try:
                subject = Subject(MODELS[model], arguments.device, DTYPES[dtype], ratios)
            except (ValueError, ImportError) as error:
                absent.append(f"{model}: {shortened(str(error))}")
                bar.update(sum(len(settings[one].batches) * len(settings[one].ratios) for one in chosen))
                continue
            for one in chosen:
                table = table_of(subject, one.mode, settings[one], arguments, bar)
                tables[", ".join(one)] = table
                publish(show=False)  # an interruption leaves what is there so far
            del subject
    publish()


if __name__ == "__main__":
    main()
