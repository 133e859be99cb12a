"""Small networks with one difficulty each, filled from a seed."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise

import torch
from torch import nn

from testbed.cifar import ResNet18
from tests.strategies import fill_


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# Ways to copy a module.
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": through_torch_save,
}


def small_resnet(seed: int = 0, width: int = 8) -> ResNet18:
    return fill_(ResNet18(width), seed).eval()


def mlp(seed: int = 0, sizes: tuple[int, ...] = (24, 32, 16, 8)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside, outside in pairwise(sizes):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return fill_(nn.Sequential(*layers[:-1]), seed)


class Tied(nn.Module):
    """A weight shared across parents (embedding and head) and inside one parent (two linears)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
        self.body[1].weight = self.body[0].weight
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(tokens)))


class Shared(nn.Module):
    """One module under three names, in two parents."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.body = nn.ModuleList([self.first, nn.Linear(16, 16)])
        self.again = nn.ModuleDict({"ab": self.first})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again["ab"](self.body[1](self.body[0](self.first(x))))


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that an error must leave as it was: modules, parameters by identity, values, flags, hooks."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "values": {
            name: value.to_dense().clone() if value.is_sparse else value.clone()
            for name, value in model.state_dict().items()
            if isinstance(value, torch.Tensor) and not (value.is_meta or nn.parameter.is_lazy(value))
        },
        "flags": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    """Compare two snapshots bit for bit (NaN equals NaN)."""
    values, others = one.pop("values"), other.pop("values")
    equal = one == other and values.keys() == others.keys()
    return equal and all(
        torch.equal(torch.nan_to_num(values[key]), torch.nan_to_num(others[key]))
        and torch.equal(values[key].isnan(), others[key].isnan())
        for key in values
    )


# One of each layer that a penalty finds by itself, small.
EVERY_LAYER = {
    "linear": lambda: nn.Linear(5, 4),
    "wide": lambda: nn.Linear(9, 3),
    "conv1d": lambda: nn.Conv1d(6, 4, 3, groups=2),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(6, 4, 2, groups=2),
    "conv_transpose3d": lambda: nn.ConvTranspose3d(3, 6, 2, groups=3),
    "embedding": lambda: nn.Embedding(6, 3, padding_idx=0),
}


def linear_of(matrix: torch.Tensor) -> nn.Linear:
    """A linear layer without a bias, of this very weight."""
    layer = nn.Linear(1, 1, bias=False)  # torch warns of layers that are made without entries
    layer.weight = nn.Parameter(matrix)
    return layer


def two_layers() -> nn.Sequential:
    return fill_(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), 0)


class ByKeyword(nn.Module):
    """Calls one of its layers by keyword."""

    def __init__(self, size):
        super().__init__()
        self.a, self.b = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x):
        return self.b(input=self.a(x))
