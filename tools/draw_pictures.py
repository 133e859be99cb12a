"""Draw the pictures of the page on the mathematics: `make pictures`, a minute on a CPU.

* `storage.png`: how many numbers a matrix takes at each rank, in both forms; a formula.
* `frequencies.png`: how strongly the derivative penalties pull at each frequency along the channels; a formula.
* `truncation.png`: the weight of one convolution before and after compression, trained plainly and smooth.
* `budget.png`: the ranks that one budget gives to the layers of a network, beside equal shares.

The last two train the network of `examples/digits.py`, with its settings, from one seed. `images/weights.png` and
`images/spectra.png` come from `examples/watch_training.py`, `images/digits.png` from `examples/digits.py`.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import torchsmooth

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))  # they are no package
from digit_network import STRENGTHS, DigitNetwork, load_images, train

ROOT = Path(__file__).resolve().parents[1]
LAYER = "blocks.5.conv2"
RATIO = 0.8


def draw_storage(path: Path, rows: int = 256, columns: int = 256) -> None:
    """Numbers stored over the rank."""
    ranks = torch.arange(rows + 1).numpy()
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(ranks, ranks * (rows + columns), label="factored: r(m + n)")
    axes.plot(ranks, ranks * (rows + columns - ranks), label="pivoted: r(m + n − r)")
    axes.axhline(rows * columns, color="grey", linestyle=":", label="dense: mn")
    axes.set(xlabel="rank r", ylabel="numbers stored", title=f"A matrix of {rows} × {columns}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_frequencies(path: Path) -> None:
    """Decay over the frequency."""
    frequency = torch.linspace(0, torch.pi, 200)
    eigenvalue = (2 - 2 * frequency.cos()).numpy()
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(frequency.numpy(), eigenvalue, label="first derivative: 2 − 2 cos ω")
    axes.plot(frequency.numpy(), eigenvalue**2, label="second derivative: (2 − 2 cos ω)²")
    axes.axhline(1, color="grey", linestyle=":", label="weight decay: 1")
    axes.set(xlabel="frequency ω along the channels", ylabel="‖D W‖² / ‖W‖²", title="What each penalty pulls at")
    axes.set_xticks([0, torch.pi / 2, torch.pi], ["0", "π/2", "π"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def centre_of(model: DigitNetwork) -> Tensor:
    """Return the centre of the kernels of one convolution, dense or low-rank, as a matrix."""
    return model.get_submodule(LAYER).weight.detach()[:, :, 1, 1]


def draw_truncation(path: Path, networks: dict[str, DigitNetwork]) -> None:
    """A weight before, after, and what was lost, for each network."""
    figure = Figure(figsize=(8.5, 5.8), layout="constrained")
    rows = figure.subplots(len(networks), 3, squeeze=False)
    for (name, model), row in zip(networks.items(), rows, strict=True):
        small = copy.deepcopy(model)
        report = torchsmooth.svd_compress_(small, RATIO)
        before, after, layer = centre_of(model), centre_of(small), report[LAYER]
        shown = {
            f"{name}: before": before,
            f"after −{RATIO:.0%}: {layer.parameters_after:,} of {layer.parameters_before:,} numbers": after,
            f"lost: relative error {layer.relative_error:.2f}": before - after,
        }
        size = 2.5 * before.square().mean().sqrt().item()
        for axes, (title, values) in zip(row, shown.items(), strict=True):
            axes.imshow(values.numpy(), cmap="RdBu", vmin=-size, vmax=size, interpolation="nearest")
            axes.set_title(title, fontsize=9)
            axes.set(xticks=[], yticks=[])
    figure.suptitle(f"{LAYER}, the centre of its 3×3 kernels: output channels down, input channels across", fontsize=10)
    figure.savefig(path, dpi=120)


def draw_budget(path: Path, model: DigitNetwork) -> None:
    """Ranks of one budget and of equal shares, over the full rank, layer by layer."""
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, allocation in enumerate(("uniform", "budget")):
        plan = torchsmooth.plan_compression(model, RATIO, allocation=allocation, scheme="channel", form="factored")
        layers = [layer for layer in plan if layer.options]
        kept = [layer.parameters_after / layer.parameters_before for layer in layers]
        error = sum((layer.relative_error * weight_norm(model, layer.name)) ** 2 for layer in layers) ** 0.5
        total = sum(weight_norm(model, layer.name) ** 2 for layer in layers) ** 0.5
        offset = 0.4 * place - 0.2
        where = [index + offset for index in range(len(layers))]
        axes.bar(where, kept, 0.4, label=f"{allocation}: error of all weights together {error / total:.2f}")
    axes.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=60, ha="right", fontsize=8)
    axes.set(ylabel="share of the weight that is kept", title=f"−{RATIO:.0%} of the network, smooth, scheme channel")
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    figure.savefig(path, dpi=120)


def weight_norm(model: DigitNetwork, name: str) -> float:
    """Return the Frobenius norm of a layer's weight."""
    return model.get_submodule(name).weight.detach().norm().item()


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="folder for the pictures")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = load_images()["train"]
    penalties = {"plain": None, "smooth": torchsmooth.NuclearNorm(STRENGTHS["nuclear"])}
    networks = {name: train(images, options.epochs, 0, penalty, lambda _: None) for name, penalty in penalties.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    draw_storage(options.output / "storage.png")
    draw_frequencies(options.output / "frequencies.png")
    draw_truncation(options.output / "truncation.png", networks)
    draw_budget(options.output / "budget.png", networks["smooth"])


if __name__ == "__main__":
    main()
