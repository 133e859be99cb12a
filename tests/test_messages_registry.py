"""What ``smooth_``, ``register_penalty`` and what is around them answer to mistakes."""

from __future__ import annotations

import math

import torch
from torch import nn

from tests.mistakes import Mistake, check, table
from tests.networks import two_layers
from torchsmooth import (
    NuclearNorm,
    RankTail,
    functional,
    is_penalized,
    penalty_loss,
    register_penalty,
    remove_penalties,
    smooth_,
)
from torchsmooth.penalties import Penalty


def smoothed(penalty=None):
    return lambda: smooth_(two_layers(), penalty or NuclearNorm())


def norms_only():
    return nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())


def nan_model(penalty=None):
    model = two_layers()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    return model if penalty is None else smooth_(model, penalty)


class NoGroups(Penalty):
    """Forgets that it is given groups."""

    def __call__(self, weight):
        return weight.square().sum()


REGISTERED = [
    Mistake(
        "a class of penalties",
        lambda model: smooth_(model, NuclearNorm),
        TypeError,
        "penalty must be an instance: write NuclearNorm(), not NuclearNorm.",
    ),
    Mistake(
        "a strength for a penalty",
        lambda model: smooth_(model, 1e-3),
        TypeError,
        (
            "penalty must be NuclearNorm(...), FirstDerivative(...), SecondDerivative(...) or "
            "another torchsmooth.penalties.Penalty, got float 0.001."
        ),
    ),
    Mistake(
        "a name for a penalty",
        lambda model: smooth_(model, "nuclear"),
        TypeError,
        (
            "penalty must be NuclearNorm(...), FirstDerivative(...), SecondDerivative(...) or "
            "another torchsmooth.penalties.Penalty, got str 'nuclear'."
        ),
    ),
    Mistake(
        "a function for a penalty",
        lambda model: smooth_(model, functional.nuclear_norm),
        TypeError,
        (
            "penalty must be NuclearNorm(...), FirstDerivative(...), SecondDerivative(...) or "
            "another torchsmooth.penalties.Penalty, got function nuclear_norm."
        ),
    ),
    Mistake(
        "a class of models",
        lambda model: smooth_(nn.Sequential, NuclearNorm()),
        TypeError,
        "model must be a torch.nn.Module, got the class Sequential: pass an instance of it.",
    ),
    Mistake(
        "parameters for a model",
        lambda model: smooth_(list(model.parameters()), NuclearNorm()),
        TypeError,
        "model must be a torch.nn.Module, got list.",
    ),
    Mistake(
        "a model without weights",
        lambda model: smooth_(model, NuclearNorm()),
        ValueError,
        (
            "Sequential has no Linear, Conv, ConvTranspose or Embedding layer: use "
            "register_penalty(module, tensor_name, penalty) for other weights."
        ),
        model=norms_only,
    ),
    Mistake(
        "a filter that keeps nothing",
        lambda model: smooth_(model, NuclearNorm(), lambda module, name: False),
        ValueError,
        (
            "Sequential has no Linear, Conv, ConvTranspose or Embedding layer that filter_fn keeps: "
            "use register_penalty(module, tensor_name, penalty) for other weights."
        ),
    ),
    Mistake(
        "a filter that is a name",
        lambda model: smooth_(model, NuclearNorm(), "0"),
        TypeError,
        "filter_fn must be a function of (module, qualified_name), got str '0'.",
    ),
    Mistake(
        "a filter of one argument",
        lambda model: smooth_(model, NuclearNorm(), lambda name: True),
        TypeError,
        ("filter_fn must be a function of (module, qualified_name), got function <lambda>, which takes (name)."),
    ),
    Mistake(
        "a lazy model",
        lambda model: smooth_(model, NuclearNorm()),
        ValueError,
        (
            "parameter '0.weight' is not initialised yet (a lazy module): run one batch through the "
            "model first, then call this again."
        ),
        model=lambda: nn.Sequential(nn.LazyLinear(5)),
    ),
    Mistake(
        "complex weights",
        lambda model: smooth_(model, NuclearNorm()),
        TypeError,
        (
            "tensor 'weight' of '0' (Linear) is of torch.complex64; a penalty needs float64, "
            "float32, bfloat16 or float16."
        ),
        model=lambda: nn.Sequential(nn.Linear(6, 5, dtype=torch.complex64)),
    ),
    Mistake(
        "a penalty on a bias",
        lambda model: register_penalty(model[0], "bias", NuclearNorm()),
        ValueError,
        (
            "tensor 'bias' of Linear has shape (5,); a penalty acts along an output and an input "
            "channel axis and needs at least two."
        ),
    ),
    Mistake(
        "a name misspelt",
        lambda model: register_penalty(model[0], "wieght", NuclearNorm()),
        ValueError,
        "tensor 'wieght' of Linear does not exist: it has 'bias', 'weight'.",
    ),
    Mistake(
        "a whole model and a name",
        lambda model: register_penalty(model, "weight", NuclearNorm()),
        ValueError,
        (
            "tensor 'weight' of Sequential does not exist: it has no parameters of its own. Pass the "
            "layer that has it, or call smooth_(model, penalty) for all layers."
        ),
    ),
    Mistake(
        "a dotted name",
        lambda model: register_penalty(model, "0.weight", NuclearNorm()),
        ValueError,
        (
            "tensor '0.weight' of Sequential does not exist: it has no parameters of its own. Pass "
            "the layer that has it, or call smooth_(model, penalty) for all layers."
        ),
    ),
    Mistake(
        "an attribute that is no tensor",
        lambda model: register_penalty(model[0], "in_features", NuclearNorm()),
        ValueError,
        "tensor 'in_features' of Linear is int 6, not a tensor: it has 'bias', 'weight'.",
    ),
    Mistake(
        "a tensor for a name",
        lambda model: register_penalty(model[0], model[0].weight, NuclearNorm()),
        TypeError,
        "tensor_name must be a string, got Parameter.",
    ),
    Mistake(
        "a tensor for a module",
        lambda model: register_penalty(model[0].weight, "weight", NuclearNorm()),
        TypeError,
        "module must be a torch.nn.Module, got Parameter.",
    ),
    Mistake(
        "removing what is not there",
        lambda model: remove_penalties(model[0], "weight"),
        ValueError,
        "no penalty is registered on tensor 'weight' of Linear (registered there: none).",
    ),
    Mistake(
        "removing another name",
        lambda model: remove_penalties(model[0], "bias"),
        ValueError,
        "no penalty is registered on tensor 'bias' of Linear (registered there: 'weight').",
        model=smoothed(),
    ),
    Mistake(
        "removing from a state dict",
        lambda model: remove_penalties(model.state_dict()),
        TypeError,
        "module must be a torch.nn.Module, got OrderedDict: load a state dict into a model first.",
    ),
    Mistake(
        "asking parameters",
        lambda model: is_penalized(model[0].weight),
        TypeError,
        "module must be a torch.nn.Module, got Parameter.",
    ),
    Mistake(
        "the loss of the parameters",
        lambda model: penalty_loss(model.parameters()),
        TypeError,
        "model must be a torch.nn.Module, got generator.",
    ),
    Mistake(
        "the loss of what adapts",
        penalty_loss,
        ValueError,
        (
            "RankTail on tensor 'weight' of '0' (Linear): this penalty changes while the network "
            "trains, and its state is kept by attach_(optimizer, model): call that, and leave "
            "penalty_loss(model) out of the loss."
        ),
        model=smoothed(RankTail(0.5)),
    ),
    Mistake(
        "the loss of NaN",
        lambda model: penalty_loss(model).backward(),
        ValueError,
        (
            "NuclearNorm on tensor 'weight' of '2' (Linear): the nuclear norm needs a weight of "
            "finite values, but this one holds NaN or infinite entries or could not be decomposed: a "
            "learning rate that is too high is the usual cause."
        ),
        model=lambda: nan_model(NuclearNorm()),
    ),
    Mistake(
        "the loss of weights without values",
        penalty_loss,
        ValueError,
        (
            "NuclearNorm on tensor 'weight' of '0' (Linear): the nuclear norm needs a weight with "
            "values, but this one is on the meta device: load the weights first (for instance "
            "model.to_empty(device=...), then load_state_dict)."
        ),
        model=lambda: smooth_(nn.Sequential(nn.Linear(6, 5, device="meta")), NuclearNorm()),
    ),
    Mistake(
        "a penalty of one's own without groups",
        penalty_loss,
        TypeError,
        (
            "NoGroups on tensor 'weight' of '0' (Linear): NoGroups.__call__() got an unexpected "
            "keyword argument 'groups'"
        ),
        model=smoothed(NoGroups(1.0)),
    ),
]


@table(REGISTERED)
def test_a_mistake_is_answered_in_these_words(mistake):
    check(mistake)
