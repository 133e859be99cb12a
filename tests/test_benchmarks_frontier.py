"""What the benchmark of one trained network keeps between its runs."""

from __future__ import annotations

import argparse
import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cifar10_benchmark import benchmark, random_images
from tests.networks import small_resnet
from tests.strategies import seeds

frontier = benchmark("frontier")


@settings(max_examples=10)
@given(seed=seeds, place=st.integers(0, 2**31 - 1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_network_is_told_from_one_with_any_other_value_or_size(seed, place, dtype):
    model = small_resnet(seed, width=2).to(dtype)
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    name, values = sorted(other.state_dict().items())[place % len(other.state_dict())]
    values.view(-1)[place % values.numel()] += 1
    assert frontier.fingerprint(same) == frontier.fingerprint(model)
    assert frontier.fingerprint(other) != frontier.fingerprint(model), name
    assert frontier.fingerprint(small_resnet(seed, width=3)) != frontier.fingerprint(model)


def test_another_network_at_the_same_path_is_measured_anew(tmp_path, monkeypatch):
    def load_images(split, count):
        images = random_images(count, 0)
        return images.pixels, images.labels

    monkeypatch.setattr(frontier, "load_images", load_images)
    arguments = argparse.Namespace(
        device="cpu", methods=["uniform"], ratios=[0.5], test_images=4, calibration_images=4, batch_size=4,
        resume=tmp_path / "kept.json",
    )  # fmt: skip
    found = []
    for width in (4, 8, 4):
        path = tmp_path / "network.pt"
        torch.save(small_resnet(width=width).state_dict(), path)
        found.append(frontier.measure_network(str(path), arguments))
    for one in found:
        assert all(cell.left <= one.total / 2 for row in one.cells.values() for cell in row.values())
    assert found[0].cells == found[2].cells != found[1].cells


def test_what_is_kept_is_not_measured_again(tmp_path):
    cache = frontier.Cache(tmp_path / "kept.json", "key")
    cache.put("row", 0.5, frontier.Cell(80.0, 10))
    assert frontier.Cache(tmp_path / "kept.json", "key").get("row", 0.5) == frontier.Cell(80.0, 10)
    assert frontier.Cache(tmp_path / "kept.json", "other").get("row", 0.5) is None
