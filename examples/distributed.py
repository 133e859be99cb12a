"""Smooth training with DistributedDataParallel, and compression that the processes share.

Run `torchrun --nproc_per_node 2 examples/distributed.py`: some seconds on a CPU, nothing is downloaded. Every process
gets its own part of scikit-learn's digits. Penalties need nothing to be sent, as every process has the same weights;
compressing divides the layers among the processes, and all end up with the same model.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torchsmooth
from digit_network import accuracy, load_images

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchsmooth import CompressionReport


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--ratio", type=float, default=0.7, help="fraction of the parameters to remove")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> tuple[CompressionReport, float]:
    """Train and compress on every process; return the report, and the accuracy of the small network in percent."""
    options = parse_arguments(arguments)
    dist.init_process_group("gloo")  # torchrun has set RANK, WORLD_SIZE and the address
    try:
        rank, processes = dist.get_rank(), dist.get_world_size()
        parts = load_images()
        pixels, labels = (whole[rank::processes] for whole in parts["train"])

        torch.manual_seed(0)  # the same weights everywhere, as DistributedDataParallel sees to anyway
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        model.append(nn.Linear(256, 10))
        torchsmooth.smooth_(model, torchsmooth.NuclearNorm(1e-2))
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
        torchsmooth.attach_(optimizer, wrapped)

        for _ in range(options.epochs):
            for batch in torch.arange(len(labels)).split(64 // processes):
                loss = F.cross_entropy(wrapped(pixels[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        # Called on every process, on the model inside of the wrapper.
        report = torchsmooth.svd_compress_(model.eval(), options.ratio)
        right = accuracy(model, parts["test"])
        if rank == 0:
            print(report)
            print(f"{processes} processes; test accuracy {right:.1f} %")
    finally:
        dist.destroy_process_group()
    return report, right


if __name__ == "__main__":
    main()
