"""How small does a network get by low rank and int8 together, and how much of its quality is left?

Two networks: the sentence encoder MiniLM, whose quality is the mean cosine similarity of 200 sentences' embeddings to
those of the dense encoder (of its 22.7 million parameters 11.7 million are word embeddings, which torchao leaves in
float32); and a classifier of scikit-learn's digits made of linear layers, trained here in seconds,
whose quality is the accuracy on 601 test images. Each is compressed at several ratios, without data and with a few
unlabelled batches, and then quantised by torchao: the weights of linear layers to int8, in the last kind of rows also
their inputs, when they come. Nothing is fine-tuned. Everything runs on the CPU.

    python benchmarks/quantisation.py --write
"""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import make_parser, publish, read_arguments
from torch import nn
from tqdm import tqdm

import torchsmooth

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from digit_network import PENALTIES, STRENGTHS, load_images
from testbed.sentences import batches_of, embed, load_minilm, sentences
from testbed.torchvision_import import import_torchvision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from digit_network import Images

EPOCHS, WIDTH = 30, 512


class Subject(NamedTuple):
    """A network, what to compress it by, and how good it is."""

    name: str
    model: nn.Module
    ratios: tuple[float, ...]
    calibration: Any
    quality: Callable[[nn.Module], str]


def minilm() -> Subject:
    """Load the sentence encoder, and compose sentences to compress it by and others to judge it by."""
    import_torchvision()  # before transformers does
    model, tokenizer = load_minilm()
    texts = sentences(456)
    expected = embed(model, tokenizer, texts[256:])

    def quality(small: nn.Module) -> str:
        return f"cosine {float(F.cosine_similarity(embed(small, tokenizer, texts[256:]), expected).mean()):.3f}"

    return Subject("MiniLM", model, (0.2, 0.3, 0.4), batches_of(tokenizer, texts[:256]), quality)


def digits(penalty: str | None) -> Subject:
    """Train the classifier, plainly or with a penalty."""
    images = load_images()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )
    train(model, images["train"], penalty)

    @torch.no_grad()
    def quality(small: nn.Module) -> str:
        right = small(images["test"].pixels).argmax(1) == images["test"].labels
        return f"{100 * float(right.float().mean()):.1f} %"

    calibration = list(images["train"].pixels.split(128))
    name = "digits, plain" if penalty is None else f"digits, {PENALTIES[penalty].__name__}({STRENGTHS[penalty]})"
    return Subject(name, model.eval(), (0.5, 0.7, 0.9), calibration, quality)


def train(model: nn.Module, images: Images, penalty: str | None) -> None:
    """Train a classifier in place."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    if penalty is not None:
        torchsmooth.smooth_(model, PENALTIES[penalty](STRENGTHS[penalty]))
        torchsmooth.attach_(optimizer, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images.labels)).split(64):
            loss = F.cross_entropy(model(images.pixels[batch]), images.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    torchsmooth.remove_penalties(model)


def numbers() -> dict[str, Callable[[nn.Module], object]]:
    """Return what is done to the numbers of a model, in place, by name."""
    from torchao.quantization import (  # noqa: PLC0415 - importing it prints, so let errors in the arguments come first
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    def is_wide(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features > 1  # torchao fails for a single input

    return {
        "float32": lambda _: None,
        "int8 weights": lambda model: quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_wide),
        "int8 weights and inputs": lambda model: quantize_(
            model, Int8DynamicActivationInt8WeightConfig(), filter_fn=is_wide
        ),
    }


def megabytes(model: nn.Module) -> float:
    """Return the size of the saved state dict."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue()) / 1e6


def compressed(subject: Subject) -> Iterator[tuple[str, nn.Module]]:
    """Yield the network as it is, and compressed in every way, each by name; plans for all ratios are made at once."""
    yield "dense", subject.model
    for name, data in {"no data": None, "calibration": subject.calibration}.items():
        plans = torchsmooth.sweep(subject.model, subject.ratios, calibration=data, progress=False)
        for ratio, plan in zip(subject.ratios, plans, strict=True):
            small = copy.deepcopy(subject.model)
            plan.apply_(small, calibration=data, progress=False)
            yield f"−{ratio:.0%}, {name}", small


def rows_of(subject: Subject, kinds: dict[str, Callable[[nn.Module], object]], bar: tqdm) -> Iterator[list[str]]:
    """Compress one network in every way, quantise each result in every way, and measure it."""
    for how, small in compressed(subject):
        row = [subject.name, how, f"{sum(parameter.numel() for parameter in small.parameters()):,}"]
        for kind, quantise in kinds.items():
            bar.set_description(f"{subject.name}, {how}, {kind}")
            result = copy.deepcopy(small)
            quantise(result)
            row.append(f"{megabytes(result):.2f} MB, {subject.quality(result)}")
            bar.update()
        bar.write(" | ".join(row), file=sys.stderr)
        yield row


def main() -> None:
    """Measure and print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=("minilm", "digits"), default=("minilm", "digits"))
    arguments = read_arguments(parser)
    if arguments.device != "cpu":
        parser.error("int8 is measured on the CPU: run with --device cpu")
    kinds, rows = numbers(), []
    subjects: list[Subject] = []
    if "minilm" in arguments.only:
        subjects.append(minilm())
    if "digits" in arguments.only:
        subjects += [digits(None), digits("nuclear")]
    total = sum(len(kinds) * (1 + 2 * len(subject.ratios)) for subject in subjects)
    with tqdm(total=total, disable=None) as bar:
        for subject in subjects:
            rows += rows_of(subject, kinds, bar)
    title = (
        "Low rank × int8 with no fine-tuning: size of the state dict, and accuracy or similarity to the dense network"
    )
    publish("quantisation", title, ("network", "low rank", "parameters", *kinds), rows, arguments)


if __name__ == "__main__":
    main()
