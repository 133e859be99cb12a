"""What the benchmarks of time stand on: the layers of others, the counting, the tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchsmooth
from testbed.llama import LlamaBlock
from tests.networks import small_resnet
from tests.strategies import fill_, randn, seeds

folder = Path(__file__).resolve().parents[1] / "benchmarks"
pytest.importorskip("tqdm", reason="needs the extra `bench`")
if not folder.is_dir():
    pytest.skip("needs benchmarks/", allow_module_level=True)
sys.path.append(str(folder))  # its scripts import each other by name

import compress_time  # noqa: E402
import compress_ways  # noqa: E402
import harness  # noqa: E402
import inference  # noqa: E402
import inference_candidates as candidates  # noqa: E402
import peers  # noqa: E402
import timed_models  # noqa: E402

INSTALLED = [name for name, peer in peers.PEERS.items() if not peer.missing]


def options(**given):
    return argparse.Namespace(
        **{"device": "cpu", "all": False, "models": None, "batches": None, "ratios": None, "dtypes": None}
        | {"modes": None, "groups": ["params"], "runs": 3, "least": 0.0, "limit": 60.0, "write": False}
        | given
    )


def small_entry():
    return timed_models.Entry(lambda: fill_(LlamaBlock(16, 24, 2), 0), (5, 16))


# --------------------------------------------------------------------------------------------------------------- peers


@pytest.mark.filterwarnings("ignore")  # of the libraries' own
@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_computes_what_the_low_rank_layer_computes(name):
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed: {', '.join(peers.PEERS[name].missing)} missing")
    make = peers.PEERS[name].make
    for bias in (True, False):
        linear = torchsmooth.LowRankLinear.from_linear(fill_(nn.Linear(14, 10, bias=bias), 1), 4)
        conv = torchsmooth.LowRankConv2d.from_conv2d(
            fill_(nn.Conv2d(6, 10, 3, stride=2, padding=1, dilation=2, bias=bias), 2), 7
        )
        with torch.no_grad():
            x, image = randn(2, 3, 14, seed=3, dtype=torch.float32), randn(2, 6, 9, 9, seed=4, dtype=torch.float32)
            torch.testing.assert_close(make(linear)(x), linear(x), atol=1e-5, rtol=1e-4)
            other = make(conv)
            assert other(image).shape == conv(image).shape
            if name != "tensorly-torch":  # whose convolutions have as many parameters, of another decomposition
                torch.testing.assert_close(other(image), conv(image), atol=1e-5, rtol=1e-4)
            mine, theirs = (sum(parameter.numel() for parameter in one.parameters()) for one in (conv, other))
            assert theirs == pytest.approx(mine, rel=0.2)


def test_every_low_rank_layer_of_a_model_gets_a_peer():
    model = small_resnet()
    torchsmooth.plan_compression(model, 0.7, scheme="channel", form="factored").apply_(model)
    x = randn(2, 3, 32, 32, seed=0, dtype=torch.float32)
    before = model(x)
    assert peers.replaced_(model, peers.PEERS["two plain layers"]) is model
    assert not any(isinstance(one, (torchsmooth.LowRankConv2d, torchsmooth.LowRankLinear)) for one in model.modules())
    torch.testing.assert_close(model(x), before, atol=0, rtol=0)


def test_what_a_peer_cannot_do_leaves_the_model_as_it_was():
    def refuse(layer):
        if isinstance(layer, torchsmooth.LowRankLinear):
            raise ValueError("not this one")
        return peers.two_plain_layers(layer)

    conv = torchsmooth.LowRankConv2d.from_conv2d(nn.Conv2d(4, 4, 3), 2)
    linear = torchsmooth.LowRankLinear.from_linear(nn.Linear(4, 4), 2)
    model = nn.Sequential(conv, nn.Flatten(), linear)
    with pytest.raises(ValueError, match="not this one"):
        peers.replaced_(model, peers.Peer("", (), refuse))
    assert model[0] is conv
    assert model[2] is linear


# ------------------------------------------------------------------------------------------------------------ counting


def test_multiply_adds_are_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert candidates.multiply_adds(model, torch.zeros(2, 3, 4, 4)) == 2 * (16 * 8 * 3 * 9 + 8 * 16 * 5)
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    counted = candidates.multiply_adds(attention, torch.zeros(1, 3, 8))
    assert counted == 3 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 3 * 3 * 8  # fused, nothing would be counted
    assert torch.backends.mha.get_fastpath_enabled()


def test_candidates_are_of_the_ratio_and_of_the_same_ranks():
    subject = candidates.Subject(small_entry(), "cpu", torch.float32, [0.5, 0.999])
    inputs = subject.inputs(2)
    plans = subject.plans("params", inputs)
    assert plans[0.5].ratio >= 0.5
    assert plans[0.999].startswith("cannot be reached")
    assert subject.plans("params", inputs) is plans  # planned once
    small = plans[0.5].apply_(subject.entry.model())
    assert small.ratio >= 0.5
    equal = subject.plans(candidates.EQUAL, inputs)[0.5]
    assert {one.form for one in equal if one.rank} == {"factored"}
    model = subject.entry.model()
    equal.apply_(model)
    two = peers.replaced_(model, peers.PEERS["two plain layers"])
    after = sum(one.numel() for one in two.parameters())
    assert after == equal.parameters_after


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch runs without oneDNN")
def test_all_layers_of_the_packed_model_are_dense_and_packed():
    subject = candidates.Subject(small_entry(), "cpu", torch.float32, [0.5])
    found = {one.name: one for one in subject.candidates(2, 0.5, ["params"])}
    packed = found[candidates.PACKED]
    layers = [one for one in packed.model.modules() if isinstance(one, torchsmooth.LowRankLinear)]
    assert layers
    assert {one.execution for one in layers} == {"packed_dense"}
    assert packed.fewer == 1.0
    assert candidates.multiply_adds(found["target params"].model, packed.inputs) > 0
    with torch.no_grad():
        assert torch.allclose(packed.model(packed.inputs), found["target params"].model(packed.inputs), atol=1e-5)


def test_times_are_planned_with_the_channels_of_images_last(monkeypatch):
    def planned(model, ratios, *, example_inputs, **_):
        is_last = [
            one.is_contiguous(memory_format=torch.channels_last) for one in (next(model.parameters()), example_inputs)
        ]
        return dict.fromkeys(ratios, f"planned in {is_last}")

    monkeypatch.setattr(candidates, "reachable_plans", planned)
    convolutions = timed_models.Entry(lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), (8, 6, 6))
    subject = candidates.Subject(convolutions, "cpu", torch.float32, [0.5])
    found = {one.name: one for one in subject.candidates(2, 0.5, ["macs", "latency"])}
    assert found["target latency"].problem == "planned in [True, True]"
    assert found["target macs"].problem == "planned in [False, False]"
    assert subject.model[0].weight.is_contiguous()  # what was given is left as it was


def test_a_ratio_that_cannot_be_reached_takes_only_the_larger_ones_with_it():
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    plans = candidates.reachable_plans(model, [0.99, 0.5, 0.95, 0.7])
    assert [isinstance(plans[ratio], str) for ratio in (0.5, 0.7, 0.95, 0.99)] == [False, False, True, True]


def test_another_error_of_a_plan_is_none_of_an_unreachable_ratio():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"between 0 and 1 .*got 1\.5"):
        candidates.reachable_plans(model, [0.5, 1.5])
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        candidates.reachable_plans(model, [0.5])


def test_a_target_that_cannot_be_planned_says_why_and_the_others_are_there(monkeypatch):
    def planned(model, ratios, **options):
        if options.get("target") == "macs":
            raise ValueError("the weight of layer '0' is odd.")
        return sweep(model, ratios, **options)

    sweep = torchsmooth.sweep
    monkeypatch.setattr(torchsmooth, "sweep", planned)
    subject = candidates.Subject(small_entry(), "cpu", torch.float32, [0.5])
    found = {one.name: one for one in subject.candidates(2, 0.5, ["macs", "params"])}
    assert found["target macs"].problem == "the weight of layer '0' is odd."
    assert found["target params"].model is not None


# -------------------------------------------------------------------------------------------------------------- tables


def test_models_of_one_class_are_compiled_apart():
    one, two = (inference.apart(fill_(nn.Linear(3, 3), seed)) for seed in (0, 1))
    assert one.__code__ is not two.__code__
    x = torch.ones(1, 3)
    assert not torch.equal(one(x), two(x))
    torch.testing.assert_close(one(x), fill_(nn.Linear(3, 3), 0)(x))


def test_what_is_measured_follows_the_options():
    assert inference.settings_of(options()) == inference.ON_CPU
    everything = inference.settings_of(options(all=True))
    assert {one.model for one in everything} == set(timed_models.MODELS)
    assert {one.mode for one in everything} == {"eager", "compile"}  # no graphs on a CPU
    assert {one.mode for one in inference.settings_of(options(device="cuda"))} == set(inference.MODES)
    some = inference.settings_of(options(models=["vgg16_224"], batches=[2], dtypes=["bfloat16"], modes=["eager"]))
    assert some == {inference.Setting("vgg16_224", "bfloat16", "eager"): inference.Run([2], inference.RATIOS)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modes", "graphs"], "--modes graphs are CUDA's"),
        (["--modes", "eager", "graphs"], "--modes graphs are CUDA's"),
        (["--ratios", "0.5", "1.5"], "--ratios must be strictly between 0 and 1"),
        (["--ratios", "0"], "--ratios must be strictly between 0 and 1"),
        (["--ratios", "nan"], "--ratios must be strictly between 0 and 1"),
    ],
)
def test_options_that_measure_nothing_are_refused(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inference.py", "--device", "cpu", *words])
    with pytest.raises(SystemExit):
        inference.read_options()
    assert message in capsys.readouterr().err


def test_a_cell_has_the_speed_up_over_the_faster_dense_model():
    cells = {
        "dense": inference.Cell(8e-3, 7e-3, 9e-3),
        "dense, channels_last": inference.Cell(6e-3, 6e-3, 6e-3),
        "small": inference.Cell(3e-3, 2.5e-3, 3.25e-3),
    }
    small = candidates.Candidate("small", fewer=4.0)
    assert inference.text_of(small, cells, 6) == "3.00 (2.50–3.25) ms, 2,000/s, **2.00 ×** of 4.00 × (50%)"
    assert inference.text_of(candidates.Candidate("dense"), cells, 8) == "8.00 (7.00–9.00) ms, 1,000/s"
    failed = candidates.Candidate("none", problem="it | is\nso")
    assert inference.text_of(failed, cells, 8) == "it / is"


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.2345e-5, "0.0123"), (9.99e-4, "0.999"), (0.0345, "34.5"), (1.5, "1500"), (0.123, "123")]
)
def test_times_have_three_digits(seconds, text):
    assert inference.milliseconds(inference.Cell(seconds, seconds, seconds)) == f"{text} ({text}–{text}) ms"


def test_quartiles_of_a_few_runs():
    assert inference.cell_of([3.0]) == (3.0, 3.0, 3.0)
    assert inference.cell_of([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)


def test_what_fails_is_said_and_the_others_are_measured():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("not enough memory for this")

    x = torch.zeros(1, 3)
    models = [
        candidates.Candidate("dense", nn.Linear(3, 3), x),
        candidates.Candidate("failing", Failing(), x),
        candidates.Candidate("unreachable", problem="cannot be reached"),
    ]
    found = inference.measure(models, "eager", options())
    assert set(found) == {"dense"}
    assert [one.problem for one in models] == ["", "out of memory", "cannot be reached"]


def test_every_run_of_every_candidate_is_returned_and_short_ones_are_repeated():
    calls = {"short": 0, "other": 0}

    def count(name):
        calls[name] += 1

    samples = harness.alternating_seconds([lambda: count("short"), lambda: count("other")], "cpu", 3)
    assert [len(times) for times in samples] == [3, 3]
    assert calls == {"short": 4, "other": 4}  # one that is not counted
    harness.alternating_seconds([lambda: count("short")], "cpu", 2, least=0.5)
    assert calls["short"] > 4 + 2 * 2


def test_tables_are_printed_with_headings_and_notes(capsys):
    tables = {"one": (["a", "b"], [["1", "2"]]), "two": (["c"], [["3"]])}
    harness.publish_tables("name", "Title", ["A note."], tables, options())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# Title"
    assert lines[4:] == [
        "A note.", "", "## one", "", "| a | b |", "| --- | --- |", "| 1 | 2 |", "", "## two", "", "| c |", "| --- |",
        "| 3 |", "",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------- time of compressing


def test_the_matrices_of_a_plan_are_those_of_each_scheme_with_attention_taken_apart():
    attention = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, (3, 2)), "attention": attention})
    shapes = sorted(tuple(one.shape) for one in compress_ways.planned_matrices(model))
    conv = [(1, 6, 24), (1, 36, 4), (1, 12, 12), (1, 18, 8)]  # channel, input, spatial both ways round
    assert shapes == sorted(conv + [(1, 8, 8)] * 4)
    assert model["attention"] is attention
    assert [tuple(one.shape) for one in compress_ways.flattened(model)] == [(6, 24), (24, 8), (8, 8)]


@given(seeds, st.sampled_from([0.3, 0.6]))
@settings(max_examples=4)
def test_a_compressed_model_is_as_near_as_float64_svds_of_the_same_ranks(seed, ratio):
    model = nn.Sequential(fill_(nn.Conv2d(8, 16, 3, groups=2), seed), fill_(nn.Linear(24, 20), seed))
    difference, layers = compress_ways.largest_difference(model, ratio)
    assert layers >= 1
    assert difference < 1e-6


def test_errors_are_compared_inside_of_attention_too():
    model = nn.Sequential(fill_(nn.TransformerEncoderLayer(24, 2, 32, batch_first=True), 0))
    expected = sum(one.rank is not None for one in torchsmooth.plan_compression(model, 0.6, scheme="channel"))
    difference, layers = compress_ways.largest_difference(model, 0.6)
    assert layers == expected
    assert isinstance(model[0].self_attn, torchsmooth.LowRankMultiheadAttention)
    assert difference < 1e-6


def test_a_model_that_was_cut_worse_is_found_out(monkeypatch):
    model = nn.Sequential(fill_(nn.Linear(24, 20), 0))
    apply = torchsmooth.CompressionPlan.apply_

    def worse(plan, target, **rest):
        apply(plan, target, **rest)
        with torch.no_grad():
            target[0].up.weight.mul_(1.01)

    monkeypatch.setattr(torchsmooth.CompressionPlan, "apply_", worse)
    assert compress_ways.largest_difference(model, 0.5)[0] > 1e-6


def test_ways_are_timed_on_copies_and_one_that_fails_says_why():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    before = [one.clone() for one in model.parameters()]
    limited = compress_ways.Way(lambda *_: (_ for _ in ()).throw(RuntimeError("ended after 1 s")))
    ways = compress_ways.WAYS | {"limited": limited}
    found = compress_time.timed(model, ways, options(runs=1))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert found["limited"].note == "ended after 1 s"
    rows = [compress_time.row(name, one, found) for name, one in found.items()]
    assert rows[-1] == ["limited", "ended after 1 s", "–", "–", "–"]
    assert rows[list(ways).index(compress_time.BASE)][2] == "1.00 ×"
    assert rows[list(ways).index(compress_time.LIMIT)][3] == "1.0 ×"
