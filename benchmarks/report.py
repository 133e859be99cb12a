"""Makes the page ``benchmarks/results/cifar10.md``, with its pictures, from the results of ``cifar10.py``.

The verdict on what the numbers say is written by hand, in ``benchmarks/results/cifar10-verdict.md``, and is put on top
of the page as it stands.

    python benchmarks/report.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cifar10_results import Results
from report_pictures import draw_accuracies, draw_overview, draw_spectra, draw_weights
from report_tables import format_group, groups_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cifar10_results import Line
    from report_tables import Group

sys.path.append(str(Path(__file__).resolve().parents[1]))  # torchsmooth may not be installed

from torchsmooth._atomic_file import write_text

VERDICT = "cifar10-verdict.md"
_INTRODUCTION = """\
Networks trained with each penalty, and then made smaller with no fine-tuning: no method takes a gradient step after
the training. Accuracies are in percent, means over the seeds with the lowest and the highest in brackets. Of the
50,000 training images 5,000 are held out of every training, and strengths are compared on these alone; no choice was
made on the test images. Ratios are fractions of *all* parameters of the network.

“+ BatchNorm”: `recalibrate_batchnorm_` on the first 1,024 training images, cropped and mirrored as in training,
without labels; the same step for every method. “+ calibration”: `svd_compress_(…, calibration=…)` on the same
images, which fits factors, biases and BatchNorm statistics in closed form. “structured”: channels of least norm are
cut out by dependency groups (Torch-Pruning). “unstructured”: the weights of least magnitude in the whole network
become zero (`torch.nn.utils.prune.global_unstructured`); zeros count as removed, though no file and no clock does
so. The other rows saw no data. Where a table names a number of images, both used that many. “–”: the ratio cannot be
reached, or was not measured."""


def write_report(lines: Sequence[Line], networks: Sequence[Path], folder: Path) -> Path:
    """Write the page and its pictures.

    Args:
        lines: results, in the order in which the penalties are to appear.
        networks: folders of the trained networks, for the pictures of spectra and weights; those of networks that are
            not there are left out.
        folder: where the page goes; what is in the file ``cifar10-verdict.md`` there is put on its top.

    Returns:
        The path of the page.

    Raises:
        ValueError: if there is no result on test images.
    """
    groups = groups_of(lines)
    if not groups:
        raise ValueError("there is no result on test images to report: run benchmarks/cifar10.py first.")
    folder.mkdir(parents=True, exist_ok=True)
    verdict = folder / VERDICT
    parts = ["# Smooth networks on CIFAR-10: how accurate, and how far they can be compressed"]
    parts += [verdict.read_text(encoding="utf-8").strip()] if verdict.exists() else []
    parts.append(_INTRODUCTION)
    for group in groups:
        parts.append(format_group(group, _pictures(group, networks, folder)))
    page = folder / "cifar10.md"
    write_text(page, "\n\n".join([*parts, "Printed by `python benchmarks/report.py`."]) + "\n")
    return page


def _pictures(group: Group, networks: Sequence[Path], folder: Path) -> dict[str, str]:
    """Draw what can be drawn; return the names of the pictures by what they show."""
    names = {}
    for shown, draw in (
        ("Accuracy against the share of parameters removed, near that of the dense networks", draw_overview),
        ("Accuracy against the share of parameters removed, by each method", draw_accuracies),
        ("Singular values of the weights of each layer", draw_spectra),
        ("The largest weight, by its rows and columns of channels", draw_weights),
    ):
        picture = folder / f"cifar10-{group.slug}-{draw.__name__.removeprefix('draw_')}.png"
        if draw(group, networks, picture):
            names[shown] = picture.name
    return names


def main() -> None:
    """Read the results and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = [Path("runs/cifar10")]
    parser.add_argument("--runs", type=Path, nargs="+", default=folders, help="folders that cifar10.py wrote")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="where the page goes")
    arguments = parser.parse_args()
    missing = [f"{folder}" for folder in arguments.runs if not (folder / "results.jsonl").exists()]
    if missing:
        parser.error(f"there is no results.jsonl in {', '.join(missing)}: run benchmarks/cifar10.py first")
    lines = [line for folder in arguments.runs for line in Results(folder / "results.jsonl")]
    networks = [folder / "networks" for folder in arguments.runs]
    print(f"Written: {write_report(lines, networks, arguments.results)}")


if __name__ == "__main__":
    main()
