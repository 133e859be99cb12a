"""Which sum over the layers, made small without any data, keeps the most accuracy?

A plan gives each layer the ranks that make a sum of losses small. Every candidate here is the loss of one layer at one
rank; forms, budget and factors are the library's own and the same for all, and so are the schemes, without Tucker-2,
whose error has no spectral norm. Test accuracy as compressed, and after the BatchNorm statistics were estimated anew on
1,024 training images.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from harness import publish
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from testbed.checkpoints import load_network
from testbed.cifar import accuracy, load_images
from torchsmooth import recalibrate_batchnorm_
from torchsmooth._expansion import expanded_
from torchsmooth._workpiece import Request, Workpiece

if TYPE_CHECKING:
    from collections.abc import Callable  # noqa: F401 - in the annotation below

    from torch import Tensor, nn

    from torchsmooth.layer_plan import Option

CASES = (
    ("resnet18_w16/plain", 0.7),
    ("resnet18_w16/plain", 0.8),
    ("resnet18_w16/nuclear_1e-3", 0.8),
    ("resnet18_w16/tail_80", 0.9),
    ("cifar_resnet/20", 0.5),
    ("cifar_resnet/20", 0.7),
    ("cifar_resnet/56", 0.5),
    ("cifar_resnet/56", 0.7),
)


def _energy(module: nn.Module) -> float:
    weight: Tensor = module.weight.detach()
    return float(weight.double().square().sum())


def _normed_energy(module: nn.Module, norm: nn.Module | None) -> float:
    """Energy of a weight whose rows are scaled as the BatchNorm that follows scales them."""
    if norm is None:
        return _energy(module)
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    return float((module.weight.detach().flatten(1) * scale[:, None]).double().square().sum())


def _squared_values(option: Option) -> Tensor:
    """The largest squared singular value that is cut, for each rank."""
    values = option.spectrum._values.square().amax(0)
    return torch.cat([values, values.new_zeros(1)])


# (layer, the norm after it, option, its place among the layers from 0 to 1) to the loss of every rank.
Objective = "Callable[[nn.Module, nn.Module | None, Option, float], Tensor]"
OBJECTIVES: dict[str, Objective] = {
    "relative squared error": lambda _layer, _norm, one, _place: one.errors,
    "absolute squared error (default)": lambda layer, _norm, one, _place: one.errors * _energy(layer),
    "geometric mean of the two": lambda layer, _norm, one, _place: one.errors * math.sqrt(_energy(layer)),
    "absolute, spectral norm": lambda _layer, _norm, one, _place: _squared_values(one),
    "relative, spectral norm": lambda _layer, _norm, one, _place: _squared_values(one) / _squared_values(one)[0],
    "absolute, as scaled by the BatchNorm that follows": lambda layer, norm, one, _place: (
        one.errors * _normed_energy(layer, norm)
    ),
    "relative × number of outputs": lambda layer, _norm, one, _place: one.errors * len(layer.weight),
    "relative × √(entries)": lambda layer, _norm, one, _place: one.errors * math.sqrt(layer.weight.numel()),
    "relative, early layers weighed twice as much": lambda _layer, _norm, one, place: one.errors * (2 - place),
    "relative, late layers weighed twice as much": lambda _layer, _norm, one, place: one.errors * (1 + place),
}


def norms_after(model: nn.Module) -> dict[str, nn.Module]:
    """Map each convolution to the BatchNorm that comes next among the model's modules, if it has as many channels."""
    found: dict[str, nn.Module] = {}
    waiting = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            waiting.append((name, module))
        elif isinstance(module, torch.nn.BatchNorm2d) and waiting:
            before, layer = waiting.pop(0)
            if layer.out_channels == module.num_features:
                found[before] = module
    return found


def measured(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Return the accuracy in percent."""
    return accuracy(model, inputs, labels, batch_size=50)  # on a CPU faster than larger ones


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test-images", type=int, default=2000, help="how many, from the first on")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/ as well")
    arguments = parser.parse_args()
    arguments.device = "cpu"
    pixels, labels = load_images("test", arguments.test_images)
    calibration, _ = load_images("train", 1024)
    cells: dict[str, list[str]] = {name: [] for name in OBJECTIVES}
    heads = []
    request = Request.of(
        scheme=("channel", "input", "spatial"), form="auto", allocation="budget", target="params", example_inputs=None,
        rank_multiple=1, filter_fn=None, calibration=None, progress=False,
    )  # fmt: skip
    bar = tqdm(total=len(CASES) * len(OBJECTIVES), desc="objectives")
    for spec, ratio in CASES:
        network = load_network(spec)
        inputs, batches = network.normalise(pixels), network.normalise(calibration).split(128)
        heads.append(f"{spec} −{100 * ratio:.0f} % (dense {measured(network.model, inputs, labels):.1f})")
        with torch.no_grad(), expanded_(network.model, request.refusal) as expansion:
            workpiece = Workpiece(network.model, request, expansion)
        modules, norms = dict(network.model.named_modules()), norms_after(network.model)
        options = {layer.name: layer.options for layer in workpiece.layers}
        for name, objective in OBJECTIVES.items():
            for index, layer in enumerate(workpiece.layers):
                module, place = modules[layer.name], index / len(workpiece.layers)
                layer.options = {
                    scheme: replace(one, losses=objective(module, norms.get(layer.name), one, place))
                    for scheme, one in options[layer.name].items()
                }
            small = copy.deepcopy(network.model)
            workpiece.plan(ratio).apply_(small)
            before = measured(small, inputs, labels)
            recalibrate_batchnorm_(small, batches)
            cells[name].append(f"{before:.1f} → {measured(small, inputs, labels):.1f}")
            bar.update()
    bar.close()
    publish(
        "objectives",
        f"What should a plan make small? Accuracy (%) on {arguments.test_images:,} test images of CIFAR-10 (JPEG copy)",
        ("loss of a layer", *heads),
        [(name, *row) for name, row in cells.items()],
        arguments,
    )


if __name__ == "__main__":
    main()
