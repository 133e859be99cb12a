"""The choices of one layer: each scheme with its decomposition, errors and losses."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ._layers import KINDS, weight_of
from ._linalg import LinAlgError, working_copy
from ._spectrum import Spectrum
from ._whitening import output_errors
from .layer_plan import Option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ._layers import FoundLayer
    from ._matricise import Scheme


def options_of(found: FoundLayer, scheme: str, importance: float) -> dict[Scheme, Option]:
    """Decompose a layer in every scheme that was asked for.

    Args:
        found: a layer that can be compressed, with finite values.
        scheme: one of ``SCHEME_OPTIONS``.
        importance: what its squared relative errors are multiplied with to become losses.

    Raises:
        ValueError: if the weight cannot be decomposed; the message names the layer.
    """
    weight = weight_of(found.module)
    layouts = KINDS[type(found.module)].matricisations(found.module, scheme)
    options: dict[Scheme, Option] = {}
    for name, layout in layouts.items():
        try:
            spectrum = Spectrum(layout.to_matrices(weight), with_basis=len(layouts) == 1)
        except LinAlgError as error:
            raise undecomposed(found.name, error) from error
        errors = spectrum.errors()
        options[name] = Option(layout, errors, importance * errors, torch.finfo(weight.dtype).eps / 2, spectrum)
    return options


def calibrated(
    options: Mapping[Scheme, Option], name: str, weight: Tensor, inner: Tensor, importance: float
) -> dict[Scheme, Option]:
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
            scheme: output_errors(working_copy(weight), inner, one.matricisation) for scheme, one in options.items()
        }
    except LinAlgError as error:
        raise undecomposed(name, error) from error
    return {scheme: replace(one, losses=importance * losses[scheme]) for scheme, one in options.items()}


def undecomposed(name: str, error: RuntimeError) -> ValueError:
    """Say that a weight could not be decomposed."""
    return ValueError(f"the weight of layer {name!r} could not be decomposed ({error}): leave it out with filter_fn.")
