"""Penalties where the weight is computed by pruning or norms: on what it is computed from, and on itself."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrize, prune

from tests.networks import EVERY_LAYER, two_layers
from tests.reference import penalties as reference
from tests.strategies import fill_, seeds
from tests.training import sgd, squares
from torchsmooth import (
    Constrained,
    FirstDerivative,
    NuclearNorm,
    SecondDerivative,
    attach_,
    penalty_loss,
    register_penalty,
    smooth_,
)

REFERENCES = {
    NuclearNorm: reference.nuclear_norm,
    FirstDerivative: reference.first_derivative,
    SecondDerivative: reference.second_derivative,
}
few = settings(max_examples=4)


def pruned(layer):
    return prune.random_unstructured(layer, "weight", 0.3)


def normed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def spectrally_normed(layer):
    return nn.utils.spectral_norm(layer)


SOURCES = {pruned: "weight_orig", normed: "weight_v", spectrally_normed: "weight_orig"}


@pytest.mark.parametrize("compute", SOURCES)
@pytest.mark.parametrize("layer", EVERY_LAYER)
@pytest.mark.parametrize("kind", REFERENCES)
@few
@given(seed=seeds)
def test_what_a_weight_is_computed_from_is_read_as_the_weight(kind, layer, compute, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for the mask, and the vectors of spectral_norm
        module, name = compute(fill_(EVERY_LAYER[layer]().double(), seed)), SOURCES[compute]
    source = getattr(module, name)
    register_penalty(module, name, kind(1.0))
    loss = penalty_loss(module)
    trained = source[1:] if isinstance(module, nn.Embedding) else source
    groups, transposed = getattr(module, "groups", 1), "Transpose" in type(module).__name__
    assert loss.item() == pytest.approx(REFERENCES[kind](trained, groups=groups, transposed=transposed), rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, source)
    assert not isinstance(module, nn.Embedding) or not gradient[0].any()


@pytest.mark.parametrize("compute", SOURCES)
@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@few
@given(seed=seeds)
def test_a_weight_that_is_not_computed_anew_is_named_whatever_was_evaluated_last(compute, evaluated, adaptive, seed):
    model = fill_(two_layers().double(), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        compute(model[2])
    smooth_(model, Constrained(NuclearNorm()) if adaptive else NuclearNorm(0.1))
    optimizer = sgd(model.parameters())
    handle = attach_(optimizer, model)
    squares(model, 0).backward()
    if evaluated:
        with torch.no_grad():
            squares(model, 1)
    before = [one.detach().clone() for one in model.parameters()]
    with pytest.raises(ValueError, match=r"on tensor 'weight' of '2' \(Linear\)\. They must be computed anew when"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert handle.step == 0


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_parametrized_weight_that_is_cached_is_named(evaluated):
    model = smooth_(nn.utils.parametrizations.weight_norm(fill_(nn.Linear(6, 5), 0)), NuclearNorm(0.1))
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    with parametrize.cached():
        with torch.set_grad_enabled(not evaluated):
            loss = squares(model, 0)
        if not evaluated:
            loss.backward()
        with pytest.raises(ValueError, match=r"step outside of parametrize\.cached\(\)"):
            optimizer.step()


@pytest.mark.parametrize("compute", SOURCES)
def test_a_computed_weight_whose_sources_are_not_trained_is_left_alone(compute):
    model = fill_(two_layers().double(), 0)
    with torch.random.fork_rng(devices=[]):
        compute(model[2])
    smooth_(model, NuclearNorm(0.1))
    optimizer = sgd(model[0].parameters())
    attach_(optimizer, model)
    with torch.no_grad():
        squares(model, 0)
    optimizer.step()
    assert all(one.grad is None for one in model[2].parameters())


def test_constant_weights_of_trained_layers_are_left_alone():
    model = fill_(two_layers().double(), 0)
    weight = model[0]._parameters.pop("weight").detach()
    model[0].register_buffer("weight", weight)
    model[2].weight.requires_grad_(requires_grad=False)
    smooth_(model, NuclearNorm(0.1))
    model.register_parameter("mixing", nn.Parameter(torch.ones(3, 3, dtype=torch.float64)))
    register_penalty(model, "mixing", NuclearNorm(0.1))
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    optimizer.step()
    assert model.mixing.grad.any()
    assert all(one.grad is None for layer in (model[0], model[2]) for one in layer.parameters())
