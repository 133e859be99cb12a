"""How `cifar10.py` trains one network, from where an interruption left it."""

from __future__ import annotations

import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from cifar10_candidates import Candidate
from cifar10_recipes import Recipe
from torch import nn
from tqdm import tqdm
from unreachable import is_unreachable

import torchsmooth
from torchsmooth._atomic_file import whole_file

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed

from testbed.augmentation import augmented
from testbed.cifar import accuracy, normalise
from testbed.cifar_networks import ARCHITECTURES

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from cifar10_recipes import Run

    from testbed.cifar_splits import Splits

# With zeros, BatchNorm would learn other statistics than those of whole images, and calibration would have to follow.
BORDER: Literal["reflection"] = "reflection"


class Epoch(NamedTuple):
    """What is known after an epoch.

    Attributes:
        number: counted from one.
        loss: mean over the epoch, without the penalty.
        held_out: accuracy in percent on the images held out.
        penalty: the value of the penalty, at its full strength.
        expected: the relative error of all weights together, if they were compressed now by the ratio wanted.
    """

    number: int
    loss: float
    held_out: float
    penalty: float
    expected: float


class Watcher(Protocol):
    """What is told how a training goes."""

    def step(self, done: int) -> None:
        """Hear that so many steps are done."""

    def epoch(self, epoch: Epoch) -> None:
        """Hear that an epoch is done, and kept on the disk."""


class Bar:
    """A watcher that shows a progress bar on a terminal, and elsewhere a line for each epoch.

    Args:
        run: what is trained.
        steps: optimizer steps of the whole training.
        ratio: the ratio wanted.
    """

    def __init__(self, run: Run, steps: int, ratio: float) -> None:
        self._run, self._ratio, self._start = run, ratio, time.monotonic()
        self._bar = tqdm(total=steps, desc=f"{run.penalty} {run.strength:g}, seed {run.seed}", disable=None)

    def step(self, done: int) -> None:
        """Move the bar."""
        self._bar.update(done - self._bar.n)

    def epoch(self, epoch: Epoch) -> None:
        """Show the accuracy, the penalty and the expected loss."""
        facts = {
            "loss": f"{epoch.loss:.3f}",
            "held out": f"{epoch.held_out:.2f} %",
            "penalty": f"{epoch.penalty:.4g}",
            f"error at −{100 * self._ratio:g} %": f"{epoch.expected:.4f}",
        }
        self._bar.set_postfix(facts)
        if self._bar.disable:
            told = ", ".join(f"{name} {value}" for name, value in facts.items())
            seconds = time.monotonic() - self._start
            head = f"{self._run.name}: epoch {epoch.number}/{self._run.epochs}"
            print(f"{head}: {told}; {seconds:.0f} s", flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class Training:
    """A network with all that its training needs, to be kept in a checkpoint and gone on with.

    The global random state is not used: the initial weights come from the seed alone, the order of the images and their
    crops from a generator that belongs to the checkpoint.

    Args:
        run: what is trained.
        splits: the images, on the device to train on.
        ratio: at which the expected loss is told; for a tail it is the tail's own.

    Raises:
        ValueError: if there are fewer images than in one batch.
    """

    def __init__(self, run: Run, splits: Splits, ratio: float) -> None:
        self.run = run
        self._recipe, candidate = Recipe.of(run.recipe), Candidate(run.penalty, run.strength)
        self.ratio = candidate.ratio or ratio
        self._images, self._held_out = splits.train, splits.held_out
        device = self._images.pixels.device
        self._autocast_on = device.type if run.dtype == "bfloat16" else ""
        self.steps_per_epoch = len(self._images.labels) // self._recipe.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"there must be at least {self._recipe.batch_size} images, a batch of recipe {run.recipe!r}, to train "
                f"on; got {len(self._images.labels)}."
            )
        self.steps = run.epochs * self.steps_per_epoch
        self.epochs_done = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            model = ARCHITECTURES[run.network].make(run.width)
        self.model = model.to(device, memory_format=torch.channels_last)
        self._optimizer = self._recipe.make_optimizer(self.model)
        self._rate = self._recipe.make_schedule(self._optimizer, self.steps)
        self._penalty = candidate.make()
        self._handle: torchsmooth.attach.PenaltyHandle | None = None
        if self._penalty is not None:
            torchsmooth.smooth_(self.model, self._penalty)
            schedule = candidate.schedule(self.steps)
            self._handle = torchsmooth.attach_(self._optimizer, self.model, schedule=schedule)
        self._generator = torch.Generator(device).manual_seed(run.seed)

    def epoch(self, watcher: Watcher) -> Epoch:
        """Train for one epoch."""
        images, labels = self._images
        size, total = self._recipe.batch_size, torch.zeros((), device=images.device)
        self.model.train()
        order = torch.randperm(len(labels), generator=self._generator, device=images.device)
        for number, indices in enumerate(order[: self.steps_per_epoch * size].split(size), start=1):
            batch = normalise(augmented(images[indices], self._generator, BORDER))
            with self._autocast():
                logits = self.model(batch)
            loss = F.cross_entropy(logits.float(), labels[indices], label_smoothing=self._recipe.label_smoothing)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._rate.step()
            total += loss.detach()
            watcher.step(self.epochs_done * self.steps_per_epoch + number)
        self.epochs_done += 1
        with self._autocast():
            held_out = accuracy(self.model, normalise(self._held_out.pixels), self._held_out.labels)
        loss_mean = float(total) / self.steps_per_epoch
        cut, whole = _cut_energy(self.model, self.ratio)
        return Epoch(self.epochs_done, loss_mean, held_out, self._penalty_value(cut), math.sqrt(cut / whole))

    def save(self, path: Path) -> None:
        """Keep everything in a file, which is replaced in one step."""
        state = {
            "epochs_done": self.epochs_done,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rate": self._rate.state_dict(),
            "penalty": None if self._handle is None else self._handle.state_dict(),
            "generator": self._generator.get_state(),
        }
        with whole_file(path) as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        """Go on from a file."""
        device = self._images.pixels.device
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rate.load_state_dict(state["rate"])
        if self._handle is not None:
            self._handle.load_state_dict(state["penalty"])
        self._generator.set_state(state["generator"].cpu())
        self.epochs_done = state["epochs_done"]

    def finished(self) -> nn.Module:
        """Return the network without its penalties, in eval mode."""
        if self._handle is not None:
            self._handle.remove()
            torchsmooth.remove_penalties(self.model)
        return self.model.eval()

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._autocast_on, dtype=torch.bfloat16) if self._autocast_on else nullcontext()

    @torch.no_grad()
    def _penalty_value(self, cut: float) -> float:
        if self._penalty is None:
            return 0.0
        if isinstance(self._penalty, torchsmooth.RankTail):
            return self._penalty.strength / 2 * cut
        return float(torchsmooth.penalty_loss(self.model))


def train(run: Run, splits: Splits, folder: Path, ratio: float, watcher: Watcher | None = None) -> nn.Module:
    """Train a network, or go on, or load it if it is there already.

    Args:
        run: what to train.
        splits: the images, on the device to train on.
        folder: where the trained network is kept, and its checkpoint after each epoch until then.
        ratio: at which the expected loss is told; for a tail it is the tail's own.
        watcher: what is told how it goes; None shows a progress bar.

    Returns:
        The network in eval mode, on that device.
    """
    network, checkpoint = network_file(run, folder), folder / f"{run.name}.checkpoint"
    if network.exists():
        return load_trained(run, folder).to(splits.train.pixels.device, memory_format=torch.channels_last)
    folder.mkdir(parents=True, exist_ok=True)
    training = Training(run, splits, ratio)
    if checkpoint.exists():
        training.load(checkpoint)
    bar = None if watcher else Bar(run, training.steps, training.ratio)
    told = watcher or bar
    try:
        told.step(training.epochs_done * training.steps_per_epoch)
        while training.epochs_done < run.epochs:
            epoch = training.epoch(told)
            training.save(checkpoint)
            told.epoch(epoch)
    finally:
        if bar:
            bar.close()
    model = training.finished()
    with whole_file(network) as file:
        torch.save(model.state_dict(), file)
    checkpoint.unlink(missing_ok=True)
    return model


def network_file(run: Run, folder: Path) -> Path:
    """Return where a trained network is kept."""
    return folder / f"{run.name}.pt"


def load_trained(run: Run, folder: Path) -> nn.Module:
    """Load a trained network in eval mode, on the CPU."""
    model = ARCHITECTURES[run.network].make(run.width)
    model.load_state_dict(torch.load(network_file(run, folder), map_location="cpu", weights_only=True))
    return model.eval()


def expected_error(model: nn.Module, ratio: float) -> float:
    """Predict the relative error of all weights together at a ratio; NaN if it cannot be reached."""
    cut, whole = _cut_energy(model, ratio)
    return math.sqrt(cut / whole)


@torch.no_grad()
def _cut_energy(model: nn.Module, ratio: float) -> tuple[float, float]:
    """Return the squared norm of what a plan cuts off the weights, and that of the weights."""
    try:
        plan = torchsmooth.plan_compression(model, ratio, progress=False)
    except ValueError as error:
        if not is_unreachable(error):
            raise
        return math.nan, 1.0
    modules, cut, whole = dict(model.named_modules()), 0.0, 0.0
    for layer in plan:
        weight: object = getattr(modules[layer.name], "weight", None)
        if not isinstance(weight, torch.Tensor):  # positions, say, which are a parameter of the network itself
            continue
        energy = float(weight.float().square().sum())
        whole += energy
        cut += 0.0 if layer.choice is None else layer.relative_error**2 * energy
    return cut, whole
