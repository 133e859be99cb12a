"""Pairs of ranks in plans and files: edits, what is written and read, and the messages."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.strategies import fill_
from torchsmooth import CompressionPlan, TuckerConv2d, load_compressed_, plan_compression, svd_compress_


def convolutions(dtype=torch.float32):
    return fill_(nn.Sequential(nn.Conv2d(16, 24, 3), nn.Conv2d(24, 16, 3), nn.Conv2d(16, 20, 1)), 0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_weight_is_read_as_it_was_written(dtype):
    model = convolutions(dtype)
    model[0].weight.data.zero_()
    plan = plan_compression(model, 0.5, scheme="tucker")
    read = CompressionPlan.from_json(plan.to_json())
    assert str(read) == str(plan)
    assert read["0"].relative_error == plan["0"].relative_error == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda layer: layer.update(shape=[2**21, 2**21, 3, 3], parameters_before=9 * 2**42),
            r"field 'layers\[0\].errors.tucker' must be left out of a layer of more than",
        ),
        (
            lambda layer: layer["errors"]["tucker"].append([17, 1, 0.5]),
            r"tucker\[\d+\]' must be ranks of at most",
        ),
        (lambda layer: layer["errors"]["tucker"].append([1, -1, 0.5]), "must be a whole number of at least 0"),
        (lambda layer: layer.update(rank=[17, 1]), "'layers.0..rank' must be a pair of at most"),
        (lambda layer: layer.update(rank=3), "'layers.0..rank' must be a pair of ranks, got 3"),
    ],
)
def test_files_with_impossible_pairs_are_refused(edit, message):
    content = json.loads(plan_compression(convolutions(), 0.5, scheme="tucker", form="factored").to_json())
    edit(content["layers"][0])
    with pytest.raises(ValueError, match=message):
        CompressionPlan.from_json(json.dumps(content))


@pytest.mark.parametrize("row", [["tucker", "factored", [999, 1], 5], ["spatial", "factored", 1, 5]])
def test_files_with_times_of_impossible_ranks_are_refused(row):
    content = json.loads(plan_compression(convolutions(), 0.5, scheme="tucker", form="factored").to_json())
    content |= {"target": "latency", "latency_before": 1.0}
    for layer in content["layers"]:
        times = [["tucker", "factored", layer["rank"], 3]] if layer["scheme"] == "tucker" else []
        layer["prices"] = {"dense": 10, "times": times}
    assert CompressionPlan.from_json(json.dumps(content)).target == "latency"
    content["layers"][0]["prices"]["times"].append(row)
    with pytest.raises(ValueError, match=r"prices.times\[\d+\]' must be"):
        CompressionPlan.from_json(json.dumps(content))


def set_rank(layer, rank):
    layer.rank = rank


def set_scheme(layer, scheme):
    layer.scheme = scheme


@pytest.mark.parametrize(
    ("name", "edit", "error", "message"),
    [
        ("0", lambda one: set_rank(one, (3, 4)), TypeError, r"layer '0' .* use choose\('tucker', \(3, 4\)\)"),
        (
            "2",
            lambda one: set_rank(one, (3, 4)),
            TypeError,
            "'2' must be an integer in scheme 'channel', got tuple",
        ),
        ("0", lambda one: set_rank(one, None), TypeError, r"layer '0' .*keep_dense\(\) leaves it whole"),
        ("0", lambda one: one.choose("tucker", (3, 4, 5)), ValueError, r"layer '0' must be a pair \(r_in, r_out\)"),
        ("0", lambda one: one.choose("tucker", (3, 99)), ValueError, r"layer '0' \(r_out\) must lie between 1 and"),
        ("0", lambda one: one.choose("tucker", (3, True)), TypeError, r"layer '0' \(r_out\) must be an integer"),
        ("0", lambda one: (set_rank(one, 20), set_scheme(one, "tucker")), ValueError, r"use choose\(scheme, rank\)"),
    ],
)
def test_bad_pairs_are_named_with_the_way_out(name, edit, error, message):
    plan = plan_compression(convolutions(), 0.3, form="factored")
    for layer in plan:
        layer.choose("channel", 4)
    with pytest.raises(error, match=message):
        edit(plan[name])


def test_a_pair_chooses_tucker_where_it_was_planned_for():
    plan = plan_compression(convolutions(), 0.3)
    plan["0"].keep_dense()
    plan["0"].rank = (3, 4)
    assert (plan["0"].scheme, plan["0"].rank) == ("tucker", (3, 4))
    other = plan_compression(convolutions(), 0.3, scheme="channel")
    other["0"].keep_dense()
    with pytest.raises(TypeError, match="scheme 'tucker', which this layer was not planned for"):
        other["0"].rank = (3, 4)


def test_loading_names_the_part_that_is_missing():
    model = convolutions()
    svd_compress_(model, 0.5, scheme="tucker")
    state = model.state_dict()
    del state["0.core.weight"]
    with pytest.raises(ValueError, match=r"layer '0', whose kernel is larger, but not '0.core.weight'"):
        load_compressed_(convolutions(), state)
    layer = TuckerConv2d.from_conv2d(nn.Conv2d(8, 12, 3), (3, 4))
    with pytest.raises(ValueError, match=r"build the low-rank layer with TuckerConv2d\.like"):
        load_compressed_(nn.Conv2d(8, 12, 3), layer.state_dict())


def test_the_geometry_is_shown_as_torch_shows_it():
    conv = nn.Conv2d(8, 12, 3, padding=1, dilation=2, groups=2, padding_mode="circular")
    text = repr(TuckerConv2d.from_conv2d(conv, (2, 3)))
    assert "padding=(1, 1), dilation=(2, 2), groups=2, padding_mode=circular, rank=(2, 3)" in text
    assert "groups" not in repr(TuckerConv2d.from_conv2d(nn.Conv2d(8, 12, 3), (2, 3)))
