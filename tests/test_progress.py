"""Progress: shown only where somebody looks, with and without tqdm."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from tests.networks import mlp
from torchsmooth import _progress, plan_compression
from torchsmooth._progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(_progress, "sys", SimpleNamespace(stderr=stream))
    return stream


@pytest.fixture
def no_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)


@pytest.mark.parametrize("enabled", [None, True, False])
def test_all_items_come_through_with_tqdm(enabled, terminal):
    pytest.importorskip("tqdm")
    assert list(progress(range(5), "Counting", enabled=enabled)) == [0, 1, 2, 3, 4]
    assert ("Counting" in terminal.getvalue()) == (enabled is True)


@pytest.mark.parametrize("enabled", [None, True, False])
def test_all_items_come_through_without_tqdm(enabled, terminal, no_tqdm):
    assert list(progress(iter(range(5)), "Counting", 5, enabled)) == [0, 1, 2, 3, 4]
    assert ("Counting: 5 of 5\n" in terminal.getvalue()) == (enabled is True)


def test_a_long_loop_shows_on_a_terminal_by_itself(terminal, no_tqdm, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(now))
    assert list(progress(range(5), "Counting")) == [0, 1, 2, 3, 4]
    assert terminal.getvalue().startswith("\rCounting: 2 of 5")
    assert terminal.getvalue().endswith("Counting: 5 of 5\n")


def test_nobody_looks_at_a_pipe(monkeypatch, no_tqdm):
    stream = io.StringIO()
    monkeypatch.setattr(_progress, "sys", SimpleNamespace(stderr=stream))
    items = range(5)
    assert progress(items, "Counting") is items
    assert stream.getvalue() == ""


def test_nothing_breaks_where_there_is_no_stream(monkeypatch):
    monkeypatch.setattr(_progress, "sys", SimpleNamespace(stderr=None))
    assert list(progress(range(3), "Counting")) == [0, 1, 2]


def test_an_unknown_number_of_items_is_counted(terminal, no_tqdm):
    assert list(progress(iter("ab"), "Counting", enabled=True)) == ["a", "b"]
    assert "Counting: 2\n" in terminal.getvalue()


def test_plans_show_it_when_asked(terminal, no_tqdm):
    plan_compression(mlp(), 0.5, progress=True)
    assert "Decomposing layers: 3 of 3" in terminal.getvalue()
    with pytest.raises(TypeError, match="progress must be True, False or None, got str 'yes'"):
        plan_compression(mlp(), 0.5, progress="yes")
