"""The architectures that the CIFAR-10 benchmark trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from testbed.cifar_networks import ARCHITECTURES
from testbed.vgg import Vgg16
from testbed.vision_transformer import Attention, VisionTransformer
from tests.strategies import fill_, randn
from torchsmooth import svd_compress_

NARROW = {"resnet18": 4, "vgg16": 4, "resnet20": 8, "vit_small": 12}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_maps_images_to_logits_and_can_be_compressed(name):
    model = fill_(ARCHITECTURES[name].make(NARROW[name]), 0).eval()
    images, before = randn(2, 3, 32, 32, seed=1, dtype=torch.float32), count(model)
    assert model(images).shape == (2, 10)
    svd_compress_(model, 0.5, progress=False)
    assert 0.45 * before < count(model) <= 0.5 * before
    assert model(images).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [
        ("resnet18", 64, 11_173_962),
        # The published 14,728,266 less a bias for each of the 4,224 channels, which BatchNorm makes idle.
        ("vgg16", 64, 14_724_042),
        ("resnet20", 16, 269_722),
    ],
)
def test_the_usual_widths_have_the_published_sizes(name, width, parameters):
    with torch.device("meta"):
        assert count(ARCHITECTURES[name].make(width)) == parameters


def test_a_vgg16_has_thirteen_convolutions_in_five_stages():
    layers = list(Vgg16(4).modules())
    convolutions = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)]
    assert convolutions == [4, 4, 8, 8, 16, 16, 16, 32, 32, 32, 32, 32, 32]
    assert [sum(isinstance(layer, kind) for layer in layers) for kind in (nn.BatchNorm2d, nn.MaxPool2d)] == [13, 5]


def test_attention_is_that_of_torch():
    ours = fill_(Attention(12, heads=3), 0)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = randn(2, 7, 12, seed=1, dtype=torch.float32)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_a_vision_transformer_knows_where_a_patch_is():
    model = fill_(VisionTransformer(12), 0).eval()
    images = randn(1, 3, 32, 32, seed=1, dtype=torch.float32)
    moved = images.roll(4, dims=-1)  # the same patches at other places
    assert not torch.allclose(model(images), model(moved), atol=1e-3)
    with torch.no_grad():
        model.positions.zero_()
    torch.testing.assert_close(model(images), model(moved))


def test_a_width_that_the_heads_cannot_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of the 3 heads, got 16"):
        VisionTransformer(16)
