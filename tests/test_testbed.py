"""What the tests and benchmarks stand on: the networks, their checkpoints, the scaling of their images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from testbed.checkpoints import load_network
from testbed.cifar import ResNet18, accuracy, load_images, normalise, normalise_imagenet
from testbed.cifar_resnet import CifarResNet, ZeroPaddedShortcut, load_cifar_resnet
from tests.networks import mlp, small_resnet
from tests.strategies import fill_, randn

IMAGE = torch.zeros(1, 3, 32, 32)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def small_cifar_resnet(seed=0):
    return fill_(CifarResNet(8), seed).eval()


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_a_cifar_resnet_has_the_published_size(depth, parameters):
    model = CifarResNet(depth)
    assert count(model) == parameters
    assert sum(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in model.modules()) == depth


@pytest.mark.parametrize("depth", [2, 18, 54, -4])
def test_a_cifar_resnet_of_another_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2.*got {depth}"):
        CifarResNet(depth)


def test_a_cifar_resnet_maps_images_to_logits():
    assert small_cifar_resnet()(IMAGE.repeat(2, 1, 1, 1)).shape == (2, 10)


def test_the_padded_shortcut_takes_every_second_pixel_into_the_middle_channels():
    images = randn(2, 4, 6, 6, seed=0)
    padded = ZeroPaddedShortcut(4)(images)
    assert torch.equal(padded[:, 2:6], images[:, :, ::2, ::2])
    assert not padded[:, :2].any()
    assert not padded[:, 6:].any()


def test_images_are_scaled_as_each_kind_of_network_was_trained():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    own, imagenet = (scale(pixels).flatten().tolist() for scale in (normalise, normalise_imagenet))
    assert own == pytest.approx([-125.3 / 63.0, (128 - 123.0) / 62.1, (255 - 113.9) / 66.7])
    assert imagenet == pytest.approx([-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225])


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("suffix", [".pt", ".th"])
def test_a_checkpoint_of_ones_own_is_recognised(tmp_path, suffix):
    narrow, deep = small_resnet(seed=1, width=4), small_cifar_resnet(seed=2)
    torch.save(narrow.state_dict(), tmp_path / f"narrow{suffix}")
    torch.save(deep.state_dict(), tmp_path / f"deep{suffix}")
    for name, model, scale in (("narrow", narrow, normalise), ("deep", deep, normalise_imagenet)):
        network = load_network(tmp_path / f"{name}{suffix}")
        assert network.normalise is scale
        assert not network.model.training
        assert name in network.description
        assert f"{count(model):,}" in network.description
        images = randn(2, 3, 32, 32, seed=3, dtype=torch.float32)
        assert torch.equal(network.model(images), model(images))


def test_a_checkpoint_may_be_wrapped_prefixed_and_old(tmp_path):
    model = small_cifar_resnet()
    state = {f"module.{name}": value for name, value in model.state_dict().items() if "num_batches" not in name}
    torch.save({"state_dict": state, "best_prec1": 90.0}, tmp_path / "old.th")
    found = load_network(str(tmp_path / "old.th")).model
    assert torch.equal(found(IMAGE), model(IMAGE))


def _fully_pickled(path):
    torch.save(small_cifar_resnet(), path)


def _of_something_else(path):
    torch.save(mlp().state_dict(), path)


def _with_other_classes(path):
    torch.save(ResNet18(4, classes=100).state_dict(), path)


def _with_a_tensor_missing(path):
    state = small_cifar_resnet().state_dict()
    del state["layer2.0.bn1.bias"]
    torch.save(state, path)


def _without_names(path):
    torch.save([torch.zeros(3)], path)


def _with_other_things(path):
    torch.save({"epoch": 3, "optimizer": {}}, path)


def _no_checkpoint(path):
    path.write_text("not a checkpoint")


def _empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (_fully_pickled, r"save model.state_dict\(\)"),
        (_of_something_else, "neither architecture.*got 0.weight, 0.bias"),
        (_with_other_classes, r"ResNet-18 of width 4.* 2 of its.*fc.weight \(expected \(10, 32\), got \(100, 32\)\)"),
        (_with_a_tensor_missing, r"ResNet-8.* 1 of its.*layer2.0.bn1.bias \(expected \(32,\), got nothing\)"),
        (_without_names, "no state dict"),
        (_with_other_things, "no state dict"),
        (_no_checkpoint, "cannot be read"),
        (_empty, "cannot be read"),
    ],
)
def test_another_file_is_refused_with_the_reason(tmp_path, save, message):
    save(tmp_path / "network.pt")
    with pytest.raises(ValueError, match=message):
        load_network(tmp_path / "network.pt")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*nowhere.pt"):
        load_network(tmp_path / "nowhere.pt")


def test_an_unknown_name_lists_those_that_there_are(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHSMOOTH_SHARED_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="no network named 'vgg'.*Known: none"):
        load_network("vgg")
    (tmp_path / "resnet18_w16").mkdir()
    (tmp_path / "cifar_resnet").mkdir()
    (tmp_path / "resnet18_w16" / "tail_80.pt").touch()
    (tmp_path / "cifar_resnet" / "resnet8-0123abcd.th").touch()
    with pytest.raises(ValueError, match=r"Known: resnet18_w16/tail_80, cifar_resnet/8\. "):
        load_network("cifar_resnet/20")
    with pytest.raises(FileNotFoundError, match="resnet20"):
        load_cifar_resnet(20)


@pytest.mark.parametrize(
    ("name", "least"), [("resnet18_w16/plain", 82), ("resnet18_w16/tail_80", 78), ("cifar_resnet/56", 80)]
)
def test_the_trained_networks_do_what_they_were_trained_for(name, least, shared_data_folder):
    if not (shared_data_folder / name.partition("/")[0]).exists():
        pytest.skip(f"{name} is not in {shared_data_folder}")
    pixels, labels = load_images("test", 500)
    network = load_network(name)
    assert accuracy(network.model, network.normalise(pixels), labels) > least


def test_the_public_networks_load_by_depth(shared_data_folder):
    if not (shared_data_folder / "cifar_resnet").exists():
        pytest.skip(f"the public CIFAR ResNets are not in {shared_data_folder}")
    for depth in (20, 32, 44, 56):
        by_depth, by_name = load_cifar_resnet(depth), load_network(f"cifar_resnet/{depth}")
        assert f"ResNet-{depth}," in by_name.description
        assert torch.equal(by_depth(IMAGE), by_name.model(IMAGE))
