"""What ``load_compressed_``, ``compress_checkpoint`` and the command line answer to mistakes with files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.checkpoints import names, save
from tests.mistakes import Mistake, check, table
from tests.networks import two_layers
from tests.strategies import fill_
from torchsmooth import compress_checkpoint, load_compressed_, svd_compress_
from torchsmooth._command_line import main


def compressed_state(**options):
    model = two_layers()
    svd_compress_(model, 0.3, **options)
    return model.state_dict()


def without(*keys):
    state = compressed_state(form="factored")
    return {key: value for key, value in state.items() if key not in keys}


def wide():
    return fill_(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4)), 0)


def deeper():
    return fill_(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 4)), 0)


def pickled(folder, content):
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"


def dense(folder):
    return save(two_layers().state_dict(), folder, "pickle")


def text(folder, name):
    (folder / name).write_text("hello")
    return folder / name


def spoiled():
    state = two_layers().state_dict()
    state["2.weight"][0, 0] = float("nan")
    return state


FILES = [
    Mistake(
        "a path that does not exist",
        lambda model, folder: load_compressed_(model, folder / "small.pt"),
        FileNotFoundError,
        "'{folder}/small.pt' does not exist.",
    ),
    Mistake(
        "a model saved whole",
        lambda model, folder: load_compressed_(model, pickled(folder, nn.Linear(2, 2))),
        ValueError,
        (
            "'{folder}/model.pt' holds more than tensors and plain containers: reading "
            "torch.nn.modules.linear.Linear would execute code. Where you trust the file, load it "
            "and save its state_dict() alone."
        ),
    ),
    Mistake(
        "a list that was saved",
        lambda model, folder: load_compressed_(model, pickled(folder, [torch.ones(2)])),
        ValueError,
        "'{folder}/model.pt' holds a list: expected a state dict, model.state_dict().",
    ),
    Mistake(
        "a checkpoint under another key",
        lambda model, folder: load_compressed_(model, pickled(folder, {"net": two_layers().state_dict(), "epoch": 3})),
        ValueError,
        (
            "'{folder}/model.pt' holds no state dict: expected tensors by name, or those under one "
            "of 'model', 'model_state_dict', 'state_dict'; its keys are 'epoch', 'net'."
        ),
    ),
    Mistake(
        "text for a file",
        lambda model, folder: load_compressed_(model, text(folder, "small.pt")),
        ValueError,
        (
            "'{folder}/small.pt' cannot be read as a checkpoint (KeyError): expected a whole file "
            "that torch.save wrote, or one named .safetensors or .index.json."
        ),
    ),
    Mistake(
        "text named safetensors",
        lambda model, folder: load_compressed_(model, text(folder, "small.safetensors")),
        ValueError,
        (
            "'{folder}/small.safetensors' is no whole safetensors file ({cause}): was it cut off, or "
            "is it of another format?"
        ),
    ),
    Mistake(
        "an empty folder",
        load_compressed_,
        ValueError,
        (
            "'{folder}' is a folder, which should hold one .index.json file or one .safetensors "
            "file, but holds none. Name the file."
        ),
    ),
    Mistake(
        "the file of a larger model",
        lambda model, folder: load_compressed_(model, pickled(folder, deeper().state_dict())),
        ValueError,
        "the state dict does not fit this model: {cause}",
    ),
    Mistake(
        "a source that does not exist",
        lambda model, folder: compress_checkpoint(folder / "big.pt", folder / "out.pt", 0.3),
        FileNotFoundError,
        "'{folder}/big.pt' does not exist.",
    ),
    Mistake(
        "a model for a source",
        lambda model, folder: compress_checkpoint(model, folder / "out.pt", 0.3),
        TypeError,
        "source must be a path, got Sequential: svd_compress_ takes a model.",
    ),
    Mistake(
        "a state dict for a source",
        lambda model, folder: compress_checkpoint(model.state_dict(), folder / "out.pt", 0.3),
        TypeError,
        "source must be a path, got OrderedDict: save a state dict with torch.save first.",
    ),
    Mistake(
        "no destination",
        lambda model, folder: compress_checkpoint(dense(folder), None, 0.3),
        TypeError,
        "destination must be a path, got None.",
    ),
    Mistake(
        "a destination of another kind",
        lambda model, folder: compress_checkpoint(dense(folder), folder / "out.safetensors", 0.3),
        ValueError,
        (
            "destination '{folder}/out.safetensors' must be a file of the same kind as the source, "
            "'model.pt': name it something.pt."
        ),
    ),
    Mistake(
        "the source as destination",
        lambda model, folder: compress_checkpoint(dense(folder), folder / "model.pt", 0.3),
        ValueError,
        ("destination '{folder}/model.pt' is the source itself: it would be lost; choose another name."),
    ),
    Mistake(
        "a destination in no folder",
        lambda model, folder: compress_checkpoint(dense(folder), folder / "none" / "out.pt", 0.3),
        FileNotFoundError,
        "the folder of destination '{folder}/none/out.pt' does not exist: make it first.",
    ),
    Mistake(
        "a folder for a destination",
        lambda model, folder: compress_checkpoint(dense(folder), folder, 0.3),
        ValueError,
        "destination '{folder}' is a folder: name the file in it.",
    ),
    Mistake(
        "a file ratio in percent",
        lambda model, folder: compress_checkpoint(dense(folder), folder / "out.pt", 30),
        ValueError,
        (
            "ratio must lie strictly between 0 and 1 (the fraction of the model's parameters to "
            "remove), got 30.0: 30 % is written 0.3."
        ),
    ),
    Mistake(
        "a file ratio too high",
        lambda model, folder: compress_checkpoint(dense(folder), folder / "out.pt", 0.9),
        ValueError,
        (
            "ratio 0.9 cannot be reached: with rank 1 in every layer that can be compressed, 27 of "
            "59 parameters are left. The largest ratio that can be reached is 0.5423."
        ),
    ),
    Mistake(
        "a file filter of modules",
        lambda model, folder: compress_checkpoint(dense(folder), folder / "out.pt", 0.3, filter_fn=lambda name: True),
        TypeError,
        ("filter_fn must be a function of (shape, name), got function <lambda>, which takes (name)."),
    ),
    Mistake(
        "a file filter that leaves all out",
        lambda model, folder: compress_checkpoint(
            dense(folder), folder / "out.pt", 0.3, filter_fn=lambda shape, name: False
        ),
        ValueError,
        (
            "nothing to compress in this checkpoint: filter_fn left out all 2 layers. "
            "filter_fn(shape, name) returns True for a layer to compress."
        ),
    ),
    Mistake(
        "a device misspelt",
        lambda model, folder: compress_checkpoint(dense(folder), folder / "out.pt", 0.3, device="gpu"),
        ValueError,
        "device must be a torch.device or the name of one, got str 'gpu'.",
    ),
    Mistake(
        "a model of another size",
        lambda model, folder: compress_checkpoint(dense(folder), folder / "out.pt", 0.3, model=model),
        ValueError,
        (
            "'{folder}/model.pt' holds '0.weight' of shape (5, 6), but this Sequential has (5, 7): "
            "was it built with other sizes?"
        ),
        model=wide,
    ),
    Mistake(
        "a model of other layers",
        lambda model, folder: compress_checkpoint(dense(folder), folder / "out.pt", 0.3, model=model),
        ValueError,
        ("'{folder}/model.pt' lacks '3.bias', '3.weight': was it saved from a Sequential built like this one?"),
        model=deeper,
    ),
    Mistake(
        "a file with NaN",
        lambda model, folder: compress_checkpoint(pickled(folder, spoiled()), folder / "out.pt", 0.3),
        ValueError,
        (
            "'{folder}/model.pt': the weight of layer '2' holds 1 NaN or infinite values out of 20: "
            "repair it, or leave the layer out with filter_fn."
        ),
    ),
    Mistake(
        "a file without layers",
        lambda model, folder: compress_checkpoint(
            pickled(folder, nn.BatchNorm1d(4).state_dict()), folder / "out.pt", 0.3
        ),
        ValueError,
        (
            "nothing to compress in this checkpoint: it has no layers. Linear layers, convolutions "
            "and embeddings with more than a few channels can be."
        ),
    ),
]


COMMANDS = {
    "no such file": (["inspect", "{folder}/none.pt"], "'{folder}/none.pt' does not exist."),
    "a ratio in percent": (
        ["compress", "{folder}/model.pt", "{folder}/out.pt", "--ratio", "30"],
        (
            "ratio must lie strictly between 0 and 1 (the fraction of the model's parameters to "
            "remove), got 30.0: 30 % is written 0.3."
        ),
    ),
    "ratios in percent": (
        ["inspect", "{folder}/model.pt", "--ratios", "30", "50"],
        (
            "--ratios must lie strictly between 0 and 1 (the fraction of the model's parameters to "
            "remove), got 30.0: 30 % is written 0.3."
        ),
    ),
    "a file that is there": (
        ["compress", "{folder}/model.pt", "{folder}/there.pt", "--ratio", "0.3"],
        "'{folder}/there.pt' exists already: add --force to replace it.",
    ),
    "the file itself": (
        ["compress", "{folder}/model.pt", "{folder}/model.pt", "--ratio", "0.3", "--force"],
        ("destination '{folder}/model.pt' is the source itself: it would be lost; choose another name."),
    ),
    "another kind": (
        ["compress", "{folder}/model.pt", "{folder}/out.safetensors", "--ratio", "0.3"],
        (
            "destination '{folder}/out.safetensors' must be a file of the same kind as the source, "
            "'model.pt': name it something.pt."
        ),
    ),
    "a ratio too high": (
        ["compress", "{folder}/model.pt", "{folder}/out.pt", "--ratio", "0.9"],
        (
            "ratio 0.9 cannot be reached: with rank 1 in every layer that can be compressed, 27 of "
            "59 parameters are left. The largest ratio that can be reached is 0.5423."
        ),
    ),
    "a pattern of nothing": (
        ["compress", "{folder}/model.pt", "{folder}/out.pt", "--ratio", "0.3", "--exclude", "head*"],
        "--exclude 'head*' matches none of the 2 layers, such as '0'.",
    ),
    "a scheme misspelt": (
        ["inspect", "{folder}/model.pt", "--scheme", "chanel"],
        (
            "scheme must be one of 'auto', 'channel', 'input', 'spatial', 'tucker'; got str "
            "'chanel': did you mean 'channel'?"
        ),
    ),
    "a device misspelt": (
        ["inspect", "{folder}/model.pt", "--device", "gpu"],
        "device must be a torch.device or the name of one, got str 'gpu'.",
    ),
    "all left out": (
        ["compress", "{folder}/model.pt", "{folder}/out.pt", "--ratio", "0.3", "--exclude", "*"],
        (
            "nothing to compress in this checkpoint: --exclude left out all 2 layers. "
            "Layers whose names match none of its patterns are compressed."
        ),
    ),
}


@table(FILES)
def test_a_wrong_file_is_answered_in_these_words(mistake, tmp_path):
    check(mistake._replace(does=lambda model: mistake.does(model, tmp_path)), folder=tmp_path)
    assert "out" not in {name.partition(".")[0] for name in names(tmp_path)}  # hidden ones are for the next run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_is_answered_in_these_words(name, tmp_path, capsys):
    arguments, message = COMMANDS[name]
    save(two_layers().state_dict(), tmp_path, "pickle")
    save(two_layers().state_dict(), tmp_path, "pickle", "there")
    assert main([one.replace("{folder}", str(tmp_path)) for one in arguments]) == 1
    written = capsys.readouterr()
    assert (written.out, written.err) == ("", f"error: {message}\n".replace("{folder}", str(tmp_path)))
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["model.pt", "there.pt"]
