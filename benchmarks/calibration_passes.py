"""How many passes over the batches does a fit to calibration data take, and how much time does leaving out parts save?

Layers are fitted one after the other, each to what the layers before it leave. Running the network up to each layer, as
methods do that know nothing of the network, takes half a pass for the dense network and half a pass for the compressed
one, for each layer; and once or twice half a pass more where norms have to be found before the layer. The library
leaves out parts whose layers are all done, and notes what the dense network puts out at many layers in one run. Passes
are counted in multiply-adds, for random weights and inputs; both ways find the same.

    python benchmarks/calibration_passes.py --write
"""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from harness import make_parser, median_seconds, publish, read_arguments
from torch import Tensor
from tqdm import tqdm

import torchsmooth
from torchsmooth import _two_networks
from torchsmooth._counting import Counter
from torchsmooth._finished import FinishedParts

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed

from testbed.cifar_networks import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Iterator

# Networks of testbed/cifar_networks.py, with their widths.
NETWORKS = (("resnet20", 16), ("resnet18", 16), ("vgg16", 16), ("vit_small", 192))
RATIO = 0.7


@contextmanager
def in_full() -> Iterator[None]:
    """Run both networks from the beginning for each layer."""
    with patch.object(FinishedParts, "_keep", lambda *_: None), patch.object(_two_networks, "_AHEAD", 0):
        yield


def passes(plan: torchsmooth.CompressionPlan, model: torch.nn.Module, batches: list[Tensor]) -> float:
    """Return how many passes of the dense network the runs of a fit are as long as."""
    total = 0
    run = _two_networks.run

    def counted(network: torch.nn.Module, batch: Any) -> Any:
        nonlocal total
        with Counter() as counter:
            try:
                return run(network, batch)
            finally:
                total += counter.macs

    with torch.no_grad():
        with Counter() as one:
            for batch in batches:
                model(batch)
        with patch.object(_two_networks, "run", counted):
            plan.apply_(copy.deepcopy(model), calibration=batches)
    return total / one.macs


def main() -> None:
    """Count, measure and print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--images", type=int, default=128, help="how many to calibrate with, in batches of 64")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each way, after one that is not")
    arguments = read_arguments(parser)
    rows = []
    for name, width in tqdm(NETWORKS):
        architecture = ARCHITECTURES[name]
        torch.manual_seed(0)
        model = architecture.make(width).eval().to(arguments.device)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(arguments.images, 3, 32, 32, generator=generator).to(arguments.device)
        batches = list(images.split(64))
        plan = torchsmooth.plan_compression(model, RATIO)
        counts = []
        for way in (in_full(), nullcontext()):
            with way:
                counts.append(passes(plan, model, batches))

        def whole(plan: Any = plan, model: Any = model, batches: Any = batches) -> None:
            plan.apply_(copy.deepcopy(model), calibration=batches)

        def from_the_beginning(whole: Any = whole) -> None:
            with in_full():
                whole()

        before, now = median_seconds((from_the_beginning, whole), arguments.device, arguments.runs)
        layers = sum(layer.scheme is not None for layer in plan.layers)
        rows.append(
            [
                f"{architecture.title}, width {width}",
                str(layers),
                *(f"{count:.1f}" for count in counts),
                f"{before / now:.2f} ×",
            ]
        )
        tqdm.write(" | ".join(rows[-1]), file=sys.stderr)
    title = (
        f"Passes over {arguments.images} images that a fit to calibration data takes, −{RATIO:.0%} of the parameters"
    )
    header = ["network", "layers compressed", "passes, all run for each layer", "passes", "all of the fit faster by"]
    publish("calibration_passes", title, header, rows, arguments)


if __name__ == "__main__":
    main()
