"""The pruning that others do, as the benchmarks compare with it."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from testbed.cifar_resnet import CifarResNet
from testbed.vision_transformer import VisionTransformer
from tests.networks import small_resnet
from tests.strategies import fill_, randn

baselines = pytest.importorskip("benchmarks.pruning_baselines", reason="needs benchmarks/ and the extra `bench`")

IMAGE = torch.zeros(1, 3, 32, 32)
PRUNED_BY = {
    "weights": baselines.zero_weights_,
    "filters": baselines.zero_filters_,
    "channels": lambda model, ratio: baselines.remove_channels_(model, ratio, IMAGE),
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def small_cifar_resnet(seed=0):
    return fill_(CifarResNet(8), seed).eval()


@pytest.mark.parametrize("make", [small_resnet, small_cifar_resnet])
@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("method", PRUNED_BY)
def test_pruning_reaches_the_ratio_of_all_parameters(method, ratio, make):
    model = make()
    before, names = count(model), set(model.state_dict())
    most = before - math.ceil(ratio * before)
    left = PRUNED_BY[method](model, ratio)
    assert left == baselines.count_left(model)
    assert 0.9 * most < left <= most  # one filter or channel is a lot of so small a network
    assert set(model.state_dict()) == names  # no masks stay behind
    assert model(IMAGE).shape == (1, 10)
    assert (count(model) == left) == (method == "channels")


def test_a_ratio_is_exact_in_decimals():
    model = fill_(nn.Linear(10, 10, bias=False), 0)
    assert baselines.zero_weights_(model, 0.55) == 45  # 0.55 * 100 is a little more than 55 in floats


def test_the_smallest_weights_of_the_whole_network_are_zeroed():
    model, before = small_resnet(), small_resnet()
    baselines.zero_weights_(model, 0.6)
    pairs = [
        (layer.weight, old.weight)
        for layer, old in zip(model.modules(), before.modules(), strict=True)
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    removed = torch.cat([old[new == 0] for new, old in pairs]).abs()
    kept = torch.cat([new[new != 0] for new, _ in pairs]).abs()
    assert removed.max() <= kept.min()
    assert all(torch.equal(new[new != 0], old[new != 0]) for new, old in pairs)


def test_the_weakest_filters_of_every_layer_but_the_last_are_zeroed():
    model, before = small_resnet(), small_resnet()
    baselines.zero_filters_(model, 0.6)
    assert torch.equal(model.fc.weight, before.fc.weight)
    for layer, old in zip(model.modules(), before.modules(), strict=True):
        if isinstance(layer, nn.Conv2d):
            gone = ~layer.weight.flatten(1).any(1)
            norms = old.weight.flatten(1).norm(dim=1)
            assert norms[gone].max() <= norms[~gone].min()
            assert torch.equal(layer.weight[~gone], old.weight[~gone])
            # Rounding alone makes the shares of the layers differ.
            assert abs(float(gone.float().mean()) - 0.62) < 0.07


def test_channels_that_do_nothing_go_without_a_trace():
    """Cut out of the blocks and out of the stream between them, so the graph that Torch-Pruning found is right."""
    model = small_resnet()
    stem, first, second, third = model.conv1, *model.layers[:3]
    with torch.no_grad():
        for layer, norm in ((stem, model.bn1), (first.conv2, first.bn2), (second.conv2, second.bn2)):
            layer.weight[2:4] = norm.weight[2:4] = norm.bias[2:4] = 0
        for layer in (first.conv1, second.conv1, third.conv1, third.short[0]):
            layer.weight[:, 2:4] = 0
        for block in model.layers[4:]:
            block.conv1.weight[1::4] = block.bn1.weight[1::4] = block.bn1.bias[1::4] = 0
            block.conv2.weight[:, 1::4] = 0
    images = randn(4, 3, 32, 32, seed=5, dtype=torch.float32)
    expected = model(images)
    baselines.remove_channels_(model, 0.05, IMAGE)
    assert (stem.out_channels, first.conv2.out_channels, third.conv1.in_channels) == (6, 6, 6)
    assert [block.conv1.out_channels for block in model.layers] == [8, 8, 16, 16, 24, 24, 48, 48]
    torch.testing.assert_close(model(images), expected)


def test_padded_channels_stay():
    """Torch-Pruning would map the channels before a padding to wrong ones after it, and the shapes would fit."""
    model = small_cifar_resnet()
    stages = (model.layer1, model.layer2, model.layer3)
    with torch.no_grad():
        for (block,) in stages:
            block.conv1.weight[::2] = block.bn1.weight[::2] = block.bn1.bias[::2] = 0
            block.conv2.weight[:, ::2] = 0
    images = randn(4, 3, 32, 32, seed=5, dtype=torch.float32)
    expected = model(images)
    baselines.remove_channels_(model, 0.1, IMAGE)
    assert [block.conv1.out_channels for (block,) in stages] == [8, 16, 32]
    assert [block.conv2.out_channels for (block,) in stages] == [16, 32, 64]
    torch.testing.assert_close(model(images), expected)


def test_outputs_that_are_divided_among_heads_stay():
    """The channels of the stream between the blocks go, and so do those of the positions, which no layer owns."""
    model = fill_(VisionTransformer(12), 0).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.up.weight[::2] = block.up.bias[::2] = 0
            block.down.weight[:, ::2] = 0
    images = randn(4, 3, 32, 32, seed=5, dtype=torch.float32)
    expected = model(images)
    whole = [f"blocks.{number}.attention.{layer}" for number in range(6) for layer in ("query", "key", "value")]
    baselines.remove_channels_(model, 0.25, IMAGE, whole)
    assert [block.up.out_features for block in model.blocks] == [24] * 6
    torch.testing.assert_close(model(images), expected)
    baselines.remove_channels_(model, 0.5, IMAGE, whole)
    width = model.patches.out_channels
    assert width < 12
    assert model.positions.shape == (1, 64, width)
    for block in model.blocks:
        layers = (block.attention.query, block.attention.key, block.attention.value)
        assert [(layer.in_features, layer.out_features) for layer in layers] == [(width, 12)] * 3
    assert model(images).shape == (4, 10)


def test_outputs_stay_where_no_linear_layer_makes_them():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    baselines.remove_channels_(fill_(model, 0), 0.6, IMAGE)
    assert model(IMAGE).shape == (1, 10)


def test_a_group_of_weak_channels_keeps_its_best():
    """Torch-Pruning alone would give all of them back."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1)  # so the channels of the first group are all alike
        model[1].weight[0] *= 100  # and one of the second outweighs its others, and the first group too
    baselines.remove_channels_(model, 0.85, torch.zeros(1, 8))
    assert [layer.out_features for layer in model] == [1, 1, 4]
    assert (model[1].weight == 100).all()


@pytest.mark.parametrize("training", [False, True])
def test_cutting_channels_keeps_the_modes_and_the_random_states(training):
    model = small_cifar_resnet().train(training)
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    statistics = model.bn1.running_mean.clone()
    states = (torch.get_rng_state(), random.getstate())
    baselines.remove_channels_(model, 0.5, IMAGE)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.bn1.running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_cutting_channels_gives_the_same_network_every_time():
    one, other = small_resnet(), small_resnet()
    with torch.no_grad():
        baselines.remove_channels_(one, 0.5, IMAGE)
    other.conv1.weight.requires_grad_(False)
    baselines.remove_channels_(other, 0.5, F.pad(IMAGE, (1, 1)))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("weights", "cannot be reached: .* parameters to remove, but .* weights"),
        ("filters", "cannot be reached: with one filter left"),
        ("channels", "cannot be reached by removing channels: with one left in each of 3 groups.*conv1, layer1"),
    ],
)
def test_a_ratio_out_of_reach_is_refused_and_changes_nothing(method, message):
    model = small_cifar_resnet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        PRUNED_BY[method](model, 0.999)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, math.nan])
@pytest.mark.parametrize("method", PRUNED_BY)
def test_a_ratio_that_is_none_is_refused(method, ratio):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        PRUNED_BY[method](small_cifar_resnet(), ratio)
