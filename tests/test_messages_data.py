"""What is answered to mistakes with example inputs and calibration data, and by ``recalibrate_batchnorm_``."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from tests.mistakes import Mistake, check, table
from tests.networks import two_layers
from tests.strategies import fill_
from torchsmooth import (
    recalibrate_batchnorm_,
    svd_compress_,
)

INPUTS = torch.linspace(-1, 1, 48).reshape(8, 6)


class Strict(nn.Module):
    """Takes inputs of six features and says so otherwise; its forward pass is called at every use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = two_layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1:] != (6,) or not x.is_floating_point():
            raise RuntimeError(f"six features, please, not {x.dtype} of shape {tuple(x.shape)}")
        return self.body(x)


def with_norm(seed=0):
    return fill_(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)), seed)


def used_up():
    batches = iter([INPUTS])
    list(batches)
    return batches


def number_of_batches():
    yield 3


DATA = [
    Mistake(
        "a target without inputs",
        lambda model: svd_compress_(model, 0.5, target="macs"),
        ValueError,
        (
            "target 'macs' is measured on example_inputs, got None: pass a tensor, a tuple of "
            "positional arguments or a dict of keyword arguments for the model."
        ),
    ),
    Mistake(
        "a list of example inputs",
        lambda model: svd_compress_(model, 0.5, target="macs", example_inputs=[INPUTS]),
        TypeError,
        ("example_inputs must be a tensor, a tuple of positional arguments, or a dict of keyword arguments; got list."),
    ),
    Mistake(
        "example inputs for a target that takes none",
        lambda model: svd_compress_(model, 0.5, example_inputs=INPUTS),
        ValueError,
        (
            "example_inputs are what targets 'macs' and 'latency' are measured on, and target 'params' takes none: "
            "name one of these targets, or leave them out; data to fit to is given as calibration=."
        ),
    ),
    Mistake(
        "example inputs that the model refuses",
        lambda model: svd_compress_(model, 0.5, target="macs", example_inputs=INPUTS[:, :5]),
        RuntimeError,
        "six features, please, not torch.float32 of shape (8, 5)",
        model=Strict,
    ),
    Mistake(
        "max_error with a target",
        lambda model: svd_compress_(model, max_error=0.1, target="macs", example_inputs=INPUTS),
        ValueError,
        (
            "max_error bounds the error of each layer, whatever that saves, so it cannot be combined "
            "with target 'macs': give a ratio, or leave target out."
        ),
    ),
    Mistake(
        "a tensor to calibrate",
        lambda model: svd_compress_(model, 0.5, calibration=INPUTS),
        TypeError,
        "calibration must be an iterable of inputs, such as [inputs] or a DataLoader, got Tensor.",
    ),
    Mistake(
        "no batches to calibrate",
        lambda model: svd_compress_(model, 0.5, calibration=[]),
        ValueError,
        "calibration is empty: pass at least one batch (an iterator can be used up only once).",
    ),
    Mistake(
        "an iterator used up",
        lambda model: svd_compress_(model, 0.5, calibration=used_up()),
        ValueError,
        "calibration is empty: pass at least one batch (an iterator can be used up only once).",
    ),
    Mistake(
        "a generator function not called",
        lambda model: svd_compress_(model, 0.5, calibration=number_of_batches),
        TypeError,
        (
            "calibration must be an iterable of inputs, such as [inputs] or a DataLoader, got "
            "function number_of_batches."
        ),
    ),
    Mistake(
        "batches that are numbers",
        lambda model: svd_compress_(model, 0.5, calibration=number_of_batches()),
        TypeError,
        ("a batch must be a tensor, a tuple or list that begins with the input, or a dict; got int 3."),
    ),
    Mistake(
        "batches of numpy",
        lambda model: svd_compress_(model, 0.5, calibration=[INPUTS.numpy()]),
        TypeError,
        ("a batch must be a tensor, a tuple or list that begins with the input, or a dict; got ndarray."),
    ),
    Mistake(
        "labels before images",
        lambda model: svd_compress_(model, 0.5, calibration=[(torch.arange(8), INPUTS)]),
        RuntimeError,
        "six features, please, not torch.int64 of shape (8,)",
        model=Strict,
    ),
    Mistake(
        "batches that the model refuses",
        lambda model: svd_compress_(model, 0.5, calibration=[INPUTS, INPUTS[:, :5]]),
        RuntimeError,
        "six features, please, not torch.float32 of shape (8, 5)",
        model=Strict,
    ),
    Mistake(
        "NaN in the batches",
        lambda model: svd_compress_(model, 0.5, calibration=[INPUTS.clone().fill_(math.nan)]),
        ValueError,
        ("calibration brings NaN or infinite values to layer '0': look at the inputs, and at the layers before it."),
    ),
    Mistake(
        "norms of a model without any",
        lambda model: recalibrate_batchnorm_(model, [INPUTS]),
        ValueError,
        "this Sequential has no BatchNorm layer with running statistics to estimate.",
    ),
    Mistake(
        "norms with one tensor",
        lambda model: recalibrate_batchnorm_(model, INPUTS),
        TypeError,
        "batches must be an iterable of inputs, such as [inputs] or a DataLoader, got Tensor.",
        model=with_norm,
    ),
    Mistake(
        "norms without batches",
        lambda model: recalibrate_batchnorm_(model, []),
        ValueError,
        "batches is empty: pass at least one batch (an iterator can be used up only once).",
        model=with_norm,
    ),
    Mistake(
        "norms with NaN",
        lambda model: recalibrate_batchnorm_(model, [INPUTS.clone().fill_(math.nan)]),
        ValueError,
        (
            "the statistics of BatchNorm layer '1' came out NaN or infinite: look at the inputs, and "
            "at the layers before it."
        ),
        model=with_norm,
    ),
    Mistake(
        "norms of a class",
        lambda model: recalibrate_batchnorm_(nn.BatchNorm1d, [INPUTS]),
        TypeError,
        "model must be a torch.nn.Module, got the class BatchNorm1d: pass an instance of it.",
    ),
]


@table(DATA)
def test_a_mistake_is_answered_in_these_words(mistake):
    check(mistake)


BATCH = "torchsmooth was calling the model with the input of a batch: a tensor of shape (8,) in torch.int64 on cpu."
EXAMPLE = (
    "torchsmooth was calling the model with example_inputs: a tensor of shape (8, 5) in torch.float32 on cpu, scale: a "
    "float."
)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes before Python 3.11")
@pytest.mark.parametrize(
    ("error", "options", "note"),
    [
        (RuntimeError, {"calibration": [(torch.arange(8), INPUTS)]}, BATCH),
        (RuntimeError, {"target": "macs", "example_inputs": INPUTS[:, :5]}, EXAMPLE.replace(", scale: a float", "")),
        (
            TypeError,
            {"target": "latency", "example_inputs": {"x": INPUTS[:, :5], "scale": 0.5}},
            EXAMPLE.replace(": a tensor", ": x: a tensor"),
        ),
    ],
)
def test_an_error_of_the_model_itself_says_what_it_was_called_with(error, options, note):
    model = Strict()
    with pytest.raises(error) as caught:
        svd_compress_(model, 0.5, **options)
    assert caught.value.__notes__ == [note]
