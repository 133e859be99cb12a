"""Train a small network twice, plain and smooth, then compress both with no fine-tuning.

The data are scikit-learn's digits, 1,797 grey images of 8×8 pixels, so nothing is downloaded. Each trained network is
compressed by four ratios and three methods, and no gradient step follows:

* `svd`: `torchsmooth.svd_compress_`, which replaces each weight by a product of two smaller ones;
* `unstructured`: the weights of least magnitude become zero (`torch.nn.utils.prune.global_unstructured`);
* `structured`: whole filters of least norm go (`torch.nn.utils.prune.ln_structured`), as in Li et al., "Pruning
  Filters for Efficient ConvNets", 2017 (arXiv 1608.08710).

Run it with `make demo`, or `python examples/digits.py --help`.
"""

from __future__ import annotations

import argparse
import bisect
import copy
import math
import platform
import sys
import time
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils import prune
from tqdm import tqdm

import torchsmooth
from digit_network import PENALTIES, STRENGTHS, DigitNetwork, accuracy, load_images, train

if TYPE_CHECKING:
    from collections.abc import Callable

RATIOS = (0.5, 0.7, 0.8, 0.9)  # fractions of all parameters to remove


# --------------------------------------------------------------------------------------------------------- compression


def count_parameters(model: nn.Module) -> int:
    """Count all parameters, except those that a pruning mask holds at zero."""
    masked = sum(int((mask == 0).sum()) for name, mask in model.named_buffers() if name.endswith("_mask"))
    return sum(parameter.numel() for parameter in model.parameters()) - masked


def parameters_to_remove(model: nn.Module, ratio: float) -> int:
    """Turn a ratio into a number of parameters."""
    return math.ceil(ratio * count_parameters(model))


def compress_by_svd(model: DigitNetwork, ratio: float) -> DigitNetwork:
    """Replace weights by low-rank products."""
    compressed = copy.deepcopy(model)
    torchsmooth.svd_compress_(compressed, ratio=ratio)
    return compressed


def prune_unstructured(model: DigitNetwork, ratio: float) -> DigitNetwork:
    """Set the weights of least magnitude, anywhere in the network, to zero."""
    compressed = copy.deepcopy(model)
    weights = [(layer, "weight") for layer in compressed.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=parameters_to_remove(model, ratio))
    return compressed


def prune_filters(model: DigitNetwork, amount: float) -> DigitNetwork:
    """Mask the same share of filters in the first convolution of every block, and all that depends on them.

    Nothing but the second convolution of the block reads these channels, so they could be cut out without a trace.
    """
    compressed = copy.deepcopy(model)
    for block in compressed.blocks:
        prune.ln_structured(block.conv1, "weight", amount, n=2, dim=0)
        kept = block.conv1.weight_mask[:, 0, 0, 0]
        prune.custom_from_mask(block.bn1, "weight", kept)
        prune.custom_from_mask(block.bn1, "bias", kept)
        prune.custom_from_mask(block.conv2, "weight", kept[None, :, None, None].expand_as(block.conv2.weight))
    return compressed


def prune_structured(model: DigitNetwork, ratio: float) -> DigitNetwork:
    """Prune the smallest share of filters, in steps of 0.1 %, that removes the fraction of parameters asked for."""

    def removed(share: int) -> int:
        return count_parameters(model) - count_parameters(prune_filters(model, share / 1000))

    share = bisect.bisect_left(range(1000), parameters_to_remove(model, ratio), key=removed)
    return prune_filters(model, share / 1000)


METHODS: dict[str, Callable[[DigitNetwork, float], DigitNetwork]] = {
    "svd": compress_by_svd,
    "unstructured": prune_unstructured,
    "structured": prune_structured,
}


# ------------------------------------------------------------------------------------------------ measuring and showing

# Percentages by method, network and ratio, one for each seed; NaN where a method cannot remove that much.
# The ratio 0 is the dense network, the same under every method.
Accuracies = dict[tuple[str, str, float], list[float]]


def measure(arguments: argparse.Namespace) -> tuple[Accuracies, DigitNetwork]:
    """Train and compress for every seed; return all accuracies and the last smooth network."""
    parts = load_images()
    penalties = {"plain": None, "smooth": arguments.penalty}
    found: Accuracies = {}
    with tqdm(total=2 * arguments.seeds * arguments.epochs, unit="epoch") as progress:
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            for network, penalty in penalties.items():
                progress.set_description(f"{network}, seed {seed}")
                model = train(parts["train"], arguments.epochs, seed, penalty, lambda _: progress.update())
                dense = accuracy(model, parts[arguments.split])
                for method, compress in METHODS.items():
                    found.setdefault((method, network, 0.0), []).append(dense)
                    for ratio in RATIOS:
                        compressed = compress(model, ratio)
                        removed = count_parameters(model) - count_parameters(compressed)
                        reached = removed >= parameters_to_remove(model, ratio)
                        percentage = accuracy(compressed, parts[arguments.split]) if reached else math.nan
                        found.setdefault((method, network, ratio), []).append(percentage)
    return found, model


def format_table(accuracies: Accuracies) -> str:
    """Lay the mean accuracies out as a Markdown table."""
    lines = ["| method       | network | dense |" + "".join(f" {ratio:>5.0%} |" for ratio in RATIOS)]
    lines.append("|:-------------|:--------|------:|" + "------:|" * len(RATIOS))
    for method in METHODS:
        for network in ("plain", "smooth"):
            means = [mean(accuracies[method, network, ratio]) for ratio in (0.0, *RATIOS)]
            cells = "".join("     – |" if math.isnan(value) else f" {value:5.1f} |" for value in means)
            lines.append(f"| {method:<12} | {network:<7} |{cells}")
    return "\n".join(lines)


def describe(arguments: argparse.Namespace, model: DigitNetwork) -> str:
    """Say in a few lines what the numbers are."""
    seeds = ", ".join(str(seed) for seed in range(arguments.seed, arguments.seed + arguments.seeds))
    return (
        f"Accuracy in percent on the {arguments.split} images of scikit-learn's digits, by the fraction of all "
        "parameters removed.\nNo fine-tuning, no BatchNorm statistics estimated anew. "
        "What a pruning mask holds at zero counts as removed.\n\n"
        f"Network: {count_parameters(model):,} parameters, trained for {arguments.epochs} epochs. "
        f"Smooth: `{arguments.penalty}`.\nMean over the seeds: {seeds}. "
        f"Device: CPU ({platform.machine()}, {torch.get_num_threads()} thread), torch {torch.__version__}, "
        f"torchsmooth {torchsmooth.__version__}."
    )


def plot(accuracies: Accuracies, path: Path, split: str) -> None:
    """Draw accuracy over the fraction removed: a colour for each method, dashed for plain, solid for smooth."""
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    columns = {"dense": 0.0} | {f"{ratio:.0%}": ratio for ratio in RATIOS}
    for method, colour in zip(METHODS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        for network, line, fill in (("plain", "--", "white"), ("smooth", "-", colour)):
            means = [mean(accuracies[method, network, ratio]) for ratio in columns.values()]
            style = {"color": colour, "linestyle": line, "marker": "o", "markerfacecolor": fill}
            axes.plot(list(columns), means, label=f"{method}, {network}", **style)
    axes.axhline(10, color="grey", linestyle=":", label="guessing")
    axes.set(xlabel="parameters removed", ylabel=f"{split} accuracy (%)", ylim=(0, 104))
    axes.set_title("Digits: compressed with no fine-tuning")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for digits.png and digits.md")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    parser.add_argument("--penalty", choices=PENALTIES, default="nuclear", help="what makes the weights smooth")
    parser.add_argument(
        "--strength", type=float, help="factor in front of the penalty (default: tuned on the validation images)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds to average over")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="images to measure on")
    arguments = parser.parse_args()
    if arguments.strength is None:
        arguments.strength = STRENGTHS[arguments.penalty]
    if min(arguments.epochs, arguments.seeds) < 1 or not 0 <= arguments.strength < math.inf:
        parser.error("--epochs and --seeds must be at least 1, and --strength finite and at least 0")
    arguments.penalty = PENALTIES[arguments.penalty](strength=arguments.strength)
    return arguments


def main() -> None:
    """Train, compress, print and write."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # layers this small gain little from a second one, and lose much on a busy machine
    torch.use_deterministic_algorithms(mode=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    accuracies, smooth_model = measure(arguments)
    description, table = describe(arguments, smooth_model), format_table(accuracies)
    print(f"\nThe last smooth network, 80 % smaller:\n{torchsmooth.svd_compress_(smooth_model, ratio=0.8)}")
    print(f"\n{description}\n\n{table}\n")
    (arguments.output / "digits.md").write_text(f"# Digits\n\n{description}\n\n{table}\n", encoding="utf-8")
    plot(accuracies, arguments.output / "digits.png", arguments.split)
    print(f"{time.perf_counter() - start:.0f} s; wrote digits.md and digits.png to {arguments.output}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
