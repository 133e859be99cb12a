"""A run that is stopped anywhere leaves no broken file, and the next one does not do finished work again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import load, names, out, same, save
from tests.networks import mlp
from torchsmooth import compress_checkpoint, load_compressed_, svd_compress_
from torchsmooth._checkpoint_factors import Workshop
from torchsmooth._destination import Destination
from torchsmooth._work_folder import WorkFolder

SIZES = (24, 32, 16, 20, 8)  # four layers
LAYERS = len(SIZES) - 1


def compressed(ratio=0.5, **options):
    model = mlp(sizes=SIZES)
    svd_compress_(model, ratio, **options)
    return model.state_dict()


class Stopped(BaseException):
    """What a test stops a run with; like KeyboardInterrupt, no Exception."""


class Watch:
    """Counts the steps of runs, and stops one at a step that was asked for."""

    STEPS = (
        (Workshop, "decompose"),
        (Workshop, "factor"),
        (WorkFolder, "write_files"),
        (Destination, "commit"),
        (WorkFolder, "remove"),
    )

    def __init__(self, monkeypatch):
        self.counts = dict.fromkeys((name for _, name in self.STEPS), 0)
        self.stop_at, self.error = None, Stopped
        for owner, name in self.STEPS:
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name, method):
        def counted(*args, **kwargs):
            if self.stop_at == (name, self.counts[name]):
                raise self.error
            self.counts[name] += 1
            return method(*args, **kwargs)

        return counted

    def start(self, *stop_at, error=Stopped):
        self.counts = dict.fromkeys(self.counts, 0)
        self.stop_at, self.error = stop_at or None, error


@settings(max_examples=8)
@given(
    kind=st.sampled_from(["pickle", "safetensors", "sharded"]),
    stops=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["decompose", "factor"]), st.integers(0, LAYERS - 1)),
            st.tuples(st.sampled_from(["write_files", "commit"]), st.just(0)),
        ),
        min_size=1,
        max_size=3,
    ),
    earlier=st.booleans(),
    error=st.sampled_from([Stopped, KeyboardInterrupt, OSError]),
)
def test_stopped_anywhere_and_started_again(tmp_path_factory, kind, stops, earlier, error):
    folder = tmp_path_factory.mktemp("stopped")
    source, target = save(mlp(sizes=SIZES).state_dict(), folder, kind), out(folder, kind)
    if earlier:
        compress_checkpoint(source, target, 0.2)
    before = load(target) if earlier else None
    with pytest.MonkeyPatch.context() as patch:
        watch, done = Watch(patch), {"decompose": 0, "factor": 0}
        for stop in stops:
            watch.start(*stop, error=error)
            try:
                compress_checkpoint(source, target, 0.5)
            except error:
                assert target.exists() == earlier
                assert before is None or same(load(target), before)
                done = {name: done[name] + watch.counts[name] for name in done}
            else:  # so few steps were left that it came to the end
                before, earlier, done = compressed(), True, {"decompose": 0, "factor": 0}
        watch.start()
        report = compress_checkpoint(source, target, 0.5)
        assert done["decompose"] + watch.counts["decompose"] == LAYERS
        assert done["factor"] + watch.counts["factor"] == len(report.compressed)
    assert same(load(target), compressed())
    assert not [one for one in folder.iterdir() if one.name.startswith(".")]


KILLED = """
import os, signal, sys, torchsmooth
from torchsmooth._checkpoint_factors import Workshop
factor, count = Workshop.factor, []
def killed(*args):
    count.append(1)
    if len(count) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return factor(*args)
Workshop.factor = killed
torchsmooth.compress_checkpoint(*sys.argv[1:], 0.5)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing is killed like this here")
def test_killed_by_the_system_and_started_again(tmp_path, monkeypatch):
    source, target = save(mlp(sizes=SIZES).state_dict(), tmp_path, "safetensors"), out(tmp_path, "safetensors")
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(target)], check=False)  # noqa: S603
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    watch = Watch(monkeypatch)
    report = compress_checkpoint(source, target, 0.5)
    assert (watch.counts["decompose"], watch.counts["factor"]) == (0, len(report.compressed) - 2)
    assert same(load(target), compressed())
    assert names(tmp_path) == ["model.safetensors", "small.safetensors"]


def stopped(source, target, watch, *stop_at, **options):
    watch.start(*stop_at)
    with pytest.raises(Stopped):
        compress_checkpoint(source, target, **{"ratio": 0.5, **options})
    watch.start()


def test_another_ratio_uses_what_was_decomposed(tmp_path, monkeypatch):
    source, target = save(mlp(sizes=SIZES).state_dict(), tmp_path, "pickle"), out(tmp_path, "pickle")
    watch = Watch(monkeypatch)
    stopped(source, target, watch, "commit", 0)
    compress_checkpoint(source, target, 0.3, form="factored")
    assert watch.counts["decompose"] == 0
    assert same(load(target), compressed(0.3, form="factored"))


@pytest.mark.parametrize("options", [{"scheme": "input"}, {"device": "cpu:0"}])
def test_what_could_differ_is_decomposed_anew(tmp_path, monkeypatch, options):
    source, target = save(mlp(sizes=SIZES).state_dict(), tmp_path, "pickle"), out(tmp_path, "pickle")
    watch = Watch(monkeypatch)
    stopped(source, target, watch, "commit", 0)
    compress_checkpoint(source, target, 0.5, **options)
    assert watch.counts["decompose"] == LAYERS


def test_a_source_that_has_changed_is_begun_anew(tmp_path, monkeypatch):
    source, target = save(mlp(sizes=SIZES).state_dict(), tmp_path, "safetensors"), out(tmp_path, "safetensors")
    watch = Watch(monkeypatch)
    stopped(source, target, watch, "commit", 0)
    state = mlp(1, sizes=SIZES).state_dict()
    save(state, tmp_path, "safetensors")
    os.utime(source, ns=(0, 10**18))
    compress_checkpoint(source, target, 0.5)
    assert watch.counts["decompose"] == LAYERS
    model = mlp(1, sizes=SIZES)
    svd_compress_(model, 0.5)
    assert same(load(target), model.state_dict())


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "pickle", "pickle mapped anew"])
@pytest.mark.parametrize("step", [(Workshop, "decompose"), (Workshop, "factor"), (WorkFolder, "write_files")])
@pytest.mark.parametrize("sizes", [SIZES, (24, 8)])
def test_a_source_that_changes_meanwhile_is_refused_and_not_mixed(tmp_path, monkeypatch, kind, step, sizes):
    kind, _, anew = kind.partition(" ")
    if anew:
        monkeypatch.setattr("torchsmooth._pickle_file._MAPPED", 0)
    source, target = save(mlp(sizes=SIZES).state_dict(), tmp_path, kind), out(tmp_path, kind)
    compress_checkpoint(source, target, 0.3)
    before = load(target)
    (tmp_path / "new").mkdir()
    other = save(mlp(1, sizes=sizes).state_dict(), tmp_path / "new", kind)
    (owner, name), calls = step, []

    def changed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            for one in other.parent.iterdir():
                os.utime(one, ns=(0, 10**18))
                one.replace(source.parent / one.name)
        return original(*args, **kwargs)

    original = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, changed)
        with pytest.raises(
            ValueError, match="changed while the checkpoint was read: call this again when nobody writes"
        ):
            compress_checkpoint(source, target, 0.5)
    assert same(load(target), before)
    assert not list(tmp_path.rglob(".*"))
    compress_checkpoint(source, target, 0.5)
    model = mlp(1, sizes=sizes)
    svd_compress_(model, 0.5)
    assert same(load(target), model.state_dict())


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    source, target = save(mlp(sizes=SIZES).state_dict(), tmp_path, "safetensors"), out(tmp_path, "safetensors")
    synced, renamed, sync, replace = [], [], os.fsync, os.replace

    def counted_sync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def checked_replace(self, place):
        renamed.append((self.stat().st_ino in synced, place))
        replace(self, place)

    monkeypatch.setattr("os.fsync", counted_sync)
    monkeypatch.setattr("pathlib.Path.replace", checked_replace)
    compress_checkpoint(source, target, 0.5)
    assert all(known for known, _ in renamed)
    assert renamed[-1][1] == target
    assert synced[-1] == tmp_path.stat().st_ino  # the folder, so that the new name stays


def test_an_error_before_any_work_leaves_nothing_behind(tmp_path):
    state = mlp(sizes=SIZES).state_dict()
    state["0.weight"][1, 2] = torch.nan
    source = save(state, tmp_path, "pickle")
    with pytest.raises(ValueError, match="1 NaN or infinite values out of 768"):
        compress_checkpoint(source, tmp_path / "small.pt", 0.5)
    assert names(tmp_path) == ["model.pt"]


def test_a_ratio_that_cannot_be_reached_costs_the_decomposition_only_once(tmp_path, monkeypatch):
    source = save(mlp(sizes=SIZES).state_dict(), tmp_path, "pickle")
    watch = Watch(monkeypatch)
    with pytest.raises(ValueError, match=r"ratio 0\.99 cannot be reached: .* The largest ratio that can be reached"):
        compress_checkpoint(source, tmp_path / "small.pt", 0.99)
    compress_checkpoint(source, tmp_path / "small.pt", 0.5)
    assert watch.counts["decompose"] == LAYERS
    assert names(tmp_path) == ["model.pt", "small.pt"]


def test_a_damaged_result_is_made_again(tmp_path, monkeypatch):
    source, target = save(mlp(sizes=SIZES).state_dict(), tmp_path, "pickle"), out(tmp_path, "pickle")
    watch = Watch(monkeypatch)
    stopped(source, target, watch, "commit", 0)
    (work,) = tmp_path.glob(".*torchsmooth-partial")
    for kind in ("spectra", "factors"):
        next((work / kind).iterdir()).write_bytes(b"")
    (work / "files" / "model.pt").unlink()
    compress_checkpoint(source, target, 0.5)
    assert (watch.counts["decompose"], watch.counts["factor"]) == (1, 1)
    assert same(load(target), compressed())


def test_a_folder_in_use_is_replaced_by_its_index(tmp_path, monkeypatch):
    source, target = save(mlp(sizes=SIZES).state_dict(), tmp_path, "sharded"), tmp_path / "small"
    target.mkdir()
    (target / "config.json").write_text("{}")
    compress_checkpoint(source, target, 0.3)
    own = {"config.json", "model.safetensors.index.json"}
    assert set(names(target)) == own | {"part-0.safetensors", "part-1.safetensors"}
    before = load(target)

    replace, moved = os.replace, []

    def one_then_stopped(self, place):
        if self.parent.name == "files":
            moved.append(place)
            if len(moved) == 2:
                raise Stopped
        replace(self, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.replace", one_then_stopped)
        with pytest.raises(Stopped):
            compress_checkpoint(source, target, 0.5)
    assert same(load(target), before)
    watch = Watch(monkeypatch)
    compress_checkpoint(source, target, 0.5)
    assert (watch.counts["decompose"], watch.counts["factor"]) == (0, 0)
    assert same(load(target), compressed())
    new = set(names(target)) - own
    assert len(new) == 2
    assert not new & {"part-0.safetensors", "part-1.safetensors"}
    assert same(load_compressed_(mlp(1, sizes=SIZES), target).state_dict(), compressed())
    compress_checkpoint(source, target / "model.safetensors.index.json", 0.3)  # the index may be named instead
    assert same(load(target), before)
    assert set(names(target)) == own | {"part-0.safetensors", "part-1.safetensors"}


def test_an_index_may_get_a_name_of_its_own(tmp_path):
    source = save(mlp(sizes=SIZES).state_dict(), tmp_path, "sharded_pickle")
    compress_checkpoint(source, tmp_path / "small" / "other.index.json", 0.5)
    weight_map = json.loads((tmp_path / "small" / "other.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == {"part-0.pt", "part-1.pt"}
    assert same(load(tmp_path / "small" / "other.index.json"), compressed())


def test_a_draft_that_was_left_by_a_killed_run_does_not_stay(tmp_path, monkeypatch):
    source, target = save(mlp(sizes=SIZES).state_dict(), tmp_path, "sharded"), out(tmp_path, "sharded")
    stopped(source, target, Watch(monkeypatch), "commit", 0)
    (folder,) = tmp_path.glob(".*torchsmooth-partial")
    (folder / "files" / ".part-1.safetensors.0123").write_bytes(b"half of it")
    compress_checkpoint(source, target, 0.5)
    assert names(target) == ["model.safetensors.index.json", "part-0.safetensors", "part-1.safetensors"]


def test_finished_files_are_not_taken_for_those_of_another_count_of_parameters(tmp_path, monkeypatch):
    model = mlp(sizes=SIZES)
    model.register_buffer("table", torch.ones(1500))  # by its name alone a parameter
    source, target = save(model.state_dict(), tmp_path, "sharded"), out(tmp_path, "sharded")
    stopped(source, target, Watch(monkeypatch), "commit", 0, ratio=0.3)
    report = compress_checkpoint(source, target, 0.3, model=model)
    fresh = compress_checkpoint(source, out(tmp_path, "sharded", "fresh"), 0.3, model=model)
    assert report.parameters_after == fresh.parameters_after
    assert same(load(target), load(out(tmp_path, "sharded", "fresh")))


def test_a_folder_that_is_there_is_worked_in_for_it_may_be_on_another_disk(tmp_path, monkeypatch):
    source = save(mlp(sizes=SIZES).state_dict(), tmp_path, "sharded")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    stopped(source, tmp_path / "link", Watch(monkeypatch), "commit", 0)
    assert names(tmp_path / "real") == [".link.torchsmooth-partial"]
    compress_checkpoint(source, tmp_path / "link", 0.5)
    assert names(tmp_path / "real") == ["model.safetensors.index.json", "part-0.safetensors", "part-1.safetensors"]
    assert (tmp_path / "link").is_symlink()


def test_a_source_that_is_away_for_a_moment_costs_no_progress(tmp_path, monkeypatch):
    source, target = save(mlp(sizes=SIZES).state_dict(), tmp_path, "safetensors"), out(tmp_path, "safetensors")
    watch, original, calls = Watch(monkeypatch), Workshop.decompose, []

    def lost(*args):
        calls.append(args)
        if len(calls) == 2:
            source.rename(tmp_path / "away")
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workshop, "decompose", lost)
        with pytest.raises(OSError, match=re.escape(source.name)):
            compress_checkpoint(source, target, 0.5)
    (tmp_path / "away").rename(source)
    before = watch.counts["decompose"]
    compress_checkpoint(source, target, 0.5)
    assert watch.counts["decompose"] - before == LAYERS - 1
