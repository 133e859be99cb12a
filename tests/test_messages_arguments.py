"""What ``svd_compress_``, ``plan_compression`` and ``sweep`` answer to wrong arguments."""

from __future__ import annotations

import math

import torch
from torch import nn

from tests.mistakes import Mistake, check, table
from torchsmooth import (
    plan_compression,
    svd_compress_,
    sweep,
)

ARGUMENTS = [
    Mistake(
        "a ratio in percent",
        lambda model: svd_compress_(model, 70),
        ValueError,
        (
            "ratio must lie strictly between 0 and 1 (the fraction of the model's parameters to "
            "remove), got 70.0: 70 % is written 0.7."
        ),
    ),
    Mistake(
        "a ratio of zero",
        lambda model: svd_compress_(model, 0),
        ValueError,
        ("ratio must lie strictly between 0 and 1 (the fraction of the model's parameters to remove), got 0.0."),
    ),
    Mistake(
        "a ratio of one",
        lambda model: svd_compress_(model, 1.0),
        ValueError,
        ("ratio must lie strictly between 0 and 1 (the fraction of the model's parameters to remove), got 1.0."),
    ),
    Mistake(
        "a negative ratio",
        lambda model: svd_compress_(model, -0.5),
        ValueError,
        ("ratio must lie strictly between 0 and 1 (the fraction of the model's parameters to remove), got -0.5."),
    ),
    Mistake(
        "a ratio that is NaN",
        lambda model: svd_compress_(model, math.nan),
        ValueError,
        "ratio must be finite, got nan.",
    ),
    Mistake(
        "a ratio as text",
        lambda model: svd_compress_(model, "0.5"),
        TypeError,
        "ratio must be a real number, got str '0.5'.",
    ),
    Mistake(
        "a ratio of True",
        lambda model: svd_compress_(model, ratio=True),
        TypeError,
        "ratio must be a real number, got bool True.",
    ),
    Mistake(
        "a list of ratios",
        lambda model: svd_compress_(model, [0.5, 0.7]),
        TypeError,
        "ratio must be a real number, got list [0.5, 0.7].",
    ),
    Mistake(
        "neither ratio nor max_error",
        svd_compress_,
        ValueError,
        (
            "give either ratio (fraction to remove) or max_error (largest relative error of a "
            "layer), got ratio=None, max_error=None."
        ),
    ),
    Mistake(
        "both ratio and max_error",
        lambda model: svd_compress_(model, 0.5, max_error=0.1),
        ValueError,
        (
            "give either ratio (fraction to remove) or max_error (largest relative error of a "
            "layer), got ratio=0.5, max_error=0.1."
        ),
    ),
    Mistake(
        "max_error in percent",
        lambda model: svd_compress_(model, max_error=5),
        ValueError,
        (
            "max_error must lie strictly between 0 and 1 (the largest relative error of a layer), "
            "got 5.0: 5 % is written 0.05."
        ),
    ),
    Mistake(
        "the class of a model",
        lambda model: svd_compress_(nn.Linear, 0.5),
        TypeError,
        "model must be a torch.nn.Module, got the class Linear: pass an instance of it.",
    ),
    Mistake(
        "a state dict for a model",
        lambda model: svd_compress_(model.state_dict(), 0.5),
        TypeError,
        "model must be a torch.nn.Module, got OrderedDict: load a state dict into a model first.",
    ),
    Mistake(
        "a list of layers for a model",
        lambda model: svd_compress_(list(model), 0.5),
        TypeError,
        "model must be a torch.nn.Module, got list: put them in a torch.nn.Sequential or ModuleList.",
    ),
    Mistake(
        "the path of a model",
        lambda model: svd_compress_("model.pt", 0.5),
        TypeError,
        "model must be a torch.nn.Module, got str 'model.pt'.",
    ),
    Mistake(
        "an optimizer for a model",
        lambda model: svd_compress_(torch.optim.SGD(model.parameters(), lr=0.1), 0.5),
        TypeError,
        "model must be a torch.nn.Module, got SGD.",
    ),
    Mistake(
        "model and ratio swapped",
        lambda model: svd_compress_(0.5, model),
        TypeError,
        "model must be a torch.nn.Module, got float 0.5.",
    ),
    Mistake(
        "a scheme misspelt",
        lambda model: svd_compress_(model, 0.5, scheme="chanel"),
        ValueError,
        (
            "scheme must be one of 'auto', 'channel', 'input', 'spatial', 'tucker'; got str "
            "'chanel': did you mean 'channel'?"
        ),
    ),
    Mistake(
        "a scheme that is none",
        lambda model: svd_compress_(model, 0.5, scheme="svd"),
        ValueError,
        "scheme must be one of 'auto', 'channel', 'input', 'spatial', 'tucker'; got str 'svd'.",
    ),
    Mistake(
        "a scheme that is no text",
        lambda model: svd_compress_(model, 0.5, scheme=2),
        TypeError,
        "scheme must be a name or a sequence of names, got int 2.",
    ),
    Mistake(
        "no scheme",
        lambda model: svd_compress_(model, 0.5, scheme=[]),
        ValueError,
        ("scheme is an empty list: name at least one of 'auto', 'channel', 'input', 'spatial', 'tucker'."),
    ),
    Mistake(
        "a form misspelt",
        lambda model: svd_compress_(model, 0.5, form="pivot"),
        ValueError,
        ("form must be one of 'auto', 'factored', 'pivoted'; got str 'pivot': did you mean 'pivoted'?"),
    ),
    Mistake(
        "an allocation misspelt",
        lambda model: svd_compress_(model, 0.5, allocation="Budget"),
        ValueError,
        "allocation must be one of 'budget', 'uniform'; got str 'Budget': did you mean 'budget'?",
    ),
    Mistake(
        "a target misspelt",
        lambda model: svd_compress_(model, 0.5, target="flops"),
        ValueError,
        "target must be one of 'params', 'macs', 'latency'; got str 'flops'.",
    ),
    Mistake(
        "parametrized misspelt",
        lambda model: svd_compress_(model, 0.5, parametrized="remove"),
        ValueError,
        "parametrized must be one of 'keep', 'merge'; got str 'remove'.",
    ),
    Mistake(
        "rank_multiple of zero",
        lambda model: svd_compress_(model, 0.5, rank_multiple=0),
        ValueError,
        "rank_multiple must be at least 1 (ranks are multiples of it), got 0.",
    ),
    Mistake(
        "rank_multiple as a float",
        lambda model: svd_compress_(model, 0.5, rank_multiple=8.0),
        TypeError,
        "rank_multiple must be an integer, got float 8.0.",
    ),
    Mistake(
        "progress as text",
        lambda model: svd_compress_(model, 0.5, progress="yes"),
        TypeError,
        "progress must be True, False or None, got str 'yes'.",
    ),
    Mistake(
        "a group that is none",
        lambda model: svd_compress_(model, 0.5, process_group="gloo"),
        TypeError,
        (
            "process_group must be a torch.distributed.ProcessGroup that is initialised (of a "
            "DeviceMesh: mesh.get_group()), or None, got str 'gloo'."
        ),
    ),
    Mistake(
        "a filter that is a list",
        lambda model: svd_compress_(model, 0.5, filter_fn=["0"]),
        TypeError,
        "filter_fn must be a function of (module, qualified_name), got list ['0'].",
    ),
    Mistake(
        "a filter of one argument",
        lambda model: svd_compress_(model, 0.5, filter_fn=lambda name: name != "2"),
        TypeError,
        ("filter_fn must be a function of (module, qualified_name), got function <lambda>, which takes (name)."),
    ),
    Mistake(
        "a filter that returns nothing",
        lambda model: svd_compress_(model, 0.5, filter_fn=lambda module, name: None),
        TypeError,
        "filter_fn returned None for layer '0': return True to take a layer, False to leave it out.",
    ),
    Mistake(
        "a filter that leaves all out",
        lambda model: svd_compress_(model, 0.5, filter_fn=lambda module, name: False),
        ValueError,
        (
            "nothing to compress in this Sequential: filter_fn left out all 2 layers. "
            "filter_fn(module, qualified_name) returns True for a layer to compress."
        ),
    ),
    Mistake(
        "a single ratio to sweep",
        lambda model: sweep(model, 0.5),
        TypeError,
        "ratios must be a list of fractions such as [0.5, 0.7], got float 0.5.",
    ),
    Mistake(
        "no ratios to sweep",
        lambda model: sweep(model, []),
        ValueError,
        "ratios is empty: give at least one fraction to remove, such as [0.5, 0.7].",
    ),
    Mistake(
        "one of the ratios in percent",
        lambda model: sweep(model, [0.5, 70]),
        ValueError,
        (
            "ratios[1] must lie strictly between 0 and 1 (the fraction of the model's parameters to "
            "remove), got 70.0: 70 % is written 0.7."
        ),
    ),
    Mistake(
        "one of the ratios too high",
        lambda model: sweep(model, [0.3, 0.9]),
        ValueError,
        (
            "ratio 0.9 cannot be reached: with rank 1 in every layer that can be compressed, 27 of "
            "59 parameters are left. The largest ratio that can be reached is 0.5423."
        ),
    ),
    Mistake(
        "a plan for a class",
        lambda model: plan_compression(nn.Sequential, 0.5),
        TypeError,
        "model must be a torch.nn.Module, got the class Sequential: pass an instance of it.",
    ),
]


@table(ARGUMENTS)
def test_a_mistake_is_answered_in_these_words(mistake):
    check(mistake)
