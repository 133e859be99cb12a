"""What the pictures of spectra and of weights show, and the page and the example about them."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchsmooth
from tests.networks import EVERY_LAYER, linear_of, two_layers
from tests.reference import penalties as reference_penalties
from tests.strategies import fill_, low_rank, randn, seeds
from torchsmooth import Spectrum, plot_spectra, plot_weights, spectrum

ROOT = Path(__file__).resolve().parents[1]


def test_a_plot_has_a_line_and_bars_for_each_layer(tmp_path):
    found = spectrum(two_layers(), ratio=0.25)
    figure = found.plot(tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").stat().st_size > 1000
    lines, ranks, energies, differences = figure.axes
    assert [line.get_label() for line in lines.lines] == ["0", "2"]
    for line, layer in zip(lines.lines, found, strict=True):
        assert list(line.get_ydata()) == layer.relative_values.tolist()
        assert line.get_xdata()[-1] == 1
    for axes, values in (
        (ranks, [layer.relative_rank for layer in found]),
        (energies, [layer.energy(0.25) for layer in found]),
        (differences, [layer.first_difference for layer in found]),
    ):
        assert [bar.get_width() for bar in axes.patches] == values
    assert [label.get_text() for label in ranks.get_yticklabels()] == ["0", "2"]
    assert ranks.yaxis_inverted()  # the first layer on top
    assert energies.get_xlabel() == "energy at −25 %"


def test_spectra_side_by_side_are_matched_by_name():
    model = two_layers()
    both = {"all": spectrum(model), "last": spectrum(model, filter_fn=lambda module, name: name == "2")}
    figure = plot_spectra(both)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["all", "last"]
    assert [len(axes.lines) for axes in figure.axes[:2]] == [2, 1]
    first, second = figure.axes[2].containers
    assert (len(first), len(second)) == (2, 1)
    centres = [bar.get_y() + bar.get_height() / 2 for bar in (first[1], second[0])]
    assert all(0.5 < centre < 1.5 for centre in centres)  # both at the place of layer "2"
    assert centres[0] < centres[1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all", "last"]
    assert figure.axes[0].lines[1].get_color() == figure.axes[1].lines[0].get_color()


def test_a_plot_of_zero_empty_and_tiny_weights(tmp_path):
    model = nn.Sequential(*(linear_of(torch.full(shape, 1e-30)) for shape in ((1, 1), (0, 3), (2, 4))))
    nn.init.zeros_(model[2].weight)
    figure = spectrum(model).plot(tmp_path / "odd.svg")
    assert len(figure.axes[0].lines) == 3


def test_pictures_of_weights_share_one_scale(tmp_path):
    conv = fill_(nn.Conv2d(4, 6, (3, 2), groups=2), 0)
    transposed = fill_(nn.ConvTranspose2d(4, 6, 2, groups=2), 1)
    compressed = torchsmooth.LowRankLinear.from_linear(fill_(nn.Linear(5, 3), 2), 1)
    given = {"conv": conv, "transposed": transposed, "half": randn(2, 3, seed=4).bfloat16(), "low-rank": compressed}
    figure = plot_weights(given, tmp_path / "weights.png")
    assert (tmp_path / "weights.png").stat().st_size > 1000
    *pictures, bar = figure.axes
    assert bar.get_ylabel() == "weight"
    assert [axes.get_title() for axes in pictures] == list(given)
    assert {(axes.get_xlabel(), axes.get_ylabel()) for axes in pictures} == {("input channel", "output channel")}
    shown = [torch.as_tensor(axes.images[0].get_array().data) for axes in pictures]
    blocks = reference_penalties.group_blocks(transposed.weight, 2, transposed=True)
    expected = [conv.weight[:, :, 1, 1], torch.cat(blocks)[:, :, 1, 1], given["half"], compressed.weight]
    for picture, weight in zip(shown, expected, strict=True):
        assert torch.equal(picture, weight.detach().double())
    largest = max(float(picture.abs().max()) for picture in shown)
    assert {axes.images[0].get_clim() for axes in pictures} == {(-largest, largest)}
    (other, _) = plot_weights({"": conv}, position=(2, 0)).axes
    assert torch.equal(torch.as_tensor(other.images[0].get_array().data), conv.weight[:, :, 2, 0].detach().double())


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1.0, 1e300])
def test_relative_pictures_do_not_depend_on_the_scale(scale):
    weight = randn(4, 5, seed=0)
    figure = plot_weights({"one": weight, "other": scale * weight}, relative=True)
    one, other = (torch.as_tensor(axes.images[0].get_array().data) for axes in figure.axes[:2])
    assert float(one.square().mean()) == pytest.approx(1)
    torch.testing.assert_close(other, one if scale else torch.zeros_like(one))


@given(data=st.data(), kind=st.sampled_from(sorted(EVERY_LAYER)), seed=seeds)
def test_a_low_rank_layer_is_drawn_as_the_dense_one_of_its_weight(data, kind, seed):
    dense = fill_(EVERY_LAYER[kind]().double(), seed)
    compressed = low_rank(dense, data)
    merged = compressed.to_dense()
    pictures = plot_weights({"compressed": compressed, "merged": merged}).axes[:2]
    one, other = (torch.as_tensor(axes.images[0].get_array().data) for axes in pictures)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def test_a_compiled_layer_is_drawn_with_its_own_geometry():
    layer = fill_(nn.ConvTranspose1d(4, 6, 1), 0)
    figure = plot_weights({"compiled": torch.compile(layer, backend="eager")})
    assert torch.equal(
        torch.as_tensor(figure.axes[0].images[0].get_array().data), layer.weight[:, :, 0].T.detach().double()
    )


@pytest.mark.parametrize(
    ("error", "message", "weights", "options"),
    [
        (TypeError, "weights must be a mapping from names to tensors or modules, such as .*, got list", [], {}),
        (ValueError, "such as .*, got an empty one", {}, {}),
        (TypeError, "the names in weights must be strings, got int 0", {0: torch.ones(2, 2)}, {}),
        (TypeError, "got for 'a' int 3", {"a": 3}, {}),
        (TypeError, "weight 'a' must be of .* got torch.int64", {"a": torch.ones(2, 2, dtype=torch.int64)}, {}),
        (ValueError, r"weight 'a' must have an output .* got shape \(3,\)", {"a": torch.ones(3)}, {}),
        (ValueError, "'a' .ReLU. must have a tensor as its weight", {"a": nn.ReLU()}, {}),
        (ValueError, "'a' .LazyLinear. is not initialised", {"a": nn.LazyLinear(2)}, {}),
        (ValueError, "must have finite values to draw, got NaN", {"a": torch.full((2, 2), math.nan)}, {}),
        (ValueError, "must have finite values to draw, got none", {"a": torch.ones(2, 0)}, {}),
        (ValueError, "got one on the meta device", {"a": torch.ones(2, 2, device="meta")}, {}),
        (TypeError, "position must be a sequence .* got int 1", {"a": torch.ones(2, 2, 3)}, {"position": 1}),
        (ValueError, "position must have an index .* weight 'a'", {"a": torch.ones(2, 2, 3)}, {"position": (3,)}),
        (ValueError, "position must have an index .* weight 'a'", {"a": torch.ones(2, 2, 3)}, {"position": (1, 1)}),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_named(error, message, weights, options):
    with pytest.raises(error, match=message):
        plot_weights(weights, **options)


def test_spectra_that_cannot_be_compared_are_refused():
    found = spectrum(two_layers())
    with pytest.raises(TypeError, match="spectra must be a mapping from names to Spectrum, such as .*, got Spectrum"):
        plot_spectra(found)
    with pytest.raises(TypeError, match="what spectrum.* got for 'b' Sequential"):
        plot_spectra({"a": found, "b": two_layers()})
    with pytest.raises(ValueError, match=r"of one ratio to be compared, got \[0.5, 0.8\]"):
        plot_spectra({"a": found, "b": spectrum(two_layers(), ratio=0.5)})


def test_without_matplotlib_only_drawing_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = spectrum(two_layers())
    assert isinstance(found, Spectrum)
    for draw in (found.plot, lambda: plot_weights({"a": torch.ones(2, 2)})):
        with pytest.raises(ImportError, match=re.escape("pip install 'torchsmooth[plot]'")):
            draw()


def test_drawing_leaves_pyplot_alone():
    import matplotlib as mpl
    from matplotlib._pylab_helpers import Gcf

    settings_before, backend = dict(mpl.rcParams), mpl.rcParams._get("backend")
    spectrum(two_layers()).plot()
    plot_weights({"a": torch.ones(2, 2)})
    assert not Gcf.figs
    assert mpl.rcParams._get("backend") is backend
    assert dict(mpl.rcParams) == settings_before


def test_the_example_runs_and_says_what_it_misses(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    options = ["--output", str(tmp_path), "--epochs", "1", "--penalties", "first"]
    monkeypatch.setattr(sys, "argv", ["watch_training.py", *options])
    import watch_training

    watch_training.main()
    assert {path.name for path in tmp_path.iterdir()} == {"spectra.png", "weights.png"}
    assert "tensorboard is not installed" in capsys.readouterr().out
