"""Which layers of torch can be factored: what they have to be, and what is said of those that are not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ._checks import FLOAT_DTYPES, check_choice, check_count, describe, kind_of_tensor, quoted
from ._matricise import FORMS

if TYPE_CHECKING:
    from ._matricise import Form, Matricisation

STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

# What a layer is run by: where one of these was replaced on an instance, factors could not do the same.
CALLED = ("forward", "_conv_forward", "__call__")

# The layers of torch for which there is a LowRank class.
PLAIN_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)


def why_not_plain(module: nn.Module, shape: tuple[int, ...]) -> str:
    """Say why a layer of a known type is more than its weight and bias, so that factors could not stand in for it.

    Args:
        module: a layer.
        shape: the shape that its weight has by its attributes.

    Returns:
        The reason; empty for a plain layer.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        return "weight is not a plain parameter (pruned or weight-normed; remove that first)"
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return f"weight is {kind_of_tensor(weight)}"
    if weight.dtype not in FLOAT_DTYPES:
        return f"weight is of {weight.dtype}"
    if weight.numel() == 0:
        return "weight is empty"
    if tuple(weight.shape) != shape:
        return f"weight is of shape {tuple(weight.shape)}, but the layer's attributes say {shape}"
    if "bias" not in module._parameters and hasattr(module, "bias"):  # an embedding has none at all
        return "bias is not a plain parameter (pruned, or a buffer)"
    extras = [*(module._parameters.keys() - {"weight", "bias"}), *module._buffers, *module._modules]
    if extras:
        return f"it has more than a weight and a bias: {quoted(extras)}"
    if any(vars(module).get(hooks) for hooks in STATE_HOOKS):
        return "it has state-dict hooks, which expect the key 'weight'"
    patched = [name for name in CALLED if name in vars(module)]
    bounded = getattr(module, "max_norm", None) is not None
    otherwise = "max_norm rescales its rows in place when they are looked up (set it to None first)" if bounded else ""
    return f"its {patched[0]} was replaced on this instance" if patched else otherwise


def check_rank(rank: object, matricisation: Matricisation, form: Form, whole: str) -> int:
    """Return a rank as an int if the form can have it; ``whole`` names the full rank in the error."""
    check_choice(form, "form", FORMS)
    most = matricisation.largest_rank(form)
    if form == "pivoted":
        if most == 0:
            raise ValueError(
                "form 'pivoted' needs a matrix with at least two rows and two columns, got one of "
                f"{matricisation.rows} × {matricisation.columns}: leave the layer dense."
            )
        whole = f"one less than {whole}, at which the pivoted form is the dense weight itself"
    return check_count(rank, "rank", most, whole)


def check_source(module: nn.Module, expected: type[nn.Module], shape_of: Any) -> nn.Parameter:
    """Return the weight of a layer that is about to be factored, or say why it cannot be."""
    name = type(module).__name__
    if not isinstance(module, expected):
        other = next((one for one in PLAIN_LAYERS if isinstance(module, one)), None)
        advice = f" Use {way_to_factor(other)} for that." if other else ""
        raise TypeError(f"expected a torch.nn.{expected.__name__}, got {describe(module)}.{advice}")
    weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter) or nn.parameter.is_lazy(weight):
        raise ValueError(
            f"the weight of this {name} is not a plain parameter (lazy, pruned or parametrized): run a batch, or call "
            "torch.nn.utils.prune.remove / parametrize.remove_parametrizations first."
        )
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"the weight of this {name} is of {weight.dtype}; expected float64, float32, bfloat16 or float16."
        )
    reason = why_not_plain(module, shape_of(module))
    if reason:
        raise ValueError(f"this {name} cannot be factored: {reason}.")
    return weight


def way_to_factor(dense_class: type[nn.Module]) -> str:
    """Name the method that factors a layer of torch."""
    name = dense_class.__name__
    return f"LowRank{name}.from_{name.replace('Transpose', '_transpose').lower()}"
