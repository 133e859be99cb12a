"""Watch the weights of a network while it trains, plain and smooth, in TensorBoard and in two pictures.

The network of `digits.py` is trained once without a penalty and once with each penalty. After every epoch
`torchsmooth.spectrum(model).scalars()` goes to TensorBoard, a run for each training. At the end two pictures are
written: `spectra.png`, the singular values, effective ranks, energies and roughness of all layers, and `weights.png`,
the weight of one layer, side by side.

Run `python examples/watch_training.py --help`; then `tensorboard --logdir demo/tensorboard`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

import torchsmooth
from digit_network import PENALTIES, STRENGTHS, DigitNetwork, Images, accuracy, load_images, train

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

NO_TENSORBOARD = "tensorboard is not installed, so nothing is logged, only drawn: pip install tensorboard"


class Watcher:
    """What is called after each epoch: it measures the weights and the accuracy, and logs both."""

    def __init__(self, writer: SummaryWriter | None, validation: Images, ratio: float, progress: tqdm) -> None:
        self.writer, self.validation, self.ratio, self.progress = writer, validation, ratio, progress
        self.epoch = 0

    def __call__(self, model: DigitNetwork) -> None:
        """Look at a model that is being trained."""
        self.epoch += 1
        self.progress.update()
        if self.writer is None:
            return
        for tag, value in torchsmooth.spectrum(model, ratio=self.ratio).scalars().items():
            self.writer.add_scalar(tag, value, self.epoch)
        model.eval()
        self.writer.add_scalar("accuracy/validation", accuracy(model, self.validation), self.epoch)
        model.train()


def open_writer(folder: Path) -> SummaryWriter | None:
    """Return a writer for one run, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for spectra.png and weights.png")
    parser.add_argument("--logdir", type=Path, default=Path("demo/tensorboard"), help="folder for the logs")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    parser.add_argument(
        "--penalties", nargs="+", choices=PENALTIES, default=["nuclear", "first"], help="which to compare"
    )
    parser.add_argument(
        "--ratio", type=float, default=0.8, help="fraction of its parameters that each layer would lose"
    )
    parser.add_argument("--layer", default="blocks.5.conv2", help="whose weight to draw")
    parser.add_argument("--seed", type=int, default=0, help="of every training")
    arguments = parser.parse_args()
    if arguments.epochs < 1 or not 0 < arguments.ratio < 1:
        parser.error("--epochs must be at least 1, and --ratio between 0 and 1")
    if not isinstance(dict(DigitNetwork().named_modules()).get(arguments.layer), (torch.nn.Conv2d, torch.nn.Linear)):
        parser.error(f"--layer must name a Conv2d or Linear of the network, got {arguments.layer!r}")
    return arguments


def main() -> None:
    """Train, log and draw."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # layers this small gain little from a second one, and lose much on a busy machine
    arguments.output.mkdir(parents=True, exist_ok=True)
    images = load_images()
    penalties = {name: PENALTIES[name](STRENGTHS[name]) for name in dict.fromkeys(arguments.penalties)}
    models = {}
    with tqdm(total=(1 + len(penalties)) * arguments.epochs, unit="epoch") as progress:
        for name, penalty in {"plain": None, **penalties}.items():
            progress.set_description(name)
            title = name if penalty is None else type(penalty).__name__
            writer = open_writer(arguments.logdir / title)
            watcher = Watcher(writer, images["validation"], arguments.ratio, progress)
            models[title] = train(images["train"], arguments.epochs, arguments.seed, penalty, watcher)
            if writer is not None:
                writer.close()

    spectra = {name: torchsmooth.spectrum(model, ratio=arguments.ratio) for name, model in models.items()}
    for name, model in models.items():
        print(f"\n{name}, {accuracy(model, images['test']):.1f} % of the test images right:\n{spectra[name]}")
    torchsmooth.plot_spectra(spectra, arguments.output / "spectra.png")
    weights = {name: model.get_submodule(arguments.layer) for name, model in models.items()}
    torchsmooth.plot_weights(weights, arguments.output / "weights.png", relative=True)
    print(f"\nwrote spectra.png and weights.png to {arguments.output}")
    print(NO_TENSORBOARD if writer is None else f"logs: tensorboard --logdir {arguments.logdir}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
