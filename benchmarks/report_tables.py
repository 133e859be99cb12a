"""The tables of the page that `report.py` makes."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from cifar10_candidates import PENALTIES, Candidate
from cifar10_frontier import CALIBRATION_IMAGES, images_of, with_images
from cifar10_recipes import Run
from cifar10_results import RUN
from cifar10_strengths import format_strengths

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed

from testbed.cifar_networks import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cifar10_results import Line

DENSE = "dense"
METHODS = (
    "SVD",
    "SVD + BatchNorm",
    "SVD + calibration",
    "structured",
    "structured + BatchNorm",
    "unstructured",
    "unstructured + BatchNorm",
)
_WITH_DATA = " + "  # in the names of all methods that see images
# Rows of low rank, each with the rows of pruning that saw the same data, unstructured pruning last.
_AGAINST = {
    "SVD": ("structured", "unstructured"),
    "SVD + BatchNorm": ("structured + BatchNorm", "unstructured + BatchNorm"),
    "SVD + calibration": ("structured + BatchNorm", "unstructured + BatchNorm"),
}
# How many points below the plain dense network of the same recipe a compressed one may be.
MARKS = {0.7: 0.5, 0.8: 1.0, 0.9: 2.0}
_OF_THE_GAPS = (
    "Points by which SVD is above (+) or below (−) the better one of structured and unstructured pruning on the same "
    "network, with the same data: mean over the seeds."
)
_OF_THE_CANDIDATE = {"penalty", "strength", "seed"}

# By seed, method and ratio; None where the ratio cannot be reached.
Accuracies = dict[tuple[int, str, float], float | None]


@dataclass(frozen=True)
class Group:
    """All results of one network by one recipe, whatever the penalty.

    Attributes:
        settings: the fields of ``Run`` that they share.
        found: accuracies in percent on the test images, by candidate, the plain one first.
        lines: the results themselves.
        tried: the results on the images held out.
    """

    settings: Mapping[str, Any]
    found: Mapping[Candidate, Accuracies]
    lines: Sequence[Line]
    tried: Sequence[Line]

    @property
    def slug(self) -> str:
        """What to call its pictures."""
        values = (f"w{value}" if key == "width" else f"{value}" for key, value in self.settings.items())
        return "-".join(values).replace(",", "-").replace("=", "_")

    @property
    def ratios(self) -> list[float]:
        """The ratios that were measured, ascending."""
        return sorted({line["ratio"] for line in self.lines if line["method"] != DENSE and line["ratio"] > 0})

    @cached_property
    def seen(self) -> int:
        """How many images the rows with data saw: the usual number, or where there is none of that, the most common."""
        counts = Counter(images_of(line["method"]) for line in self.lines if _WITH_DATA in line["method"])
        return CALIBRATION_IMAGES if CALIBRATION_IMAGES in counts or not counts else counts.most_common(1)[0][0]

    def row(self, method: str) -> str:
        """Return what the row of a method is called here, where it may have seen another number of images."""
        return with_images(method, self.seen) if _WITH_DATA in method else method

    def values(self, candidate: Candidate, method: str, ratio: float) -> dict[int, float]:
        """Return accuracies by seed, of those that were measured and reached."""
        found = self.found[candidate]
        return {
            seed: accuracy
            for (seed, one, at), accuracy in found.items()
            if (one, at) == (method, ratio) and accuracy is not None
        }

    def run(self, candidate: Candidate, seed: int) -> Run:
        """Return what identifies one of its networks."""
        return Run(**{**self.settings, "penalty": candidate.penalty, "strength": candidate.strength, "seed": seed})

    def seeds(self, candidate: Candidate) -> list[int]:
        """Return the seeds that a candidate was trained with, ascending."""
        return sorted({seed for seed, _, _ in self.found[candidate]})


def groups_of(lines: Sequence[Line]) -> list[Group]:
    """Sort results on test images into groups, in the order of their first lines."""
    grouped: dict[tuple[object, ...], list[Line]] = {}
    shared = [name for name in RUN if name not in _OF_THE_CANDIDATE]
    for line in lines:
        grouped.setdefault(tuple(line[name] for name in shared), []).append(line)
    groups = []
    for key, members in grouped.items():
        tests, tried = (_of_most_images(members, split) for split in ("test", "held_out"))
        found: dict[Candidate, Accuracies] = {}
        for line in sorted(tests, key=_place):
            candidate = Candidate(line["penalty"], line["strength"])
            found.setdefault(candidate, {})[line["seed"], line["method"], line["ratio"]] = line["accuracy"]
        if tests:
            groups.append(Group(dict(zip(shared, key, strict=True)), found, tests, sorted(tried, key=_place)))
    return groups


def _of_most_images(lines: Iterable[Line], split: str) -> list[Line]:
    """Return the results on a split, without those of a trial, which are of fewer images."""
    found = [line for line in lines if line["split"] == split]
    most = max((line["images"] for line in found), default=0)
    return [line for line in found if line["images"] == most]


def _place(line: Line) -> tuple[int, str, float]:
    penalty = line["penalty"]
    return (PENALTIES.index(penalty) if penalty in PENALTIES else len(PENALTIES), penalty, line["strength"])


def format_group(group: Group, pictures: Mapping[str, str]) -> str:
    """Lay a group out in Markdown.

    Args:
        group: what was measured.
        pictures: names of pictures, by what they show.

    Returns:
        The text.
    """
    parts = [_heading(group), *(f"![{shown}]({name})" for shown, name in pictures.items())]
    parts += ["### Dense", _dense(group), "### Compressed", _by_method(group)]
    if _plain(group) is not None:
        marks = ", ".join(f"{mark:g} at −{100 * ratio:g} %" for ratio, mark in MARKS.items())
        parts += [
            "### Distance to the plain dense network",
            f"Points above (+) or below (−) the plain dense mean; in bold where it is at most {marks} below.",
            _distances(group),
        ]
    parts += [
        "### SVD against pruning",
        _OF_THE_GAPS,
        _against_pruning(group),
    ]
    if group.tried:
        images = group.tried[0]["images"]
        parts += [
            "### Strengths tried",
            f"Accuracy on {images:,} images held out: dense; compressed without data → with BatchNorm estimated anew.",
            format_strengths(group.tried),
        ]
    return "\n\n".join(parts)


def _heading(group: Group) -> str:
    settings, line = group.settings, group.lines[0]
    copy = "the JPEG copy (quality 75)" if settings["data"] == "jpeg" else "the original pixels"
    devices, versions, dates = (sorted({f"{one[name]}" for one in group.lines}) for name in ("device", "torch", "date"))
    command = ["python", "benchmarks/cifar10.py", "--network", settings["network"], "--width", settings["width"]]
    command += ["--epochs", settings["epochs"], "--recipe", settings["recipe"], "--dtype", settings["dtype"]]
    seeds = sorted({line["seed"] for line in group.lines})
    command += ["--seeds", *seeds]
    return (
        f"## {ARCHITECTURES[settings['network']].title} of width {settings['width']}, "
        f"{line['parameters_dense']:,} parameters, {settings['epochs']} epochs\n\n"
        f"On {copy}, {settings['train_images']:,} images to train on, {line['images']:,} to test; recipe "
        f"`{settings['recipe']}`, trained in {settings['dtype']}. {', '.join(devices)}; torch {', '.join(versions)}; "
        f"{dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'}. `{shlex.join(map(str, command))}`"
    )


def _plain(group: Group) -> float | None:
    """Return the mean accuracy of the plain networks as they are; None if there are none."""
    for candidate in group.found:
        if candidate.penalty == "plain":
            return mean(group.values(candidate, DENSE, 0.0).values())
    return None


def _dense(group: Group) -> str:
    plain = _plain(group)
    rows = []
    for candidate in group.found:
        values = group.values(candidate, DENSE, 0.0)
        normed = group.values(candidate, group.row(f"{DENSE} + BatchNorm"), 0.0)
        difference = "–" if plain is None else _signed(mean(values.values()) - plain)
        seeds = ", ".join(map(str, group.seeds(candidate)))
        rows.append([candidate.title, seeds, _spread(values), difference, _spread(normed)])
    return table(["penalty, strength", "seeds", "dense", "against none", "dense + BatchNorm"], rows)


def _by_method(group: Group) -> str:
    """Make a table for each method, with a row for each penalty, the best mean of each column in bold."""
    parts = []
    # What saw another number of images comes last.
    first = list(map(group.row, METHODS))
    others = sorted({line["method"] for line in group.lines if line["ratio"] > 0} - {*first})
    for method in (*first, *others):
        cells = {
            (candidate, ratio): group.values(candidate, method, ratio)
            for candidate in group.found
            for ratio in group.ratios
        }
        if not any(cells.values()):
            continue
        best = {
            ratio: max((mean(cells[one, ratio].values()) for one in group.found if cells[one, ratio]), default=None)
            for ratio in group.ratios
        }
        rows = []
        for candidate in group.found:
            texts = [
                _bold(_spread(cells[candidate, ratio]), bool(values) and mean(values.values()) == best[ratio])
                for ratio in group.ratios
                for values in [cells[candidate, ratio]]
            ]
            rows.append([candidate.title, *texts])
        parts.append(f"{method}:\n\n{table(['penalty, strength', *_columns(group)], rows)}")
    return "\n\n".join(parts)


def _distances(group: Group) -> str:
    plain = _plain(group) or 0.0
    rows = []
    for candidate in group.found:
        for method in map(group.row, _AGAINST):
            cells = []
            for ratio in group.ratios:
                values = group.values(candidate, method, ratio)
                distance = round(mean(values.values()) - plain, 2) if values else None
                text = "–" if distance is None else _signed(distance)
                within = distance is not None and ratio in MARKS and distance >= -MARKS[ratio]
                cells.append(_bold(text, within))
            rows.append([candidate.title, method, *cells])
    return table(["penalty, strength", "method", *_columns(group)], rows)


def _against_pruning(group: Group) -> str:
    rows = []
    for candidate in group.found:
        for method, prunings in _AGAINST.items():
            row, against = group.row(method), list(map(group.row, prunings))
            cells = []
            for ratio in group.ratios:
                ours = group.values(candidate, row, ratio)
                theirs = [group.values(candidate, one, ratio) for one in against]
                # Without the unstructured one, which is far the better one, the gap would say nothing.
                gaps = [
                    value - max(one[seed] for one in theirs if seed in one)
                    for seed, value in ours.items()
                    if seed in theirs[-1]
                ]
                cells.append(_signed(mean(gaps)) if gaps else "–")
            rows.append([candidate.title, row, *cells])
    return table(["penalty, strength", "method", *_columns(group)], rows)


def _columns(group: Group) -> list[str]:
    return [f"−{100 * ratio:g} %" for ratio in group.ratios]


def _spread(values: Mapping[int, float]) -> str:
    """Write a mean, and the lowest and the highest where there are several."""
    if not values:
        return "–"
    text = f"{mean(values.values()):.2f}"
    return text if len(values) == 1 else f"{text} ({min(values.values()):.1f} … {max(values.values()):.1f})"


def _signed(points: float) -> str:
    return f"{points:+.2f}".replace("-", "−")


def _bold(text: str, wanted: bool) -> str:  # noqa: FBT001 - private
    return f"**{text}**" if wanted else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay cells out in Markdown, the first column to the left, the others to the right."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "| :-- |" + " --: |" * (len(header) - 1), *lines[1:]])
