"""The choices of one layer: each scheme with its decomposition, errors and losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from ._layers import KINDS, weight_of
from ._linalg import LARGE, LinAlgError, working_copy
from ._matricise import Matricisation
from ._moments import check_moments
from ._spectrum import Spectrum
from ._tucker_layout import TuckerLayout
from ._tucker_spectrum import TuckerSpectrum
from ._whitening import output_errors, tucker_output_errors
from .layer_plan import Option

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
    found: FoundLayer, schemes: Sequence[str], importance: float, *, keep_bases: bool
) -> dict[LayerScheme, Option]:
    """Decompose a layer in every scheme that was asked for.

    Args:
        found: a layer that can be compressed, with finite values.
        schemes: some of ``SCHEME_OPTIONS``.
        importance: what its squared relative errors are multiplied with to become losses.
        keep_bases: whether singular vectors are kept for when the layer is factored.

    Raises:
        ValueError: if the weight cannot be decomposed; the message names the layer.
    """
    weight = weight_of(found.module)
    layouts = KINDS[type(found.module)].layouts(found.module, schemes)
    try:
        known = _decomposed(layouts, weight, keep=keep_bases)
    except LinAlgError as error:
        raise undecomposed(found.name, error) from error
    options: dict[LayerScheme, Option] = {}
    for name, layout in layouts.items():
        errors = known[name].errors()
        options[name] = Option(layout, errors, importance * errors, torch.finfo(weight.dtype).eps / 2, known[name])
    return options


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
    layouts: Mapping[LayerScheme, Layout], weight: Tensor, *, keep: bool
) -> dict[LayerScheme, Decomposition]:
    """Decompose a weight in some schemes: with bases where they are needed for planning already, or there is no choice.

    Tucker-2 takes its bases from the schemes ``channel`` and ``input``, where they are planned, too. Unless bases are
    to be kept, they are computed again when the layer is factored.
    """
    known: dict[LayerScheme, Decomposition] = {}
    bases: dict[LayerScheme, Tensor | None] = {}
    for scheme, layout in layouts.items():
        if isinstance(layout, Matricisation):
            for_tucker = "tucker" in layouts and scheme in _TUCKER_SIDES
            with_basis = for_tucker or (keep and len(layouts) == 1)
            spectrum = Spectrum(layout.to_matrices(weight), with_basis=with_basis, keep=keep)
            small_side = "up" if layout.rows <= layout.columns else "down"
            bases[scheme] = spectrum.basis if _TUCKER_SIDES.get(scheme) == small_side else None
            known[scheme] = spectrum
        elif isinstance(layout, TuckerLayout):  # after the others: in the order of LAYER_SCHEMES it is the last
            known[scheme] = TuckerSpectrum(layout.to_tensors(weight), bases.get("channel"), bases.get("input"))
    if not keep:
        for one in known.values():
            one.forget_()
    return known


def _output_errors(layout: Layout, weight: Tensor, inner: Tensor) -> Tensor:
    if isinstance(layout, TuckerLayout):
        return tucker_output_errors(weight, inner, layout)
    return output_errors(weight, inner, cast("Matricisation", layout))


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

    Raises:
        ValueError: if the moment is not finite or cannot be decomposed; the message names the layer.
    """
    check_moments(name, inner)
    try:
        losses = {
            scheme: _output_errors(one.matricisation, working_copy(weight), inner) for scheme, one in options.items()
        }
    except LinAlgError as error:
        raise undecomposed(name, error) from error
    return {scheme: importance * one for scheme, one in losses.items()}


def undecomposed(name: str, error: RuntimeError) -> ValueError:
    """Say that a weight could not be decomposed."""
    return ValueError(f"the weight of layer {name!r} could not be decomposed ({error}): leave it out with filter_fn.")
