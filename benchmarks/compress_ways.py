"""The ways to compress a model that `compress_time.py` compares."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import torchsmooth
from torchsmooth._expansion import expanded_
from torchsmooth._layers import KINDS, find_layers, weight_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchsmooth._matricise import Matricisation

_SCHEMES = ("auto",)


@dataclass(frozen=True)
class Way:
    """A way to compress a model.

    Attributes:
        run: called with the model, the ratio, and the seconds after which it may give up with a RuntimeError.
        needs: modules that have to be importable.
    """

    run: Callable[[nn.Module, float, float], object]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]


def by_library(model: nn.Module, ratio: float, _: float, **options: Any) -> None:
    """Compress a model in place."""
    torchsmooth.svd_compress_(model, ratio, progress=False, **options)


def plan_alone(model: nn.Module, ratio: float, _: float) -> None:
    """Plan, and leave the model as it is."""
    torchsmooth.plan_compression(model, ratio, progress=False)


@torch.no_grad()
def svd_of_layers(model: nn.Module, _: float, __: float) -> None:
    """Decompose each weight as one matrix."""
    for weight in flattened(model):
        torch.linalg.svd(weight, full_matrices=False)


@torch.no_grad()
def svd_of_planned(model: nn.Module, _: float, __: float) -> None:
    """Decompose each matrix that a plan looks at."""
    for matrices in planned_matrices(model):
        torch.linalg.svd(matrices, full_matrices=False)


@torch.no_grad()
def products(model: nn.Module, _: float, __: float) -> None:
    """Multiply each weight with its transpose, on its small side."""
    for weight in flattened(model):
        _gram(weight)


@torch.no_grad()
def eigenproblems(model: nn.Module, _: float, __: float, dtype: torch.dtype) -> None:
    """Solve the eigenproblem of each of those products: all singular values, and the vectors of the small side."""
    for weight in flattened(model):
        torch.linalg.eigh(_gram(weight.to(dtype)))


def _gram(weight: Tensor) -> Tensor:
    return torch.mm(weight, weight.T) if len(weight) <= weight.shape[1] else torch.mm(weight.T, weight)


def flattened(model: nn.Module) -> list[Tensor]:
    """List the weights of linear layers and convolutions as matrices; those of attention as they are stored."""
    matrices = []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            matrices.append(module.weight.detach().flatten(1))
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            matrices.append(module.in_proj_weight.detach())
    return matrices


def planned_matrices(model: nn.Module) -> list[Tensor]:
    """List the matrices whose singular values a plan needs, ``(groups, rows, columns)`` each."""
    matrices = []
    with expanded_(model, lambda _, __: "") as expansion:
        for one in find_layers(model, expansion):
            if not one.reason:
                weight = weight_of(one.module).detach()
                layouts = KINDS[type(one.module)].layouts(one.module, _SCHEMES)
                matrices += [layout.to_matrices(weight) for name, layout in layouts.items() if name != "tucker"]
    return matrices


def by_tensorly(model: nn.Module, ratio: float, limit: float) -> None:
    """Decompose each layer with tensorly-torch, one after the other: it has no call for a whole model."""
    tltorch: Any = importlib.import_module("tltorch")
    began = time.perf_counter()
    options = {"rank": 1 - ratio, "implementation": "factorized"}
    for module in model.modules():
        if time.perf_counter() - began > limit:
            raise RuntimeError(f"ended after {limit:.0f} s, with layers left")
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            tltorch.FactorizedConv.from_conv(module, factorization="tucker", fixed_rank_modes="spatial", **options)
        elif isinstance(module, nn.Linear):
            tltorch.FactorizedLinear.from_linear(
                module, auto_tensorize=False, in_tensorized_features=(module.in_features,),
                out_tensorized_features=(module.out_features,), bias=module.bias is not None, factorization="CP",
                **options,
            )  # fmt: skip


def by_fasterai(model: nn.Module, ratio: float, _: float, method: str) -> None:
    """Decompose a model with fasterai; its ratio is of the ranks."""
    convolutions: Any = importlib.import_module("fasterai.misc.conv_decomposer").Conv_Decomposer()
    linear: Any = importlib.import_module("fasterai.misc.fc_decomposer").FC_Decomposer()
    linear.decompose(convolutions.decompose(model, ratio, method=method), ratio)


WAYS: dict[str, Way] = {
    "svd_compress_": Way(by_library),
    'svd_compress_, scheme="channel"': Way(partial(by_library, scheme="channel")),
    "plan_compression": Way(plan_alone),
    "torch.linalg.svd, each layer": Way(svd_of_layers),
    "torch.linalg.svd, each matrix of the plan": Way(svd_of_planned),
    "eigh(W @ W.T) in float64, each layer": Way(partial(eigenproblems, dtype=torch.float64)),
    "eigh(W @ W.T) in float32, each layer": Way(partial(eigenproblems, dtype=torch.float32)),
    "W @ W.T, each layer": Way(products),
}
PEERS: dict[str, Way] = {
    "tensorly-torch (Tucker and CP)": Way(by_tensorly, ("tltorch", "tensorly")),
    "fasterai (SVD)": Way(partial(by_fasterai, method="svd"), ("fasterai", "einops")),
    "fasterai (Tucker)": Way(partial(by_fasterai, method="tucker"), ("fasterai", "einops")),
}


@torch.no_grad()
def largest_difference(model: nn.Module, ratio: float) -> tuple[float, int]:
    """Compare the errors of a compressed model with those of float64 SVDs cut at the same ranks.

    Args:
        model: a dense model, which becomes the compressed one.
        ratio: fraction of its parameters to remove, in scheme ``channel``.

    Returns:
        The largest difference of the relative errors ‖W − Ŵ‖ / ‖W‖ of a layer, and the number of low-rank layers.
    """
    plan = torchsmooth.plan_compression(model, ratio, scheme="channel", progress=False)
    weights: dict[str, Tensor] = {}
    with expanded_(model, lambda _, __: "") as expansion:
        for one in find_layers(model, expansion):
            if not one.reason:
                weights[one.name] = weight_of(one.module).detach().double()
    plan.apply_(model, progress=False)
    differences = []
    for one in plan:
        if one.rank is None:
            continue
        layout: Matricisation = one.options["channel"].matricisation  # type: ignore[assignment]
        exact = layout.to_matrices(weights.pop(one.name))
        stored: Any = model.get_submodule(one.name).weight
        error = (exact - layout.to_matrices(stored.double())).norm() / exact.norm()
        tail = torch.linalg.svdvals(exact)[..., one.rank :].norm() / exact.norm()
        differences.append(abs(float(error - tail)))
    return max(differences, default=0.0), len(differences)
