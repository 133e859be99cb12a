"""The images that the CIFAR-10 benchmark trains on: their three parts, their cache, and their crops."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from testbed import cifar_splits
from testbed.augmentation import augmented
from testbed.cifar_splits import load_splits, split_held_out
from testbed.torchvision_import import import_torchvision
from tests.strategies import seeds

COUNTS = {"train": 12, "test": 5}


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------- splits


@given(st.integers(2, 300).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count - 1))))
def test_every_image_is_on_one_side_always_the_same(sizes):
    count, held_out = sizes
    train, kept = split_held_out(count, held_out)
    assert len(kept) == held_out
    assert sorted([*train.tolist(), *kept.tolist()]) == list(range(count))
    again = split_held_out(count, held_out)
    assert torch.equal(train, again[0])
    assert torch.equal(kept, again[1])


def test_the_images_held_out_are_those_of_all_results():
    train, kept = split_held_out(50_000, 5_000)
    assert kept[:5].tolist() == [9, 11, 15, 43, 53]
    assert (len(train), int(kept.sum())) == (45_000, 125_499_351)


@pytest.mark.parametrize("held_out", [0, -1, 10, 11])
def test_none_on_one_side_is_refused(held_out):
    with pytest.raises(ValueError, match=f"less than the 10 images, got {held_out}"):
        split_held_out(10, held_out)


def flat_images(count, first=0):
    """Images of one colour each, which JPEG keeps, and labels that tell which."""
    shades = np.arange(first, first + count) * 10 % 256
    return np.broadcast_to(shades[:, None, None, None], (count, 32, 32, 3)).astype(np.uint8), np.arange(count) % 10


def write_jpegs(folder, first=0):
    from PIL import Image

    arrays = {}
    for split, count in COUNTS.items():
        pixels, labels = flat_images(count, first)
        files = []
        for one in pixels:
            buffer = io.BytesIO()
            Image.fromarray(one).save(buffer, "JPEG", quality=75)
            files.append(np.frombuffer(buffer.getvalue(), np.uint8))
        arrays |= {
            f"{split}_jpeg": np.concatenate(files),
            f"{split}_offsets": np.cumsum([0, *map(len, files)]),
            f"{split}_labels": labels,
        }
    np.savez(folder / "cifar10_jpeg.npz", **arrays)


def assert_flat(splits, source, first=0):
    assert splits.source == source
    parts = [torch.cat([splits.train.labels, splits.held_out.labels]).sort().values, splits.test.labels]
    assert [part.tolist() for part in parts] == [sorted(np.arange(12) % 10), list(range(5))]
    assert [len(splits.train.labels), len(splits.held_out.labels)] == [9, 3]
    for images in splits[:3]:
        assert images.pixels.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        assert images.pixels.shape[1:] == (3, 32, 32)
        shades = images.pixels.float().mean((1, 2, 3))
        numbers = ((shades / 10).round().long() - first) % 10
        assert torch.equal(numbers, images.labels)


@pytest.fixture
def few_held_out(monkeypatch):
    monkeypatch.setattr(cifar_splits, "HELD_OUT", 3)


@pytest.fixture
def jpegs(tmp_path, monkeypatch):
    pytest.importorskip("PIL", reason="needs the extra `bench`")
    folder = tmp_path / "data"
    folder.mkdir()
    write_jpegs(folder)
    monkeypatch.setenv("TORCHSMOOTH_SHARED_DATA", str(folder))
    return folder


@pytest.mark.usefixtures("few_held_out")
def test_the_jpeg_copy_is_decoded_once_and_again_when_it_changes(jpegs, tmp_path, monkeypatch):
    cache = tmp_path / "not" / "there"
    assert_flat(load_splits("jpeg"), "jpeg")
    assert_flat(load_splits("jpeg", cache), "jpeg")
    (kept,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(cifar_splits, "load_images", lambda *_: pytest.fail("decoded twice"))
        assert_flat(load_splits("jpeg", cache), "jpeg")
    kept.write_bytes(kept.read_bytes()[:100])  # as an older torch.save may leave it
    assert_flat(load_splits("jpeg", cache), "jpeg")
    write_jpegs(jpegs, first=3)
    assert_flat(load_splits("jpeg", cache), "jpeg", first=3)


def test_a_copy_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHSMOOTH_SHARED_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"cifar10_jpeg\.npz: set TORCHSMOOTH_SHARED_DATA"):
        load_splits("jpeg")
    with pytest.raises(FileNotFoundError, match="no folder cifar-10-batches-py in .*download=True"):
        load_splits(tmp_path)


@pytest.mark.usefixtures("few_held_out")
def test_the_original_is_read_by_torchvision(tmp_path, monkeypatch):
    import_torchvision()
    from torchvision.datasets import cifar

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels, labels = flat_images(12)
    parts = {f"data_batch_{number}": slice(3 * number - 3, 3 * number) for number in range(1, 5)}
    parts |= {"data_batch_5": slice(12, 12), "test_batch": slice(0, 5)}
    for name, part in parts.items():
        rows = pixels[part].transpose(0, 3, 1, 2).reshape(-1, 3072)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": labels[part].tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)  # by the checksums of the real ones
    assert_flat(load_splits(tmp_path), "original")


def test_parts_can_be_cut_and_moved():
    images = cifar_splits.Images(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4))
    splits = cifar_splits.Splits(images, images.first(2), images.first(None), "jpeg").to("meta")
    assert [len(part.labels) for part in splits[:3]] == [4, 2, 4]
    assert all(tensor.is_meta for part in splits[:3] for tensor in part)


# ------------------------------------------------------------------------------------------------------- augmentation


def crops(image, border="zeros", padding=4):
    """All that can become of an image, by loops: each crop of the padded one, and its mirror image."""
    _, height, width = image.shape
    widths = ((0, 0), (padding, padding), (padding, padding))
    padded = torch.from_numpy(np.pad(image.numpy(), widths, mode="constant" if border == "zeros" else "reflect"))
    found = []
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + height, left : left + width]
            found += [crop, crop.flip(-1)]
    return found


@pytest.mark.parametrize("border", ["zeros", "reflection"])
@given(seeds, st.integers(1, 6), st.sampled_from([(32, 32), (5, 7)]))
def test_an_augmented_image_is_a_crop_or_its_mirror_image(border, seed, count, size):
    images = torch.randint(1, 256, (count, 3, *size), generator=generator(seed), dtype=torch.uint8)
    before, state = images.clone(), torch.get_rng_state()
    result = augmented(images, generator(seed), border)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    assert result.is_contiguous(memory_format=torch.channels_last)
    for image, new in zip(images, result, strict=True):
        assert any(torch.equal(new, crop) for crop in crops(image, border))
    assert torch.equal(result, augmented(images, generator(seed), border))


@pytest.mark.parametrize("border", ["zeros", "reflection"])
def test_every_crop_and_both_mirror_images_occur(border):
    image = torch.arange(1, 1 + 10 * 10).reshape(1, 1, 10, 10)
    results = augmented(image.expand(4000, 1, 10, 10), generator(0), border)
    seen = [int((results == crop).flatten(1).all(1).sum()) for crop in crops(image[0], border)]
    assert sum(seen) == 4000
    assert min(seen) > 0
    assert 1800 < sum(seen[::2]) < 2200
