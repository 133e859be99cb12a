"""What ``register_layer`` and what was registered answer to mistakes."""

from __future__ import annotations

import torch
from torch import nn

from tests.mistakes import Mistake, check, table
from tests.strategies import fill_
from torchsmooth import (
    register_layer,
    restore_dense_,
    svd_compress_,
)


def made(cls, *args, **kwargs):
    return lambda model: cls(*args, **kwargs)


def linear():
    return fill_(nn.Linear(6, 5), 0)


class Own(nn.Module):
    """A linear layer with its weight transposed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 5))

    def forward(self, x):
        return x @ self.weight


def as_linear(layer):
    expanded = nn.Linear(6, 5, bias=False, device="meta")
    expanded.weight = nn.Parameter(layer.weight.T)
    return expanded


def as_much_more(layer):
    return nn.Linear(6, 5)


def registered(expand, collapse=None, then=lambda model: svd_compress_(model, 0.3)):
    """Register the layer, use it, and forget it again."""

    def does(model):
        register_layer(Own, expand, collapse)
        try:
            then(model)
        finally:
            from torchsmooth.layer_types import _TYPES

            del _TYPES[Own]

    return does


def compressed_own():
    model = own()
    registered(as_linear)(model)
    return model


def own():
    return nn.Sequential(Own())


REGISTERED = [
    Mistake(
        "a layer for its class",
        lambda model: register_layer(Own(), as_linear),
        TypeError,
        "layer_type must be a class of torch.nn.Module, got Own().",
    ),
    Mistake(
        "a name for a class",
        lambda model: register_layer("Own", as_linear),
        TypeError,
        "layer_type must be a class of torch.nn.Module, got str 'Own'.",
    ),
    Mistake(
        "a class that is no module",
        lambda model: register_layer(dict, as_linear),
        TypeError,
        "layer_type must be a class of torch.nn.Module, got the class dict.",
    ),
    Mistake(
        "expand not a function",
        lambda model: register_layer(Own, "as_linear"),
        TypeError,
        "expand must be a function of a layer, got str 'as_linear'.",
    ),
    Mistake(
        "collapse not a function",
        lambda model: register_layer(Own, as_linear, 5),
        TypeError,
        "collapse must be a function of a layer, got int 5.",
    ),
    Mistake(
        "a plain layer",
        lambda model: register_layer(nn.Linear, as_linear),
        ValueError,
        "layer_type must not be a plain layer, got Linear: it is known already.",
    ),
    Mistake(
        "expand returns nothing",
        registered(lambda layer: None),
        TypeError,
        "layer '0': expand, as registered for Own, must return a torch.nn.Module, got None.",
        model=own,
    ),
    Mistake(
        "expand returns the weight",
        registered(lambda layer: layer.weight.T),
        TypeError,
        "layer '0': expand, as registered for Own, must return a torch.nn.Module, got Tensor.",
        model=own,
    ),
    Mistake(
        "expand returns the layer",
        registered(lambda layer: layer),
        ValueError,
        (
            "nothing to compress in this Sequential: its only layer cannot be made smaller (0: the "
            "function registered for it returned the layer itself). Linear layers, convolutions and "
            "embeddings with more than a few channels can be."
        ),
        model=own,
    ),
    Mistake(
        "expand adds parameters",
        registered(as_much_more),
        ValueError,
        (
            "nothing to compress in this Sequential: its only layer cannot be made smaller (0: it "
            "has 30 parameters, but what it was expanded to has 35). Linear layers, convolutions and "
            "embeddings with more than a few channels can be."
        ),
        model=own,
    ),
    Mistake(
        "expand of no argument",
        registered(lambda: None),
        TypeError,
        "expand must be a function of a layer, got function <lambda>, which takes no arguments.",
        model=own,
    ),
    Mistake(
        "expand fails",
        registered(lambda layer: layer.wieght),
        AttributeError,
        "'Own' object has no attribute 'wieght'",
        model=own,
    ),
    Mistake(
        "collapse not dense",
        registered(as_linear, lambda linear: None, then=restore_dense_),
        TypeError,
        "layer '0': collapse, as registered for Own, must return a torch.nn.Module, got None.",
        model=compressed_own,
    ),
    Mistake(
        "a class of its own alone",
        registered(as_linear),
        ValueError,
        ("the model is itself an Own, with no parent in which it could be replaced: wrap it in a torch.nn.Sequential."),
        model=Own,
    ),
]


@table(REGISTERED)
def test_a_mistake_is_answered_in_these_words(mistake):
    check(mistake)
