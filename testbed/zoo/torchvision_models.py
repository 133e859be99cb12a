"""Every model of torchvision, with random weights, at small inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from testbed.torchvision_import import import_torchvision
from testbed.zoo.entry import Entry, noise
from testbed.zoo.torchvision_layers import register_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Those that are made for one size of images, or for a least one, where it is not 64.
_SIZES = {"inception_v3": 299, "maxvit": 224, "vit": 224, "raft": 128, "ssd300": 300, "ssdlite320": 320}
_CLASSES_TO_DETECT = 5
_BLOCKS = 4


def torchvision_entries() -> Iterator[Entry]:
    """Yield an entry for every model of torchvision."""
    torchvision = import_torchvision()
    register_layers(torchvision)
    models = torchvision.models
    namespaces: dict[str, tuple[Any, Callable[[str], Entry]]] = {
        "classification": (models, _classifier),
        "segmentation": (models.segmentation, _segmenter),
        "detection": (models.detection, _detector),
        "video": (models.video, _video_classifier),
        "optical flow": (models.optical_flow, _flow_estimator),
        "quantizable": (models.quantization, _quantizable),
    }
    for module, make in namespaces.values():
        for name in models.list_models(module=module):
            yield make(name)


def _size_of(name: str) -> int:
    return next((size for start, size in _SIZES.items() if name.removeprefix("quantized_").startswith(start)), 64)


def _images(name: str, batch: int = 2) -> torch.Tensor:
    return noise(batch, 3, _size_of(name), _size_of(name))


def _build(name: str, **kwargs: Any) -> Any:
    return import_torchvision().models.get_model(name, weights=None, **kwargs)


def _classifier(name: str) -> Entry:
    """Make an entry of a classifier, smaller where more of the same would take minutes and show nothing new."""
    # These draw their weights by a slow method of scipy's.
    kwargs = {"init_weights": False} if name.startswith(("googlenet", "inception_v3", "vgg")) else {}
    cut, note = None, ""
    if name.startswith("vgg"):
        cut, note = _narrow_classifier_, "a classifier of widths 1024 and 256 behind global pooling"
    elif name.startswith("alexnet"):
        cut, note = _narrow_alexnet_, "a classifier of widths 1024 and 256"
    elif name in {"vit_l_16", "vit_l_32", "vit_h_14"}:
        cut, note = _few_blocks_, f"{_BLOCKS} blocks"
    elif name in {"regnet_y_128gf", "regnet_y_32gf", "regnet_x_32gf"}:
        cut, note = _two_stages_, "without its last two stages"

    def build() -> nn.Module:
        model: nn.Module = _build(name, **kwargs)
        if cut is not None:
            cut(model)
        return model

    return Entry(f"torchvision/{name}", "classification", build, lambda _: ((_images(name),), {}), note=note)


def _narrow_classifier_(model: Any) -> None:
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0], model.classifier[3] = nn.Linear(512, 1024), nn.Linear(1024, 256)
    model.classifier[6] = nn.Linear(256, 1000)


def _narrow_alexnet_(model: Any) -> None:
    model.classifier[1], model.classifier[4] = nn.Linear(256 * 36, 1024), nn.Linear(1024, 256)
    model.classifier[6] = nn.Linear(256, 1000)


def _few_blocks_(model: Any) -> None:
    model.encoder.layers = model.encoder.layers[:_BLOCKS]


def _two_stages_(model: Any) -> None:
    model.trunk_output = model.trunk_output[:2]
    width = model.trunk_output[1][-1].f.c[0].out_channels
    model.fc = nn.Linear(width, 1000)


def _segmenter(name: str) -> Entry:
    auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}
    return Entry(
        f"torchvision/{name}",
        "segmentation",
        lambda: _build(name, weights_backbone=None, **auxiliary),
        lambda _: ((_images(name),), {}),
    )


def _detector(name: str) -> Entry:
    """Make an entry of a detector, which takes a list of images, and what is to be found in them when it trains."""
    sizes = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 128}
    classes = 2 if name.startswith("keypoint") else _CLASSES_TO_DETECT

    def feed(training: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: FBT001 - of the protocol
        images = list(_images(name).sigmoid())
        if not training:
            return (images,), {}
        one = {
            "boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 8.0, 60.0, 44.0]]),
            "labels": torch.tensor([1, 1] if classes == 2 else [1, 3]),
        }
        if name.startswith("mask"):
            one["masks"] = (noise(2, _size_of(name), _size_of(name)) > 0).to(torch.uint8)
        if name.startswith("keypoint"):
            one["keypoints"] = torch.tensor([24.0, 28.0, 1.0]).repeat(2, 17, 1)
        return (images, [one, one]), {}

    return Entry(
        f"torchvision/{name}",
        "detection",
        lambda: _build(name, weights_backbone=None, num_classes=classes, **sizes),
        feed,
        note=f"{classes} classes" + ("" if not sizes else ", images resized to 96 pixels"),
        counts_vary=True,
    )


def _video_classifier(name: str) -> Entry:
    # Both of these are made for one size of clips; MViT has no BatchNorm, which would need a batch.
    batch, frames, pixels = {"mvit": (1, 16, 224), "s3d": (2, 16, 224)}.get(name.partition("_")[0], (2, 8, 64))
    return Entry(
        f"torchvision/{name}",
        "video",
        lambda: _build(name),
        lambda _: ((noise(batch, 3, frames, pixels, pixels),), {}),
    )


def _flow_estimator(name: str) -> Entry:
    return Entry(
        f"torchvision/{name}",
        "optical flow",
        lambda: _build(name),
        lambda _: ((_images(name), _images(name).roll(2, -1)), {"num_flow_updates": 3}),
        note="three updates",
    )


def _quantizable(name: str) -> Entry:
    """Make an entry of a model that is made to be quantised, in floating point as it is before that."""
    kwargs = {"init_weights": False} if "googlenet" in name or "inception" in name else {}
    return Entry(
        f"torchvision/{name}",
        "quantizable",
        lambda: _build(name, quantize=False, **kwargs),
        lambda _: ((_images(name),), {}),
        note="before quantisation",
    )
