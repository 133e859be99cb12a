"""BatchNorm layers folded into the convolutions before them: the last step before a network is run for good."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._checks import check_initialised, check_module, describe, quoted
from ._execution import use_
from ._follows import Follower, followers
from ._linalg import clamped, working_copy
from ._lowrank_layer import LowRankLayer, check_writable
from ._norms import affine_of, norms_of
from ._sharing import Sharing
from ._swap import swap_
from ._table import format_table
from .lowrank_conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .tucker import TuckerConv2d

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["FoldingReport", "fold_batchnorm_"]

# Their channels are the second axis of what they give, as BatchNorm has it; those of nn.Linear may be another.
_DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LOW_RANK = (LowRankConv1d, LowRankConv2d, LowRankConv3d, TuckerConv2d)

# These very types: what is derived from them may compute more, an activation say.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class FoldingReport:
    """What :func:`torchsmooth.fold_batchnorm_` did; ``print`` shows a table.

    Attributes:
        folded: by the name of each BatchNorm layer that is gone, the layer that does its work now.
        left: by the name of each that is still there, why.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.BatchNorm2d(8)).eval()
        >>> print(torchsmooth.fold_batchnorm_(model))
        BatchNorm  folded into  note
        ---------  -----------  --------------------------------------------------------------
        2          –            left: '1', which feeds it, is no plain convolution, but a ReLU
    """

    folded: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        rows = [(name, layer, "") for name, layer in self.folded.items()]
        rows += [(name, "–", f"left: {reason}") for name, reason in self.left.items()]
        return format_table(("BatchNorm", "folded into", "note"), rows)


@torch.inference_mode(mode=False)
@torch.no_grad()
def fold_batchnorm_(model: nn.Module, *, pairs: Iterable[tuple[str, str]] | None = None) -> FoldingReport:
    r"""Fold BatchNorm layers into the convolutions that feed them, dense or low-rank, in place.

    In eval mode a BatchNorm layer multiplies each channel by a number and adds another one. The convolution before it
    can do that with its own weight and bias, at no cost:

    .. math:: \hat W_c = s_c W_c, \qquad \hat b_c = s_c (b_c - \mu_c) + \beta_c,
              \qquad s_c = \gamma_c / \sqrt{\sigma_c^2 + \epsilon}

    Each norm that was folded becomes an ``nn.Identity``. The network computes what it did, to rounding, and passes over
    its activations once less for each norm; in a network whose products have become small, that is much of its time.
    It is a step for running a network: train, load and estimate statistics anew before it; quantise and ``tune_`` after
    it. The keys of the state dict change, so ``load_compressed_`` takes what was saved before.

    Args:
        model: in eval mode, with nn.Conv1d, 2d, 3d or low-rank layers of those before BatchNorm layers of these very
            types: one that is derived from them may compute more, an activation say.
        pairs: the name of a layer and that of the norm which takes its output, for each pair to fold: nobody else may
            take or keep that output, or read a weight of the two. None finds them in symbolic traces of the model, by
            ``torch.fx``: one with all optional arguments given, one with the first argument alone, and one with each
            single other. A pair is folded if it is one in all of them. What a trace leaves in attributes, containers
            and buffers of the modules is put back.

    Returns:
        What was folded, and why the other norms were not.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: if the model is in training mode, cannot be traced, or has no BatchNorm layer with running
            statistics; if a pair cannot be folded. Nothing has changed then.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8)).eval()
        >>> images = torch.randn(2, 3, 8, 8)
        >>> expected = model(images)
        >>> report = torchsmooth.fold_batchnorm_(model)
        >>> model[1], torch.allclose(model(images), expected, atol=1e-6)
        (Identity(), True)

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2018, section 3.2; ``torch.nn.utils.fuse_conv_bn_eval`` does it for one dense convolution.
    """
    check_module(model)
    check_initialised(model)
    given = None if pairs is None else _checked_pairs(model, pairs)
    norms = norms_of(model)
    if not norms:
        raise ValueError(f"this {type(model).__name__} has no BatchNorm layer with running statistics to fold.")
    training = [name for name, norm in norms.items() if norm.training]
    if training:
        raise ValueError(
            f"BatchNorm layers {quoted(training)} are in training mode, and use the statistics of each batch: call "
            "model.eval() first."
        )
    fed = followers(model) if given is None else given
    modules, shared, sharing = dict(model.named_modules()), _shared(model), Sharing(model)
    folded: dict[str, str] = {}
    left: dict[str, str] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, follower in fed.items():
        norm, layer = norms[name], modules.get(follower.layer)
        reason = follower.reason or _why_not(follower.layer, layer, norm, shared) or _held(sharing, layer, name, norm)
        if reason and given is not None:
            raise ValueError(f"{name!r} cannot be folded into {follower.layer!r}: {reason}.")
        if reason or layer is None:
            left[name] = reason
            continue
        folded[name] = follower.layer
        replacements[layer] = _with_norm(layer, norm)
        replacements[norm] = nn.Identity().eval()
    swap_(model, replacements)
    return FoldingReport(folded, left)


def _checked_pairs(model: nn.Module, pairs: object) -> dict[str, Follower]:
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs must be an iterable of pairs of names, as ('conv1', 'bn1'), got {describe(pairs)}.")
    modules, norms = dict(model.named_modules()), norms_of(model)
    found: dict[str, Follower] = {}
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Iterable) or [type(one) for one in (*pair,)] != [str, str]:
            raise TypeError(f"pairs must hold pairs of names, as ('conv1', 'bn1'), got {describe(pair)}.")
        layer, norm = pair
        unknown = [one for one in (layer, norm) if one not in modules]
        if unknown:
            raise ValueError(f"pairs names {quoted(unknown)}, and this {type(model).__name__} has no such module.")
        if norm not in norms:
            raise ValueError(
                f"pairs names {norm!r} as the norm of {layer!r}, and it is a {type(modules[norm]).__name__}, no "
                "BatchNorm layer with running statistics."
            )
        if norm in found or layer in {one.layer for one in found.values()}:
            raise ValueError(f"pairs names {norm!r} or {layer!r} more than once.")
        found[norm] = Follower(layer, "")
    return found


def _shared(model: nn.Module) -> set[int]:
    """Return the ids of modules and parameters that a model has in more than one place."""
    modules = Counter(id(one) for parent in model.modules() for one in parent._modules.values() if one is not None)
    parameters = Counter(
        id(one) for module in model.modules() for one in module._parameters.values() if one is not None
    )
    return {one for one, count in (modules + parameters).items() if count > 1}


def _why_not(name: str, layer: nn.Module | None, norm: _BatchNorm, shared: set[int]) -> str:
    """Say why a norm cannot be folded into a layer; empty if it can."""
    if type(layer) not in (*_DENSE, *_LOW_RANK) or layer is None:
        return f"{name!r}, which feeds it, is no plain convolution, but a {type(layer).__name__}"
    if type(norm) not in _NORMS:
        return f"it is no plain BatchNorm, but a {type(norm).__name__}, which may compute more"
    if norm.num_features != layer.out_channels:
        return f"it has {norm.num_features} features, and {name!r}, which feeds it, {layer.out_channels} channels"
    parts = [one for module in (layer, norm) for one in module.modules()]
    if any(id(one) in shared for one in (*parts, *layer.parameters())):
        return f"{name!r} or the norm is in the model more than once, or shares its weight"
    # Hooks would see other values than before; older ways to prune and to reparametrise are hooks, too.
    if any(vars(one)[kind] for one in parts for kind in _HOOKS):
        return f"{name!r} or the norm has hooks"
    if any("forward" in vars(one) for one in parts):
        return f"the forward of {name!r} or of the norm was replaced on the instance"
    if isinstance(layer, LowRankLayer):
        try:
            check_writable(layer, "folded")
        except ValueError as error:
            return str(error)
    values = [norm.running_mean, norm.running_var, norm.weight, norm.bias, *layer.parameters()]
    if not all(bool(one.isfinite().all()) for one in values if one is not None):
        return "a value is NaN or infinite"
    return ""


def _held(sharing: Sharing, layer: nn.Module | None, name: str, norm: _BatchNorm) -> str:
    """Say who else would go on with a layer or a norm as it was; empty if nobody would."""
    parts = [] if layer is None else [*layer.modules(), *norm.modules()]
    held = next(filter(None, map(sharing.of_module, parts)), "")
    return f"the layer or {name!r} is {held}" if held else ""


def _with_norm(layer: nn.Module, norm: Any) -> nn.Module:
    """Copy a layer that does the work of a norm as well."""
    folded: Any = copy.deepcopy(layer)
    use_(folded, None)
    scale, shift = affine_of(norm, working_copy)
    like: Tensor = next(folded.parameters())
    owner = folded.bias_owner if isinstance(layer, LowRankLayer) else folded
    if owner.bias is not None:
        shift = scale * working_copy(owner.bias) + shift
    if isinstance(layer, LowRankLayer):
        up, *others = (working_copy(one) for one in folded.factors())
        layout = folded.layout if isinstance(layer, TuckerConv2d) else folded.matricisation
        rows = scale.reshape(layout.groups, -1)  # each channel may have several rows, one for each tap of ``up``
        folded.set_factors_(up * rows.repeat_interleave(up.shape[1] // rows.shape[1], 1).unsqueeze(-1), *others)
    else:
        weight = working_copy(folded.weight)
        folded.weight.copy_(clamped(weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), like.dtype))
    owner.bias = nn.Parameter(clamped(shift, like.dtype).to(like), requires_grad=like.requires_grad)
    done: nn.Module = folded
    return done
