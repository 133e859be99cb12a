"""What a batch may be, and how a model is run on one without using it up."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Mapping
from typing import Any, NamedTuple

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


class Pair(NamedTuple):
    first: Any
    second: Any


class OwnDict(dict):
    """A dictionary of a class of its own, as models take them."""


def nested(kind, one, other):
    return {
        "a list": lambda: [one, other],
        "a tuple": lambda: (one, other),
        "a named tuple": lambda: Pair(one, other),
        "a dictionary": lambda: {"x": one, "y": other},
        "an ordered one": lambda: OrderedDict(x=one, y=other),
        "one of its own": lambda: OwnDict(x=one, y=other),
        "a UserDict": lambda: UserDict(x=one, y=other),
        "a list of lists": lambda: [[one], [other, None]],
        "all of them": lambda: [{"x": (one, Pair([other], "text"))}],
    }[kind]()


KINDS = ["a list", "a tuple", "a named tuple", "a dictionary", "an ordered one", "one of its own", "a UserDict",
         "a list of lists", "all of them"]  # fmt: skip


class WritesAll(nn.Module):
    """Writes to tensors and containers as far as it can."""

    def forward(self, given):
        self.kind = type(given)
        todo, total = [given], 0
        while todo:
            one = todo.pop()
            if isinstance(one, torch.Tensor):
                total = total + one.add_(1).sum()
            elif isinstance(one, (dict, UserDict)):
                todo.extend(one.values())
                one.clear()
            elif isinstance(one, (list, tuple)):
                todo.extend(one)
                if isinstance(one, list):
                    one.clear()
        return total


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_batch_holds_is_copied_however_deep(kind):
    one, other = torch.zeros(3), torch.zeros(2, 2)
    batch, before = nested(kind, one, other), nested(kind, one, other)
    model = WritesAll()
    given = [{"given": batch}] if isinstance(batch, (dict, UserDict)) else [(batch, "label"), {"given": batch}]
    for _ in range(2):
        for whole in given:
            assert run(model, check_batch(whole)) == 7
            assert model.kind is type(batch)
            assert repr(batch) == repr(before)
            assert not one.any()


def test_what_is_no_container_is_handed_on():
    class Holder:
        pass

    holder = Holder()
    size = torch.Size([2])
    assert run(nn.Identity(), [holder, size, "text", None, 3]) == [holder, size, "text", None, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_that_fills_what_it_gave_anew_is_refused(kind):
    def filled():
        one, other = torch.zeros(3), torch.zeros(2, 2)
        for value in range(2):
            other.fill_(value)
            yield (nested(kind, one, other), "label")

    def replaced():
        batch = [None]
        for _ in range(2):
            batch[0] = nested(kind, torch.zeros(3), torch.zeros(2, 2))
            yield (batch, "label")

    for loader in (filled, replaced):
        with pytest.raises(ValueError, match="data: batch 0 was written to after it was given"):
            collect(loader(), "data")


class Lazy(Mapping):
    """Makes its tensors when they are asked for."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __getitem__(self, name):
        return torch.tensor(self.arrays[name])

    def __iter__(self):
        return iter(self.arrays)

    def __len__(self):
        return len(self.arrays)


def test_a_mapping_that_makes_its_tensors_anew_is_not_one_that_was_written_to():
    (kept,) = collect([Lazy({"images": [[1.0, 2.0]]})], "batches")
    assert run(Named(), kept).tolist() == [[1.0, 2.0]]


class ReadOnly(dict):
    def __setitem__(self, name, value):
        raise TypeError("read only")


class Sized(list):
    def __new__(cls, size):
        return super().__new__(cls)

    def __init__(self, size):
        super().__init__([torch.ones(size)])


@pytest.mark.parametrize("value", [ReadOnly(one=torch.ones(3)), Sized(3)], ids=lambda one: type(one).__name__)
def test_what_cannot_be_copied_is_handed_on(value):
    given = []
    run(lambda images: given.append(images), {"images": value})  # noqa: PLW0108 - by keyword
    assert given[0] is value
