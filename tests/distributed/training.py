"""What workers that train with penalties have in common: a network with every kind of weight, and ways to train it."""

from __future__ import annotations

import functools
import importlib
import itertools

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_

from tests.distributed.launch import everywhere
from tests.strategies import fill_, randn
from torchsmooth import (
    FirstDerivative,
    NuclearNorm,
    NuclearRatio,
    SecondDerivative,
    attach_,
    penalty_loss,
    register_penalty,
)

PENALTIES = [NuclearNorm(0.02), NuclearRatio(0.03), FirstDerivative(0.02), SecondDerivative(0.01)]
TOKENS = torch.randint(0, 7, (8, 4), generator=torch.Generator().manual_seed(0))
TARGETS = randn(8, 1, seed=1)
PLACES = ("before", "after", "attach")  # of the penalty: before or after the forward pass, or by the optimizer


class Network(nn.Module):
    """Rows that two ranks cannot divide evenly, or not at all; groups, transposed ones, one that is never trained."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6, padding_idx=2)
        self.grouped = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose1d(8, 5, 2)
        self.body = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        self.head = nn.Linear(5, 1)

    def forward(self, tokens):
        x = self.transposed(self.grouped(self.embedding(tokens).mT).tanh())
        return self.head(self.body(x.tanh().mean(-1)))


def network(*penalties):
    """Each layer with the next of the penalties, and the embedding with one more."""
    model = fill_(Network(), 0).double()
    with torch.no_grad():
        model.embedding.weight[2] = 0.0
    turns = itertools.cycle(penalties or PENALTIES)
    layers = [one for one in model.modules() if getattr(one, "weight", None) is not None]
    for layer, penalty in zip([*layers, model.embedding], turns, strict=False):
        register_penalty(layer, "weight", penalty)
    return model


OPTIMIZERS = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02),
}


def half(rows):
    return rows.chunk(2)[dist.get_rank()]


def task(model, rows=TOKENS, targets=TARGETS):
    return (model(rows) - targets).square().mean()


def train(model, optimizer, place, loss=task, steps=10, clip=None):
    """The loop of a user; return the handle, if there is one."""
    handle = attach_(optimizer, model) if place == "attach" else None
    for _ in range(steps):
        optimizer.zero_grad()
        terms = [penalty_loss(model)] if place == "before" else []
        terms.append(loss(model))
        if place == "after":
            terms.append(penalty_loss(model))
        sum(terms).backward()
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return handle


@functools.cache
def alone(name, place="after", clip=None):
    """The network as one process trains it, on the whole batch."""
    model = network()
    train(model, OPTIMIZERS[name](model), place, clip=clip)
    return model


def own_half(model):
    return task(model, half(TOKENS), half(TARGETS))


def gathered(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same_parameters(model, expected, tolerance=1e-9):
    found = {name.removeprefix("module."): gathered(one) for name, one in model.named_parameters()}
    wanted = dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert torch.allclose(found[name], one, rtol=0.0, atol=tolerance), (name, (found[name] - one).abs().max())
    parts = everywhere([one.detach() for one in found.values()])
    assert all(torch.equal(one, other) for one, other in zip(*parts, strict=True))


def fsdp():
    """The module with fully_shard; it moved in torch 2.6."""
    module = importlib.import_module("torch.distributed.fsdp")
    return module if hasattr(module, "fully_shard") else importlib.import_module("torch.distributed._composable.fsdp")


@functools.cache
def mesh(*shape, names=None):
    return init_device_mesh("cpu", shape or (2,), mesh_dim_names=names)


def sharded(model, *, parts=True, **kwargs):
    kwargs.setdefault("mesh", mesh())
    if parts:
        for part in [*model.children()][::3]:
            fsdp().fully_shard(part, **kwargs)
    return fsdp().fully_shard(model, **kwargs)
