"""What was done to each layer: the value that ``svd_compress_`` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ._table import format_shape, format_share, format_table

__all__ = ["CompressionReport", "LayerReport"]

_HEADER = ("layer", "shape", "scheme", "rank", "parameters", "rel. error", "note")


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: qualified name in the model.
        type: class name before.
        shape: shape of the weight before.
        scheme: ``"channel"``, ``"input"``, ``"spatial"`` or ``"spatial_transposed"``; None if it stayed dense.
        form: how it is stored: ``"factored"`` or ``"dense"``.
        rank: rank kept, in each group; None if it stayed dense.
        full_rank: rank from which on nothing is lost, in that scheme; None if it stayed dense.
        parameters_before: entries of the weight.
        parameters_after: entries of the factors, or of the weight if it stayed dense.
        relative_error: ‖W − Ŵ‖_F / ‖W‖_F, measured on the factors as they are stored; 0 if it stayed dense.
        reason: why it stayed dense; empty otherwise.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    scheme: str | None
    form: str
    rank: int | None
    full_rank: int | None
    parameters_before: int
    parameters_after: int
    relative_error: float
    reason: str


def layer_row(layer: Any) -> tuple[str, ...]:
    """Lay out one layer of a plan or a report as a row of its table."""
    dense = layer.scheme is None
    before, after = f"{layer.parameters_before:,}", f"{layer.parameters_after:,}"
    return (
        layer.name or "(the model)",
        format_shape(layer.shape),
        layer.scheme or "–",
        "–" if dense else f"{layer.rank} / {layer.full_rank}",
        before if dense else f"{before} → {after}",
        "–" if dense else f"{layer.relative_error:.4f}",
        f"dense: {layer.reason}" if dense else "",
    )


def layer_table(layers: Any) -> str:
    """Lay out the layers of a plan or a report as a table."""
    return format_table(_HEADER, [layer_row(layer) for layer in layers], right=(3, 4, 5))


def totals_line(before: int, after: int, asked: str) -> str:
    """Sum a plan or a report up in a line."""
    return f"{before:,} → {after:,} parameters ({format_share(after, before)}; {asked})"


@dataclass(frozen=True)
class CompressionReport:
    """What :func:`torchsmooth.svd_compress_` did; ``print`` shows a table.

    Attributes:
        layers: one entry for every module with a weight, also for those that stayed dense.
        parameters_before: all parameters of the model before, shared ones counted once.
        parameters_after: all parameters of the model that came out, counted on it.
        asked: what was asked for, in words.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> report = torchsmooth.svd_compress_(model, ratio=0.5)
        >>> report.parameters_before, report.ratio >= 0.5, report["0"].form
        (8320, True, 'factored')
    """

    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    asked: str

    @property
    def ratio(self) -> float:
        """Fraction of the parameters that was removed."""
        return 1 - self.parameters_after / self.parameters_before

    @property
    def compressed(self) -> tuple[LayerReport, ...]:
        """The layers that became low-rank."""
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r} in this report.")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dictionaries, lists and numbers, ready for JSON."""
        return {
            "asked": self.asked,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "ratio": self.ratio,
            "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers],
        }

    def __str__(self) -> str:
        totals = totals_line(self.parameters_before, self.parameters_after, self.asked)
        counts = f"{len(self.compressed)} of {len(self.layers)} layers low-rank"
        return f"{layer_table(self.layers)}\n{totals}, {counts}"
