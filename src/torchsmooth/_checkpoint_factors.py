"""One layer of a checkpoint at a time: what a plan has to know of it, and its factors."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from ._apply import measured_error
from ._checks import check_values
from ._layers import KINDS, FoundLayer, rows_of, weight_of
from ._linalg import LinAlgError
from ._objective import log_norm, relative_importances
from ._options import bases_kept, options_of, undecomposed
from ._prices import ParameterPrices
from ._spectrum import Anew
from .layer_plan import LayerPlan, Option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from ._checkpoint_layers import CheckpointLayer
    from ._matricise import LayerScheme
    from ._tensor_source import Checkpoint
    from ._terms import Terms
    from ._tucker_layout import Layout
    from .layer_plan import Choice


class Workshop:
    """Decomposes and factors layers of a checkpoint, of which no more than one is in memory.

    Args:
        checkpoint: where the weights are.
        layers: all of them.
        terms: how plans are made.
        device: where the work is done.
    """

    def __init__(
        self, checkpoint: Checkpoint, layers: Sequence[CheckpointLayer], terms: Terms, device: torch.device
    ) -> None:
        self._checkpoint, self._terms, self._device = checkpoint, terms, device
        layouts = {one.name: self._layouts(one) for one in layers if one.dense is not None}
        # No basis is kept here. But where a plan for the model keeps one, singular values come from another routine of
        # LAPACK, which rounds otherwise, and the results are to be the same to the last bit.
        self._with_bases = bases_kept({name: list(several.values()) for name, several in layouts.items()})

    def name_of(self, layer: CheckpointLayer, *more: Any) -> str:
        """Name a result for a layer, so that results that could differ have different names."""
        groups = KINDS[type(layer.dense)].groups(layer.dense) if layer.dense is not None else 0
        told = [layer.key, layer.type, layer.shape, groups, layer.name in self._with_bases]
        told += [self._terms.schemes, str(self._device), *more]
        return hashlib.sha256(json.dumps(told).encode("utf-8")).hexdigest()[:32]

    def decompose(self, layer: CheckpointLayer) -> dict[str, Any]:
        """Return the errors of every rank and the norm of a weight.

        Raises:
            ValueError: if it holds NaN or infinite values, or cannot be decomposed; the message names layer and file.
        """
        found = self._found(layer)
        weight = weight_of(found.module)
        try:
            check_values(weight, layer.name)
            options = self._options(found)
        except ValueError as error:
            raise ValueError(f"{self._checkpoint.file_of(layer.key)!r}: {error}") from error
        errors = {scheme: one.errors for scheme, one in options.items()}
        first = next(iter(options.values()))
        rounding = {"roundoff": first.roundoff, "spacing": first.spacing}
        return {"errors": errors, "log_norm": log_norm(weight, rows_of(found.module)), **rounding}

    def plans(self, layers: Sequence[CheckpointLayer], known: Mapping[str, Mapping[str, Any]]) -> list[LayerPlan]:
        """Return what can be planned for all layers, given what :meth:`decompose` returned for each, by name."""
        norms = [float(one["log_norm"]) for one in known.values()]
        importance = dict(zip(known, relative_importances(norms), strict=True))
        return [self._plan(one, known.get(one.name), importance.get(one.name, 0.0)) for one in layers]

    def factor(self, layer: CheckpointLayer, choice: Choice) -> dict[str, Any]:
        """Return the tensors that take the place of a weight, by the ends of their keys, and how far off they are."""
        found = self._found(layer)
        weight = weight_of(found.module).detach()
        low_rank = KINDS[type(found.module)].like(found.module, choice.rank, choice.scheme, choice.form)
        try:
            # Where bases of two schemes go into a third, they come from where a plan for the model has them from. Where
            # it keeps them, they are those of the whole decomposition, however few are wanted.
            known: Any = Anew() if layer.name in self._with_bases else None
            if choice.scheme == "tucker":
                known = self._options(found)["tucker"].spectrum
            low_rank.truncate_(weight, known)
        except LinAlgError as error:
            raise undecomposed(layer.name, error) from error
        owners = [f"{name}." for name, child in low_rank.named_children() if child is low_rank.bias_owner]
        return {
            "tensors": {key: value.cpu().contiguous() for key, value in low_rank.state_dict().items()},
            "bias": f"{owners[0] if owners else ''}bias",
            "error": measured_error(found.module, low_rank),
        }

    def _found(self, layer: CheckpointLayer) -> FoundLayer:
        module = layer.holding(self._checkpoint.read(layer.key).to(self._device))
        return FoundLayer(layer.name, module, layer.type, layer.parameters)

    def _options(self, found: FoundLayer) -> dict[LayerScheme, Option]:
        return options_of([found], self._terms.schemes, [1.0], keep_bases=found.name in self._with_bases)[0]

    def _layouts(self, layer: CheckpointLayer) -> dict[LayerScheme, Layout]:
        return KINDS[type(layer.dense)].layouts(layer.dense, self._terms.schemes) if layer.dense is not None else {}

    def _plan(self, layer: CheckpointLayer, known: Mapping[str, Any] | None, importance: float) -> LayerPlan:
        options = {}
        if known is not None:
            for scheme, layout in self._layouts(layer).items():
                errors: Tensor = known["errors"][scheme]
                # A draft of an earlier version has no spacing.
                rounding = float(known["roundoff"]), float(known.get("spacing", 0.0))
                options[scheme] = Option(layout, errors, importance * errors, *rounding)
        plan = LayerPlan(layer.name, layer.type, layer.shape, options, layer.reason, forms=self._terms.forms)
        plan.parameters_before = layer.parameters
        plan.prices = ParameterPrices(layer.parameters)
        return plan
