"""The callbacks of the examples, in a training of each framework."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from testbed.torchvision_import import import_torchvision

import_torchvision()  # before a framework does, which would not declare what a CPU build lacks
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Lightning calls what torch has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in ("digit_network", "lightning_callback", "hugging_face_callback"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_lightning(example):
    pytest.importorskip("pytorch_lightning")
    report, right = example("lightning_callback").main(epochs=3)
    assert report.ratio >= 0.7
    assert {layer.name for layer in report.layers if layer.scheme} >= {"net.1", "net.3"}
    assert right > 85


def test_hugging_face(example):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    report, right = example("hugging_face_callback").main(epochs=2)
    assert report.ratio >= 0.4
    assert any(layer.scheme for layer in report.layers)
    assert right > 85
