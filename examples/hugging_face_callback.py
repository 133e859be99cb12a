"""Smooth training and compression as a callback of Hugging Face's Trainer, on a small task made up here.

The callback smooths the weights while the Trainer works, and compresses the model when it is done. A tiny BERT, built
from a configuration, learns whether the first word of a sequence stands in the first half of the vocabulary. Run
`python examples/hugging_face_callback.py`: a few seconds on a CPU, nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import torchsmooth

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from torchsmooth.penalties import Penalty

WORDS = 40


class SmoothThenCompress(TrainerCallback):
    """Add a penalty while the training runs, and compress the model in place when it ends."""

    def __init__(self, penalty: Penalty, ratio: float) -> None:
        self.penalty, self.ratio = penalty, ratio

    def on_train_begin(self, *_: Any, model: nn.Module, optimizer: Optimizer, **__: Any) -> None:
        """Register the penalty, and let the optimizer add its gradient."""
        torchsmooth.smooth_(model, self.penalty)
        self.handle = torchsmooth.attach_(optimizer, model)

    def on_train_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Compress; the report is kept."""
        self.handle.remove()
        self.report = torchsmooth.svd_compress_(torchsmooth.remove_penalties(model), self.ratio)


def make_data(number: int, seed: int) -> list[dict[str, Any]]:
    """Draw sequences of words with their labels."""
    words = torch.randint(WORDS, (number, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": int(row[0] < WORDS // 2)} for row in words]


def main(epochs: int = 6) -> tuple[torchsmooth.CompressionReport, float]:
    """Train, compress and print; return the report and the accuracy of the compressed model in percent."""
    set_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=8, num_labels=2,
    )  # fmt: skip
    callback = SmoothThenCompress(torchsmooth.NuclearNorm(1e-3), ratio=0.4)
    test = make_data(200, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=3e-3, use_cpu=True,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(BertForSequenceClassification(config), arguments, train_dataset=make_data(640, seed=0))
        trainer.add_callback(callback)
        trainer.train()
        prediction = trainer.predict(test)
    right = 100 * float((prediction.predictions.argmax(1) == prediction.label_ids).mean())
    print(f"{callback.report}\n{right:.1f} % of the test sequences right")
    return callback.report, right


if __name__ == "__main__":
    main()
