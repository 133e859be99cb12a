"""Compress a torchvision model after its training, with and without data, and load it again.

By default the model has random weights and the calibration images are noise, so that nothing is downloaded: what can be
seen then is sizes, layers and errors, and no accuracy. `--pretrained` downloads torchvision's weights; with them, use
images of your own in place of the noise.

Run `python examples/torchvision_model.py --help`: half a minute on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import torchsmooth

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for testbed/
from testbed.torchvision_import import import_torchvision  # `import torchvision`, also beside a CPU build of torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from torchsmooth import CompressionReport


def count_parameters(model: nn.Module) -> int:
    """Count all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a model makes of images; those for segmentation have it in a dictionary."""
    found = model(images)
    return found["out"] if isinstance(found, dict) else found


@torch.no_grad()
def output_error(model: nn.Module, dense: nn.Module, images: Tensor) -> float:
    """Return how far the outputs moved, over the size of the dense model's."""
    expected = outputs(dense, images)
    return ((outputs(model, images) - expected).norm() / expected.norm()).item()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v3_small", help="a name in torchvision.models")
    parser.add_argument("--pretrained", action="store_true", help="download torchvision's weights")
    parser.add_argument("--ratio", type=float, default=0.3, help="fraction of the parameters to remove")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images in pixels")
    parser.add_argument("--batches", type=int, default=4, help="calibration batches of 16 images")
    parser.add_argument("--output", type=Path, default=Path("small.pt"), help="where the small state dict goes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> CompressionReport:
    """Compress twice, save, load; return the report of the calibrated one."""
    options = parse_arguments(arguments)
    models = import_torchvision().models
    torch.manual_seed(0)
    build = models.get_model_builder(options.model)
    # Models that are made around another one would download the weights of that.
    empty = {"weights_backbone": None} if "weights_backbone" in inspect.signature(build).parameters else {}
    dense = (build(weights="DEFAULT") if options.pretrained else build(**empty)).eval()
    images = torch.randn(16 * (options.batches + 1), 3, options.size, options.size).split(16)
    unseen, batches = images[0], list(images[1:])

    # The one line. The model is copied, since it works in place.
    without_data = copy.deepcopy(dense)
    report = torchsmooth.svd_compress_(without_data, options.ratio)
    print(report)

    # The same with data: ranks, factors, biases and BatchNorms are fitted to it, with no gradient step.
    with_data = copy.deepcopy(dense)
    report = torchsmooth.svd_compress_(with_data, options.ratio, calibration=batches)

    print(f"\n{options.model}: {count_parameters(dense):,} parameters, then {count_parameters(with_data):,}")
    for name, model in (("without data", without_data), ("with data", with_data)):
        print(f"relative error of the outputs on unseen images, {name}: {output_error(model, dense, unseen):.3f}")

    # A state dict is all there is to keep.
    torch.save(with_data.state_dict(), options.output)
    again = torchsmooth.load_compressed_(build(**empty).eval(), torch.load(options.output, weights_only=True))
    assert torch.equal(outputs(again, unseen), outputs(with_data, unseen))  # noqa: S101 - what the example shows
    print(f"saved to {options.output}, loaded again: the same outputs, bit for bit")
    return report


if __name__ == "__main__":
    main()
