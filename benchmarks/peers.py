"""The low-rank layers of other libraries, made of the same factors or of as many parameters.

Their dependencies are in the extra ``peers``. fasterai asks for fastai, which may bring another torch, and uses nothing
of it here: ``pip install --no-deps fasterai`` beside the extra. Looked at as well, and not among them:

- greenformer 0.2.2 cannot be imported beside a current transformers (it takes ``Conv1D`` from where that no longer is).
- mosaicml 0.32.1 (Composer) holds torch below 2.7.1, and its layers are two plain ones in a row.
- geotorch 0.4.0 constrains a weight to be of low rank and multiplies it out at every call: nothing gets smaller.
- tednet 0.1.3 and torchtt 0.5.0 make random layers of tensor networks, of other ranks, with no way to a given weight.
- lowrank 1.0.0, low-rank-toolbox 2.0.0 have no layers; factorizer 0.9.6 cannot be built.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchsmooth import LowRankConv2d, LowRankLinear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    LowRank = LowRankLinear | LowRankConv2d


@dataclass(frozen=True)
class Peer:
    """A library, and how it would store a low-rank layer.

    Attributes:
        equal: what its layer has in common with the low-rank one.
        needs: modules that have to be importable.
        make: makes its layer of a low-rank one in the factored form of scheme ``channel``; a ValueError says why it
            cannot.
    """

    equal: str
    needs: tuple[str, ...]
    make: Callable[[LowRank], nn.Module]

    @property
    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]


def two_plain_layers(layer: LowRank) -> nn.Module:
    """Put the two factors in a row, as one does by hand."""
    return nn.Sequential(layer.down, layer.up)


def by_tensorly(layer: LowRank) -> nn.Module:
    """Make a factorised layer of tensorly-torch."""
    return _cp_linear(layer) if isinstance(layer, LowRankLinear) else _tucker_convolution(layer)


def _cp_linear(layer: LowRankLinear) -> nn.Module:
    """Make a layer of the same factors: of a matrix, a CP decomposition is a sum of rank-one matrices."""
    made: nn.Module = _tltorch().FactorizedLinear(
        (layer.in_features,), (layer.out_features,), bias=layer.bias is not None, factorization="CP", rank=layer.rank,
        implementation="factorized", **_placed(layer),
    )  # fmt: skip
    weight: Any = made.weight
    up, down = weight.factors
    weight.weights.fill_(1)
    up.copy_(layer.up.weight)
    down.copy_(layer.down.weight.T)
    if layer.bias is not None:
        made.bias.copy_(layer.bias)
    return made


def _tucker_convolution(layer: LowRankConv2d) -> nn.Module:
    """Make a Tucker-2 convolution of as many parameters, with random factors."""
    if layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError("tensorly-torch has no groups, padding modes or padding by name.")
    rows, columns = layer.matricisation.rows, layer.matricisation.columns
    made: Any = _tltorch().FactorizedConv(
        layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding,
        dilation=layer.dilation, bias=layer.bias is not None, factorization="tucker", implementation="factorized",
        rank=layer.rank * (rows + columns) / (rows * columns), fixed_rank_modes="spatial", **_placed(layer),
    )  # fmt: skip
    made.reset_parameters(float(layer.weight.std()))
    if layer.bias is not None:
        made.bias.copy_(layer.bias)
    result: nn.Module = made
    return result


def by_fasterai(layer: LowRank) -> nn.Module:
    """Let fasterai decompose the dense layer, at the same rank."""
    dense = layer.to_dense().float()  # it has no half precision
    if isinstance(layer, LowRankLinear):
        decomposer: Any = importlib.import_module("fasterai.misc.fc_decomposer").FC_Decomposer()
        size = min(layer.in_features, layer.out_features)
    else:
        decomposer = importlib.import_module("fasterai.misc.conv_decomposer").Conv_Decomposer()
        size = min(layer.in_channels, layer.out_channels)
        if layer.groups > 1 or layer.padding_mode != "zeros":
            raise ValueError("fasterai knows no groups and no padding modes.")
    # It keeps int((1 - percent_removed) * size) singular values: half of one more is for rounding.
    made: nn.Module = decomposer.SVD(dense, 1 - (layer.rank + 0.5) / size)
    return made.to(**_placed(layer))


def _tltorch() -> Any:
    return importlib.import_module("tltorch")


def _placed(layer: nn.Module) -> dict[str, Any]:
    parameter = next(layer.parameters())
    return {"device": parameter.device, "dtype": parameter.dtype}


PEERS: dict[str, Peer] = {
    "two plain layers": Peer("the same factors", (), two_plain_layers),
    # Without opt_einsum torch multiplies the factors of a linear layer from left to right, at many times the cost.
    "tensorly-torch": Peer(
        "linear layers: the same factors (CP); convolutions: as many parameters (Tucker)",
        ("tltorch", "tensorly", "opt_einsum"),
        by_tensorly,
    ),
    "fasterai": Peer("the same ranks", ("fasterai", "einops"), by_fasterai),
}


@torch.no_grad()
def replaced_(model: nn.Module, peer: Peer) -> nn.Module:
    """Put a peer's layer in the place of each low-rank one.

    Args:
        model: a model compressed in scheme ``channel`` and form ``factored``.
        peer: whose layers.

    Returns:
        The model itself, in eval mode.

    Raises:
        ValueError: if the peer has no layer for one of them; the model is unchanged then.
    """
    places = list(_places(model))
    made = {layer: peer.make(layer) for layer in {layer for _, _, layer in places}}
    for parent, name, layer in places:
        setattr(parent, name, made[layer])
    return model.eval()


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, LowRank]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, (LowRankLinear, LowRankConv2d)):
                yield parent, name, child
