"""Are smooth networks as accurate as plain ones on CIFAR-10, and how much of that is left when they are compressed?

Trains a network once for each penalty and seed (or loads it, where it was trained before), compresses it by every
method and ratio with no fine-tuning, and writes a line of JSON for each number to ``results.jsonl`` in the output
folder, from which ``report.py`` makes the page. An interrupted command is given again and goes on: with the epoch that
it was in, and with the numbers that are missing. Without options: a ResNet-18 of width 16, 15 epochs, three seeds.

5,000 of the 50,000 training images are held out of every training. Strengths are compared on these alone:

    python benchmarks/cifar10.py --choose-strength --seeds 0
    python benchmarks/cifar10.py --strength chosen
    python benchmarks/report.py

On a GPU:

    python benchmarks/cifar10.py --width 64 --epochs 50 --seeds 0 1 --recipe sgd_large_batch --strength chosen
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from cifar10_candidates import PENALTIES, Candidate, expanded, strengths, usual_strength
from cifar10_frontier import CALIBRATION_IMAGES, METHODS, Measuring, calibration_batches, measure
from cifar10_recipes import Recipe, Run
from cifar10_results import Results
from cifar10_strengths import chosen_strength, format_strengths
from cifar10_training import train
from harness import read_arguments

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed

from testbed.cifar_networks import ARCHITECTURES
from testbed.cifar_splits import JPEG, Splits, load_splits

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from cifar10_results import Line

RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97)


def make_runs(arguments: argparse.Namespace, splits: Splits, results: Results) -> Iterator[Run]:
    """List what to train, all penalties of one seed before the next seed."""
    for seed in arguments.seeds:
        for penalty in arguments.penalty:
            run = Run(
                network=arguments.network,
                width=arguments.width,
                epochs=arguments.epochs,
                recipe=arguments.recipe,
                penalty=penalty,
                strength=usual_strength(penalty),
                seed=seed,
                data=splits.source,
                dtype=arguments.dtype,
                train_images=len(splits.train.labels),
            )
            for strength in _strengths(arguments, run, results):
                yield Run(**{**vars(run), "strength": strength})


def _strengths(arguments: argparse.Namespace, run: Run, results: Iterable[Line]) -> list[float]:
    if run.penalty == "plain":
        return [run.strength]
    if arguments.strength == ["chosen"]:
        return [chosen_strength(results, run, arguments.wanted_ratio)]
    if arguments.strength:
        return [float(one) for one in arguments.strength]
    return list(strengths(run.penalty)) if arguments.choose_strength else [run.strength]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", choices=ARCHITECTURES, default="resnet18")
    add("--width", type=int, help="of the network; by default what a CPU can do")
    add("--epochs", type=int, default=15)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--penalty", nargs="+", default=list(PENALTIES), help="plain, nuclear, first, second, tail_NN for NN %%, tail")
    add("--strength", nargs="+", default=[], help="numbers, or 'chosen': the best on the images held out")
    add("--choose-strength", action="store_true", help="try a grid of strengths, measured on the images held out")
    add("--wanted-ratio", type=float, default=0.8, help="at which strengths are compared; of tails, their own")
    add("--recipe", default="sgd", help="a name, and changes: sgd,batch_size=512,peak_rate=0.4 (see cifar10_recipes)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="in which networks compute in training")
    add("--data", default=JPEG, help="jpeg, or the folder of torchvision's original CIFAR-10")
    add("--cache", type=Path, default=Path(tempfile.gettempdir()) / "torchsmooth-cifar10", help="of decoded images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--threads", type=int, help="of the CPU; by default all")
    add("--output", type=Path, default=Path("runs/cifar10"), help="folder of results and networks")
    add("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="none: only train, measure only dense")
    add("--ratios", nargs="+", type=float, default=list(RATIOS), help="fractions of all parameters to remove")
    add("--calibration-images", type=int, default=CALIBRATION_IMAGES, help="training images that methods with data see")
    add("--again", action="store_true", help="measure what is in the results already, too")
    add("--images", type=int, help="training images, for a trial; by default all 45,000")
    add("--test-images", type=int, help="to measure on, for a trial; by default all")
    arguments = read_arguments(parser)
    try:
        arguments.penalty = expanded(arguments.penalty)
        Recipe.of(arguments.recipe)
        if arguments.strength != ["chosen"]:
            [Candidate("nuclear", float(one)).make() for one in arguments.strength]
    except ValueError as error:
        parser.error(str(error))
    if arguments.choose_strength and arguments.strength == ["chosen"]:
        parser.error("--choose-strength makes the choice that --strength chosen looks up: give one of the two")
    arguments.ratios = sorted({*arguments.ratios, *_own_ratios(arguments)})
    if not 0 < arguments.ratios[0] <= arguments.ratios[-1] < 1:
        parser.error("--ratios and --wanted-ratio must be strictly between 0 and 1")
    counts = ("epochs", "images", "test_images", "calibration_images", "threads")
    given = [getattr(arguments, name) for name in counts]
    if any(one is not None and one < 1 for one in given):
        parser.error(f"{', '.join('--' + name.replace('_', '-') for name in counts)} must be at least 1")
    arguments.width = arguments.width or ARCHITECTURES[arguments.network].width
    return arguments


def _own_ratios(arguments: argparse.Namespace) -> list[float]:
    """List the ratios at which strengths will be compared."""
    if not arguments.choose_strength:
        return []
    return [Candidate(penalty, 0.0).ratio or arguments.wanted_ratio for penalty in arguments.penalty]


def main() -> None:
    """Train, measure and write, one network after the other."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = Results(arguments.output / "results.jsonl")
    splits = load_splits(arguments.data, arguments.cache)
    held_out, test = splits.held_out.first(arguments.test_images), splits.test.first(arguments.test_images)
    splits = Splits(splits.train.first(arguments.images), held_out, test, splits.source).to(arguments.device)
    split, methods = ("held_out", ["svd"]) if arguments.choose_strength else ("test", arguments.methods)
    measuring = Measuring(
        splits.held_out if arguments.choose_strength else splits.test,
        split,
        calibration_batches(splits.train, arguments.calibration_images),
        methods,
        arguments.ratios,
    )
    tried: list[Line] = []
    for run in list(make_runs(arguments, splits, results)):
        model = train(run, splits, arguments.output / "networks", arguments.wanted_ratio)
        lines = measure(model, run, measuring, results, again=arguments.again)
        tried += lines
        print(f"{run.name}: {_told(lines)}", flush=True)
    if arguments.choose_strength:
        print(f"\nAccuracy in % on the {len(held_out.labels):,} images held out:\n\n{format_strengths(tried)}")


def _told(lines: Iterable[Line]) -> str:
    """Write accuracies in one line, by method."""
    found: dict[str, list[str]] = {}
    for line in lines:
        text = "–" if line["accuracy"] is None else f"{line['accuracy']:.2f}"
        found.setdefault(line["method"], []).append(text)
    return "; ".join(f"{method} {' '.join(texts)}" for method, texts in found.items())


if __name__ == "__main__":
    main()
