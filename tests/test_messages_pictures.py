"""What the functions of weights, spectra and pictures answer to mistakes."""

from __future__ import annotations

import math

import torch
from torch import nn

from tests.mistakes import Mistake, check, table
from tests.networks import two_layers
from torchsmooth import (
    functional,
    plot_spectra,
    plot_weights,
    smooth_,
    spectrum,
)


def norms_only():
    return nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())


def nan_model(penalty=None):
    model = two_layers()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    return model if penalty is None else smooth_(model, penalty)


FUNCTIONS = [
    Mistake(
        "a module for a weight",
        lambda model: functional.nuclear_norm(model[0]),
        TypeError,
        "weight must be a torch.Tensor, got Linear(in_features=6, out_features=5, bias=True).",
    ),
    Mistake(
        "a bias for a weight",
        lambda model: functional.first_derivative(model[0].bias),
        ValueError,
        (
            "weight must have an output and an input channel axis, got shape (5,): penalties make "
            "weights smooth along the channels, biases and norm scales have none to spare."
        ),
    ),
    Mistake(
        "an integer weight",
        lambda model: functional.second_derivative(torch.ones(3, 4, dtype=torch.int64)),
        TypeError,
        "weight must be of float64, float32, bfloat16 or float16, got torch.int64.",
    ),
    Mistake(
        "groups that do not divide",
        lambda model: functional.first_derivative(torch.ones(4, 2, 3), groups=3),
        ValueError,
        "groups must divide the first axis of the weight, got 3 for shape (4, 2, 3).",
    ),
    Mistake(
        "a spatial scheme of a matrix",
        lambda model: functional.nuclear_norm(torch.ones(4, 3), scheme="spatial"),
        ValueError,
        (
            "scheme 'spatial' splits the height from the width of a kernel, but this weight has 0 "
            "kernel axes: use 'channel' or 'input'."
        ),
    ),
    Mistake(
        "a method misspelt in a function",
        lambda model: functional.nuclear_ratio(torch.ones(4, 3), method="svdd"),
        ValueError,
        (
            "method must be one of 'auto', 'svd', 'eigh', 'polar_express', 'polar_express_bf16'; got "
            "str 'svdd': did you mean 'svd'?"
        ),
    ),
    Mistake(
        "a spectrum in percent",
        lambda model: spectrum(model, ratio=80),
        ValueError,
        (
            "ratio must lie strictly between 0 and 1 (the fraction of its parameters that each layer "
            "is to lose: 0.8 = 80 % fewer), got 80.0: 80 % is written 0.8."
        ),
    ),
    Mistake(
        "a spectrum of a state dict",
        lambda model: spectrum(model.state_dict()),
        TypeError,
        "model must be a torch.nn.Module, got OrderedDict: load a state dict into a model first.",
    ),
    Mistake(
        "a spectrum without layers",
        spectrum,
        ValueError,
        (
            "the model must have a Linear, Conv, ConvTranspose or Embedding layer, got a Sequential "
            "with none: torch.linalg.svdvals serves for other tensors."
        ),
        model=norms_only,
    ),
    Mistake(
        "a spectrum of nothing",
        lambda model: spectrum(model, filter_fn=lambda module, name: False),
        ValueError,
        (
            "the model must have a Linear, Conv, ConvTranspose or Embedding layer that filter_fn "
            "keeps, got a Sequential with none: torch.linalg.svdvals serves for other tensors."
        ),
    ),
    Mistake(
        "a spectrum by one argument",
        lambda model: spectrum(model, filter_fn=lambda module: True),
        TypeError,
        ("filter_fn must be a function of (module, qualified_name), got function <lambda>, which takes (module)."),
    ),
    Mistake(
        "a spectrum in another scheme",
        lambda model: spectrum(model, scheme="auto"),
        ValueError,
        ("scheme must be one of 'channel', 'input', 'spatial', 'spatial_transposed'; got str 'auto'."),
    ),
    Mistake(
        "a spectrum of NaN",
        spectrum,
        ValueError,
        (
            "the weight of layer '2' holds 1 NaN or infinite values out of 20: repair it, or leave "
            "the layer out with filter_fn."
        ),
        model=nan_model,
    ),
    Mistake(
        "a spectrum of lazy weights",
        spectrum,
        ValueError,
        (
            "parameter '0.weight' is not initialised yet (a lazy module): run one batch through the "
            "model first, then call this again."
        ),
        model=lambda: nn.Sequential(nn.LazyLinear(5)),
    ),
    Mistake(
        "a layer that a spectrum lacks",
        lambda model: spectrum(model)["layer1"],
        KeyError,
        "no layer 'layer1' in this spectrum: it has '0', '2'.",
    ),
    Mistake(
        "a prefix that is a number",
        lambda model: spectrum(model).scalars(1),
        TypeError,
        "prefix must be a string, got int 1.",
    ),
    Mistake(
        "one spectrum to draw",
        lambda model: plot_spectra(spectrum(model)),
        TypeError,
        "spectra must be a mapping from names to Spectrum, such as {'plain': ...}, got Spectrum.",
    ),
    Mistake(
        "no spectra to draw",
        lambda model: plot_spectra({}),
        ValueError,
        ("spectra must be a mapping from names to Spectrum, such as {'plain': ...}, got an empty one."),
    ),
    Mistake(
        "models for spectra",
        lambda model: plot_spectra({"plain": model}),
        TypeError,
        "spectra must be what spectrum(model) returns, got for 'plain' Sequential.",
    ),
    Mistake(
        "spectra of two ratios",
        lambda model: plot_spectra({"a": spectrum(model), "b": spectrum(model, ratio=0.5)}),
        ValueError,
        ("spectra must all be of one ratio to be compared, got [0.5, 0.8]: call spectrum(model, ratio=...) anew."),
    ),
    Mistake(
        "one weight to draw",
        lambda model: plot_weights(model[0].weight),
        TypeError,
        ("weights must be a mapping from names to tensors or modules, such as {'plain': ...}, got Parameter."),
    ),
    Mistake(
        "a model to draw",
        lambda model: plot_weights({"model": model}),
        ValueError,
        "'model' (Sequential) must have a tensor as its weight, got None: leave it out.",
    ),
    Mistake(
        "a bias to draw",
        lambda model: plot_weights({"bias": model[0].bias}),
        ValueError,
        (
            "weight 'bias' must have an output and an input channel axis, got shape (5,): leave it "
            "out; where sharding has flattened the parameters, gather them first."
        ),
    ),
    Mistake(
        "a position that a kernel lacks",
        lambda model: plot_weights({"conv": torch.ones(4, 3, 3, 3)}, position=(1, 5)),
        ValueError,
        (
            "position must have an index for each kernel axis of every weight, got (1, 5) for weight "
            "'conv' with a kernel of (3, 3)."
        ),
    ),
    Mistake(
        "a position that is a number",
        lambda model: plot_weights({"conv": torch.ones(4, 3, 3, 3)}, position=1),
        TypeError,
        "position must be a sequence of one index for each kernel axis, got int 1.",
    ),
]


@table(FUNCTIONS)
def test_a_mistake_is_answered_in_these_words(mistake):
    check(mistake)
