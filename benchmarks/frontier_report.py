"""How `frontier.py` shows what it measured: a table with the best in bold, what is behind it, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from frontier_methods import METHODS
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from frontier_methods import Method

RESULTS = Path(__file__).parent / "results"

# The lines of the plot: not all methods, or nothing could be told apart.
_LINES = {
    "the default + calibration": ("tab:blue", "-"),
    "the default + BatchNorm": ("tab:blue", "--"),
    "+ pivoted form (the default)": ("tab:blue", ":"),
    "uniform ranks, channel": ("tab:grey", ":"),
    "unstructured pruning + BatchNorm": ("tab:orange", "--"),
    "Torch-Pruning + BatchNorm": ("tab:green", "--"),
}
_NAMES = {"+ pivoted form (the default)": "the default, without data"}


class Cell(NamedTuple):
    """What one method does at one ratio.

    Attributes:
        accuracy: in percent; None if the ratio cannot be reached.
        left: the number of parameters left.
    """

    accuracy: float | None
    left: int


# By row of the table and by ratio.
Cells = dict[str, dict[float, Cell]]


class Frontier(NamedTuple):
    """All that was measured of one network.

    Attributes:
        network: what it is.
        total: its number of parameters.
        dense: its accuracy in percent as it is, and with BatchNorm statistics estimated anew.
        cells: the methods in the order of the table.
        ratios: the fractions removed, ascending.
        images: the numbers of test and of calibration images, and of images in a batch.
        circumstances: on what was measured.
        command: what prints it.
    """

    network: str
    total: int
    dense: tuple[float, float]
    cells: Cells
    ratios: Sequence[float]
    images: tuple[int, int, int]
    circumstances: str
    command: str


def format_frontier(frontier: Frontier, picture: str = "") -> str:
    """Lay a frontier out in Markdown.

    Args:
        frontier: what was measured.
        picture: name of the plot, if there is one.

    Returns:
        The text.
    """
    methods = [method for method in METHODS.values() if method.label in frontier.cells]
    plain, recalibrated = frontier.dense
    accuracies = (
        "Test accuracy in percent by the share of all parameters removed; the best of each column in bold. "
        f"Dense: {plain:.2f}; dense + BatchNorm: {recalibrated:.2f}."
    )
    counts = (
        f"Parameters left, of {frontier.total:,}; for pruning, zeros are not counted. The rows of the library keep to "
        "the ratio, which is checked. Not counted: the order of rows that the pivoted form keeps, one integer each, "
        "and the indices that unstructured pruning would take."
    )
    paragraphs = [
        f"# Accuracy against ratio: {frontier.network}",
        f"{frontier.circumstances}. `{frontier.command}`",
        f"![Accuracy against the share of parameters removed]({picture})" if picture else "",
        accuracies,
        _table(frontier, list(frontier.cells), _accuracies(frontier)),
        _conditions(frontier, methods),
        counts,
        _table(frontier, [method.label for method in methods], _counts(frontier)),
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def plot_frontier(frontier: Frontier, path: Path) -> None:
    """Draw accuracy over the share removed, one line for each of a handful of methods."""
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(frontier.dense[0], color="black", linestyle="--", linewidth=1, label="dense")
    for label, (colour, line) in _LINES.items():
        points = [
            (100 * ratio, cell.accuracy)
            for ratio, cell in frontier.cells.get(label, {}).items()
            if cell.accuracy is not None
        ]
        if points:
            style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 4}
            axes.plot(*zip(*points, strict=True), label=_NAMES.get(label, label), **style)
    axes.set(xlabel="parameters removed (%)", ylabel="test accuracy (%)", ylim=(0, 100), title=frontier.network)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)


def _conditions(frontier: Frontier, methods: Sequence[Method]) -> str:
    """Say what the numbers were measured on, and who saw which images."""
    tests, calibration, batch_size = frontier.images
    fitted = [f"“{method.label}”" for method in methods if method.calibrated]
    saw = " and ".join([*fitted, "the rows with “+ BatchNorm”"])
    return (
        f"First {tests:,} test images of a JPEG copy of CIFAR-10 (quality 75; networks score a little lower on it "
        "than on the original pixels). Nothing was fine-tuned: no method takes a gradient step. "
        f"{saw[0].upper()}{saw[1:]} saw the first {calibration:,} training images, in batches of {batch_size}, without "
        "labels; the other rows saw no data. “+ BatchNorm”: `recalibrate_batchnorm_`. “+ calibration”: "
        "`svd_compress_(…, calibration=…)`, which fits factors, biases and BatchNorm statistics in closed form. "
        "“–”: the ratio cannot be reached."
    )


def _accuracies(frontier: Frontier) -> dict[tuple[str, float], str]:
    texts = {
        (label, ratio): "–" if cell.accuracy is None else f"{cell.accuracy:.2f}"
        for label, cells in frontier.cells.items()
        for ratio, cell in cells.items()
    }
    for ratio in frontier.ratios:
        column = [key for key in texts if key[1] == ratio and texts[key] != "–"]
        best = max((float(texts[key]) for key in column), default=None)
        texts |= {key: f"**{texts[key]}**" for key in column if float(texts[key]) == best}
    return texts


def _counts(frontier: Frontier) -> dict[tuple[str, float], str]:
    return {
        (label, ratio): "–" if cell.accuracy is None else f"{cell.left:,}"
        for label, cells in frontier.cells.items()
        for ratio, cell in cells.items()
    }


def _table(frontier: Frontier, labels: Sequence[str], texts: Mapping[tuple[str, float], str]) -> str:
    header = ("method", *(f"−{100 * ratio:g} %" for ratio in frontier.ratios))
    rows = [(label, *(texts[label, ratio] for ratio in frontier.ratios)) for label in labels]
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "| :-- |" + " --: |" * len(frontier.ratios), *lines[1:]])
