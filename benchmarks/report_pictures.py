"""The pictures of the page that `report.py` makes."""

from __future__ import annotations

import math
from statistics import mean
from typing import TYPE_CHECKING

from cifar10_training import load_trained, network_file
from matplotlib.figure import Figure
from report_tables import DENSE, METHODS

import torchsmooth

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from cifar10_candidates import Candidate
    from matplotlib.axes import Axes
    from report_tables import Group
    from torch import nn

_COLUMNS = 4
_COLOURS = ("black", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:olive")
# The methods of the overview, all with the same data, and their lines.
_OVERVIEW = {"SVD + calibration": "-", "unstructured + BatchNorm": "--", "structured + BatchNorm": ":"}
_DEPTH = 20  # points below the best that the overview shows
_RATIO = 0.8  # of the energies beside the spectra


def draw_accuracies(group: Group, _networks: Iterable[Path], path: Path) -> bool:
    """Draw accuracy over the share removed: a panel for each method, a line for each penalty, shaded over the seeds.

    Returns:
        Whether there was something to draw.
    """
    methods = [
        method
        for method in map(group.row, METHODS)
        if any(group.values(candidate, method, ratio) for candidate in group.found for ratio in group.ratios)
    ]
    if not methods:
        return False
    rows = math.ceil(len(methods) / _COLUMNS)
    figure = Figure(figsize=(3.6 * min(_COLUMNS, len(methods)), 3.2 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, min(_COLUMNS, len(methods)), sharex=True, sharey=True, squeeze=False).flat
    for method, axes in zip(methods, panels, strict=False):
        _draw_method(axes, group, method)
    for axes in panels:  # those that are left over
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel("parameters removed (%)")
    figure.supylabel("test accuracy (%)")
    figure.savefig(path, dpi=110)
    return True


def _draw_method(axes: Axes, group: Group, method: str) -> None:
    for number, candidate in enumerate(group.found):
        style = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": "--" if candidate.penalty == "plain" else "-"}
        _draw_line(axes, group, candidate, method, label=candidate.title, **style)
    axes.set(title=method, ylim=(0, 100))
    axes.title.set_fontsize("medium")
    _finish(axes, group)


def draw_overview(group: Group, _networks: Iterable[Path], path: Path) -> bool:
    """Draw what is left of the accuracy near the dense one: the plain network by each method, the smooth ones by SVD.

    Returns:
        Whether there was something to draw.
    """
    dense = [value for candidate in group.found for value in group.values(candidate, DENSE, 0.0).values()]
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, candidate in enumerate(group.found):
        plain = candidate.penalty == "plain"
        for method, line in ((group.row(one), line) for one, line in _OVERVIEW.items()):
            if plain or method.startswith("SVD"):
                style = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": line}
                _draw_line(axes, group, candidate, method, label=f"{candidate.title}: {method}", **style)
    axes.set(xlabel="parameters removed (%)", ylabel="test accuracy (%)", ylim=(max(dense) - _DEPTH, max(dense) + 1))
    _finish(axes, group)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)
    return True


def _draw_line(axes: Axes, group: Group, candidate: Candidate, method: str, *, color: str, **style: str) -> None:
    """Draw the means over the seeds, beginning with the dense network, over a shade from the lowest to the highest."""
    points = [group.values(candidate, DENSE, 0.0), *(group.values(candidate, method, ratio) for ratio in group.ratios)]
    reached = {place: values.values() for place, values in enumerate(points) if values}
    means, lowest, highest = ([of(values) for values in reached.values()] for of in (mean, min, max))
    axes.plot(list(reached), means, color=color, marker=".", linewidth=1.2, **style)
    axes.fill_between(list(reached), lowest, highest, color=color, alpha=0.15, linewidth=0)


def _finish(axes: Axes, group: Group) -> None:
    """Put the ratios at equal distances: those of interest are close to each other."""
    axes.set_xticks(range(1 + len(group.ratios)), ["dense", *(f"{100 * ratio:g}" for ratio in group.ratios)])
    axes.grid(alpha=0.3)


def draw_spectra(group: Group, networks: Iterable[Path], path: Path) -> bool:
    """Draw the spectra of a network of each penalty side by side, of its first seed that is there.

    Returns:
        Whether there was something to draw.
    """
    spectra = {title: torchsmooth.spectrum(model, ratio=_RATIO) for title, model in _load(group, networks).items()}
    if spectra:
        torchsmooth.plot_spectra(spectra, path)
    return bool(spectra)


def draw_weights(group: Group, networks: Iterable[Path], path: Path) -> bool:
    """Draw the largest weight of a network of each penalty side by side, each over its root mean square.

    Returns:
        Whether there was something to draw.
    """
    layers = {title: _largest(model) for title, model in _load(group, networks).items()}
    if layers:
        torchsmooth.plot_weights(layers, path, relative=True)
    return bool(layers)


def _largest(model: nn.Module) -> nn.Module:
    """Return the layer with the most weights, the first of several."""
    sizes = {module: module.weight.numel() for module in model.modules() if hasattr(module, "weight")}
    return max(sizes, key=sizes.__getitem__)


def _load(group: Group, networks: Iterable[Path]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for candidate in group.found:
        runs = [group.run(candidate, seed) for seed in group.seeds(candidate)]
        files = [(run, folder) for run in runs for folder in networks if network_file(run, folder).exists()]
        if files:
            found[candidate.title] = load_trained(*files[0])
    return found
