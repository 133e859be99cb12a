"""What a batch may be, and how a model is run on one without using it up."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn

from tests.strategies import randn
from torchsmooth._batches import check_batch, check_batches, collect, run

IMAGES = randn(6, 3, 4, 4, seed=0, dtype=torch.float32)


class Named(nn.Module):
    def forward(self, images, scale=1):
        return scale * images


def test_inputs_are_kept_and_labels_dropped():
    named = {"images": IMAGES, "scale": 2}
    batches = [IMAGES, (IMAGES, torch.zeros(6)), [IMAGES], named]
    kept = collect(iter(batches), "batches")
    assert all(one is IMAGES for one in kept[:3])
    assert kept[3] is named


def test_a_loader_draws_nothing_from_the_global_random_state():
    data = torch.utils.data.TensorDataset(IMAGES, torch.zeros(6))
    for shuffle in (True, False):
        torch.manual_seed(3)
        state = torch.get_rng_state()
        kept = collect(torch.utils.data.DataLoader(data, 4, shuffle=shuffle), "batches")
        assert torch.equal(torch.get_rng_state(), state)
        assert [len(one) for one in kept] == [4, 2]


@pytest.mark.parametrize("batches", [IMAGES, {"images": IMAGES}, "images", 3, None])
def test_what_is_no_collection_of_batches_is_refused(batches):
    with pytest.raises(TypeError, match=r"data must be an iterable of inputs, such as \[inputs\] or a Data"):
        check_batches(batches, "data")


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_batches_at_all_are_refused(batches):
    with pytest.raises(ValueError, match="data is empty: pass at least one batch"):
        collect(batches, "data")


@pytest.mark.parametrize("batch", ["image", (), [], 3, None])
def test_what_is_no_batch_is_refused(batch):
    with pytest.raises(TypeError, match="a batch must be a tensor, a tuple or list that begins with the input, or"):
        check_batch(batch)


def test_a_model_is_called_with_copies():
    class InPlace(nn.Module):
        def forward(self, images):
            return images.add_(1)

    before = IMAGES.clone()
    for batch in (IMAGES, {"images": IMAGES}, UserDict(images=IMAGES)):
        assert torch.equal(run(InPlace(), batch), before + 1)
        assert torch.equal(IMAGES, before)
    assert torch.equal(run(Named(), {"images": IMAGES, "scale": 2}), 2 * IMAGES)
    assert run(nn.Identity(), None) is None


def test_copies_are_laid_out_and_flagged_as_the_originals():
    original = IMAGES.to(memory_format=torch.channels_last).requires_grad_()
    with torch.no_grad():
        copy = run(nn.Identity(), original)
    assert copy.is_contiguous(memory_format=torch.channels_last)
    assert copy.requires_grad
    assert copy.is_leaf
    assert not run(nn.Identity(), torch.arange(3)).requires_grad
