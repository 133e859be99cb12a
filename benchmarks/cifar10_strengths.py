"""Which strength of a penalty is the best on the images that were held out."""

from __future__ import annotations

from dataclasses import asdict
from statistics import mean
from typing import TYPE_CHECKING

from cifar10_candidates import Candidate, usual_strength
from cifar10_results import RUN

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cifar10_recipes import Run
    from cifar10_results import Line

METHOD = "SVD"  # by which the strengths are compared: without data


def chosen_strength(lines: Iterable[Line], run: Run, ratio: float) -> float:
    """Return the strength with the best held-out accuracy, compressed without data; of equals the weakest.

    Args:
        lines: results.
        run: which network, recipe and penalty it is for; its strength and seed are not looked at.
        ratio: at which the accuracies are compared; a tail is judged at its own.

    Raises:
        ValueError: if no strength of this penalty was tried at that ratio.
    """
    if run.penalty == "plain":
        return usual_strength("plain")
    ratio = Candidate(run.penalty, 0.0).ratio or ratio
    wanted = {key: value for key, value in asdict(run).items() if key not in {"strength", "seed"}}
    wanted |= {"split": "held_out", "method": METHOD, "ratio": ratio}
    matching = [line for line in lines if all(line[key] == value for key, value in wanted.items())]
    most = max((line["images"] for line in matching), default=0)
    found: dict[float, list[float]] = {}
    for line in matching:
        if line["images"] == most and line["accuracy"] is not None:  # without those of a trial
            found.setdefault(line["strength"], []).append(line["accuracy"])
    if not found:
        raise ValueError(
            f"no strength of {run.penalty!r} was tried at a ratio of {ratio} with these settings: run the same command "
            "with --choose-strength first, or give one by --strength."
        )
    return max(sorted(found), key=lambda strength: mean(found[strength]))


def format_strengths(lines: Sequence[Line]) -> str:
    """Lay out what was tried on the held-out images, a row for each network.

    Args:
        lines: results of the split ``"held_out"``.

    Returns:
        A table in Markdown: accuracies in percent, dense, and compressed without data → with BatchNorm estimated anew.
    """
    ratios = sorted({line["ratio"] for line in lines if line["method"] == METHOD})
    cells: dict[tuple[object, ...], dict[tuple[str, float], float | None]] = {}
    for line in lines:
        key = tuple(line[name] for name in RUN)
        cells.setdefault(key, {})[line["method"], line["ratio"]] = line["accuracy"]
    rows = ["| penalty, strength | seed | dense | " + " | ".join(f"−{100 * ratio:g} %" for ratio in ratios) + " |"]
    rows.append("| :-- | --: | --: |" + " --: |" * len(ratios))
    for key, found in cells.items():
        facts = dict(zip(RUN, key, strict=True))
        texts = [
            " → ".join(
                "–" if found[name, ratio] is None else f"{found[name, ratio]:.1f}"
                for name in (METHOD, f"{METHOD} + BatchNorm")
                if (name, ratio) in found
            )
            for ratio in ratios
        ]
        title = Candidate(facts["penalty"], facts["strength"]).title
        dense = found.get(("dense", 0.0))
        rows.append(f"| {title} | {facts['seed']} | {dense:.1f} | {' | '.join(texts)} |")
    return "\n".join(rows)
