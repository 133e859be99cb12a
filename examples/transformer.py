"""Train a small transformer smooth, and compress its attention and its linear layers, with no fine-tuning.

It reads scikit-learn's digits as eight words, the rows of an image. It is trained twice, plainly and with the nuclear
norm, and each network is compressed without data and with its training images as calibration.

Run `python examples/transformer.py --help`: under a minute on a CPU, nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsmooth
from digit_network import Images, accuracy, load_images

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 64


class RowTransformer(nn.Module):
    """Two encoder layers over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(8, WIDTH)
        self.places = nn.Parameter(0.1 * torch.randn(8, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classes = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images of shape (batch, 1, 8, 8)."""
        return self.classes(self.encoder(self.rows(images.squeeze(1)) + self.places).mean(dim=1))


def train(images: Images, epochs: int, penalty: torchsmooth.NuclearNorm | None) -> RowTransformer:
    """Train with AdamW; two calls make it smooth, and the loop is as ever."""
    torch.manual_seed(0)
    model = RowTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    if penalty is not None:
        torchsmooth.smooth_(model, penalty)
        torchsmooth.attach_(optimizer, model)
    steps = epochs * (len(images.labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images.labels)).split(64):
            loss = F.cross_entropy(model(images.pixels[batch]), images.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images")
    parser.add_argument("--strength", type=float, default=3e-2, help="of the nuclear norm")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.7, 0.8], help="fractions to remove")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train, compress, print a table; return the accuracies of its rows, dense first."""
    options = parse_arguments(arguments)
    parts = load_images()
    batches = list(parts["train"].pixels.split(448))
    table: dict[str, list[float]] = {}
    for network, penalty in (("plain", None), ("smooth", torchsmooth.NuclearNorm(options.strength))):
        model = train(parts["train"], options.epochs, penalty)
        for how, data in (("no data", None), ("calibrated", batches)):
            row = table[f"{network}, {how}"] = [accuracy(model, parts["test"])]
            for ratio in options.ratios:
                small = copy.deepcopy(model)
                report = torchsmooth.svd_compress_(small, ratio, calibration=data)
                row.append(accuracy(small, parts["test"]))
    print(report)  # of the last: the projections of the attention have lines of their own
    print("\n| network | dense |" + "".join(f" −{ratio:.0%} |" for ratio in options.ratios))
    print("| :-- | --: |" + " --: |" * len(options.ratios))
    for name, row in table.items():
        print(f"| {name} |" + "".join(f" {value:.1f} |" for value in row))
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)  # layers this small gain little from a second one
    main()
