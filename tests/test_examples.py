"""Every example runs, at its smallest; what trains in a framework is in test_examples_frameworks.py."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist

from testbed.torchvision_import import import_torchvision
from tests.pages import ROOT
from torchsmooth import load_compressed_

EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Import an example as if it were run: with its neighbours, in an empty folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_a_torchvision_model(example, tmp_path):
    options = ["--model", "squeezenet1_1", "--size", "32", "--batches", "1", "--ratio", "0.2"]
    report = example("torchvision_model").main(options)
    assert report.ratio >= 0.2
    assert any(layer.output_error is not None for layer in report.layers)
    again = load_compressed_(
        import_torchvision().models.squeezenet1_1(), torch.load(tmp_path / "small.pt", weights_only=True)
    )
    assert sum(one.numel() for one in again.parameters()) == report.parameters_after


def test_a_model_around_another_one_downloads_nothing(example, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("it downloads")

    monkeypatch.setattr(import_torchvision().models.WeightsEnum, "get_state_dict", refuse)
    options = ["--model", "lraspp_mobilenet_v3_large", "--size", "32", "--batches", "1", "--ratio", "0.2"]
    assert example("torchvision_model").main(options).ratio >= 0.2


def test_a_transformer(example, capsys):
    table = example("transformer").main(["--epochs", "2", "--ratios", "0.5"])
    assert len(table) == 4
    assert all(len(row) == 2 for row in table.values())
    assert min(row[0] for row in table.values()) > 50  # after two epochs; by chance it would be 10
    printed = capsys.readouterr().out
    assert "self_attn.out_proj" in printed
    assert all(f"| {name} |" in printed for name in table)


def test_targets(example, capsys):
    plans = example("latency_target").main(["--width", "16", "--batch", "2"])
    assert {"params", "macs"} <= plans.keys()
    assert plans["params"].parameters_after <= 0.7 * plans["params"].parameters_before
    assert plans["macs"].macs_after <= 0.7 * plans["macs"].macs_before
    # Only the time may be out of reach: that is up to the machine.
    assert ("not to be had" in capsys.readouterr().out) == ("latency" not in plans)


@pytest.mark.parametrize("ratio", ["0", "2", "-0.1", "nan"])
def test_a_ratio_that_is_none_is_not_put_down_to_the_machine(example, capsys, ratio):
    with pytest.raises(SystemExit):
        example("latency_target").main(["--ratio", ratio])
    assert "--ratio must be strictly between 0 and 1" in capsys.readouterr().err


def test_distributed_on_one_process(example, monkeypatch, tmp_path):
    # A file to meet at instead of a port: there is nobody else, and ports may be taken.
    meet = dist.init_process_group
    store = f"file://{tmp_path / 'store'}"
    monkeypatch.setattr(dist, "init_process_group", lambda kind: meet(kind, init_method=store, rank=0, world_size=1))
    report, right = example("distributed").main(["--epochs", "4"])
    assert report.ratio >= 0.7
    assert right > 50
    assert not dist.is_initialized()


@pytest.mark.slow
def test_digits(example, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["digits.py", "--output", str(tmp_path), "--epochs", "2", "--seeds", "1"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        example("digits").main()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert {path.name for path in tmp_path.iterdir()} == {"digits.md", "digits.png"}


@pytest.mark.slow
def test_pictures_of_the_documentation(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["draw_pictures.py", "--output", str(tmp_path), "--epochs", "1"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    importlib.import_module("draw_pictures").main()
    assert {path.name for path in tmp_path.iterdir()} == {
        "budget.png",
        "frequencies.png",
        "storage.png",
        "truncation.png",
    }


@pytest.mark.slow
def test_distributed_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(  # noqa: S603
        [*command, str(EXAMPLES / "distributed.py"), "--epochs", "4"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"2 processes; test accuracy", done.stdout)) == 1


def test_every_example_is_on_its_page_and_in_a_test():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert scripts == set(re.findall(r"\]\(\.\./examples/(\w+\.py)\)", page))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    missing = {path for path in scripts if path.removesuffix(".py") not in tests}
    assert missing <= {"digit_network.py"}  # which the others import
