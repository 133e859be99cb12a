"""What the CIFAR-10 benchmark measures and writes down, and the strengths that it chooses by that."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.cifar import accuracy, normalise
from testbed.vision_transformer import VisionTransformer
from tests.cifar10_benchmark import benchmark, random_images, random_splits, small_run
from tests.networks import small_resnet
from tests.strategies import fill_

cifar10 = benchmark("cifar10")
frontier = benchmark("cifar10_frontier")
strengths = benchmark("cifar10_strengths")
Results = benchmark("cifar10_results").Results


def made_up(**changes):
    facts = {"split": "test", "images": 100, "method": "SVD", "ratio": 0.7, "accuracy": 50.0}
    names = set(facts) | {"dense"}
    of_the_run = {key: value for key, value in changes.items() if key not in names}
    return asdict(small_run(**of_the_run)) | facts | {key: value for key, value in changes.items() if key in names}


def test_runs_and_keys_name_the_same_fields():
    assert list(asdict(small_run())) == list(benchmark("cifar10_results").RUN)


# -------------------------------------------------------------------------------------------------------------- lines


@settings(max_examples=15)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "seed": st.integers(0, 2),
                "strength": st.sampled_from([1e-4, 3e-5, 0.1 + 0.2]),
                "method": st.sampled_from(["SVD", "„unstrukturiert“\n"]),
                "accuracy": st.none() | st.floats(0, 100),
            }
        ),
        max_size=8,
    ),
    st.integers(0, 8),
)
def test_lines_come_back_and_the_last_of_a_number_counts(tmp_path_factory, changes, break_after):
    path = tmp_path_factory.mktemp("results") / "new" / "results.jsonl"
    results, expected = Results(path), {}
    for place, change in enumerate(changes):
        if place == break_after:
            results = Results(path)
        line = made_up(**change)
        results.add(line)
        expected[change["seed"], change["strength"], change["method"]] = line
    for found in (results, Results(path)):
        assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, expected.values()))
        assert all(found.get(line | {"accuracy": None}) == line for line in expected.values())
        assert found.get(made_up(ratio=0.123)) is None


def test_two_processes_may_write_to_one_file(tmp_path):
    path = tmp_path / "results.jsonl"
    one, other = Results(path), Results(path)
    for seed in range(6):
        (one, other)[seed % 2].add(made_up(seed=seed))
    assert sorted(line["seed"] for line in Results(path)) == list(range(6))


def test_a_line_that_was_cut_short_is_left_out_and_does_not_spoil_the_next(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    first = Results(path)
    first.add(made_up(seed=0))
    first.add(made_up(seed=1))
    path.write_bytes(path.read_bytes()[:-20])
    results = Results(path)
    assert [line["seed"] for line in results] == [0]
    assert "results.jsonl, line 2: cut short" in capsys.readouterr().err
    results.add(made_up(seed=2))
    assert [line["seed"] for line in Results(path)] == [0, 2]


def test_a_line_without_what_identifies_it_is_refused(tmp_path):
    path, line = tmp_path / "results.jsonl", made_up()
    del line["seed"]
    with pytest.raises(ValueError, match="seed are missing"):
        Results(path).add(line)
    assert not path.exists()


# ---------------------------------------------------------------------------------------------------------- measuring


def measuring(images, methods=tuple(frontier.METHODS), ratios=(0.7, 0.9999)):
    batches = frontier.calibration_batches(random_images(16, 5))
    return frontier.Measuring(images, "test", batches, methods, ratios)


@pytest.fixture
def usual_images(monkeypatch):
    """Let the few images of these tests be as many as usual."""
    monkeypatch.setattr(frontier, "CALIBRATION_IMAGES", 16)


def test_another_number_of_images_makes_rows_of_its_own(tmp_path):
    model, images, path = small_resnet(width=4), random_images(20, 7), tmp_path / "results.jsonl"
    lines = frontier.measure(
        model, small_run(), measuring(images, ["calibration", "unstructured"], [0.5]), Results(path)
    )
    assert [line["method"] for line in lines] == [
        "dense",
        "dense + BatchNorm, 16 images",
        "SVD + calibration, 16 images",
        "unstructured",
        "unstructured + BatchNorm, 16 images",
    ]
    assert {line["calibration_images"] for line in lines} == {16}


@pytest.mark.usefixtures("usual_images")
def test_every_method_is_measured_on_the_same_terms(tmp_path):
    model, images, path = small_resnet(width=4), random_images(20, 7), tmp_path / "results.jsonl"
    before = copy.deepcopy(model.state_dict())
    lines = frontier.measure(model, small_run(), measuring(images), Results(path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    svd, pruned = ["SVD", "SVD + BatchNorm", "SVD + calibration"], ["structured", "unstructured"]
    methods = [*svd, *(f"{one}{more}" for one in pruned for more in ("", " + BatchNorm"))]
    assert sorted((line["method"], line["ratio"]) for line in lines) == sorted(
        [
            ("dense", 0.0),
            ("dense + BatchNorm", 0.0),
            *((method, ratio) for method in methods for ratio in (0.7, 0.9999)),
        ]
    )
    dense = accuracy(model, normalise(images.pixels), images.labels)
    total = sum(parameter.numel() for parameter in model.parameters())
    for line in lines:
        assert (line["dense"], line["parameters_dense"], line["images"]) == (dense, total, 20)
        assert (line["calibration_images"], line["split"], line["network"]) == (16, "test", "resnet18")
        if line["ratio"] == 0.9999:
            assert (line["accuracy"], line["reached"], line["parameters"]) == (None, None, None)
        elif line["ratio"] == 0.7:
            assert 0.7 <= line["reached"] < 0.8
            assert line["reached"] == 1 - line["parameters"] / total
            assert 0 <= line["accuracy"] <= 100
    assert lines[0]["accuracy"] == dense
    written = path.read_text()
    assert [json.loads(text) for text in written.splitlines()] != []

    again = frontier.measure(model, small_run(), measuring(images), Results(path))
    assert again == lines
    assert path.read_text() == written  # nothing was measured twice


@pytest.mark.usefixtures("usual_images")
def test_only_what_is_missing_is_measured_unless_all_is_wanted_again(tmp_path):
    model, images, path = small_resnet(width=4), random_images(20, 7), tmp_path / "results.jsonl"
    frontier.measure(model, small_run(), measuring(images, ["unstructured"], [0.5]), Results(path))
    count = len(path.read_text().splitlines())
    frontier.measure(model, small_run(), measuring(images, ["unstructured"], [0.5, 0.6]), Results(path))
    added = [json.loads(text) for text in path.read_text().splitlines()[count:]]
    assert [(line["method"], line["ratio"]) for line in added] == [
        ("unstructured", 0.6),
        ("unstructured + BatchNorm", 0.6),
    ]
    count += len(added)
    frontier.measure(model, small_run(), measuring(images, ["unstructured"], [0.5]), Results(path), again=True)
    assert len(path.read_text().splitlines()) == count + 4


def test_a_network_without_batchnorm_has_no_rows_with_it(tmp_path):
    model = fill_(VisionTransformer(12), 0).eval()
    wanted = measuring(random_images(10, 7), ["svd", "structured"], [0.5])
    lines = frontier.measure(model, small_run(network="vit_small"), wanted, Results(tmp_path / "results.jsonl"))
    assert [line["method"] for line in lines] == ["dense", "SVD", "structured"]


def test_calibration_images_are_the_same_every_time():
    images = random_images(300, 3)
    one, other = frontier.calibration_batches(images), frontier.calibration_batches(images)
    assert [len(batch) for batch in one] == [128, 128, 44]
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(torch.cat(one), normalise(images.pixels))  # cropped and mirrored


# ----------------------------------------------------------------------------------------------------------- strengths


def tried(strength, accuracy, **changes):
    return made_up(
        **(
            {"penalty": "first", "strength": strength, "split": "held_out", "ratio": 0.8, "accuracy": accuracy}
            | changes
        )
    )


def test_the_best_strength_on_the_images_held_out_is_chosen():
    lines = [
        tried(0.1, 60.0),
        tried(0.2, 70.0),
        tried(0.2, 60.0, seed=1),
        tried(0.4, 65.0),
        tried(0.1, 99.0, ratio=0.7),
        tried(0.1, 99.0, split="test"),
        tried(0.1, 99.0, method="SVD + BatchNorm"),
        tried(0.1, 99.0, penalty="second"),
        tried(0.1, 99.0, width=8),
        tried(0.1, 99.0, epochs=1),
        tried(0.1, 99.0, images=7),
        tried(0.8, None),
    ]
    run = small_run(penalty="first")
    assert strengths.chosen_strength(lines, run, 0.8) == 0.2  # of 65 and 65 the weaker
    assert strengths.chosen_strength([*lines, tried(0.4, 66.0, seed=1)], run, 0.8) == 0.4
    assert strengths.chosen_strength(lines, small_run(), 0.8) == 0.0
    with pytest.raises(ValueError, match=r"no strength of 'first' was tried at a ratio of 0\.9.*--choose-strength"):
        strengths.chosen_strength(lines, run, 0.9)


def test_a_tail_is_judged_at_its_own_ratio():
    lines = [
        tried(strength, accuracy, penalty="tail_90", ratio=ratio)
        for ratio, pairs in ((0.8, ((1, 80.0), (2, 70.0))), (0.9, ((1, 50.0), (2, 60.0))))
        for strength, accuracy in pairs
    ]
    assert strengths.chosen_strength(lines, small_run(penalty="tail_90"), 0.8) == 2


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "load_splits", lambda *_: random_splits())
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def run(*words):
        common = "--width 4 --epochs 1 --seeds 3 --recipe sgd,batch_size=8 --ratios 0.5 --device cpu --output"
        monkeypatch.setattr(sys, "argv", ["cifar10.py", *common.split(), str(tmp_path / "runs"), *words])
        cifar10.main()
        return list(Results(tmp_path / "runs" / "results.jsonl"))

    return run


def test_strengths_are_chosen_and_then_used(command, capsys, monkeypatch):
    monkeypatch.setattr(cifar10, "strengths", lambda _: (1e-4, 5.0))
    found = command("--penalty", "first", "--choose-strength", "--wanted-ratio", "0.7")
    assert {line["split"] for line in found} == {"held_out"}
    assert {line["strength"] for line in found} == {1e-4, 5.0}
    assert {line["ratio"] for line in found} == {0.0, 0.5, 0.7}
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "first derivative, 0.0001",
        "first derivative, 5",
    ]
    best = strengths.chosen_strength(found, small_run(**{name: found[-1][name] for name in asdict(small_run())}), 0.7)
    after = command("--penalty", "first", "--strength", "chosen", "--wanted-ratio", "0.7", "--methods", "svd")
    assert {line["strength"] for line in after if line["split"] == "test"} == {best}
    assert {line["seed"] for line in after} == {3}
    assert "epoch 1/1" not in capsys.readouterr().out  # all were trained before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--penalty smooth", "a penalty is one of"),
        ("--recipe fast", "a recipe begins with one of"),
        ("--strength strong", "could not convert"),
        ("--strength -1", "must be ≥ 0"),
        ("--ratios 0.5 1", "strictly between 0 and 1"),
        ("--epochs 0", "must be at least 1"),
        ("--choose-strength --strength chosen", "give one of the two"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(words, message, command, capsys):
    with pytest.raises(SystemExit):
        command(*words.split())
    assert message in capsys.readouterr().err
