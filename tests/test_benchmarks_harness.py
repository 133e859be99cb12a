"""What the tables of the benchmarks say of the command that made them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cifar10_benchmark import benchmark

harness = benchmark("harness")

KEPT = st.sampled_from(
    [["--width", "64"], ["--only", "plain", "nuclear=1e-3"], ["--write"], ["--ramp=0.1"], ["--only", "a b"]]
)
PLACES = st.sampled_from(
    [["--output", "/home/me/runs"], ["--output=/home/me/runs"], ["--outp", "/home/me/runs"], ["--kept-at", "/home/me"]]
)


def parsed(words):
    parser = harness.make_parser("")
    parser.add_argument("--output", type=Path, default=Path("runs"))
    parser.add_argument("--kept-at", type=Path, default=Path("kept"))
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--ramp", type=float)
    parser.add_argument("--width", type=int)
    return parser.parse_args(words)


@given(parts=st.lists(st.tuples(st.booleans(), KEPT, PLACES)))
def test_a_command_has_all_that_was_given_but_places_on_this_machine(parts):
    words = [word for is_kept, kept, place in parts for word in (kept if is_kept else place)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/somewhere/name.py", *words])
        command = harness.command_of("name", parsed(words))
    expected = [word for is_kept, kept, _ in parts if is_kept for word in kept]
    assert shlex.split(command) == ["python", "benchmarks/name.py", *expected]


def test_a_table_names_the_command_that_made_it(monkeypatch, capsys):
    words = ["--device", "cpu", "--width", "4", "--output", "/home/me/runs"]
    monkeypatch.setattr(sys, "argv", ["name.py", *words])
    harness.publish("name", "Title", ["a"], [["1"]], parsed(words))
    command = re.search("`(.*)`", capsys.readouterr().out)[1]
    assert command == "python benchmarks/name.py --device cpu --width 4"


def test_memory_of_the_cpu_is_not_given_out_as_that_of_a_gpu(monkeypatch, capsys):
    memory = benchmark("memory")
    monkeypatch.setattr(memory, "measured", lambda *_: 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    memory.main()
    assert "\nCPU, " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["memory.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        memory.main()
    assert "run with --device cpu" in capsys.readouterr().err
