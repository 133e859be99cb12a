"""What the weights of a model look like while it trains: singular values and roughness, as data and as a plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import plotting
from ._checks import (
    check_choice,
    check_filter,
    check_initialised,
    check_module,
    check_open_unit,
    check_values,
    describe,
    quoted,
)
from ._layer_spectrum import RATIO_MEANS, LayerSpectrum, measured
from ._matricise import SCHEMES, Scheme, scheme_for
from ._reading import find_weights, geometry_of, read_weight
from ._table import format_shape, format_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from os import PathLike

    from matplotlib.figure import Figure
    from torch import nn

__all__ = ["LayerSpectrum", "Spectrum", "plot_spectra", "spectrum"]

_HEADER = ("layer", "shape", "effective rank", "stable rank", "energy", "1st diff.", "2nd diff.", "note")


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What :func:`torchsmooth.spectrum` saw; ``print`` shows a table, iteration and ``[name]`` give the layers.

    Attributes:
        layers: one :class:`LayerSpectrum` for every weight, in the order of ``model.named_modules()``.
        ratio: the fraction of its parameters that each layer would lose where an energy is given without a ratio.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.ReLU())
        >>> _ = torch.nn.init.eye_(model[0].weight)
        >>> seen = torchsmooth.spectrum(model, ratio=0.5)
        >>> round(seen["0"].effective_rank, 6), seen["0"].rank_at(0.5), round(seen.energy, 6)
        (8.0, 2, 0.25)
    """

    layers: tuple[LayerSpectrum, ...]
    ratio: float

    @property
    def energy(self) -> float:
        """Mean share of ‖W‖_F² that the layers keep when each is factored to ``ratio`` fewer parameters.

        Weighted by the number of weights of each layer.
        """
        return self._mean([layer.energy(self.ratio) for layer in self.layers])

    @property
    def relative_rank(self) -> float:
        """Mean of effective rank over full rank, weighted by the number of weights of each layer."""
        return self._mean([layer.relative_rank for layer in self.layers])

    def _mean(self, values: list[float]) -> float:
        sizes = [layer.singular_values.shape[0] * layer.matrix_shape[0] * layer.matrix_shape[1] for layer in self]
        total = sum(sizes)
        return sum(size * value for size, value in zip(sizes, values, strict=True)) / total if total else 0.0

    def __getitem__(self, name: str) -> LayerSpectrum:
        for layer in self.layers:
            if name == layer.name or name in layer.tied:
                return layer
        raise KeyError(f"no layer {name!r} in this spectrum: it has {quoted([one.name for one in self.layers])}.")

    def __iter__(self) -> Iterator[LayerSpectrum]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def scalars(self, prefix: str = "torchsmooth") -> dict[str, float]:
        """Return what is worth logging, by tag, for ``SummaryWriter.add_scalar`` or ``wandb.log``.

        Args:
            prefix: what every tag begins with; empty for none.

        Returns:
            ``{prefix}/energy`` and ``{prefix}/relative_rank`` of the whole model, and ``{prefix}.{what}/{layer}``
            for each layer and each of energy, effective_rank, stable_rank, first_difference and second_difference. What
            comes before the slash is a section of its own in TensorBoard: one for each measure, all layers in it.

        Raises:
            TypeError: if ``prefix`` is not a string.
        """
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string, got {describe(prefix)}.")
        section, start = (f"{prefix}/", f"{prefix}.") if prefix else ("", "")
        found = {f"{section}energy": self.energy, f"{section}relative_rank": self.relative_rank}
        for what in ("energy", "effective_rank", "stable_rank", "first_difference", "second_difference"):
            for layer in self.layers:
                value = layer.energy(self.ratio) if what == "energy" else getattr(layer, what)
                found[f"{start}{what}/{layer.name or 'model'}"] = value
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the spectrum as plain dictionaries, lists and numbers, ready for JSON."""
        return {
            "ratio": self.ratio,
            "energy": self.energy,
            "relative_rank": self.relative_rank,
            "layers": [layer.to_dict(self.ratio) for layer in self.layers],
        }

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draw the spectrum; see :func:`torchsmooth.plot_spectra`, which puts several side by side.

        Args:
            path: where to write the picture, in the format of its suffix; None writes nothing.

        Returns:
            The figure, which pyplot knows nothing of.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        return plot_spectra({"": self}, path)

    def __str__(self) -> str:
        rows = [_row(layer, self.ratio) for layer in self.layers]
        count = f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)}"
        return (
            f"{format_table(_HEADER, rows, right=range(2, 7))}\n"
            f"{count}: effective rank {100 * self.relative_rank:.1f} % of full, energy {self.energy:.4f} "
            f"with {100 * self.ratio:g} % fewer parameters in each"
        )


def _row(layer: LayerSpectrum, ratio: float) -> tuple[str, ...]:
    return (
        layer.name or "(the model)",
        format_shape(layer.shape),
        f"{layer.effective_rank:.1f} / {layer.full_rank}",
        f"{layer.stable_rank:.1f}",
        f"{layer.energy(ratio):.4f}",
        f"{layer.first_difference:.3f}",
        f"{layer.second_difference:.3f}",
        f"tied: {', '.join(layer.tied)}" if layer.tied else "",
    )


def spectrum(
    model: nn.Module,
    *,
    ratio: float = 0.8,
    scheme: Scheme = "channel",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Spectrum:
    """Look at the weights of a model: singular values, effective rank, energy and roughness of each layer.

    What a user watches while training: a smoothness penalty works if the energy rises. The model, its gradients, its
    mode and the random state stay as they are. Layers are decomposed one at a time, in float64 and on their own device.
    Looked at are the weights that :func:`torchsmooth.smooth_` finds (Linear, Conv, ConvTranspose, Embedding), each
    weight once however often it is used; of an embedding all rows, the one of ``padding_idx`` too. Weights that are
    computed (parametrized, pruned, normed) are computed from what the model holds now.

    Args:
        model: a model, in either mode; wrapped (DistributedDataParallel, torch.compile) or not.
        ratio: the fraction of its parameters that each layer would lose by being factored, 0 < ratio < 1, the same for
            all; the energy is the share of ‖W‖² that would be left.
        scheme: which matricisation of a convolution: ``"channel"``, ``"input"``, ``"spatial"`` or
            ``"spatial_transposed"``, as in :func:`torchsmooth.functional.nuclear_norm`. The spatial ones need two
            kernel axes; every other weight uses ``"channel"`` then.
        filter_fn: ``filter_fn(module, qualified_name) -> bool``, called for each supported layer; False leaves it out.
            The names are those of the result, without the ``_orig_mod`` of torch.compile.

    Returns:
        A :class:`Spectrum`: its singular values are float64 tensors on the CPU.

    Raises:
        TypeError: if an argument is of a wrong type, or a weight is not of a real floating dtype.
        ValueError: if ``ratio`` is not between 0 and 1, the scheme is unknown, no layer was found, or a weight is not
            initialised, without values (meta device), sharded, NaN or infinite; the layer is named.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
        >>> _ = torch.nn.init.eye_(model[0].weight)
        >>> print(torchsmooth.spectrum(model, ratio=0.5))
        layer  shape  effective rank  stable rank  energy  1st diff.  2nd diff.  note
        -----  -----  --------------  -----------  ------  ---------  ---------  ----
        0      4×4           4.0 / 4          4.0  0.2500      3.000      6.000
        1 layer: effective rank 100.0 % of full, energy 0.2500 with 50 % fewer parameters in each

    Source: effective rank: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007;
    energy: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
    """
    check_module(model)
    ratio = check_open_unit(ratio, "ratio", RATIO_MEANS)
    check_choice(scheme, "scheme", SCHEMES)
    check_filter(filter_fn)
    check_initialised(model)
    found = find_weights(model, filter_fn)
    if not found:
        left_out = " that filter_fn keeps" if filter_fn is not None else ""
        raise ValueError(
            f"the model must have a Linear, Conv, ConvTranspose or Embedding layer{left_out}, got a "
            f"{type(model).__name__} with none: torch.linalg.svdvals serves for other tensors."
        )
    layers = []
    for one in found:
        weight = read_weight(one.module, f"layer {one.name!r}" if one.name else "the model")
        check_values(weight, one.name or "(the model)")
        groups, transposed = geometry_of(one.module)
        known = measured(weight, scheme_for(scheme, weight.dim()), groups, transposed=transposed)
        layers.append(LayerSpectrum(one.name, type(one.module).__name__, tied=tuple(one.tied), **known))
    return Spectrum(tuple(layers), ratio)


def plot_spectra(spectra: Mapping[str, Spectrum], path: str | PathLike[str] | None = None) -> Figure:
    """Draw spectra side by side: say, of a network trained plainly and of one trained smooth.

    For each spectrum a panel with a line for each layer: the singular values relative to the largest, over their number
    as a fraction of the full rank, dark for the first layers and light for the last. Beside them, for each layer by
    name, bars of the effective rank, the energy at the ratio of the spectra, and the first differences. Layers that
    only some of the spectra have are drawn for those.

    Args:
        spectra: one or more, by what to call them; all with the same ratio.
        path: where to write the picture, in the format of its suffix; None writes nothing.

    Returns:
        The figure, which pyplot knows nothing of.

    Raises:
        TypeError: if ``spectra`` is not a mapping from strings to ``Spectrum``.
        ValueError: if it is empty, or the ratios differ.
        ImportError: if matplotlib is not installed.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> before = torchsmooth.spectrum(model)
        >>> _ = torchsmooth.svd_compress_(model, ratio=0.3)  # instead of training
        >>> figure = torchsmooth.plot_spectra({"before": before, "after": torchsmooth.spectrum(model)})
        >>> len(figure.axes)  # a panel for each, and the three of bars
        5
    """
    plotting.check_mapping(spectra, "spectra", "Spectrum")
    for name, one in spectra.items():
        if not isinstance(one, Spectrum):
            raise TypeError(f"spectra must be what spectrum(model) returns, got for {name!r} {describe(one)}.")
    ratios = sorted({one.ratio for one in spectra.values()})
    if len(ratios) != 1:
        raise ValueError(
            f"spectra must all be of one ratio to be compared, got {ratios}: call spectrum(model, ratio=...) anew."
        )
    return plotting.draw_spectra({name: one.layers for name, one in spectra.items()}, ratios[0], path)
