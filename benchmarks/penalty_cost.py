"""What does a training step cost with each penalty, in time and in memory: in the loss, and by ``attach_``?

One step (forward, backward, SGD with momentum) of a ResNet-18 of width 64 for 32×32 images at batch 128, of the one of
torchvision on the same images (whose stem makes its step some ten times shorter, at the same weights) and of a ViT-B/16
at 224×224, with a penalty on every layer. What a user would write is there as well:
``torch.linalg.matrix_norm(weight.flatten(1), ord="nuc")`` under autograd.

Two columns of time: the whole step, measured in turn with the step without a penalty; and the penalty's own work alone
(value and backward pass, or what ``attach_`` does before the optimizer steps), which is less noisy, as a share of the
step without one. What ``RankTail`` does now and then (plans every 400 steps, decompositions every 40) is spread over
the steps. Memory is the peak of a process of its own, over that of the step without a penalty.

    python benchmarks/penalty_cost.py --write
    python benchmarks/penalty_cost.py --networks vit_b_16 --batch 4 --runs 3
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from harness import make_parser, median_seconds, publish, read_arguments
from torch import nn
from tqdm import tqdm

import torchsmooth

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed

from testbed.cifar import ResNet18
from testbed.torchvision_import import import_torchvision

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from torchsmooth.penalties import Penalty

NETWORKS = {
    "resnet18_cifar": (lambda: ResNet18(64), 32, 128),
    "resnet18": (lambda: import_torchvision().models.resnet18(num_classes=10), 32, 128),
    "vit_b_16": (lambda: import_torchvision().models.vit_b_16(num_classes=1000), 224, 4),
}
PENALTIES: dict[str, Penalty] = {
    "first derivative": torchsmooth.FirstDerivative(),
    "second derivative": torchsmooth.SecondDerivative(),
    "nuclear norm": torchsmooth.NuclearNorm(),
    "nuclear ratio": torchsmooth.NuclearRatio(),
    "constrained": torchsmooth.Constrained(torchsmooth.NuclearNorm()),
    "rank tail 0.8": torchsmooth.RankTail(0.8),
    "rank tail 0.5": torchsmooth.RankTail(0.5),
}
ADAPTIVE = ("constrained", "rank tail 0.8", "rank tail 0.5")
USER = 'matrix_norm(ord="nuc")'


def candidates(network: str) -> list[tuple[str, str]]:
    """List penalties, and how each is added; of a ViT, the attention's weights stay, so that 0.8 is out of reach."""
    without = "rank tail 0.8" if network == "vit_b_16" else "rank tail 0.5"
    names = [name for name in PENALTIES if name != without]
    pairs = [(name, "loss") for name in names if name not in ADAPTIVE]
    pairs += [(name, "attach_") for name in names]
    pairs += [("nuclear norm", "attach_, every=4"), (USER, "loss")]
    return sorted(pairs, key=lambda pair: [*PENALTIES, USER].index(pair[0]))


class Training:
    """One network with one penalty: a step of it, and the penalty's own work."""

    def __init__(self, network: str, penalty: str, way: str, arguments: argparse.Namespace) -> None:
        make, size, batch = NETWORKS[network]
        torch.manual_seed(0)
        self.model = make().to(arguments.device)
        generator = torch.Generator().manual_seed(1)
        batch = arguments.batch or batch
        self.images = torch.randn(batch, 3, size, size, generator=generator).to(arguments.device)
        self.labels = torch.randint(10, (batch,), generator=generator).to(arguments.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.penalty: Callable[[], torch.Tensor] | None = None
        self.handle: torchsmooth.attach.PenaltyHandle | None = None
        self.every = int(way.partition("every=")[2] or 1)
        if penalty == USER:
            self.penalty = self.by_autograd
        elif penalty:
            torchsmooth.smooth_(self.model, PENALTIES[penalty])
            if way == "loss":
                self.penalty = lambda: torchsmooth.penalty_loss(self.model)
            else:
                self.handle = torchsmooth.attach_(self.optimizer, self.model, every=self.every)

    def by_autograd(self) -> torch.Tensor:
        """Add up nuclear norms as one would without the library."""
        layers = [one for one in self.model.modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
        norms = [torch.linalg.matrix_norm(one.weight.flatten(1), ord="nuc") for one in layers]
        return 1e-3 * torch.stack(norms).sum()

    def step(self) -> None:
        """Train for one step."""
        loss = F.cross_entropy(self.model(self.images), self.labels)
        if self.penalty is not None:
            loss = loss + self.penalty()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def steps(self) -> None:
        """Train until the penalty has been evaluated once more."""
        for _ in range(self.every):
            self.step()

    def alone(self) -> list[tuple[Callable[[], object], int]]:
        """List what the penalty does by itself, each with the number of steps that it serves."""
        if self.penalty is not None:
            return [(lambda: self.penalty().backward(), 1)]
        if self.handle is None:
            return []
        handle = self.handle
        parts: list[tuple[Callable[[], object], int]] = [
            (lambda: handle._add_gradients(1.0, with_value=False), self.every)
        ]
        for description, adaptation in handle._adaptations.items():
            if isinstance(adaptation, torchsmooth.rank_tail.TailPlan) and isinstance(description, torchsmooth.RankTail):
                parts.append((partial(adaptation._refresh, 0), description.refresh_every))
                parts.append((partial(adaptation._replan, 0), description.replan_every))
        return parts


def peak_memory(network: str, penalty: str, way: str, arguments: argparse.Namespace) -> float:
    """Return the peak of a step in MiB: on a GPU what was allocated, otherwise the resident size of this process."""
    training = Training(network, penalty, way, arguments)
    training.step()
    if arguments.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        training.steps()
        return torch.cuda.max_memory_allocated() / 2**20
    training.steps()
    # Not by getrusage: there a process starts with the peak of the one that started it.
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return math.nan
    (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak) / 2**10


def apart(network: str, penalty: str, way: str, arguments: argparse.Namespace) -> float:
    """Measure the peak memory in a process of its own, whose peak nothing else has raised."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, (network, penalty, way, arguments))


def measure(network: str, penalty: str, way: str, arguments: argparse.Namespace, plain_memory: float) -> list[str]:
    """Compare one penalty with none: a row of the table."""
    plain, training = (Training(network, *one, arguments) for one in (("", ""), (penalty, way)))
    without, whole = median_seconds([plain.step, training.steps], arguments.device, arguments.runs)
    own = 0.0
    for work, steps in training.alone():
        own += median_seconds([work], arguments.device, arguments.runs)[0] / steps
    memory = apart(network, penalty, way, arguments) - plain_memory
    absolute = [f"{without * 1e3:.1f} ms"] if arguments.device.startswith("cuda") else []
    ratio = whole / training.every / without
    return [network, penalty, way, *absolute, f"{ratio:.3f}", f"{own / without:.1%}", f"{memory:+.0f} MiB"]


def main() -> None:
    """Measure every penalty on every network."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--runs", type=int, default=5, help="counted steps of each, after one that is not")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--batch", type=int, default=0, help="images; 128 for the ResNets and 4 for the ViT if not given"
    )
    arguments = read_arguments(parser)
    rows = []
    with tqdm(total=sum(len(candidates(network)) for network in arguments.networks), disable=None) as bar:
        for network in arguments.networks:
            plain = statistics.median(apart(network, "", "", arguments) for _ in range(3))
            for penalty, way in candidates(network):
                bar.set_description(f"{network}, {penalty}, {way}")
                rows.append(measure(network, penalty, way, arguments, plain))
                bar.update()
    header = ["network", "penalty", "by", "step", "step, times", "penalty alone, of a step", "memory"]
    if not arguments.device.startswith("cuda"):
        header.remove("step")
    title = "A training step with each penalty, against the same step with none (medians of one run)"
    publish("penalty_cost", title, header, rows, arguments)


if __name__ == "__main__":
    main()
