"""What people do to the modules of a model after it is built, each as a function of the model and two places in it."""

from __future__ import annotations

import functools
import math
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from tests.odd_layers import Doubled, Failing, Packed, Repeated, SubclassedLinear
from torchsmooth import LowRankConv2d, LowRankEmbedding, LowRankLinear, NuclearNorm, register_penalty

if TYPE_CHECKING:
    from collections.abc import Callable

    Twist = Callable[[nn.Module, nn.Module, nn.Module, int], object]

TWISTS: dict[str, Twist] = {}


def twist(function: Twist) -> Twist:
    """Add a function to the twists, under its name."""
    TWISTS[function.__name__] = function
    return function


def _parameter(one: nn.Module, number: int) -> tuple[str, nn.Parameter]:
    own = [(name, value) for name, value in one._parameters.items() if value is not None]
    return own[number % len(own)]


def _matrix(one: nn.Module, number: int) -> tuple[str, nn.Parameter]:
    own = [(name, value) for name, value in one._parameters.items() if value is not None and value.dim() > 1]
    return own[number % len(own)]


def _container(model: nn.Module, number: int) -> nn.Module:
    kinds = nn.Sequential, nn.ModuleList, nn.ModuleDict
    containers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and "parametrizations" not in name.split(".")
    ]
    return containers[number % len(containers)]


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


@twist
def tie(model, one, other, number):
    _, value = _parameter(one, number)
    for own_name, own in other._parameters.items():
        if own is not None and own is not value and own.shape == value.shape:
            other._parameters[own_name] = value
            return


@twist
def tie_the_next_of_its_kind(model, one, other, number):
    name, value = _parameter(one, number)
    for module in model.modules():
        if module is not one and type(module) is type(one) and module._parameters[name].shape == value.shape:
            module._parameters[name] = value


@twist
def tie_whatever_the_shape(model, one, other, number):
    other.weight = one.weight


@twist
def tie_by_a_view(model, one, other, number):
    _, value = _matrix(one, number)
    flat = value.detach().flatten()
    own = _parameter(other, number)[1]
    own.data = flat[: own.numel()].reshape(own.shape)


@twist
def one_flat_piece_of_memory(model, one, other, number):
    own = [value for value in one.parameters() if not nn.parameter.is_lazy(value)]
    flat = torch.cat([value.detach().flatten() for value in own])
    start = 0
    for value in own:
        value.data = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()


@twist
def share(model, one, other, number):
    parent = _container(model, number)
    if parent not in set(one.modules()):
        parent.add_module(f"again{number}", one)


@twist
def share_a_child_of_attention(model, one, other, number):
    attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    _container(model, number).add_module("projection", attention[number % len(attention)].out_proj)


@twist
def freeze(model, one, other, number):
    _parameter(one, number)[1].requires_grad_(False)


@twist
def cast(model, one, other, number):
    one.to((torch.float64, torch.float32, torch.bfloat16, torch.float16)[number % 4])


@twist
def cast_one_parameter(model, one, other, number):
    name, value = _parameter(one, number)
    dtype = (torch.complex64, torch.float64, torch.float8_e4m3fn, torch.bfloat16)[number % 4]
    one._parameters[name] = nn.Parameter(value.detach().to(dtype), requires_grad=value.requires_grad)


@twist
def add_buffer(model, one, other, number):
    value = (None, torch.tensor(1), torch.ones(2, 2), torch.zeros(0, dtype=torch.complex64))[number % 4]
    one.register_buffer("extra", value, persistent=number < 4)


@twist
def add_parameter(model, one, other, number):
    one.register_parameter("extra", (None, nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 5)))[number % 3])


@twist
def add_a_missing_child(model, one, other, number):
    one.register_module("missing", None)


@twist
def hook(model, one, other, number):
    ways = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    getattr(one, ways[number % 3])(lambda *_: None)


@twist
def hook_on_the_state(model, one, other, number):
    if number % 2:
        one.register_state_dict_post_hook(lambda *_: None)
    else:
        one.register_load_state_dict_post_hook(lambda *_: None)


@twist
def parametrize_by_weight_norm(model, one, other, number):
    parametrizations.weight_norm(one, _matrix(one, number)[0])


@twist
def parametrize_by_spectral_norm(model, one, other, number):
    parametrizations.spectral_norm(one, _matrix(one, number)[0])


@twist
def parametrize_by_an_orthogonal_matrix(model, one, other, number):
    parametrizations.orthogonal(one, _matrix(one, number)[0])


@twist
def parametrize_by_a_module(model, one, other, number):
    parametrize.register_parametrization(one, _parameter(one, number)[0], Doubled())


@twist
def parametrize_by_a_row(model, one, other, number):
    parametrize.register_parametrization(one, _matrix(one, number)[0], Repeated())


@twist
def parametrize_by_what_fails(model, one, other, number):
    failing = Failing()
    parametrize.register_parametrization(one, _parameter(one, number)[0], failing)
    failing.failing = True


@twist
def hook_by_weight_norm(model, one, other, number):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and much used
        weight_norm(one, _matrix(one, number)[0])


@twist
def hook_by_spectral_norm(model, one, other, number):
    spectral_norm(one, _matrix(one, number)[0])


@twist
def prune_entries(model, one, other, number):
    prune.l1_unstructured(one, _parameter(one, number)[0], amount=0.3)


@twist
def low_rank(model, one, other, number):
    form = ("factored", "pivoted")[number % 2]
    made: dict[type, Any] = {
        nn.Linear: lambda: LowRankLinear.from_linear(one, 2, form),
        nn.Conv2d: lambda: LowRankConv2d.from_conv2d(one, 1, "channel", form),
        nn.Embedding: lambda: LowRankEmbedding.from_embedding(one, 2, form),
    }
    _replace(model, one, made[type(one)]())


@twist
def packed(model, one, other, number):
    if isinstance(one, nn.Linear):
        layer = Packed(one.in_features, one.out_features)
        layer.dropout.eval()
        _replace(model, one, layer)


@twist
def subclass(model, one, other, number):
    if type(one) is nn.Linear:
        one.__class__ = SubclassedLinear


@twist
def values(model, one, other, number):
    _, value = _parameter(one, number)
    most = torch.finfo(value.dtype)
    with torch.no_grad():
        if number == 7:
            value.mul_(most.max / 4)
        elif number == 6:
            value.mul_(most.tiny)
        else:
            value.flatten()[: 1 if number < 3 else None] = (math.nan, math.inf, -math.inf, 0.0, 1.0, most.max)[number]


@twist
def sparse_weight(model, one, other, number):
    name, value = _matrix(one, number)
    one._parameters[name] = nn.Parameter(value.detach().to_sparse())


@twist
def empty_weight(model, one, other, number):
    name, value = _matrix(one, number)
    one._parameters[name] = nn.Parameter(value.detach()[:0])


@twist
def lazy(model, one, other, number):
    _container(model, number).add_module("lazy", nn.LazyLinear(3))


@twist
def on_the_meta_device(model, one, other, number):
    if not any(map(parametrize.is_parametrized, model.modules())):  # torch would compute what is in free memory
        one.to("meta")


@twist
def channels_last(model, one, other, number):
    one.to(memory_format=torch.channels_last)


@twist
def strided(model, one, other, number):
    _, value = _matrix(one, number)
    value.data = value.detach().transpose(0, 1).contiguous().transpose(0, 1)


@twist
def expanded(model, one, other, number):
    _, value = _matrix(one, number)
    value.data = value.detach()[:1].expand(value.shape)


@twist
def mode(model, one, other, number):
    one.training = number % 2 == 0


@twist
def gradient(model, one, other, number):
    value = _parameter(one, number)[1]
    value.grad = torch.ones_like(value)


@twist
def hold_in_a_plain_attribute(model, one, other, number):
    value = _parameter(one, number)[1] if number % 4 == 3 else None
    held = ([one], SimpleNamespace(layer=one), functools.partial(one.forward), {"tensor": value})[number % 4]
    other.__dict__["held"] = held


@twist
def note(model, one, other, number):
    one.__dict__["note" if number % 2 else "_note"] = ["anything", 3]


@twist
def note_by_the_name_of_a_child(model, one, other, number):
    one.__dict__[("up", "down", "rank", "form", "linear", "q_proj", "to_dense", "truncate_")[number]] = "mine"


@twist
def replace_forward(model, one, other, number):
    one.forward = lambda *inputs: inputs


@twist
def penalize(model, one, other, number):
    register_penalty(one, _matrix(one, number)[0], NuclearNorm(strength=0.1))
