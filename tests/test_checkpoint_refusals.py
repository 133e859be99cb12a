"""Files that are broken, hostile or of another kind, and destinations that make no sense: refused, with the way out."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.checkpoints import load, names, same, save
from tests.networks import mlp
from tests.strategies import fill_
from torchsmooth import compress_checkpoint, load_compressed_


class Hostile:
    """Runs a command when it is unpickled by a careless reader."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


def whole(kind="safetensors"):
    def make(folder):
        return save(mlp().state_dict(), folder, kind)

    return make


def with_bytes(name, change):
    """A file of which the bytes were changed."""

    def make(folder):
        whole_one = save(
            mlp().state_dict(), folder, "safetensors" if name.endswith(".safetensors") else "pickle", "whole"
        )
        (folder / name).write_bytes(change(whole_one.read_bytes()))
        return folder / name

    return make


def pickled(content):
    def make(folder):
        torch.save(content() if callable(content) else content, folder / "model.pt")
        return folder / "model.pt"

    return make


def plain_pickle(folder):
    (folder / "model.pt").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    return folder / "model.pt"


def script(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(folder / "model.pt")
    return folder / "model.pt"


def indexed(change):
    """An index that was changed: by the mapping of keys to files, or as a whole."""

    def make(folder):
        path = save(mlp().state_dict(), folder, "sharded")
        content = json.loads(path.read_text())
        changed = change(content, path.parent)
        path.write_text(changed if isinstance(changed, str) else json.dumps(content))
        return path

    return make


def named(key, name):
    return indexed(lambda content, _: content["weight_map"].update({key: name}))


def lacking_a_key(content, folder):
    del content["weight_map"]["0.weight"]


def held_twice(content, folder):
    save_file({"0.weight": torch.ones(2, 2), "extra": torch.ones(1)}, folder / "part-2.safetensors")
    content["weight_map"]["extra"] = "part-2.safetensors"


def emptied(content, folder):
    content["weight_map"] = {}


def empty_folder(folder):
    (folder / "place").mkdir()
    return folder / "place"


def crowded_folder(folder):
    for name in ("one", "two"):
        save(mlp().state_dict(), folder, "safetensors", name)
    return folder


def folder_as_a_file(folder):
    (folder / "model.safetensors").mkdir()
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"0.weight": "model.safetensors"}}))
    return path


SOURCES = [
    (
        with_bytes("cut.safetensors", lambda whole: whole[:-3]),
        ValueError,
        (
            r"cut\.safetensors' is no whole safetensors file \(.*\): was it cut off, or is it of another "
            r"format\?"
        ),
    ),
    (with_bytes("cut.safetensors", lambda whole: whole[:20]), ValueError, "is no whole safetensors file"),
    (with_bytes("empty.safetensors", lambda whole: b""), ValueError, "is no whole safetensors file"),
    (with_bytes("noise.safetensors", lambda whole: b"\xff" * 200), ValueError, "is no whole safetensors file"),
    (with_bytes("longer.safetensors", lambda whole: whole + b"more"), ValueError, "is no whole safetensors file"),
    (
        with_bytes("empty.pt", lambda whole: b""),
        ValueError,
        (
            r"empty\.pt' cannot be read as a checkpoint \(EOFError\): expected a whole file that torch\.save "
            r"wrote"
        ),
    ),
    (with_bytes("cut.pt", lambda whole: whole[: len(whole) // 2]), ValueError, "cannot be read as a checkpoint"),
    (
        with_bytes("text.pt", lambda whole: b"hello, this is no checkpoint"),
        ValueError,
        "cannot be read as a checkpoint",
    ),
    (with_bytes("zip.pt", lambda whole: b"PK\x03\x04junk"), ValueError, "cannot be read as a checkpoint"),
    (
        pickled({"state_dict": Hostile()}),
        ValueError,
        (
            r"holds more than tensors and plain containers: reading \w+\.system would execute code\. Where "
            r"you trust the file, load it and save its state_dict\(\) alone"
        ),
    ),
    (plain_pickle, ValueError, "cannot be read as a checkpoint"),
    (pickled(lambda: nn.Linear(2, 2)), ValueError, r"reading torch\.nn\.modules\.linear\.Linear would execute code"),
    (script, ValueError, r"is a TorchScript archive, which is a program: save model\.state_dict\(\) instead"),
    (pickled([torch.ones(2)]), ValueError, r"holds a list: expected a state dict, model\.state_dict\(\)"),
    (
        pickled({"epoch": 1, "net": {"0.weight": torch.ones(2, 2)}}),
        ValueError,
        (
            r"holds no state dict: expected tensors by name, or those under one of 'model', "
            r"'model_state_dict', 'state_dict'; its keys are 'epoch', 'net'"
        ),
    ),
    (pickled({}), ValueError, "its keys are none"),
    (pickled({"state_dict": {0: torch.ones(2, 2)}}), ValueError, "holds a state dict with a key that is no text: 0"),
    (pickled({"a": torch.ones(3)}), ValueError, "nothing to compress in this checkpoint: it has no layers"),
    (indexed(lambda content, _: "{"), ValueError, "is not JSON, or has a key twice"),
    (
        indexed(lambda content, _: '{"weight_map": {"a": "b", "a": "c"}}'),
        ValueError,
        r"has a key twice \('a' occurs twice\)",
    ),
    (indexed(lambda content, _: "[]"), ValueError, "is no index: expected an object with a field 'weight_map'"),
    (indexed(emptied), ValueError, "is no index"),
    (
        named("0.weight", "../part-0.safetensors"),
        ValueError,
        (
            r"names '\.\./part-0\.safetensors' as the file of '0\.weight': expected the name of a file beside "
            r"the index, without a folder"
        ),
    ),
    (named("0.weight", "/etc/passwd"), ValueError, "expected the name of a file beside the index"),
    (named("0.weight", "..\\part-0.safetensors"), ValueError, "expected the name of a file beside the index"),
    (named("0.weight", "C:part-0.safetensors"), ValueError, "expected the name of a file beside the index"),
    (named("0.weight", ".."), ValueError, "expected the name of a file beside the index"),
    (named("0.weight", 3), ValueError, "names 3 as the file of '0.weight'"),
    (named("0.weight", "model.safetensors.index.json"), ValueError, "expected the name of a file beside the index"),
    (
        named("0.weight", "part-9.safetensors"),
        FileNotFoundError,
        r"names 'part-9\.safetensors' as the file of '0\.weight', which does not exist",
    ),
    (
        named("lost.weight", "part-1.safetensors"),
        ValueError,
        (
            r"says that 'lost\.weight' is in 'part-1\.safetensors', but it is not there: are all files of the "
            r"same version\?"
        ),
    ),
    (
        named("0.weight", "part-1.safetensors"),
        ValueError,
        r"says that '0\.weight' is in 'part-1\.safetensors', but it is not there",
    ),
    (
        indexed(lacking_a_key),
        ValueError,
        (
            r"'part-0\.safetensors' beside index .* holds '0\.weight', which is not in the index: are all "
            r"files"
        ),
    ),
    (
        indexed(held_twice),
        ValueError,
        r"holds '0\.weight', which is to be read from 'part-0\.safetensors' by the index",
    ),
    (
        empty_folder,
        ValueError,
        (
            r"is a folder, which should hold one \.index\.json file or one \.safetensors file, but holds "
            r"none\. Name the file"
        ),
    ),
    (crowded_folder, ValueError, r"but holds 2: 'one\.safetensors', 'two\.safetensors'\. Name the file"),
    (folder_as_a_file, ValueError, "is a folder, not a file of tensors"),
    (lambda folder: folder / "nothing.safetensors", FileNotFoundError, r"nothing\.safetensors' does not exist"),
    (lambda folder: folder / "nothing.pt", FileNotFoundError, r"nothing\.pt' does not exist"),
    (lambda folder: folder / "nothing.index.json", FileNotFoundError, r"nothing\.index\.json"),
    (lambda folder: 5, TypeError, "source must be a path, got int 5"),
]


@pytest.mark.parametrize(("make", "error", "message"), SOURCES)
def test_a_source_that_cannot_be_used_is_named_with_the_reason(tmp_path, monkeypatch, make, error, message):
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path)
    before = names(tmp_path)
    target = tmp_path / ("small.safetensors" if str(source).endswith(".safetensors") else "small.pt")
    if str(source).endswith(".json"):
        target = tmp_path / "small"
    with pytest.raises(error, match=message):
        compress_checkpoint(source, target, 0.5)
    assert names(tmp_path) == before
    assert "executed" not in before
    if error is ValueError and "nothing to compress" not in message:
        with pytest.raises(error, match=message):
            load_compressed_(mlp(), source)


DESTINATIONS = [
    (whole(), "model.safetensors", ValueError, "is the source itself: it would be lost; choose another name"),
    (
        whole(),
        "small.pt",
        ValueError,
        (
            r"must be a file of the same kind as the source, 'model\.safetensors': name it "
            r"something\.safetensors"
        ),
    ),
    (
        whole("pickle"),
        "small.safetensors",
        ValueError,
        r"must be a file of the same kind as the source, 'model\.pt': name it something\.pt",
    ),
    (whole("pickle"), "small.json", ValueError, "must be a file of the same kind"),
    (whole("pickle"), "", ValueError, "is a folder: name the file in it"),
    (
        whole("sharded"),
        "small.safetensors",
        ValueError,
        (
            r"the source has several files, so destination .* must be a folder, or an index in it with a name "
            r"that ends in \.index\.json"
        ),
    ),
    (whole("sharded"), "model", ValueError, "is the source itself"),
    (whole("sharded"), "model/other.index.json", ValueError, "is the source itself"),
    (
        whole("pickle"),
        "nowhere/small.pt",
        FileNotFoundError,
        r"the folder of destination .*small\.pt' does not exist: make it first",
    ),
]


@pytest.mark.parametrize(("make", "name", "error", "message"), DESTINATIONS)
def test_a_destination_that_makes_no_sense_is_refused_before_any_work(tmp_path, make, name, error, message):
    source = make(tmp_path)
    before = source.read_bytes()
    with pytest.raises(error, match=message):
        compress_checkpoint(source, tmp_path / name, 0.5)
    assert source.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "part-1.safetensors"])
def test_a_folder_that_the_source_links_into_is_refused(tmp_path, name):
    source = save(mlp().state_dict(), tmp_path, "sharded")
    links = tmp_path / "links"
    links.mkdir()
    for one in source.parent.iterdir():
        if one.name == name:
            (links / one.name).symlink_to(one)
        else:
            shutil.copy(one, links)
    before = {one.name: one.read_bytes() for one in source.parent.iterdir()}
    with pytest.raises(ValueError, match=f"is where {name!r} of the source links to, which would be lost"):
        compress_checkpoint(links, source.parent, 0.5)
    assert {one.name: one.read_bytes() for one in source.parent.iterdir()} == before


def test_a_link_over_which_the_source_is_found_is_not_removed_with_the_files_of_an_earlier_index(tmp_path):
    source = save(mlp().state_dict(), tmp_path, "sharded")
    (tmp_path / "links").mkdir()
    shutil.copytree(source.parent, tmp_path / "small")
    for one in source.parent.glob("part-*"):
        (tmp_path / "small" / one.name).unlink()
        (tmp_path / "small" / one.name).symlink_to(one)
        (tmp_path / "links" / one.name).symlink_to(tmp_path / "small" / one.name)
    shutil.copy(source, tmp_path / "links")
    compress_checkpoint(tmp_path / "links", tmp_path / "small", 0.5)
    assert same(load(tmp_path / "links"), mlp().state_dict())
    assert load_compressed_(mlp(1), tmp_path / "small")


def test_a_destination_must_be_a_path(tmp_path):
    source = save(mlp().state_dict(), tmp_path, "pickle")
    with pytest.raises(TypeError, match="destination must be a path, got None"):
        compress_checkpoint(source, None, 0.5)


ARGUMENTS = [
    ({}, ValueError, "give either ratio"),
    ({"ratio": 0.5, "max_error": 0.1}, ValueError, "give either ratio"),
    ({"ratio": 1.5}, ValueError, r"ratio must lie strictly between 0 and 1 \(the fraction of the model's parameters"),
    ({"ratio": "half"}, TypeError, "ratio must be a real number, got str 'half'"),
    ({"max_error": 0.0}, ValueError, "max_error must lie strictly between 0 and 1"),
    ({"ratio": 0.5, "scheme": "best"}, ValueError, "scheme must be one of"),
    ({"ratio": 0.5, "form": "best"}, ValueError, "form must be one of"),
    ({"ratio": 0.5, "allocation": "best"}, ValueError, "allocation must be one of"),
    ({"ratio": 0.5, "rank_multiple": 0}, ValueError, "rank_multiple must be at least 1"),
    (
        {"ratio": 0.5, "filter_fn": "head"},
        TypeError,
        r"filter_fn must be a function of \(shape, name\), got str 'head'",
    ),
    ({"ratio": 0.5, "model": "mlp"}, TypeError, "model must be a torch.nn.Module, got str 'mlp'"),
    (
        {"ratio": 0.5, "device": "nowhere"},
        ValueError,
        "device must be a torch.device or the name of one, got str 'now",
    ),
    ({"ratio": 0.5, "progress": "yes"}, TypeError, "progress must be True, False or None"),
    ({"ratio": 0.99}, ValueError, r"ratio 0\.99 cannot be reached: with rank 1"),
    ({"max_error": 1e-9}, ValueError, "nothing to compress: no layer can be made smaller within max_error=1e-09"),
    (
        {"ratio": 0.5, "filter_fn": lambda shape, name: False},
        ValueError,
        (
            r"nothing to compress in this checkpoint: filter_fn left out all 3 layers\. filter_fn\(shape, name\) "
            r"returns True"
        ),
    ),
    (
        {"ratio": 0.5, "model": nn.Sequential(nn.Linear(3, 3))},
        ValueError,
        r"has, unlike the model, '0\.bias'|has, unlike the model, '2\.bias'",
    ),
    (
        {"ratio": 0.5, "model": mlp(sizes=(24, 32, 16, 8, 8))},
        ValueError,
        r"lacks '6\.bias', '6\.weight': was it saved from a Sequential built like this one\?",
    ),
    (
        {"ratio": 0.5, "model": mlp(sizes=(24, 32, 16, 9))},
        ValueError,
        (
            r"holds '4\.weight' of shape \(8, 16\), but this Sequential has \(9, 16\): was it built with "
            r"other sizes\?"
        ),
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS)
def test_arguments_that_make_no_sense_are_named(tmp_path, arguments, error, message):
    source = save(mlp().state_dict(), tmp_path, "pickle")
    with pytest.raises(error, match=message):
        compress_checkpoint(source, tmp_path / "small.pt", **arguments)
    assert not (tmp_path / "small.pt").exists()


def test_a_weight_that_is_not_finite_is_named_with_its_file(tmp_path):
    state = fill_(mlp(), 0).state_dict()
    state["2.weight"][0, :2] = torch.inf
    source = save(state, tmp_path, "sharded")
    shard = json.loads(source.read_text())["weight_map"]["2.weight"]
    message = rf"{re.escape(shard)}': the weight of layer '2' holds 2 NaN or infinite values out of 512: repair it, or"
    with pytest.raises(ValueError, match=message):
        compress_checkpoint(source, tmp_path / "small", 0.5)
    report = compress_checkpoint(source, tmp_path / "small", 0.2, filter_fn=lambda _, name: name != "2")
    assert report["2"].reason == "left out by filter_fn"


def test_without_safetensors_its_files_are_refused_with_the_way_to_get_it(tmp_path, monkeypatch):
    source = save(mlp().state_dict(), tmp_path, "safetensors")
    pickle_file = save(mlp().state_dict(), tmp_path, "pickle")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs the package safetensors: pip install torchsmooth\[checkpoint\]"):
        compress_checkpoint(source, tmp_path / "small.safetensors", 0.5)
    assert compress_checkpoint(pickle_file, tmp_path / "small.pt", 0.5).ratio >= 0.5


def test_a_source_that_shrinks_meanwhile_is_noticed(tmp_path):
    source = save(mlp().state_dict(), tmp_path, "safetensors")

    def cut(shape, name):
        source.write_bytes(source.read_bytes()[:-40])
        return True

    with pytest.raises(ValueError, match="changed while the checkpoint was read") as caught:
        compress_checkpoint(source, tmp_path / "small.safetensors", 0.5, filter_fn=cut)
    assert "ended early: it has become shorter since it was opened" in str(caught.value.__cause__)
    assert not (tmp_path / "small.safetensors").exists()


def test_the_hostile_pickle_of_these_tests_is_hostile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.load(io.BytesIO(pickle.dumps(Hostile())))
    assert (tmp_path / "executed").exists()
