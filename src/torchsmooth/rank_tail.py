"""A penalty on what a plan will cut, and on nothing else: the bridge between training and compression."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ._checks import check_choice, check_count, check_open_unit, check_values
from ._layers import KINDS, SCHEME_OPTIONS, weight_of
from ._leading import leading_basis
from ._linalg import without_autocast
from ._linear_parts import DENSE_LINEAR
from ._lowrank_layer import LowRankLayer
from ._matricise import FORMS, Matricisation
from ._planner import Filter
from ._registered import checked_names, key_of, name_of, padding_row, penalties_of, unwrapped, without_row
from ._tucker import tucker_core, tucker_factors, tucker_product
from ._whole import check_whole
from ._workpiece import Request
from .adaptive import Adaptation, AdaptivePenalty
from .planning import planned

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ._layers import LayerKind
    from ._matricise import LayerScheme
    from ._terms import FormOption, SchemeOption
    from ._tucker_layout import Layout, Rank
    from ._weight import Weight
    from .plan import CompressionPlan

__all__ = ["RankTail", "TailPlan"]


@dataclass(frozen=True)
class RankTail(AdaptivePenalty):
    r"""Penalise what compression at one ratio will cut, half the squared tail of each weight, and nothing else.

    While the network trains, its ranks are planned for the ratio, by the same planner as that of
    :func:`torchsmooth.svd_compress_`, again and again. What the truncation to those ranks leaves out decays, as under a
    weight decay of this strength; what it keeps is left alone, so that accuracy does not pay for it. At the end the cut
    costs almost nothing. Needs :func:`torchsmooth.attach_`, and is at its best with a schedule that rises slowly, since
    early in the training there is no telling yet what can go.

    .. math:: \tfrac12 \lVert W - P(W) \rVert_F^2, \qquad \nabla = W - P(W)

    P projects as the truncation does, to the planned scheme and rank, with bases held for ``refresh_every`` steps.
    Layers that the plan leaves dense, and those that cannot be compressed, are not penalised, nor are recurrent layers
    and attention's projections of its inputs, which are stored joined (its ``out_proj`` is penalised); the plan counts
    with them. Layers that could carry the penalty and do not are planned to stay dense.

    Args:
        ratio: fraction of all parameters of the model that will be removed, strictly between 0 and 1.
        strength: the factor in front, finite and ≥ 0: the tail loses this fraction a step (times the learning rate of
            plain SGD). The default was chosen at a ratio of 0.8; one of 0.9 takes more, 0.05.
        scheme: as it will be given to ``svd_compress_``, one name.
        form: as it will be given to ``svd_compress_``.
        replan_every: steps from one plan to the next, at least 1.
        refresh_every: steps from one decomposition of the planned layers to the next, at least 1.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: if one is out of range. When attached: as :func:`torchsmooth.plan_compression`.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
        >>> model = torchsmooth.smooth_(model, torchsmooth.RankTail(ratio=0.8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> schedule = torchsmooth.StrengthSchedule(total_steps=1000, begin=0.15, full=0.75)
        >>> handle = torchsmooth.attach_(optimizer, model, schedule=schedule)

    Source: the truncated nuclear norm penalises a tail, too: Hu et al., "Fast and Accurate Matrix Completion via
    Truncated Nuclear Norm Regularization", 2013. To take the tail from a plan for the whole model is the library's own.
    """

    ratio: float
    strength: float
    scheme: SchemeOption
    form: FormOption
    replan_every: int
    refresh_every: int

    def __init__(
        self,
        ratio: float,
        strength: float = 0.01,
        *,
        scheme: SchemeOption = "auto",
        form: FormOption = "auto",
        replan_every: int = 400,
        refresh_every: int = 40,
    ) -> None:
        for name, value in (
            ("ratio", check_open_unit(ratio, "ratio", "the fraction of the parameters to remove")),
            ("strength", strength),
            ("scheme", scheme),
            ("form", form),
            ("replan_every", check_count(replan_every, "replan_every", None, "optimizer steps")),
            ("refresh_every", check_count(refresh_every, "refresh_every", None, "optimizer steps")),
        ):
            object.__setattr__(self, name, value)
        check_choice(scheme, "scheme", SCHEME_OPTIONS)
        check_choice(form, "form", ("auto", *FORMS))
        self.__post_init__()

    def begin(self, model: nn.Module) -> TailPlan:
        """Make a first plan, or say why there can be none."""
        try:
            check_whole(unwrapped(model))
        except ValueError as error:
            raise ValueError(
                "RankTail decomposes whole weights again and again, and this model is sharded or wrapped inside: train "
                "it with DistributedDataParallel, or with a penalty that gathers one weight at a time, such as "
                "NuclearNorm() or Constrained(NuclearNorm())."
            ) from error
        return TailPlan(self, model)


class TailPlan(Adaptation):
    """The plan of a :class:`RankTail` while a network trains, and what projects onto the part that is kept.

    Attributes:
        plan: the plan that was made last; None after a checkpoint was loaded, until the next is made.
    """

    def __init__(self, description: RankTail, model: nn.Module) -> None:
        self._description, self._model = description, unwrapped(model)
        self.plan: CompressionPlan | None = None
        self._planned: set[str] = set()
        self._projections: dict[str, _Projection] = {}
        self._planned_at = self._refreshed_at = 0
        self._replan(0)

    def advance(self, step: int) -> None:
        """Plan or decompose again, where that is due."""
        if step - self._planned_at >= self._description.replan_every:
            self._replan(step)
        elif step - self._refreshed_at >= self._description.refresh_every:
            self._refresh(step)

    @torch.no_grad()
    def term(self, name: str, weight: Weight) -> tuple[Tensor, Tensor]:
        """Return half the squared tail of a weight, and the tail itself."""
        projection = self._projections.get(name)
        tensor = weight.tensor.detach()
        # Of another shape: another layer has taken the place since.
        if projection is None or projection.shape not in (None, tensor.shape):
            return tensor.new_zeros(()), torch.zeros_like(tensor)
        with without_autocast(tensor.device):
            kept = projection(tensor)
            tail = tensor.to(kept.dtype) - kept
        return self._description.strength * tail.square().sum() / 2, self._description.strength * tail

    def state_dict(self) -> dict[str, Any]:
        """Return the ranks and bases in use."""
        names = set(self._tensors().values())
        return {
            "planned_at": self._planned_at,
            "refreshed_at": self._refreshed_at,
            "layers": {
                name: {"scheme": one.scheme, "rank": one.rank, "bases": list(one.bases)}
                for name, one in self._projections.items()
                if name in names  # from others the penalty was removed since
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the ranks and bases of a checkpoint."""
        planned_at, refreshed_at = state["planned_at"], state["refreshed_at"]
        layers, modules = state["layers"], {name: module for module, name in self._tensors().items()}
        names = checked_names(layers.keys(), self._model, self._description) & modules.keys()
        projections = {}
        for name in (one for one in layers if one in names):
            saved = layers[name]
            layout = _layout(modules[name], saved["scheme"])
            projection = _Projection(saved["scheme"], layout, saved["rank"], saved["bases"])
            weight = _trained(modules[name])
            if not projection.fits(weight):
                raise ValueError(
                    f"the state of {self._description} is that of another model: what it keeps of {name!r} does not "
                    f"fit a weight of shape {tuple(weight.shape)}."
                )
            projections[name] = projection
        self._projections = projections
        self._planned_at, self._refreshed_at, self.plan = planned_at, refreshed_at, None

    def _replan(self, step: int) -> None:
        description, tensors = self._description, self._tensors()
        # A layer without the penalty that could have it was left out on purpose; what cannot have it (attention,
        # recurrent layers) will be compressed, too, and its parameters count.
        modules = dict(self._model.named_modules())
        left_out = {one for one in modules.values() if _kind_of(one) is not None or isinstance(one, LowRankLayer)}
        try:
            request = Request.of(
                scheme=description.scheme,
                form=description.form,
                allocation="budget",
                target="params",
                example_inputs=None,
                rank_multiple=None,
                # Under the name of a layer there may be another object while its parent is written in plain layers.
                filter_fn=lambda module, name: (own := modules.get(name, module)) in tensors or own not in left_out,
                calibration=None,
                progress=False,
                left_out=_LEFT_OUT,
            )
            with torch.inference_mode(mode=False), torch.no_grad():
                self.plan = planned(self._model, description.ratio, None, request)
        except ValueError as error:
            if self._projections and set(tensors.values()) != self._planned:
                self._planned_at = step  # of fewer layers than there were: they go on as they were planned
                self._refresh(step)
                return
            reach = f" {_REACH}" if _LEFT_OUT.reason in str(error) else ""
            raise ValueError(f"{description} cannot be planned: {error}{reach}") from error
        self._planned = set(tensors.values())
        self._projections = {}
        for layer in self.plan:
            module = modules.get(layer.name)
            if layer.choice is not None and module in tensors:
                scheme, _, rank = layer.choice
                self._projections[tensors[module]] = _Projection(scheme, _layout(module, scheme), rank, ())
        self._planned_at = step
        self._refresh(step)

    def _refresh(self, step: int) -> None:
        weights = {name: _trained(module) for module, name in self._tensors().items()}
        # The penalty may have been removed from a layer since, or another layer may have taken its place.
        self._projections = {
            name: one
            for name, one in self._projections.items()
            if name in weights and one.shape in (None, weights[name].shape)
        }
        for name, projection in self._projections.items():
            check_values(weights[name], name)
            projection.refresh(weights[name])
        self._refreshed_at = step

    def _tensors(self) -> dict[nn.Module, str]:
        """Find the layers that this penalty is registered on, with the names that their weights go by."""
        return {
            module: name_of(qualified_name, "weight")
            for qualified_name, module in self._model.named_modules()
            if _kind_of(module) is not None
            and key_of(self._description) in map(key_of, penalties_of(module).get("weight", ()))
        }


_LEFT_OUT = Filter(
    "RankTail",
    "RankTail plans without low-rank and parametrized layers, and without Linear layers, convolutions and embeddings "
    "that it is not registered on; NuclearNorm() or another penalty serves low-rank ones.",
)
_REACH = (
    f"({_LEFT_OUT.rule} A training in which it was removed from some goes on from a checkpoint if it is registered on "
    "all of them, attached, given the state, and only then removed.)"
)


class _Projection:
    """What projects one weight onto the part of it that is kept.

    Attributes:
        scheme: of the plan.
        rank: a number, or a pair in scheme ``"tucker"``.
        bases: orthonormal columns: one basis of the small side; in scheme ``"tucker"`` of the outputs and the inputs.
        shape: of the weight; None until bases were taken from one.
    """

    def __init__(self, scheme: LayerScheme, layout: Layout, rank: Rank, bases: Sequence[Tensor]) -> None:
        self.scheme, self.rank, self.bases = scheme, rank, tuple(bases)
        self.shape: torch.Size | None = None
        self._layout: Any = layout

    def refresh(self, weight: Tensor) -> None:
        """Take the leading singular vectors of a weight, in its dtype or a wider one, and on its device."""
        self.shape = weight.shape
        if isinstance(self.rank, tuple):
            outer, _, inner = tucker_factors(self._layout.to_tensors(weight), self.rank)
            bases = [outer, inner.mT]
        else:
            bases = [leading_basis(self._layout.to_matrices(weight), self.rank)]
        # Clones, or the slices would keep the whole bases in memory.
        self.bases = tuple(
            basis.to(weight.device, _working(weight.dtype), copy=True, memory_format=torch.contiguous_format)
            for basis in bases
        )

    def fits(self, weight: Tensor) -> bool:
        """Say whether the bases are those of a weight of this shape."""
        try:
            return self(torch.empty_like(weight, device="meta")).shape == weight.shape
        except (RuntimeError, ValueError, TypeError):
            return False

    def __call__(self, weight: Tensor) -> Tensor:
        """Project a weight."""
        bases = [basis.to(weight.device) for basis in self.bases]
        weight = weight.to(bases[0].dtype)
        if isinstance(self.rank, tuple):
            outer, inner = bases
            kept = tucker_product(outer, tucker_core(self._layout.to_tensors(weight), outer, inner), inner.mT)
        else:
            (basis,), matrices = bases, self._layout.to_matrices(weight)
            wide = self._layout.rows <= self._layout.columns
            kept = basis @ (basis.mT @ matrices) if wide else (matrices @ basis) @ basis.mT
        projected: Tensor = self._layout.to_weight(kept)
        return projected


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _trained(module: nn.Module) -> Tensor:
    """Return the weight as a penalty sees it: without the row that pads an embedding, which is never trained."""
    weight = weight_of(module).detach()
    return without_row(weight, padding_row(module, len(weight)))


def _kind_of(module: nn.Module) -> LayerKind | None:
    """Return how a layer is compressed; that of attention's outputs goes as the plain one that it is planned as."""
    return KINDS.get(nn.Linear if type(module) in DENSE_LINEAR else type(module))


def _layout(module: nn.Module, scheme: LayerScheme) -> Layout:
    kind = _kind_of(module)
    if kind is None:  # _tensors lets no such layer through
        raise TypeError(f"{type(module).__name__} is never planned.")
    layout = kind.layouts(module)[scheme]
    if getattr(module, "padding_idx", None) is not None and isinstance(layout, Matricisation):
        return replace(layout, in_channels=layout.in_channels - 1)
    return layout
