"""Plans for whole models: which layer gets which scheme, form and rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import _plan_file
from ._apply import Replacements, placed_, replacements_for
from ._atomic_file import write_text
from ._calibration import Calibration
from ._checks import check_module, checked_path, describe, quoted
from ._expansion import expanded_
from ._latency import compare_times
from ._layers import count_parameters, shape_of
from ._macs import count_macs
from ._ranks import ALONE
from ._running import as_inputs
from ._swap import swap_
from ._table import format_rank, format_table
from ._undo import Undo
from .layer_plan import LayerPlan
from .report import CompressionReport, Totals, choice_cell, layer_report, layer_table, removed_share, without_refit

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

    from ._expansion import Expansion
    from ._layers import FoundLayer
    from ._ranks import Team
    from ._running import Inputs
    from ._targets import Target
    from .report import LayerReport

__all__ = ["CompressionPlan"]

_LEFT_WHOLE, _NOT_PLANNED = "left whole by the plan", "not in the plan"


@dataclass(frozen=True, eq=False)
class CompressionPlan:
    """A plan for a whole model; ``print`` shows a table, layers can be edited by name, and files keep it.

    It holds no weights, but what was learnt of them: the error of each rank or pair of ranks and, in plans that were
    just made, bases: the singular vectors of the small side of each matrix (at once where there is only one scheme and
    for scheme ``"tucker"``, otherwise when the plan is first applied), which the plans of a sweep share. All that is in
    float64 on the CPU: a basis is at most twice as large as the weight in float32, the tables of pairs for a kernel of
    k entries about 6 / k times. Pickles and files leave the bases out.

    Two plans are equal if they plan the same: layers of the same names, types and shapes, with the same choices.

    Attributes:
        layers: one entry for every module with a weight, also for those that stay dense.
        parameters_before: all parameters of the model, shared ones counted once.
        asked: what was asked for, in words.
        target: what the ratio was a fraction of: ``"params"``, ``"macs"`` or ``"latency"``.
        macs_before: multiply-accumulates of the model for the example inputs; None for another target.
        latency_before: seconds that the model took for them; None for another target.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> plan = torchsmooth.plan_compression(model, ratio=0.5)
        >>> plan["0"].rank = 8
        >>> again = torchsmooth.CompressionPlan.from_json(plan.to_json())
        >>> again == plan
        True
        >>> report = again.apply_(model)
        >>> report["0"].rank, model[0].down.weight.shape
        (8, torch.Size([8, 64]))
    """

    layers: tuple[LayerPlan, ...]
    parameters_before: int
    asked: str
    target: Target = "params"
    macs_before: int | None = None
    latency_before: float | None = None

    @property
    def parameters_after(self) -> int:
        """All parameters of the model that comes out."""
        return self.parameters_before - sum(one.parameters_before - one.parameters_after for one in self.layers)

    @property
    def macs_after(self) -> int | None:
        """Multiply-accumulates of the model that comes out; None if the target is another."""
        saved = self._saved()
        return None if self.macs_before is None or saved is None else self.macs_before - saved

    @property
    def latency_after(self) -> float | None:
        """Seconds that the model will take, by the times of its layers alone.

        None if the target is another, or an edited layer has a rank that was not timed.
        """
        saved = self._saved()
        return None if self.latency_before is None or saved is None else self.latency_before - saved / 1e9

    @property
    def ratio(self) -> float:
        """Fraction of the parameters that is removed."""
        return removed_share(self.parameters_before, self.parameters_after)

    def _saved(self) -> int | None:
        costs = [(one.prices.dense, one.cost_after) for one in self.layers if one.options]
        saved = [before - after for before, after in costs if after is not None]
        return sum(saved) if len(saved) == len(costs) else None

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r} in this plan; it has {quoted([one.name for one in self.layers])}.")

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __eq__(self, other: object) -> bool:
        return self.layers == other.layers if isinstance(other, CompressionPlan) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # its layers can be edited

    @property
    def totals(self) -> Totals:
        """Parameters, multiply-accumulates and time, before and after."""
        return Totals(
            self.parameters_before,
            self.parameters_after,
            self.macs_before,
            self.macs_after,
            self.latency_before,
            self.latency_after,
        )

    def __str__(self) -> str:
        return f"{layer_table(self.layers)}\n{self.totals.line(self.asked)}, planned"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain dictionaries, lists and numbers, ready for JSON; :meth:`to_json` can be read back.

        Returns:
            What was asked for, the totals, and the choice and predicted error of each layer.
        """
        fields = ("name", "type", "scheme", "form", "rank", "full_rank", "parameters_before", "parameters_after")
        return {
            "asked": self.asked,
            **self.totals.to_dict(),
            "layers": [
                {field: getattr(one, field) for field in fields}
                | {"shape": list(one.shape), "relative_error": one.relative_error, "reason": one.reason}
                for one in self.layers
            ],
        }

    def to_json(self) -> str:
        """Write the plan as JSON: all that printing, editing and applying it need, but no weights.

        Returns:
            The text, which :meth:`from_json` reads.

        Example:
            >>> import torch, torchsmooth
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
            >>> torchsmooth.plan_compression(model, ratio=0.5).to_json()[:45]
            '{"format": "torchsmooth plan", "version": 1, '
        """
        others = ("asked", "target", "parameters_before", "macs_before", "latency_before")
        return _plan_file.to_text(self.layers, {name: getattr(self, name) for name in others})

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Read a plan from JSON.

        The errors come with six significant digits, those of pairs of ranks only where no cheaper pair is as good: any
        other pair shows that of a smaller one. What was decomposed does not come along, so that applying the plan
        decomposes each layer once.

        Args:
            text: what :meth:`to_json` wrote, by hand or by this version of the library.

        Returns:
            A plan equal to the one written.

        Raises:
            TypeError: if ``text`` is not a string.
            ValueError: if it is not JSON, not a plan, of another version, or a field is missing or wrong; the message
                names the field.
        """
        return cls(**_plan_file.from_text(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, as JSON; a file of that name is replaced in one step, or left as it is.

        Args:
            path: where to.

        Raises:
            TypeError: if ``path`` is no path.
            OSError: if it cannot be written.
        """
        write_text(checked_path(path, "path"), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CompressionPlan:
        """Read a plan from a file.

        Args:
            path: a file that :meth:`save` wrote.

        Returns:
            A plan equal to the one saved.

        Raises:
            TypeError: if ``path`` is no path.
            OSError: if it cannot be read.
            ValueError: as :meth:`from_json`; the message names the file.

        Example:
            >>> import pathlib, tempfile, torch, torchsmooth
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
            >>> plan = torchsmooth.plan_compression(model, ratio=0.5)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     plan.save(pathlib.Path(folder) / "plan.json")
            ...     torchsmooth.CompressionPlan.load(pathlib.Path(folder) / "plan.json") == plan
            True
        """
        return cls(**_plan_file.read(path))

    def compare(self, other: CompressionPlan) -> str:
        """Lay out where two plans differ.

        Args:
            other: a plan for the same model, or one like it.

        Returns:
            A table of the layers with different choices, and the totals of both plans.

        Raises:
            TypeError: if ``other`` is not a plan.

        Example:
            >>> import torch, torchsmooth
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
            >>> less, more = torchsmooth.sweep(model, [0.3, 0.6])
            >>> print(less.compare(less))
            The plans choose the same for all 2 layers.
            >>> "0 " in less.compare(more) and "the other" in less.compare(more)
            True
        """
        if not isinstance(other, CompressionPlan):
            raise TypeError(f"other must be a CompressionPlan, got {describe(other)}.")
        if self == other:
            return f"The plans choose the same for all {len(self)} layers."
        here, there = ({layer.name: layer for layer in plan} for plan in (self, other))
        rows = []
        for name in here | there:
            pair = [plan.get(name) for plan in (here, there)]
            if pair[0] != pair[1]:
                cells = [cell for one in pair for cell in _compared(one)]
                rows.append((name or "(the model)", *cells))
        header = ("layer", "this plan", "parameters", "rel. error", "the other", "parameters", "rel. error")
        table = format_table(header, rows, right=(2, 3, 5, 6))
        same = f"{len(here | there) - len(rows)} layers are alike."
        lines = [f"{who}: {plan.totals.line(plan.asked)}" for who, plan in (("this plan", self), ("the other", other))]
        return "\n".join([table, same, *lines])

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def apply_(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        calibration: Iterable[Any] | None = None,
        progress: bool | None = None,
    ) -> CompressionReport:
        """Compress a model as planned, in place: the model planned for, or a copy of it with weights of its own.

        Args:
            model: a model with the layers that the plan compresses, dense, under the same names. Others stay dense, and
                are listed as the model has them: another head may take the place of one that the plan leaves dense.
            example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments: inputs to count
                multiply-accumulates or to measure time on, before and after, if that is the plan's target. Without them
                the report has the planned multiply-accumulates, and no times.
            calibration: a few unlabelled batches, as for :func:`torchsmooth.svd_compress_`, to fit the factors, the
                biases and the BatchNorm statistics to; without, the factors are truncated SVDs of the
                weights, in scheme ``"tucker"`` refined higher-order ones.
            progress: whether to show progress; None: on a terminal, when it takes more than two seconds.

        Returns:
            The report.

        Raises:
            TypeError: if ``model`` is not a module, or ``example_inputs`` or ``calibration`` of a wrong type.
            ValueError: if a layer to compress is missing, of another type or shape, cannot be compressed or would
                grow, or its weight holds NaN or infinite values; if there are no batches, or they bring such values.
                The model is unchanged then.
        """
        check_module(model)
        inputs = None if example_inputs is None else as_inputs(example_inputs)
        return self._apply_(model, inputs, Calibration.of(calibration, progress))

    def _apply_(
        self, model: nn.Module, inputs: Inputs | None, calibration: Calibration | None, team: Team = ALONE
    ) -> CompressionReport:
        """Compress a model as planned, together with the other ranks: all of them, or none."""
        with expanded_(model, self._refusal) as expansion:
            made = replacements_for(self.layers, model, expansion, calibration, team)
            measured = team.first(lambda: self._measured(model, made.layers, inputs, expansion))
            placed_(model, made, expansion.undo)
            expansion.keep_(made.layers)
            report = CompressionReport(
                layers=tuple(_report(layer, made) for layer in self._reported(made.found)),
                parameters_before=expansion.parameters,
                parameters_after=count_parameters(model),
                asked=self.asked if calibration is not None else without_refit(self.asked),
                **measured,
            )
            team.gather(None)  # raises where another rank could not do the same
            expansion.finish_()
        return report

    def _refusal(self, _: nn.Module, name: str) -> str:
        """Say why a composite layer of the model is not to be written in plain ones: the plan leaves it whole."""
        parts = [one for one in self.layers if f"{one.name}.".startswith(f"{name}.")]
        if not parts:
            return _NOT_PLANNED
        return "" if any(one.choice is not None for one in parts) else _LEFT_WHOLE

    def _reported(self, found: Iterable[FoundLayer]) -> list[LayerPlan]:
        """Return the layers of the plan, dense ones as the model has them, and those that it does not know."""
        there, known = {one.name: one for one in found}, {layer.name for layer in self.layers}
        whole = tuple(f"{one.name}." for one in there.values() if one.reason == _LEFT_WHOLE)
        layers = []
        for layer in self.layers:
            if layer.choice is None and layer.name in there:
                layers.append(_dense(there[layer.name], layer.reason))
            elif layer.choice is not None or layer.name.startswith(whole):
                layers.append(layer)
        new = [one for one in there.values() if one.name not in known and one.reason != _LEFT_WHOLE]
        return layers + [_dense(one, one.reason or _NOT_PLANNED) for one in new]

    def _measured(
        self,
        model: nn.Module,
        replacements: Mapping[nn.Module, nn.Module],
        inputs: Inputs | None,
        expansion: Expansion,
    ) -> dict[str, Any]:
        """Count or time the model before and after; it is the dense one again when this returns."""
        if self.target == "macs":
            if inputs is None:
                return {"macs_before": self.macs_before, "macs_after": self.macs_after}
            before = count_macs(model, inputs)
            with Undo() as undo:
                undo.add(swap_, model, {new: old for old, new in replacements.items()})
                swap_(model, replacements)
                after = count_macs(model, inputs)
            return {"macs_before": before, "macs_after": after}
        if self.target == "latency" and inputs is not None:
            earlier, later = compare_times(model, inputs, replacements, expansion)
            return {"latency_before": earlier, "latency_after": later}
        return {}


def _dense(found: FoundLayer, reason: str) -> LayerPlan:
    layer = LayerPlan(found.name, found.type, shape_of(found.module), {}, reason)
    layer.parameters_before = found.parameters
    return layer


def _compared(layer: LayerPlan | None) -> tuple[str, str, str]:
    if layer is None:
        return "–", "–", "–"
    error = "–" if layer.choice is None else f"{layer.relative_error:.4f}"
    rank = "" if layer.choice is None else f", rank {format_rank(layer.rank)}"
    return f"{choice_cell(layer)}{rank}", f"{layer.parameters_after:,}", error


def _report(layer: LayerPlan, made: Replacements) -> LayerReport:
    error, refitted = made.errors.get(layer.name, 0.0), made.refitted
    if refitted is None:
        return layer_report(layer, error)
    return layer_report(layer, error, refitted.errors.get(layer.name), refitted.notes.get(layer.name, ""))
