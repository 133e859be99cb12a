"""Networks trained on CIFAR-10, compressed without and with data; skipped where they are not there."""

from __future__ import annotations

import copy

import pytest
import torch

from testbed.cifar import accuracy, load_images, load_resnet18, normalise
from torchsmooth import recalibrate_batchnorm_, svd_compress_


@pytest.fixture(scope="module")
def test_images(shared_data_folder):
    pixels, labels = load_images("test", 2000)
    return normalise(pixels), labels


@pytest.mark.parametrize(
    ("name", "ratio", "most"),
    [
        pytest.param("plain", 0.5, 1.5, marks=pytest.mark.slow),
        ("plain", 0.7, 3.5),
        ("tail_80", 0.8, 1.5),
        pytest.param("nuclear_1e-3", 0.7, 2.0, marks=pytest.mark.slow),
        pytest.param("first_derivative_1e-3", 0.7, 2.5, marks=pytest.mark.slow),
    ],
)
def test_a_trained_network_keeps_its_accuracy(name, ratio, most, test_images, capsys):
    model = load_resnet18(name)
    dense = accuracy(model, *test_images)
    report = svd_compress_(model, ratio)
    compressed = accuracy(model, *test_images)
    with capsys.disabled():
        print(
            f"\n  {name}: {dense:.2f} % dense, {compressed:.2f} % with {100 * report.ratio:.1f} % fewer parameters "
            "(2,000 test images of the JPEG copy of CIFAR-10, no data used)"
        )
    assert report.ratio >= ratio
    assert dense - compressed < most


@pytest.mark.parametrize(
    ("name", "ratio", "images", "most", "gain"),
    [
        pytest.param("plain", 0.9, 384, 14.0, 3.0, marks=pytest.mark.slow),
        pytest.param("plain", 0.9, 1024, 12.0, 3.0, marks=pytest.mark.slow),
        # Near the dense accuracy both are the same to the noise of 2,000 images.
        pytest.param("plain", 0.8, 1024, 3.5, -1.0, marks=pytest.mark.slow),
        pytest.param("tail_80", 0.8, 1024, 1.0, -1.0, marks=pytest.mark.slow),
        pytest.param("nuclear_1e-3", 0.8, 1024, 1.8, -1.0, marks=pytest.mark.slow),
    ],
)
def test_calibration_keeps_more_than_new_batchnorm_statistics(name, ratio, images, most, gain, test_images, capsys):
    batches = normalise(load_images("train", images)[0]).split(128)
    model = load_resnet18(name)
    dense = accuracy(model, *test_images)
    plain = copy.deepcopy(model)
    svd_compress_(plain, ratio)
    recalibrate_batchnorm_(plain, batches)
    svd_compress_(model, ratio, calibration=batches)
    without, calibrated = accuracy(plain, *test_images), accuracy(model, *test_images)
    with capsys.disabled():
        print(
            f"\n  {name}, {100 * ratio:.0f} % fewer parameters: {dense:.2f} % dense, {without:.2f} % with BatchNorm "
            f"statistics of {images:,} images, {calibrated:.2f} % with all fitted to them"
        )
    assert calibrated > without + gain
    assert dense - calibrated < most


def test_smooth_networks_keep_more_than_plain_ones_at_80_percent(test_images):
    lost = {}
    for name in ("plain", "nuclear_1e-3", "tail_80"):
        model = load_resnet18(name)
        dense = accuracy(model, *test_images)
        svd_compress_(model, 0.8)
        lost[name] = dense - accuracy(model, *test_images)
    assert lost["plain"] > lost["nuclear_1e-3"] > lost["tail_80"]


def test_the_global_budget_keeps_what_uniform_ranks_destroy(test_images):
    kept = {}
    for allocation in ("budget", "uniform"):
        model = load_resnet18("plain")
        svd_compress_(model, 0.7, allocation=allocation)
        kept[allocation] = accuracy(model, *test_images)
    assert kept["budget"] > kept["uniform"] + 10


def test_the_trained_networks_are_what_the_tests_take_them_for(shared_data_folder):
    model = load_resnet18("plain")
    assert sum(parameter.numel() for parameter in model.parameters()) == 701_466
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_new_batchnorm_statistics_bring_accuracy_back(test_images, capsys):
    pixels, _ = load_images("train", 1024)
    model = load_resnet18("plain")
    svd_compress_(model, 0.8)
    before = accuracy(model, *test_images)
    recalibrate_batchnorm_(model, normalise(pixels).split(128))
    after = accuracy(model, *test_images)
    with capsys.disabled():
        print(
            f"\n  plain, 80 % fewer parameters: {before:.2f} %, {after:.2f} % with BatchNorm statistics of 1,024 images"
        )
    assert after > before + 1
