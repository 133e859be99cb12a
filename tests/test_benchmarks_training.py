"""What the benchmark of one training for each penalty keeps, and how it shows what cannot be reached."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cifar10_benchmark import benchmark, random_images
from tests.networks import small_resnet

training = benchmark("training")

SETTINGS = {
    "epochs": st.sampled_from([1, 15, 150]),
    "width": st.sampled_from([1, 5, 16]),
    "batch": st.sampled_from([6, 64, 128]),
    "seed": st.sampled_from([0, 1, 50]),
    "images": st.sampled_from([1, 256, 50_000]),
    "ramp": st.sampled_from([(0.15, 0.75), (0.1, 0.75), (0.15, 0.5)]),
}
trainings = st.tuples(st.sampled_from(["plain", "nuclear=1e-3", "tail=0.9,0.05"]), st.fixed_dictionaries(SETTINGS))


def trained_by(spec, settings):
    """What a training depends on: only tails have a ramp."""
    return spec, {key: value for key, value in settings.items() if key != "ramp" or spec.startswith("tail")}


@given(one=trainings, other=trainings, changed=st.sampled_from(sorted(SETTINGS)))
def test_only_networks_that_were_trained_alike_have_one_name(one, other, changed):
    near = one[0], one[1] | {changed: other[1][changed]}
    name = training.name_of(one[0], argparse.Namespace(**one[1]))
    for spec, settings in (other, near):
        alike = trained_by(spec, settings) == trained_by(*one)
        assert (training.name_of(spec, argparse.Namespace(**settings)) == name) == alike


def test_networks_of_other_settings_in_the_same_folder_are_not_taken(tmp_path, monkeypatch, capsys):
    trained = []

    def train(spec, images, labels, arguments):
        trained.append((arguments.width, len(images)))
        return small_resnet(width=arguments.width)

    def load_images(split, count):
        images = random_images(min(count, 16), 0)
        return images.pixels, images.labels

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "load_images", load_images)
    monkeypatch.setattr(training, "RATIOS", (0.5, 0.97))
    common = ["training.py", "--output", str(tmp_path), "--device", "cpu", "--only", "plain"]
    for options in (["--width", "2"], ["--width", "4"], ["--width", "4", "--images", "8"], ["--width", "2"]):
        monkeypatch.setattr(sys, "argv", [*common, *options])
        training.main()
    assert trained == [(2, 16), (4, 16), (4, 8)]
    assert len(list(tmp_path.glob("*.pt"))) == 3
    tables = [text for text in capsys.readouterr().out.splitlines() if text.startswith("| plain |")]
    assert tables[0] == tables[3]
    assert tables[0].endswith("| – |")  # of so few channels nearly all are needed


def test_other_errors_than_an_unreachable_ratio_are_errors():
    model = small_resnet(width=2)
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    images = random_images(8, 0)
    data = {"test": images.pixels.float(), "test_labels": images.labels, "calibration": images.pixels.float()}
    with pytest.raises(ValueError, match="NaN"):
        training.measure(model, data)


def test_what_was_measured_is_read_again_as_it_was():
    found = {"dense": 80.25, "0.5": 70.0, "0.5 recalibrated": 71.0, "0.7": None, "0.7 recalibrated": None}
    again = json.loads(json.dumps(found))
    assert [training.cell_of(again, ratio) for ratio in (0.5, 0.7)] == ["70.0 → 71.0", "–"]
