"""The choices of one layer: each scheme with its decomposition, errors and losses."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from ._layers import KINDS, weight_of
from ._linalg import LinAlgError, working_copy
from ._spectrum import Spectrum
from ._tucker import tucker_errors
from ._tucker_layout import TuckerLayout
from ._whitening import output_errors, tucker_output_errors
from .layer_plan import Option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ._layers import FoundLayer
    from ._matricise import LayerScheme, Matricisation
    from ._tucker_layout import Layout


def options_of(found: FoundLayer, scheme: str, importance: float) -> dict[LayerScheme, Option]:
    """Decompose a layer in every scheme that was asked for.

    Args:
        found: a layer that can be compressed, with finite values.
        scheme: one of ``SCHEME_OPTIONS``.
        importance: what its squared relative errors are multiplied with to become losses.

    Raises:
        ValueError: if the weight cannot be decomposed; the message names the layer.
    """
    weight = weight_of(found.module)
    layouts = KINDS[type(found.module)].layouts(found.module, scheme)
    options: dict[LayerScheme, Option] = {}
    for name, layout in layouts.items():
        try:
            errors, spectrum = _decomposed(layout, weight, with_basis=len(layouts) == 1)
        except LinAlgError as error:
            raise undecomposed(found.name, error) from error
        options[name] = Option(layout, errors, importance * errors, torch.finfo(weight.dtype).eps / 2, spectrum)
    return options


def _decomposed(layout: Layout, weight: Tensor, *, with_basis: bool) -> tuple[Tensor, Spectrum | None]:
    if isinstance(layout, TuckerLayout):
        return tucker_errors(layout.to_tensors(weight)), None
    spectrum = Spectrum(cast("Matricisation", layout).to_matrices(weight), with_basis=with_basis)
    return spectrum.errors(), spectrum


def _output_errors(layout: Layout, weight: Tensor, inner: Tensor) -> Tensor:
    if isinstance(layout, TuckerLayout):
        return tucker_output_errors(weight, inner, layout)
    return output_errors(weight, inner, cast("Matricisation", layout))


def calibrated(
    options: Mapping[LayerScheme, Option], name: str, weight: Tensor, inner: Tensor, importance: float
) -> dict[LayerScheme, Option]:
    """Weigh the ranks of a layer by the error at its output.

    Args:
        options: those of the layer.
        name: its qualified name.
        weight: its weight as patches see it, ``(groups, m, n)``.
        inner: the second moment of its patches, ``(groups, n, n)``.
        importance: what squared relative errors at the output are multiplied with to become losses.

    Raises:
        ValueError: if the moment is not finite or cannot be decomposed; the message names the layer.
    """
    if not bool(inner.isfinite().all()):
        raise ValueError(
            f"calibration brings NaN or infinite values to layer {name!r}: look at the inputs, and at the layers "
            "before it."
        )
    try:
        losses = {
            scheme: _output_errors(one.matricisation, working_copy(weight), inner) for scheme, one in options.items()
        }
    except LinAlgError as error:
        raise undecomposed(name, error) from error
    return {scheme: replace(one, losses=importance * losses[scheme]) for scheme, one in options.items()}


def undecomposed(name: str, error: RuntimeError) -> ValueError:
    """Say that a weight could not be decomposed."""
    return ValueError(f"the weight of layer {name!r} could not be decomposed ({error}): leave it out with filter_fn.")
