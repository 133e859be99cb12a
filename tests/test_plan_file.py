"""Plans in files: they come back equal, and a bad file says which field is wrong."""

from __future__ import annotations

import copy
import json
import os
import re
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import Tied, mlp, same, small_resnet, snapshot
from tests.strategies import fill_, seeds
from torchsmooth import CompressionPlan, plan_compression, sweep
from torchsmooth._checks import describe

INPUTS = torch.zeros(2, 24)


def again(plan):
    return CompressionPlan.from_json(plan.to_json())


def equal(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


@settings(max_examples=8)
@given(seeds, st.floats(0.05, 0.85), st.sampled_from([mlp, small_resnet]))
def test_a_plan_comes_back_equal_and_does_the_same(seed, ratio, build):
    model = build(seed)
    plan = plan_compression(model, ratio)
    read = again(plan)
    assert read == plan
    assert read.to_json() == plan.to_json()
    assert str(read) == str(plan)
    for layer, other in zip(plan, read, strict=True):
        assert other.relative_error == pytest.approx(layer.relative_error, rel=1e-5, abs=1e-9)
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    assert plan.apply_(one).to_dict() == read.apply_(other).to_dict()
    assert equal(one, other)


def test_a_plan_that_was_read_can_be_edited():
    model = small_resnet()
    plan = plan_compression(model, 0.5)
    read = again(plan)
    for one in (plan, read):
        one["layers.7.conv2"].choose("input", 5, "pivoted")
        one["fc"].rank = 3
        one["layers.0.conv1"].keep_dense()
    assert read == plan
    assert read["fc"].relative_error == pytest.approx(plan["fc"].relative_error, rel=1e-5)
    assert read.apply_(model)["layers.7.conv2"].form == "pivoted"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_dtype_and_kind_of_layer_comes_back(dtype):
    model = nn.Sequential(
        nn.Linear(64, 64),
        nn.Conv2d(16, 32, 3, groups=4),
        nn.Conv1d(8, 8, 3),
        nn.Embedding(9, 4),
        nn.LSTM(4, 4),
        nn.Linear(1, 1),
        nn.ConvTranspose2d(8, 4, 3, groups=2),
    ).to(dtype)
    plan = plan_compression(fill_(model, 0), 0.3, filter_fn=lambda module, name: name != "5")
    read = again(plan)
    assert read == plan
    assert str(read) == str(plan)
    assert read["5"].reason == "left out by filter_fn"
    assert read.apply_(model).parameters_after == plan.parameters_after


def test_what_rounding_adds_to_small_weights_comes_back():
    model = fill_(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), 0).half()
    model[0].weight.data.mul_(1e-6)
    plan = plan_compression(model, 0.2, form="pivoted")
    read = again(plan)
    assert read.to_json() == plan.to_json()
    for one in (plan, read):
        one["0"].rank = 20
    assert plan["0"].relative_error > 1.1 * float(plan["0"].options["channel"].errors[20]) ** 0.5
    assert read["0"].relative_error == pytest.approx(plan["0"].relative_error, rel=1e-5)


def test_shared_and_tied_weights_come_back():
    plan = plan_compression(fill_(Tied(), 0), 0.1)
    assert again(plan) == plan


def test_multiply_accumulates_come_back():
    plan = plan_compression(mlp(), 0.5, target="macs", example_inputs=INPUTS)
    read = again(plan)
    assert (read.target, read.macs_before, read.macs_after) == ("macs", plan.macs_before, plan.macs_after)
    for one in (plan, read):
        one["0"].rank = 2
    assert read.macs_after == plan.macs_after
    assert read.apply_(mlp(), INPUTS).macs_after == plan.macs_after


def test_times_come_back(monkeypatch):
    def fake(call, device, repeats):
        owner = call.func.__self__
        return 1e-6 * sum(one.numel() for one in (owner if isinstance(owner, nn.Module) else call.args[0]).parameters())

    monkeypatch.setattr("torchsmooth._timing.seconds", fake)
    plan = plan_compression(mlp(), 0.3, target="latency", example_inputs=INPUTS)
    read = again(plan)
    assert read == plan
    assert str(read) == str(plan)
    assert (read.latency_before, read.latency_after) == (plan.latency_before, plan.latency_after)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    less, more = sweep(mlp(), [0.3, 0.6])
    path = tmp_path / "plan.json"
    less.save(path)
    assert CompressionPlan.load(str(path)) == less
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600

    def broken(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        more.save(path)
    monkeypatch.undo()
    assert CompressionPlan.load(path) == less
    more.save(path)
    assert CompressionPlan.load(path) == more
    assert [one.name for one in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        CompressionPlan.load(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError):
        plan_compression(mlp(), 0.5).save(tmp_path / "no" / "folder.json")


@pytest.mark.parametrize("path", [None, 3, b"plan.json"])
def test_what_is_no_path_is_refused_by_that_name(path):
    with pytest.raises(TypeError, match=f"path must be a path, got {re.escape(describe(path))}"):
        CompressionPlan.load(path)
    with pytest.raises(TypeError, match=f"path must be a path, got {re.escape(describe(path))}"):
        plan_compression(mlp(), 0.5).save(path)


def test_a_folder_is_no_file_for_a_plan(tmp_path):
    message = rf"^{re.escape(repr(str(tmp_path)))} is a folder: name the file in it\.$"
    with pytest.raises(IsADirectoryError, match=message):
        CompressionPlan.load(tmp_path)
    with pytest.raises(IsADirectoryError, match=message):
        plan_compression(mlp(), 0.5).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "plan.json"
    for content in (b"nonsense", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="plan.json"):
            CompressionPlan.load(path)


@pytest.mark.parametrize("text", ["", "nonsense", "[" * 100_000, "[]", "{}", "1", "null", '{"format": "other"}'])
def test_what_is_not_a_plan_is_refused(text):
    with pytest.raises(ValueError, match="not JSON|not a plan"):
        CompressionPlan.from_json(text)


@pytest.mark.parametrize("text", [None, b"{}", 5])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(TypeError, match="text must be a string that to_json wrote"):
        CompressionPlan.from_json(text)


def changed(path, value):
    """The text of a plan with one field changed, or removed if the value is `...`."""
    content = json.loads(plan_compression(mlp(), 0.5, form="pivoted").to_json())
    *way, last = path
    place = content
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "field 'version' must be 1, got 2: the plan was written by another version"),
        (("version",), True, "field 'version' must be 1, got True"),
        (("version",), ..., "field 'version' must be 1, got None"),
        (("asked",), ..., "field 'asked' is missing"),
        (("asked",), 5, "field 'asked' must be a text, got 5"),
        (("target",), "speed", "field 'target' must be 'params' or 'macs' or 'latency', got 'speed'"),
        (("target",), [], "field 'target' must be"),
        (("target",), "macs", "field 'layers[0].prices' must be an object, got None"),
        (("parameters_before",), 0, "field 'parameters_before' must be a whole number of at least 1, got 0"),
        (("parameters_before",), 2.5, "field 'parameters_before' must be a whole number"),
        (("parameters_before",), 10**30, "field 'parameters_before' must be a whole number"),
        (("macs_before",), 5, "field 'macs_before' must be null here, got 5"),
        (("latency_before",), 0.5, "field 'latency_before' must be null here"),
        (("layers",), {}, "field 'layers' must be a list"),
        (("layers", 1), "fc", "field 'layers[1]' must be an object, got 'fc'"),
        (("layers", 1, "name"), "0", "field 'layers[1].name' must be a name that no other layer has, got '0'"),
        (("layers", 1, "name"), None, "field 'layers[1].name' must be a text"),
        (("layers", 1, "shape"), [16, "x"], "field 'layers[1].shape[1]' must be a whole number of at least 0, got 'x'"),
        (
            ("layers", 1, "shape"),
            [16, 31],
            "field 'layers[1].parameters_before' must be 496, as the shape has, got 512",
        ),
        (("layers", 1, "shape"), [16], "field 'layers[1].errors.channel' must be a scheme of a weight of shape (16,)"),
        (("layers", 1, "groups"), 3, "with groups=3"),
        (("layers", 1, "groups"), 0, "field 'layers[1].groups' must be a whole number of at least 1"),
        (("layers", 1, "form"), "sparse", "field 'layers[1].form' must be 'dense' or 'factored' or 'pivoted'"),
        (("layers", 1, "form"), "dense", "field 'layers[1].scheme' must be null here, got 'channel'"),
        (("layers", 1, "scheme"), "input", "field 'layers[1].scheme' must be 'channel', got 'input'"),
        (("layers", 1, "rank"), 16, "field 'layers[1].rank' must be 1 … 15 in form 'pivoted', got 16"),
        (("layers", 1, "rank"), 0, "field 'layers[1].rank' must be a whole number of at least 1, got 0"),
        (("layers", 1, "rank"), True, "field 'layers[1].rank' must be a whole number"),
        (("layers", 1, "rank"), None, "field 'layers[1].rank' must be a whole number"),
        (("layers", 1, "forms"), [], "field 'layers[1].forms' must be a list of 'factored' and 'pivoted'"),
        (("layers", 1, "forms"), [["factored"]], "field 'layers[1].forms' must be a list of"),
        (("layers", 1, "roundoff"), -1, "field 'layers[1].roundoff' must be a finite number of at least 0, got -1"),
        (("layers", 1, "errors"), [], "field 'layers[1].errors' must be an object"),
        (
            ("layers", 1, "errors", "channel"),
            [1, 0],
            "must be 17 numbers, one for each rank from 0 on, got '2 numbers'",
        ),
        (("layers", 1, "errors", "channel", 3), "x", "field 'layers[1].errors.channel[3]' must be a finite number"),
        (("layers", 1, "errors", "channel", 3), 10**400, "field 'layers[1].errors.channel[3]' must be a finite number"),
        (("layers", 1, "errors", "channel", 3), float("nan"), "field 'layers[1].errors.channel[3]' must be a finite"),
        (("layers", 1, "errors", "channel", 3), 2, "must be squared relative errors of at most 1, got 2"),
        (("layers", 1, "prices"), {}, "field 'layers[1].prices' must be null here"),
        (("layers", 1, "transposed"), 1, "field 'layers[1].transposed' must be true or false, got 1"),
    ],
)
def test_a_wrong_field_is_named(path, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CompressionPlan.from_json(changed(path, value))


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ("macs", {"positions": [1, 2, 3]}, "field 'layers[0].prices.positions' must be 4 whole numbers"),
        ("macs", {"positions": [1, 2, 3, -4]}, "field 'layers[0].prices.positions[3]' must be a whole number"),
        ("macs", {"positions": [1, 2, 3, 4], "work": "none"}, "field 'layers[0].prices.work' must be 'outputs' or 'in"),
        ("latency", {"dense": "x", "times": []}, "field 'layers[0].prices.dense' must be a whole number"),
        ("latency", {"dense": 5, "times": [["channel", "factored", 1]]}, "field 'layers[0].prices.times[0]' must be a"),
        ("latency", {"dense": 5, "times": [[[], {}, 1, 1]]}, "field 'layers[0].prices.times[0]' must be a scheme"),
        (
            "latency",
            {"dense": 5, "times": [["channel", "factored", 0, 9]]},
            "field 'layers[0].prices.times[0]' must be",
        ),
    ],
)
def test_wrong_prices_are_named(target, change, message):
    content = json.loads(changed(("target",), target))
    for layer in content["layers"]:
        layer["prices"] = change
    with pytest.raises(ValueError, match=re.escape(message)):
        CompressionPlan.from_json(json.dumps(content))


def test_a_file_made_for_another_model_is_refused_when_it_is_applied():
    read = again(plan_compression(mlp(), 0.5))
    model = mlp(0, (24, 30, 16, 8))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"planned as Linear of shape \(32, 24\), but the model has"):
        read.apply_(model)
    assert same(before, snapshot(model))


def test_plans_are_equal_if_they_plan_the_same():
    model = mlp()
    plan, other = plan_compression(model, 0.5), plan_compression(model, 0.5)
    assert plan == other
    assert plan != "plan"
    other["0"].rank = plan["0"].rank - 1
    assert plan != other
    other["0"].rank = plan["0"].rank
    other["0"].form = "factored" if plan["0"].form == "pivoted" else "pivoted"
    assert plan != other
    with pytest.raises(TypeError, match="unhashable"):
        hash(plan)


def test_comparing_shows_the_layers_that_differ_and_the_totals():
    model = small_resnet()
    less, more = sweep(model, [0.3, 0.7])
    more["fc"].keep_dense()
    text = less.compare(more)
    for layer, other in zip(less, more, strict=True):
        lines = [line for line in text.splitlines() if line.startswith(layer.name + " ")]
        assert len(lines) == (layer != other)
        for line in lines:
            for one in (layer, other):
                assert (f"{one.scheme}" if one.rank else "dense") in line
                assert f"{one.parameters_after:,}" in line
    alike = sum(one == two for one, two in zip(less, more, strict=True))
    assert f"{alike} layers are alike." in text
    assert f"{less.parameters_after:,} parameters" in text
    assert f"{more.parameters_after:,} parameters" in text
    assert less.compare(again(less)) == f"The plans choose the same for all {len(less)} layers."
    assert "–" in less.compare(plan_compression(mlp(), 0.5))
    with pytest.raises(TypeError, match="other must be a CompressionPlan, got str"):
        less.compare("plan")
