"""Compress for parameters, for multiply-accumulates and for time, and compare what each gives up.

The network has a large layer that is used once beside a small one that is used at every pixel: the three targets
disagree about which of them should pay. Weights are random; nothing is downloaded.

Run `python examples/latency_target.py --help`: some seconds on a CPU. Times depend on the machine; where no low-rank
layer is faster than the dense one, the last target cannot be reached, and the example says so.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch
from torch import nn

import torchsmooth

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchsmooth import CompressionPlan


def build_model(width: int) -> nn.Sequential:
    """Build two convolutions, which take the time, and two linear layers, which take the memory."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * width, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, 10),
    ).eval()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.3, help="fraction of the target to remove")
    parser.add_argument("--width", type=int, default=64, help="channels of the convolutions")
    parser.add_argument("--batch", type=int, default=8, help="images at a time, of 32×32 pixels")
    options = parser.parse_args(arguments)
    if not 0 < options.ratio < 1:
        parser.error(f"--ratio must be strictly between 0 and 1 (0.3 = 30 % less), got {options.ratio:g}")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, CompressionPlan]:
    """Plan for each target; return the plans that there are."""
    options = parse_arguments(arguments)
    torch.manual_seed(0)
    model = build_model(options.width)
    images = torch.randn(options.batch, 3, 32, 32)
    plans: dict[str, CompressionPlan] = {}
    for target in ("params", "macs", "latency"):
        inputs = None if target == "params" else images
        try:
            plan = torchsmooth.plan_compression(model, options.ratio, target=target, example_inputs=inputs)
        except ValueError as error:
            where = " on this machine" if target == "latency" else ""
            print(f"\n{target}: not to be had{where}.\n{error}")
            continue
        plans[target] = plan
        print(f"\n{target}: {plan.parameters_before:,} → {plan.parameters_after:,} parameters")
        if target == "macs":
            print(f"{plan.macs_before:,} → {plan.macs_after:,} multiply-accumulates")
        if target == "latency":
            print(f"{1e3 * plan.latency_before:.2f} → {1e3 * plan.latency_after:.2f} ms, by the times of the layers")
        print(plan)
    return plans


if __name__ == "__main__":
    main()
