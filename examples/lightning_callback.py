"""Smooth training and compression as a callback of PyTorch Lightning, on scikit-learn's digits.

The callback smooths the weights while `fit` trains, and compresses the model when it is done; the training itself is as
it was. Run `python examples/lightning_callback.py`: a few seconds on a CPU, nothing is downloaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchsmooth
from digit_network import accuracy, load_images

if TYPE_CHECKING:
    from torchsmooth.penalties import Penalty


class SmoothThenCompress(pl.Callback):
    """Add a penalty while the training runs, and compress the model in place when it ends."""

    def __init__(self, penalty: Penalty, ratio: float) -> None:
        self.penalty, self.ratio = penalty, ratio

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register the penalty, and let the optimizers add its gradient."""
        torchsmooth.smooth_(pl_module, self.penalty)
        self.handles = [torchsmooth.attach_(optimizer, pl_module) for optimizer in trainer.optimizers]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002 - Lightning's
        """Compress; the report is kept."""
        for handle in self.handles:
            handle.remove()
        self.report = torchsmooth.svd_compress_(torchsmooth.remove_penalties(pl_module), self.ratio)


class Classifier(pl.LightningModule):
    """A model like any other: it knows nothing of the callback."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        return self.head(self.net(pixels))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's
        """Return the loss of a batch."""
        pixels, labels = batch
        return F.cross_entropy(self(pixels), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(epochs: int = 10) -> tuple[torchsmooth.CompressionReport, float]:
    """Train, compress and print; return the report and the accuracy in percent."""
    pl.seed_everything(0, verbose=False)
    images = load_images()
    loader = DataLoader(TensorDataset(*images["train"]), batch_size=64, shuffle=True)
    callback = SmoothThenCompress(torchsmooth.NuclearNorm(1e-2), ratio=0.7)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[callback], accelerator="cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Classifier()
    trainer.fit(model, loader)
    right = accuracy(model.eval(), images["test"])
    print(f"{callback.report}\n{right:.1f} % of the test images right")
    return callback.report, right


if __name__ == "__main__":
    main()
