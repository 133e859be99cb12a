"""The page that is made of the results of the CIFAR-10 benchmark, here of made-up ones."""

from __future__ import annotations

import sys
from dataclasses import asdict

import pytest
import torch

from tests.cifar10_benchmark import benchmark, small_run
from tests.networks import small_resnet

report = benchmark("report")
pictures = benchmark("report_pictures")
tables = benchmark("report_tables")
training = benchmark("cifar10_training")
Results = benchmark("cifar10_results").Results
with_images = benchmark("cifar10_frontier").with_images


def line(accuracy, method="SVD", ratio=0.7, penalty="plain", seed=0, *, split="test", images=10_000, epochs=3):
    strength = 0.0 if penalty == "plain" else 0.001
    run = asdict(small_run(penalty=penalty, strength=strength, seed=seed, epochs=epochs))
    facts = {"device": "CPU", "torch": "2.0", "date": "2026-01-02", "parameters_dense": 12345}
    number = {"split": split, "images": images, "method": method, "ratio": ratio, "accuracy": accuracy}
    return run | facts | number


def results():
    """Two seeds of a plain and of a smooth network: dense, and by three methods at two ratios."""
    dense = {"plain": (90.0, 92.0), "nuclear": (90.5, 90.7)}
    compressed = {
        ("plain", "SVD", 0.7): (88.0, 90.0),
        ("plain", "SVD", 0.9): (50.0, 60.0),
        ("nuclear", "SVD", 0.7): (90.4, 90.8),
        ("nuclear", "SVD", 0.9): (89.5, 88.0),
        ("plain", "unstructured", 0.7): (80.0, 90.5),
        ("plain", "unstructured", 0.9): (20.0, 10.0),
        ("nuclear", "unstructured", 0.7): (85.0, 85.0),
        ("nuclear", "unstructured", 0.9): (95.0, 10.0),
        ("plain", "structured", 0.7): (82.0, 81.0),
        ("plain", "structured", 0.9): (None, None),
    }
    # The smooth ones come first in the file, as of a run of its own.
    found = [line(value, "dense", 0.0, penalty, seed) for penalty in dense for seed, value in enumerate(dense[penalty])]
    found += [
        line(value, method, ratio, penalty, seed)
        for (penalty, method, ratio), values in compressed.items()
        for seed, value in enumerate(values)
    ]
    return found[::-1]


def rows_of(page, heading):
    """Read the rows of the first table after a heading."""
    lines = page[page.index(heading) :].splitlines()
    start = next(place for place, text in enumerate(lines) if text.startswith("| "))
    rows = []
    for text in lines[start:]:
        if not text.startswith("|"):
            break
        rows.append([cell.strip() for cell in text.strip("|").split("|")])
    return [rows[0], *rows[2:]]


@pytest.fixture(scope="module")
def page():
    (group,) = tables.groups_of(results())
    return tables.format_group(group, {"a picture": "picture.png"})


def test_the_page_says_what_was_trained(page):
    assert page.startswith("## ResNet-18 of width 4, 12,345 parameters, 3 epochs\n")
    for part in ("the JPEG copy (quality 75)", "20 images to train on, 10,000 to test", "CPU; torch 2.0; 2026-01-02"):
        assert part in page
    assert "python benchmarks/cifar10.py --network resnet18 --width 4 --epochs 3" in page
    assert "![a picture](picture.png)" in page


def test_dense_accuracies_are_means_with_ranges(page):
    assert rows_of(page, "### Dense") == [
        ["penalty, strength", "seeds", "dense", "against none", "dense + BatchNorm"],
        ["none", "0, 1", "91.00 (90.0 … 92.0)", "+0.00", "–"],
        ["nuclear norm, 0.001", "0, 1", "90.60 (90.5 … 90.7)", "−0.40", "–"],
    ]


def test_each_method_has_a_table_with_the_best_in_bold(page):
    assert rows_of(page, "SVD:\n") == [
        ["penalty, strength", "−70 %", "−90 %"],
        ["none", "89.00 (88.0 … 90.0)", "55.00 (50.0 … 60.0)"],
        ["nuclear norm, 0.001", "**90.60 (90.4 … 90.8)**", "**88.75 (88.0 … 89.5)**"],
    ]
    assert rows_of(page, "\nstructured:\n")[1:] == [
        ["none", "**81.50 (81.0 … 82.0)**", "–"],
        ["nuclear norm, 0.001", "–", "–"],
    ]
    assert "SVD + calibration:" not in page  # nothing was measured


@pytest.mark.parametrize("images", [512, 2048])
def test_another_number_of_images_changes_the_names_of_rows_and_nothing_else(images, monkeypatch):
    def keep(figure, _path, **_):
        drawn.append([list(one.get_ydata()) for axes in figure.axes for one in axes.lines])

    monkeypatch.setattr(pictures.Figure, "savefig", keep)
    usual = [
        line(value - place, method, ratio, penalty)
        for penalty, value in (("plain", 90.0), ("nuclear", 91.0))
        for method, ratio in (("dense", 0.0), ("dense + BatchNorm", 0.0), *((one, 0.7) for one in tables.METHODS))
        for place in [len(method) / 10]
    ]
    other = [one | {"method": with_images(one["method"], images)} for one in usual if "+" in one["method"]]
    other += [one for one in usual if "+" not in one["method"]]
    pages, drawn = [], []
    for lines in (usual, other):
        (group,) = tables.groups_of(lines)
        pages.append(tables.format_group(group, {}))
        for draw in (pictures.draw_overview, pictures.draw_accuracies):
            draw(group, [], None)
    assert all(f"SVD + calibration, {images:,} images" in part for part in pages[1].split("### ")[3:5])
    assert pages[1].replace(f", {images:,} images", "") == pages[0]
    assert drawn[:2] == drawn[2:]


def test_rows_of_the_usual_number_of_images_are_the_ones_that_are_compared():
    more = [line(89.0, "SVD + calibration, 4,096 images"), line(70.0, "unstructured + BatchNorm, 4,096 images")]
    (group,) = tables.groups_of([*results(), *more, line(88.0, "SVD + calibration")])
    page = tables.format_group(group, {})
    assert next(row for row in rows_of(page, "### Distance to") if row[1] == "SVD + calibration")[2] == "−3.00"
    assert "SVD + calibration, 4,096 images:\n" in page


def test_distances_are_to_the_plain_dense_mean_and_marked_where_they_are_small(page):
    rows = rows_of(page, "### Distance to")
    assert [row for row in rows if row[1] == "SVD"] == [
        ["none", "SVD", "−2.00", "−36.00"],
        ["nuclear norm, 0.001", "SVD", "**−0.40**", "−2.25"],
    ]


def test_pruning_is_compared_by_the_better_one_of_each_seed(page):
    rows = rows_of(page, "### SVD against pruning")
    assert [row for row in rows if row[1] == "SVD"] == [
        ["none", "SVD", "+2.75", "+40.00"],  # 88 - 82 and 90 - 90.5; 50 - 20 and 60 - 10
        ["nuclear norm, 0.001", "SVD", "+5.60", "+36.25"],
    ]


def test_nothing_is_compared_with_structured_pruning_alone():
    lines = [
        one for one in results() if (one["method"], one["penalty"], one["ratio"]) != ("unstructured", "plain", 0.7)
    ]
    (group,) = tables.groups_of(lines)
    rows = rows_of(tables.format_group(group, {}), "### SVD against pruning")
    assert next(row for row in rows if row[1] == "SVD") == ["none", "SVD", "–", "+40.00"]


def test_strengths_that_were_tried_are_shown():
    tried = [
        line(80.0, "dense", 0.0, "first", split="held_out", images=5000),
        line(75.25, "SVD", 0.8, "first", split="held_out", images=5000),
        line(76.0, "SVD + BatchNorm", 0.8, "first", split="held_out", images=5000),
        line(None, "SVD", 0.9, "first", split="held_out", images=5000),
    ]
    (group,) = tables.groups_of([*tried, *results()])
    page = tables.format_group(group, {})
    assert "Accuracy on 5,000 images held out" in page
    assert rows_of(page, "### Strengths tried") == [
        ["penalty, strength", "seed", "dense", "−80 %", "−90 %"],
        ["first derivative, 0.001", "0", "80.0", "75.2 → 76.0", "–"],
    ]
    assert tables.groups_of(tried) == []


def test_strengths_of_a_trial_are_left_out():
    tried = [
        line(80.0, "dense", 0.0, "first", split="held_out", images=5000),
        line(75.0, "SVD", 0.8, "first", split="held_out", images=5000),
    ]
    trial = [
        line(one["accuracy"] / 2, one["method"], one["ratio"], penalty, split="held_out", images=100)
        for one in tried
        for penalty in ("first", "second")
    ]
    pages = []
    for lines in (tried, [*tried, *trial], [*trial, *tried]):
        (group,) = tables.groups_of([*results(), *lines])
        pages.append(rows_of(tables.format_group(group, {}), "### Strengths tried"))
    assert pages[0] == pages[1] == pages[2]
    assert pages[0][1][2:] == ["80.0", "75.0"]


def test_other_recipes_are_apart_and_trials_are_left_out():
    other = [line(70.0, "dense", 0.0, epochs=50)]
    trial = [line(1.0, "dense", 0.0, images=100), line(2.0, "SVD", 0.5, images=100)]
    first, second = tables.groups_of([*trial, *results(), *other])
    assert (first.settings["epochs"], second.settings["epochs"]) == (3, 50)
    assert first.ratios == [0.7, 0.9]
    assert len({first.slug, second.slug}) == 2
    assert tables.groups_of(trial)[0].ratios == [0.5]


def test_a_group_without_a_plain_network_has_nothing_to_be_far_from():
    (group,) = tables.groups_of([one for one in results() if one["penalty"] != "plain"])
    text = tables.format_group(group, {})
    assert "### Distance" not in text
    assert rows_of(text, "### Dense")[1][3] == "–"


# ---------------------------------------------------------------------------------------------------- page and pictures


def test_the_command_writes_the_page_with_the_verdict_and_the_pictures(tmp_path, monkeypatch):
    runs, folder = tmp_path / "runs", tmp_path / "results"
    kept = Results(runs / "results.jsonl")
    for one in results():
        kept.add(one)
    folder.mkdir()
    (folder / "cifar10-verdict.md").write_text("## Verdict\n\n(a) holds: 90,6 % – by hand.\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["report.py", "--runs", str(runs), "--results", str(folder)])
    report.main()
    page = (folder / "cifar10.md").read_text(encoding="utf-8")
    title, verdict = page.split("\n\n")[:2]
    assert title.startswith("# ")
    assert verdict == "## Verdict"
    assert "(a) holds: 90,6 % – by hand." in page
    images = [path.name for path in folder.glob("*.png")]
    assert len(images) == 2  # without networks, no spectra and no weights
    assert all(f"]({name})" in page for name in images)
    report.main()
    assert (folder / "cifar10.md").read_text(encoding="utf-8") == page


def test_spectra_and_weights_are_those_of_the_trained_networks(tmp_path):
    (group,) = tables.groups_of(results())
    networks = [tmp_path / "none", tmp_path / "some"]
    networks[1].mkdir()
    assert not pictures.draw_weights(group, networks, tmp_path / "weights.png")
    plain, smooth = list(group.found)
    model = small_resnet(width=4)
    for run in (group.run(plain, 0), group.run(smooth, 1)):  # of the smooth network only the second seed is there
        torch.save(model.state_dict(), training.network_file(run, networks[1]))
    for draw in (pictures.draw_spectra, pictures.draw_weights):
        path = tmp_path / f"{draw.__name__}.png"
        assert draw(group, networks, path)
        assert path.stat().st_size > 1000


def test_without_results_there_is_no_page(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"run benchmarks/cifar10\.py first"):
        report.write_report([], [], tmp_path / "results")
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(sys, "argv", ["report.py", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit):
        report.main()
    assert "there is no results.jsonl in" in capsys.readouterr().err
