"""The command line: what it prints, what it returns, and that its errors are one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.checkpoints import load, out, same, save
from tests.networks import mlp
from tests.strategies import fill_, randn
from torchsmooth import compress_checkpoint, svd_compress_
from torchsmooth._command_line import main
from torchsmooth.spectra import spectrum


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "sharded"])
def test_compress_does_what_the_function_does(tmp_path, capsys, kind):
    source = save(mlp().state_dict(), tmp_path, kind)
    assert main(["compress", str(source), str(out(tmp_path, kind)), "--ratio", "0.5", "--exclude", "4*"]) == 0
    printed = capsys.readouterr()
    model = mlp()
    report = svd_compress_(model, 0.5, filter_fn=lambda _, name: name != "4")
    assert printed.out == f"{report}\n".replace("filter_fn", "--exclude")
    assert printed.err == ""
    assert same(load(out(tmp_path, kind)), model.state_dict())


def test_all_options_arrive(tmp_path, capsys):
    source, options = save(mlp().state_dict(), tmp_path, "pickle"), ["--max-error", "0.7", "--json", "--quiet"]
    options += ["--form", "pivoted", "--rank-multiple", "2", "--scheme", "channel", "--scheme", "input"]
    options += ["--allocation", "budget", "--device", "cpu"]
    assert main(["compress", str(source), str(tmp_path / "small.pt"), *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    model = mlp()
    report = svd_compress_(model, max_error=0.7, form="pivoted", rank_multiple=2, scheme=("channel", "input"))
    assert printed == json.loads(json.dumps(report.to_dict()))
    assert same(load(tmp_path / "small.pt"), model.state_dict())


def test_progress_goes_to_the_other_stream(tmp_path, capsys, monkeypatch):
    source = save(mlp().state_dict(), tmp_path, "pickle")
    monkeypatch.setattr("torchsmooth._progress._DELAY", 0.0)
    monkeypatch.setattr("torchsmooth._progress._tqdm", lambda: None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["compress", str(source), str(tmp_path / "small.pt"), "--ratio", "0.5"]) == 0
    printed = capsys.readouterr()
    for what in ("Decomposing layers: 3 of 3", "Factoring layers: 3 of 3", "Writing files: 1 of 1"):
        assert what in printed.err
        assert what not in printed.out


def test_nothing_is_replaced_without_force(tmp_path, capsys):
    source, target = save(mlp().state_dict(), tmp_path, "pickle"), tmp_path / "small.pt"
    target.write_bytes(b"mine")
    arguments = ["compress", str(source), str(target), "--ratio", "0.5"]
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"error: {str(target)!r} exists already: add --force to replace it.\n"
    assert target.read_bytes() == b"mine"
    assert main([*arguments, "--force"]) == 0
    assert "0.down.weight" in load(target)


def test_inspect_tells_what_a_compression_will_be_like(tmp_path, capsys):
    model = mlp()
    state = model.state_dict() | {
        "embed.weight": randn(9, 4, seed=3, dtype=torch.float32),
        "zero.weight": torch.zeros(6, 6),
    }
    source = save(state, tmp_path, "safetensors")
    assert main(["inspect", str(source), "--ratios", "0.3", "0.6", "0.97", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    layers = {one["name"]: one for one in found["layers"]}
    assert found["parameters"] == sum(one.numel() for one in state.values())
    assert layers["0"]["shape"] == [32, 24]
    assert layers["0"]["type"] == "Linear"
    assert (layers["zero"]["effective_rank"], layers["zero"]["full_rank"]) == (0.0, 6)
    assert layers["embed"]["effective_rank"] is None
    assert layers["embed"]["reason"].startswith("an embedding by its name")
    for one in spectrum(model).layers:
        assert layers[one.name]["effective_rank"] == pytest.approx(one.effective_rank, rel=1e-5)
    for row in found["ratios"][:2]:
        target = tmp_path / f"small-{row['ratio']}.safetensors"
        report = compress_checkpoint(source, target, row["ratio"])
        assert row["parameters"] == report.parameters_after
        # The whole error, from the weights themselves.
        names = [one.name for one in report.layers if one.name != "embed"]
        norms = {name: float(state[f"{name}.weight"].double().square().sum()) for name in names}
        lost = sum(norms[name] * report[name].relative_error ** 2 for name in names)
        assert row["relative_error"] == pytest.approx((lost / sum(norms.values())) ** 0.5, rel=1e-4)
        worst = max(report.layers, key=lambda one: one.relative_error)
        assert row["worst_layer"] == worst.name
        assert row["worst_error"] == pytest.approx(worst.relative_error, rel=1e-4)
    assert found["ratios"][2]["parameters"] is None
    assert found["ratios"][2]["problem"].startswith("ratio 0.97 cannot be reached")


def test_inspect_prints_two_tables(tmp_path, capsys):
    source = save(mlp().state_dict(), tmp_path, "pickle")
    assert main(["inspect", str(source), "--ratios", "0.5", "0.99", "--exclude", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "type", "shape", "parameters", "effective", "rank", "note"]
    assert lines[2].split()[:4] == ["0", "Linear", "32×24", "768"]
    assert lines[4].endswith("dense: left out by --exclude")
    assert lines[5] == "1,464 parameters, 2 of 3 layers can be compressed"
    assert lines[9].split()[:3] == ["0.5", "712", "(-51.4"]
    assert "cannot be reached" in lines[10]
    assert len(lines) == 11


ERRORS = [
    (["inspect", "nothing.pt"], "error: 'nothing.pt' does not exist.\n"),
    (["compress", "nothing.pt", "small.pt", "--ratio", "0.5"], "error: 'nothing.pt' does not exist.\n"),
    (
        ["inspect", "text.pt"],
        (
            "error: 'text.pt' cannot be read as a checkpoint (UnpicklingError): expected a whole file that "
            "torch.save wrote, or one named .safetensors or .index.json.\n"
        ),
    ),
    (
        ["compress", "model.pt", "small.pt", "--ratio", "2"],
        (
            "error: ratio must lie strictly between 0 and 1 (the fraction of the model's parameters to remove), got "
            "2.0: 2 % is written 0.02.\n"
        ),
    ),
    (
        ["inspect", "model.pt", "--ratios", "0"],
        (
            "error: --ratios must lie strictly between 0 and 1 (the fraction of the model's parameters to "
            "remove), got 0.0.\n"
        ),
    ),
    (
        ["compress", "model.pt", "small.pt", "--ratio", "0.5", "--exclude", "head*"],
        "error: --exclude 'head*' matches none of the 3 layers, such as '0'.\n",
    ),
    (["compress", "model.pt", "model.pt", "--ratio", "0.5", "--force"], "is the source itself"),
    (
        ["compress", "model.pt", "small.pt", "--ratio", "0.5", "--form", "best"],
        "error: form must be one of 'auto', 'factored', 'pivoted'; got str 'best'.\n",
    ),
    (["compress", "model.pt", "small.pt", "--ratio", "0.99"], "error: ratio 0.99 cannot be reached"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_errors_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    save(mlp().state_dict(), tmp_path, "pickle")
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "small.pt").exists()


def test_a_layer_left_out_is_listed_by_the_option_that_did_it(tmp_path, capsys):
    source = save(mlp().state_dict(), tmp_path, "pickle")
    options = ["--ratio", "0.3", "--exclude", "2", "--json"]
    assert main(["compress", str(source), str(tmp_path / "small.pt"), *options]) == 0
    reasons = {one["name"]: one["reason"] for one in json.loads(capsys.readouterr().out)["layers"]}
    assert reasons["2"] == "left out by --exclude"
    assert main(["inspect", str(source), "--ratios", "0.9", "--exclude", "0", "--json"]) == 0
    (ratio,) = json.loads(capsys.readouterr().out)["ratios"]
    assert "'0', with 768: left out by --exclude" in ratio["problem"]


def test_advice_names_the_option_where_the_function_has_an_argument(tmp_path, capsys):
    state = fill_(mlp(), 0).state_dict()
    state["2.weight"][0, 0] = torch.nan
    source = save(state, tmp_path, "pickle")
    arguments = ["compress", str(source), str(tmp_path / "small.pt"), "--ratio", "0.3"]
    assert main(arguments) == 1
    assert capsys.readouterr().err.endswith("repair it, or leave the layer out with --exclude.\n")
    assert main([*arguments, "--exclude", "2"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["squeeze"],
        ["inspect"],
        ["compress", "model.pt", "small.pt"],
        ["compress", "model.pt", "small.pt", "--ratio", "half"],
        ["compress", "model.pt", "small.pt", "--ratio", "0.5", "--max-error", "0.1"],
    ],
)
def test_arguments_that_cannot_be_read_end_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m torchsmooth" in capsys.readouterr().err


def test_an_interruption_is_no_traceback(tmp_path, capsys, monkeypatch):
    source = save(mlp().state_dict(), tmp_path, "pickle")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torchsmooth._checkpoint_factors.Workshop.factor", interrupted)
        assert main(["compress", str(source), str(tmp_path / "small.pt"), "--ratio", "0.5"]) == 130
    assert capsys.readouterr().err == "stopped: the same command goes on from here, if it was compress.\n"
    assert main(["compress", str(source), str(tmp_path / "small.pt"), "--ratio", "0.5"]) == 0


def test_without_safetensors_the_error_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    source = save(mlp().state_dict(), tmp_path, "safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["inspect", str(source)]) == 1
    assert capsys.readouterr().err.endswith("needs the package safetensors: pip install torchsmooth[checkpoint]\n")


def test_the_module_is_a_command(tmp_path):
    source = save(mlp().state_dict(), tmp_path, "pickle")
    command = [sys.executable, "-W", "error", "-m", "torchsmooth", "compress", str(source), str(tmp_path / "small.pt")]
    done = subprocess.run([*command, "--ratio", "0.5"], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 of 3 layers low-rank" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_one_line_too(tmp_path, capsys):
    source = save(mlp().state_dict(), tmp_path, "pickle")
    assert main(["compress", str(source), str(tmp_path / "small.pt"), "--ratio", "0.5", "--device", "cuda"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: device 'cuda' cannot be used here: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_stream_that_does_not_know_all_signs_gets_others(tmp_path, encoding):
    source = save(mlp().state_dict(), tmp_path, "pickle")
    command = [
        sys.executable,
        "-m",
        "torchsmooth",
        "compress",
        str(source),
        str(tmp_path / "small.pt"),
        "--ratio",
        "0.5",
    ]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"3 of 3 layers low-rank" in done.stdout
