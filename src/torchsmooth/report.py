"""What was done to each layer: the value that ``svd_compress_`` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ._checks import quoted
from ._table import format_milliseconds, format_rank, format_shape, format_share, format_table

if TYPE_CHECKING:
    from .layer_plan import LayerPlan

__all__ = ["CompressionReport", "LayerReport"]

# What a plan that was made with calibration data says after what was asked for.
RANKS_CALIBRATED, BEFORE_REFIT = ", ranks calibrated", " before the refit to data"

_HEADER = ("layer", "shape", "scheme", "rank", "parameters", "rel. error", "note")


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: qualified name in the model.
        type: class name before.
        shape: shape of the weight before.
        scheme: ``"channel"``, ``"input"``, ``"spatial"``, ``"spatial_transposed"`` or ``"tucker"``; None if it stayed
            dense.
        form: how it is stored: ``"factored"``, ``"pivoted"`` or ``"dense"``.
        rank: rank kept, in each group, or a pair (r_in, r_out); None if it stayed dense.
        full_rank: rank from which on nothing is lost, in that scheme; None if it stayed dense.
        parameters_before: entries of the weight.
        parameters_after: entries of the factors, or of the weight if it stayed dense.
        relative_error: ‖W − Ŵ‖_F / ‖W‖_F, measured on the factors as they are stored; 0 if it stayed dense.
        reason: why it stayed dense; empty otherwise.
        output_error: with calibration data: √(E‖y − ŷ‖² / E‖y‖²) at the layer's output y, without what a bias or a
            norm takes away; the inputs of ŷ are those of the compressed network. None if it was not fitted to data.
        note: what else there is to say of a low-rank layer.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    scheme: str | None
    form: str
    rank: int | tuple[int, int] | None
    full_rank: int | tuple[int, int] | None
    parameters_before: int
    parameters_after: int
    relative_error: float
    reason: str
    output_error: float | None = None
    note: str = ""


def layer_report(
    planned: LayerPlan, relative_error: float, output_error: float | None = None, note: str = ""
) -> LayerReport:
    """Report what became of a layer that was treated as planned."""
    return LayerReport(
        name=planned.name,
        type=planned.type,
        shape=planned.shape,
        scheme=planned.scheme,
        form=planned.form,
        rank=planned.rank,
        full_rank=planned.full_rank,
        parameters_before=planned.parameters_before,
        parameters_after=planned.parameters_after,
        relative_error=relative_error,
        reason=planned.reason,
        output_error=output_error,
        note=note,
    )


def choice_cell(layer: Any) -> str:
    """Name the scheme of a layer of a plan or a report, and its form where it is not the ordinary one."""
    if layer.scheme is None:
        return "dense"
    return f"{layer.scheme}, {layer.form}" if layer.form != "factored" else str(layer.scheme)


def layer_row(layer: Any, *, with_output: bool) -> tuple[str, ...]:
    """Lay out one layer of a plan or a report as a row of its table."""
    dense, output = layer.scheme is None, getattr(layer, "output_error", None)
    before, after = f"{layer.parameters_before:,}", f"{layer.parameters_after:,}"
    return (
        layer.name or "(the model)",
        format_shape(layer.shape),
        "–" if dense else choice_cell(layer),
        "–" if dense else f"{format_rank(layer.rank)} / {format_rank(layer.full_rank)}",
        before if dense else f"{before} → {after}",
        "–" if dense else f"{layer.relative_error:.4f}",
        *([] if not with_output else ["–" if output is None else f"{output:.4f}"]),
        f"dense: {layer.reason}" if dense else getattr(layer, "note", ""),
    )


def layer_table(layers: Any) -> str:
    """Lay out the layers of a plan or a report as a table."""
    with_output = any(getattr(layer, "output_error", None) is not None for layer in layers)
    header = (*_HEADER[:-1], "out. error", _HEADER[-1]) if with_output else _HEADER
    rows = [layer_row(layer, with_output=with_output) for layer in layers]
    return format_table(header, rows, right=(3, 4, 5, 6) if with_output else (3, 4, 5))


def without_refit(asked: str) -> str:
    """Turn what a plan says of itself into what is true where it was applied without data."""
    if not asked.endswith((RANKS_CALIBRATED, BEFORE_REFIT)):
        return asked
    return f"{asked.removesuffix(BEFORE_REFIT)}, factors not fitted to data"


def removed_share(before: int, after: int) -> float:
    """Return what share is gone, rounded once: 1 - after / before may come out below a ratio that is met exactly."""
    return (before - after) / before


class Totals(NamedTuple):
    """What a whole model costs before and after; None where that was not counted."""

    parameters_before: int
    parameters_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    latency_before: float | None = None
    latency_after: float | None = None

    def line(self, asked: str) -> str:
        """Sum a plan or a report up in a line."""
        before, after = self.parameters_before, self.parameters_after
        text = f"{before:,} → {after:,} parameters ({format_share(after, before)}; {asked})"
        if self.macs_before is not None and self.macs_after is not None:
            text += f", {self.macs_before:,} → {self.macs_after:,} multiply-accumulates"
            text += f" ({format_share(self.macs_after, self.macs_before)})"
        if self.latency_before is not None and self.latency_after is not None:
            text += f", {format_milliseconds(self.latency_before)} → {format_milliseconds(self.latency_after)} ms"
            text += f" ({format_share(self.latency_after, self.latency_before)})"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return all of it by name, with the ratio of the parameters."""
        return {**self._asdict(), "ratio": removed_share(self.parameters_before, self.parameters_after)}


@dataclass(frozen=True)
class CompressionReport:
    """What :func:`torchsmooth.svd_compress_` did; ``print`` shows a table.

    Attributes:
        layers: one entry for every module with a weight, also for those that stayed dense.
        parameters_before: all parameters of the model before, shared ones counted once.
        parameters_after: all parameters of the model that came out, counted on it.
        asked: what was asked for, in words.
        macs_before: multiply-accumulates for the example inputs before; None if they were not counted.
        macs_after: those of the model that came out.
        latency_before: seconds that the model took for them before, measured; None if that was not.
        latency_after: seconds that the model that came out took, measured in turn with the dense one.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> report = torchsmooth.svd_compress_(model, ratio=0.5)
        >>> report.parameters_before, report.ratio >= 0.5, report["0"].form
        (8320, True, 'pivoted')
    """

    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    asked: str
    macs_before: int | None = None
    macs_after: int | None = None
    latency_before: float | None = None
    latency_after: float | None = None

    @property
    def ratio(self) -> float:
        """Fraction of the parameters that was removed."""
        return removed_share(self.parameters_before, self.parameters_after)

    @property
    def compressed(self) -> tuple[LayerReport, ...]:
        """The layers that became low-rank."""
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @property
    def totals(self) -> Totals:
        """Parameters, multiply-accumulates and time, before and after."""
        return Totals(*(getattr(self, name) for name in Totals._fields))

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r} in this report; it has {quoted([one.name for one in self.layers])}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dictionaries, lists and numbers, ready for JSON."""
        return {
            "asked": self.asked,
            **self.totals.to_dict(),
            "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers],
        }

    def __str__(self) -> str:
        counts = f"{len(self.compressed)} of {len(self.layers)} layers low-rank"
        return f"{layer_table(self.layers)}\n{self.totals.line(self.asked)}, {counts}"
