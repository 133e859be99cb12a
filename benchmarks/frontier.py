"""How accurate is a trained network with 30 … 95 % of its parameters removed, by each method, without fine-tuning?

The networks are those of the shared data, by name (cifar_resnet/20, 32, 44, 56; resnet18_w16/plain, tail_80,
nuclear_1e-3, …), or any checkpoint of the same architectures, by its path.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import shlex
import sys
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from frontier_methods import METHODS, Method
from frontier_report import RESULTS, Cell, Cells, Frontier, format_frontier, plot_frontier
from harness import circumstances, make_parser, read_arguments
from tqdm import tqdm

import torchsmooth

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed

from testbed.checkpoints import load_network
from testbed.cifar import accuracy, load_images

if TYPE_CHECKING:
    import argparse

    from torch import Tensor, nn

RATIOS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


class Cache:
    """What is measured already, in a JSON file that is rewritten after every cell; without a file, in memory only.

    Args:
        path: the file, or None.
        key: what all cells have in common.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key
        self._found: dict[str, Any] = {}
        if path is not None and path.exists():
            self._found = json.loads(path.read_text(encoding="utf-8"))

    def get(self, label: str, ratio: float) -> Cell | None:
        """Return a cell, or None if it is not measured yet."""
        found = self._found.get(f"{self._key}; {label}; {ratio}")
        return None if found is None else Cell(*found)

    def put(self, label: str, ratio: float, cell: Cell) -> None:
        """Keep a cell."""
        self._found[f"{self._key}; {label}; {ratio}"] = cell
        if self._path is not None:
            partial = self._path.with_name(f"{self._path.name}.part")
            partial.write_text(json.dumps(self._found, indent=1), encoding="utf-8")
            partial.replace(self._path)


class Bench:
    """A network with the images to calibrate and to measure it with.

    Args:
        spec: the network, as ``load_network`` takes it.
        arguments: the command line.
    """

    def __init__(self, spec: str, arguments: argparse.Namespace) -> None:
        network = load_network(spec)
        self.description = network.description
        self.fingerprint = fingerprint(network.model)
        self.model = network.model.to(arguments.device)
        self.total = sum(parameter.numel() for parameter in self.model.parameters())
        pixels, labels = load_images("test", arguments.test_images)
        self._inputs: Tensor = network.normalise(pixels.to(arguments.device))
        self._labels: Tensor = labels.to(arguments.device)
        pixels, _ = load_images("train", arguments.calibration_images)
        self.batches = list(network.normalise(pixels.to(arguments.device)).split(arguments.batch_size))

    def measure(self, model: nn.Module) -> float:
        """Return the accuracy on the test images, in percent."""
        return accuracy(model, self._inputs, self._labels, batch_size=50)  # on a CPU faster than larger ones


def fingerprint(model: nn.Module) -> str:
    """Return what tells a network from every other one: a file may have been written anew since it was measured."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def measure_method(method: Method, bench: Bench, ratios: list[float], cache: Cache, bar: Any) -> Cells:
    """Fill the rows of one method, as far as the cache does not have them."""
    rows = [label for label in (method.label, method.recalibrated) if label]
    missing = [ratio for ratio in ratios if any(cache.get(label, ratio) is None for label in rows)]
    bar.update(len(rows) * (len(ratios) - len(missing)))
    bar.set_postfix_str(method.label)
    for ratio, compressed in method.compress(bench.model, missing, bench.batches) if missing else ():
        if compressed is None:
            for label in rows:
                cache.put(label, ratio, Cell(None, bench.total))
        else:
            model, left = compressed
            most = int((1 - Fraction(str(ratio))) * bench.total)
            if method.exact and left > most:
                raise RuntimeError(f"{method.label}, ratio {ratio}: {left:,} parameters are left, more than {most:,}.")
            cache.put(method.label, ratio, Cell(bench.measure(model), left))
            if method.recalibrated:
                torchsmooth.recalibrate_batchnorm_(model, bench.batches)
                cache.put(method.recalibrated, ratio, Cell(bench.measure(model), left))
        bar.update(len(rows))
    return {label: {ratio: cell for ratio in ratios if (cell := cache.get(label, ratio))} for label in rows}


def measure_network(spec: str, arguments: argparse.Namespace) -> Frontier:
    """Run every method on one network."""
    bench = Bench(spec, arguments)
    images = (arguments.test_images, arguments.calibration_images, arguments.batch_size)
    cache = Cache(arguments.resume, f"{spec}; {bench.fingerprint}; {arguments.device}; {images}")
    methods = {name: method for name, method in METHODS.items() if name in arguments.methods}
    rows = sum(1 + bool(method.recalibrated) for method in methods.values())
    with tqdm(total=2 + rows * len(arguments.ratios), desc=spec, unit="cell", mininterval=1) as bar:

        def whole(model: nn.Module, ratios: list[float], _batches: list[Tensor]) -> Any:
            yield from ((ratio, (copy.deepcopy(model), bench.total)) for ratio in ratios)

        first = measure_method(Method("dense", whole, "dense + BatchNorm"), bench, [0.0], cache, bar)
        cells = [measure_method(method, bench, arguments.ratios, cache, bar) for method in methods.values()]
    return Frontier(
        network=bench.description,
        total=bench.total,
        dense=(first["dense"][0.0].accuracy, first["dense + BatchNorm"][0.0].accuracy),
        cells=dict(itertools.chain.from_iterable(one.items() for one in cells)),
        ratios=arguments.ratios,
        images=images,
        circumstances=circumstances(arguments.device),
        command=_command(spec, arguments),
    )


def _command(spec: str, arguments: argparse.Namespace) -> str:
    """Write down what prints this table: the network, and every option that is not the default."""
    given = {
        "--methods": (arguments.methods, list(METHODS)),
        "--ratios": (arguments.ratios, list(RATIOS)),
        "--test-images": ([arguments.test_images], [10000]),
        "--calibration-images": ([arguments.calibration_images], [1024]),
        "--batch-size": ([arguments.batch_size], [128]),
    }
    words = ["python", "benchmarks/frontier.py", Path(spec).name if Path(spec).suffix else spec]
    words += ["--device", arguments.device]
    for option, (values, default) in given.items():
        words += [option, *map(str, values)] if values != default else []
    return shlex.join([*words, "--write"])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("networks", nargs="*", default=["resnet18_w16/plain"], help="names or paths of networks")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS), help="fractions to remove")
    parser.add_argument("--test-images", type=int, default=10000, help="how many to measure on")
    parser.add_argument("--calibration-images", type=int, default=1024, help="how many, without labels, to fit to")
    parser.add_argument("--batch-size", type=int, default=128, help="calibration images in a batch")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to run")
    parser.add_argument("--resume", type=Path, help="JSON file that keeps what is measured, to go on after a break")
    arguments = read_arguments(parser)
    arguments.ratios = sorted(set(arguments.ratios))
    if not 0 < arguments.ratios[0] <= arguments.ratios[-1] < 1:
        parser.error("--ratios must be strictly between 0 and 1")
    if min(arguments.test_images, arguments.calibration_images, arguments.batch_size) < 1:
        parser.error("--test-images, --calibration-images and --batch-size must be at least 1")
    return arguments


def main() -> None:
    """Measure, print and write, one network after the other."""
    arguments = parse_arguments()
    for spec in arguments.networks:
        frontier = measure_network(spec, arguments)
        print(format_frontier(frontier))
        if arguments.write:
            network = Path(spec).stem if Path(spec).suffix in {".pt", ".th"} else spec.replace("/", "-")
            target = RESULTS / f"frontier-{network}-{arguments.device.split(':')[0]}.md"
            target.parent.mkdir(exist_ok=True)
            picture = target.with_suffix(".png")
            plot_frontier(frontier, picture)
            target.write_text(format_frontier(frontier, picture.name), encoding="utf-8")


if __name__ == "__main__":
    main()
