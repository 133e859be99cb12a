"""The choices of one layer: each scheme with its decomposition, errors and losses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch

from ._decompose import LARGE
from ._layers import KINDS, weight_of
from ._linalg import LinAlgError, working_copy
from ._matricise import Matricisation
from ._moments import check_moments
from ._objective import log_norm
from ._spectrum import Spectrum
from ._tucker_layout import TuckerLayout
from ._tucker_spectrum import TuckerSpectrum
from ._whitening import Output, output_errors, tucker_output_errors
from .layer_plan import Option

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch import Tensor

    from ._layers import FoundLayer
    from ._matricise import LayerScheme
    from ._spectrum import Decomposition
    from ._tucker_layout import Layout

# What a decomposition takes at least, in multiplications in its time: the calls themselves.
_OVERHEAD = 10**6

# Bytes of bases that a plan keeps in any case; at most, if that is no more than the weights take in float32; and of how
# many of the largest layers, whatever they take.
_ROOM, _MOST, _LAYERS = 1 << 26, 1 << 29, 2

# Devices that several weights of one shape are decomposed on at once, and bytes of them in float64.
_TOGETHER, _AT_ONCE = ("cuda",), 1 << 28

# The side of a scheme's matrix on which a basis of Tucker-2 lies.
_TUCKER_SIDES: dict[LayerScheme, str] = {"channel": "up", "input": "down"}


def bases_kept(layouts: Mapping[str, Iterable[Layout]]) -> set[str]:
    """Choose layers whose bases are kept between planning and factoring: the first ones, as far as the memory goes.

    Args:
        layouts: the schemes of each layer, by name.
    """
    needs, weights = {}, 0
    for name, several in layouts.items():
        matrices = [one for one in several if isinstance(one, Matricisation)]
        needs[name] = sum((4 if one.full_rank >= LARGE else 8) * one.groups * one.full_rank**2 for one in matrices)
        weights += max((4 * one.groups * one.rows * one.columns for one in matrices), default=0)
    kept, room = set(), max(_ROOM, min(_MOST, weights), _LAYERS * max(needs.values(), default=0))
    for name, need in needs.items():
        if need <= room:
            kept.add(name)
            room -= need
    return kept


def options_of(
    layers: Sequence[FoundLayer], schemes: Sequence[str], importances: Sequence[float], *, keep_bases: bool
) -> list[dict[LayerScheme, Option]]:
    """Decompose layers of one shape in every scheme that was asked for.

    Args:
        layers: those that can be compressed, with finite values: one, or several that :func:`alike` put together.
        schemes: some of ``SCHEME_OPTIONS``.
        importances: for each, what its squared relative errors are multiplied with to become losses.
        keep_bases: whether singular vectors are kept for when a layer is factored.

    Raises:
        ValueError: if a weight cannot be decomposed; the message names the layer.
    """
    weights = [weight_of(found.module) for found in layers]
    layouts = KINDS[type(layers[0].module)].layouts(layers[0].module, schemes)
    try:
        decomposed = _decomposed(layouts, weights, keep=keep_bases)
    except LinAlgError as error:
        if len(layers) == 1:
            raise undecomposed(layers[0].name, error) from error
        each = zip(layers, importances, strict=True)  # one by one, to see which it was
        return [options_of([one], schemes, [factor], keep_bases=keep_bases)[0] for one, factor in each]
    roundoff = torch.finfo(weights[0].dtype).eps / 2
    found: list[dict[LayerScheme, Option]] = []
    for weight, known, importance in zip(weights, decomposed, importances, strict=True):
        spacing = _relative_spacing(weight)
        errors = {name: one.errors() for name, one in known.items()}
        found.append(
            {
                name: Option(layout, errors[name], importance * errors[name], roundoff, spacing, known[name])
                for name, layout in layouts.items()
            }
        )
    return found


def _relative_spacing(weight: Tensor) -> float:
    """Return half the distance of subnormal numbers over the root mean square of a weight; 0 where that is nothing."""
    size, dtype = log_norm(weight), torch.finfo(weight.dtype)
    if size == -math.inf:
        return 0.0
    # By logarithms: subnormal numbers of float64 have no half.
    spacing: float = 2.0 ** (
        math.log2(dtype.smallest_normal) + math.log2(dtype.eps / 2) + math.log2(weight.numel()) / 2 - size
    )
    return spacing if spacing > dtype.eps / 1000 else 0.0


def alike(layers: Mapping[str, FoundLayer], kept: Collection[str], owners: Mapping[str, int]) -> dict[str, list[str]]:
    """Put layers together that are decomposed in one call: on a GPU, which one alone does not fill, those of one shape.

    Args:
        layers: by name, of those that can be compressed.
        kept: of which the bases are kept.
        owners: who decomposes which.

    Returns:
        For each name, the names of all layers of its call.
    """
    same: dict[object, list[str]] = {}
    for name, found in layers.items():
        module, weight = found.module, weight_of(found.module)
        key: object = name
        if weight.device.type in _TOGETHER:
            groups, shape = KINDS[type(module)].groups(module), tuple(weight.shape)
            key = type(module), shape, groups, weight.dtype, weight.device, name in kept, owners.get(name)
        same.setdefault(key, []).append(name)
    calls: dict[str, list[str]] = {}
    for names in same.values():
        most = max(1, _AT_ONCE // (8 * weight_of(layers[names[0]].module).numel()))
        for begin in range(0, len(names), most):
            call = names[begin : begin + most]
            calls |= dict.fromkeys(call, call)
    return calls


def decomposition_work(layouts: Iterable[Layout]) -> int:
    """Estimate what it takes to decompose a weight in some schemes, to divide layers evenly.

    A matrix takes small² · large multiplications for its Gram matrix and some 10 · small³ for the eigenvectors.
    """
    work = 0
    for one in layouts:
        work += _OVERHEAD
        if isinstance(one, Matricisation):
            small, large = sorted((one.rows, one.columns))
            work += one.groups * small**2 * (large + 10 * small)
        else:  # the core, and the refinement of the bases
            sides = one.dense_parameters // one.groups, sum(one.full_rank)
            work += one.groups * sides[0] * sides[1]
    return work


def _decomposed(
    layouts: Mapping[LayerScheme, Layout], weights: Sequence[Tensor], *, keep: bool
) -> list[dict[LayerScheme, Decomposition]]:
    """Decompose weights in some schemes: with bases where they are needed for planning already, or there is no choice.

    Tucker-2 takes its bases from the schemes ``channel`` and ``input``, where they are planned, too. Unless bases are
    to be kept, they are computed again when the layer is factored.
    """
    known: list[dict[LayerScheme, Decomposition]] = [{} for _ in weights]
    bases: dict[LayerScheme, list[Tensor | None]] = {}
    for scheme, layout in layouts.items():
        if isinstance(layout, Matricisation):
            for_tucker = "tucker" in layouts and scheme in _TUCKER_SIDES
            with_basis = for_tucker or (keep and len(layouts) == 1)
            matrices = [layout.to_matrices(weight) for weight in weights]
            spectra = Spectrum.of_alike(matrices, with_basis=with_basis, keep=keep)
            small_side = "up" if layout.rows <= layout.columns else "down"
            if _TUCKER_SIDES.get(scheme) == small_side:
                bases[scheme] = [spectrum.basis for spectrum in spectra]
            for each, spectrum in zip(known, spectra, strict=True):
                each[scheme] = spectrum
        elif isinstance(layout, TuckerLayout):  # after the others: in the order of LAYER_SCHEMES it is the last
            outer, inner = (bases.get(side, [None] * len(weights)) for side in ("channel", "input"))
            for each, weight, left, right in zip(known, weights, outer, inner, strict=True):
                each[scheme] = TuckerSpectrum(layout.to_tensors(weight), left, right)
    if not keep:
        for each in known:
            for one in each.values():
                one.forget_()
    return known


def _output_errors(layout: Layout, output: Output) -> Tensor:
    if isinstance(layout, TuckerLayout):
        return tucker_output_errors(output, layout)
    return output_errors(output, cast("Matricisation", layout))


def output_losses(
    options: Mapping[LayerScheme, Option], name: str, weight: Tensor, inner: Tensor, importance: float
) -> dict[LayerScheme, Tensor]:
    """Weigh the ranks of a layer by the error at its output, in every scheme.

    Args:
        options: those of the layer.
        name: its qualified name.
        weight: its weight as patches see it, ``(groups, m, n)``.
        inner: the second moment of its patches, ``(groups, n, n)``.
        importance: what squared relative errors at the output are multiplied with to become losses.

    Returns:
        The losses, for each scheme; those that the options have already if the data says nothing, as nothing varies.

    Raises:
        ValueError: if the moment is not finite or cannot be decomposed; the message names the layer.
    """
    check_moments(name, inner)
    try:
        output = Output(working_copy(weight), inner)
        if output.energy == 0:
            return {scheme: one.losses for scheme, one in options.items()}
        losses = {scheme: _output_errors(one.matricisation, output) for scheme, one in options.items()}
    except LinAlgError as error:
        raise undecomposed(name, error) from error
    return {scheme: importance * one for scheme, one in losses.items()}


def undecomposed(name: str, error: RuntimeError) -> ValueError:
    """Say that a weight could not be decomposed."""
    return ValueError(f"the weight of layer {name!r} could not be decomposed ({error}): leave it out with filter_fn.")
