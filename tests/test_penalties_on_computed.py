"""Penalties where the weight is computed by pruning or norms: on what it is computed from, and on itself."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import prune

from tests.networks import EVERY_LAYER
from tests.reference import penalties as reference
from tests.strategies import fill_, seeds
from torchsmooth import FirstDerivative, NuclearNorm, SecondDerivative, penalty_loss, register_penalty

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
