"""How accurate is a network that was trained with each penalty: as it is, and compressed with no fine-tuning?

Trains a ResNet-18 on the CIFAR-10 images once for each candidate, from one seed and by one recipe, and compresses each
network at several ratios: without data, and with BatchNorm statistics estimated anew on 1,024 training images, cropped
and mirrored as they were in training (estimated on the images as they are, the statistics cost this network two
points, compressed or not). “–”: the ratio cannot be reached. The networks and the accuracies are kept in a folder, by
names that say how they were trained, so the work can be interrupted between candidates and gone on with.

    python benchmarks/training.py --output runs --write
    python benchmarks/training.py --output runs --only plain nuclear=3e-3 tail=0.9,0.05
"""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from harness import make_parser, publish, read_arguments
from torch import Tensor, nn
from tqdm import tqdm
from unreachable import is_unreachable

import torchsmooth

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed

from testbed.augmentation import augmented
from testbed.cifar import ResNet18, accuracy, load_images, normalise

if TYPE_CHECKING:
    import argparse

RATIOS = (0.5, 0.7, 0.8, 0.9, 0.95)
DEFAULT = (
    "plain",
    "nuclear=1e-3",
    "first=3e-4",
    "second=1e-4",
    "tail=0.8,0.01",
    "tail=0.8,0.02",
    "tail=0.9,0.05",
)
# When a tail's strength starts to rise, and is all there: what the tail will be is not known when the training begins.
RAMP = (0.15, 0.75)


def penalty_of(spec: str) -> torchsmooth.penalties.Penalty | None:
    """Read a candidate: a name, and numbers behind an equals sign."""
    name, _, numbers = spec.partition("=")
    values = [float(one) for one in numbers.split(",")] if numbers else []
    kinds = {
        "nuclear": torchsmooth.NuclearNorm,
        "ratio": torchsmooth.NuclearRatio,
        "first": torchsmooth.FirstDerivative,
        "second": torchsmooth.SecondDerivative,
        "tail": torchsmooth.RankTail,
        "constrained": lambda *bound: torchsmooth.Constrained(torchsmooth.NuclearNorm(), *bound),
    }
    if name == "plain" and not numbers:
        return None
    if name not in kinds:
        raise ValueError(f"a candidate is 'plain' or one of {sorted(kinds)} with its numbers, got {spec!r}.")
    return kinds[name](*values)


def train(spec: str, images: Tensor, labels: Tensor, arguments: argparse.Namespace) -> nn.Module:
    """Train one network, and return it in eval mode."""
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    model = ResNet18(arguments.width).to(arguments.device, memory_format=torch.channels_last)
    per_epoch = math.ceil(len(images) / arguments.batch)
    total = per_epoch * arguments.epochs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=total, pct_start=0.2, cycle_momentum=False)
    penalty = penalty_of(spec)
    if penalty is not None:
        adaptive = isinstance(penalty, torchsmooth.RankTail)
        begin, full = arguments.ramp
        schedule = torchsmooth.StrengthSchedule(total, begin=begin, full=full) if adaptive else None
        torchsmooth.attach_(optimizer, torchsmooth.smooth_(model, penalty), schedule=schedule)
    model.train()
    with tqdm(total=total, desc=spec, disable=None) as bar:
        for _ in range(arguments.epochs):
            for indices in torch.randperm(len(images), generator=generator).split(arguments.batch):
                batch = normalise(augmented(images[indices], generator)).to(arguments.device)
                with torch.autocast(batch.device.type, dtype=torch.bfloat16):
                    logits = model(batch.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits.float(), labels[indices].to(arguments.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                bar.update()
    torchsmooth.remove_penalties(model)
    return model.eval()


def name_of(spec: str, arguments: argparse.Namespace) -> str:
    """Name the files of a network, by all that its training depends on."""
    ramp = arguments.ramp if isinstance(penalty_of(spec), torchsmooth.RankTail) else ()
    parts = (arguments.epochs, f"w{arguments.width}", f"b{arguments.batch}", arguments.images, *ramp, arguments.seed)
    return "-".join(map(str, (spec, *parts)))


def measure(model: nn.Module, data: dict[str, Tensor]) -> dict[str, float | None]:
    """Measure accuracy dense and at every ratio, in percent; None where a ratio cannot be reached."""
    found: dict[str, float | None] = {"dense": accuracy(model, data["test"], data["test_labels"])}
    for ratio in RATIOS:
        small = copy.deepcopy(model)
        try:
            torchsmooth.svd_compress_(small, ratio, progress=False)
        except ValueError as error:
            if not is_unreachable(error):
                raise
            found |= {f"{ratio}": None, f"{ratio} recalibrated": None}
            continue
        found[f"{ratio}"] = accuracy(small, data["test"], data["test_labels"])
        torchsmooth.recalibrate_batchnorm_(small, data["calibration"].split(128))
        found[f"{ratio} recalibrated"] = accuracy(small, data["test"], data["test_labels"])
    return found


def cell_of(found: dict[str, float | None], ratio: float) -> str:
    """Lay out the accuracies at a ratio."""
    before, after = found[f"{ratio}"], found[f"{ratio} recalibrated"]
    return "–" if before is None or after is None else f"{before:.1f} → {after:.1f}"


def main() -> None:
    """Train and measure what is missing, and print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of networks and accuracies")
    parser.add_argument("--only", nargs="+", default=DEFAULT, metavar="CANDIDATE", help="such as nuclear=3e-3")
    parser.add_argument("--ramp", nargs=2, type=float, default=RAMP, metavar=("BEGIN", "FULL"), help="of the tails")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=50_000, help="training images; fewer for a trial")
    arguments = read_arguments(parser)
    arguments.output.mkdir(parents=True, exist_ok=True)
    files = {spec: arguments.output / f"{name_of(spec, arguments)}.json" for spec in arguments.only}
    if not all(path.exists() for path in files.values()):
        images, labels = load_images("train", arguments.images)
        test, test_labels = load_images("test", 10_000)
        data = {
            "test": normalise(test).to(arguments.device),
            "test_labels": test_labels.to(arguments.device),
            "calibration": normalise(augmented(images[:1024], torch.Generator().manual_seed(1))).to(arguments.device),
        }
        for spec, path in files.items():
            if path.exists():
                continue
            network = path.with_suffix(".pt")
            if not network.exists():
                torch.save(train(spec, images, labels, arguments).state_dict(), network)
            model = ResNet18(arguments.width).to(arguments.device).eval()
            model.load_state_dict(torch.load(network, map_location=arguments.device))
            found = measure(model, data)
            path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    rows = []
    for spec, path in files.items():
        found = json.loads(path.read_text(encoding="utf-8"))
        rows.append([spec, f"{found['dense']:.1f}", *(cell_of(found, ratio) for ratio in RATIOS)])
    title = (
        f"Accuracy in % of a ResNet-18 of width {arguments.width} on the JPEG copy of CIFAR-10, after "
        f"{arguments.epochs} epochs with each penalty: dense, and compressed with no fine-tuning (without data → "
        "BatchNorm estimated anew)"
    )
    publish("training", title, ["penalty", "dense", *(f"−{ratio:.0%}" for ratio in RATIOS)], rows, arguments)


if __name__ == "__main__":
    main()
