"""Pictures of spectra and of weights. Only here is matplotlib imported, when the first picture is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ._checks import describe
from ._linalg import working_copy
from ._matricise import channel_view
from ._reading import check_weight, geometry_of, read_weight
from ._registered import unwrapped

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ._layer_spectrum import LayerSpectrum

__all__ = ["plot_weights"]

_DOTS_PER_INCH = 100
_TALLEST = 40.0  # inches: a picture of hundreds of layers must still fit into the limits of image formats
_FLOOR = 1e-4  # relative singular values below this are cut off: they are far below what any compression keeps
# What a panel of bars shows, and where its axis ends.
_BARS: tuple[tuple[str, Callable[[LayerSpectrum, float], float], float | None], ...] = (
    ("effective rank / full rank", lambda layer, _: layer.relative_rank, 1.0),
    ("energy at −{ratio:g} %", lambda layer, ratio: layer.energy(ratio), 1.0),
    ("first differences", lambda layer, _: layer.first_difference, None),
)


def _new_figure(width: float, height: float) -> Figure:
    """Make a figure of its own: pyplot would keep a reference to it, and might open a window."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib, which is not installed: pip install 'torchsmooth[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _finished(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=_DOTS_PER_INCH)
    return figure


def check_mapping(value: object, name: str, to: str) -> None:
    """Refuse what does not map names to what is drawn under them."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a mapping from names to {to}, such as {{'plain': ...}}, got {describe(value)}."
        )
    if not value:
        raise ValueError(f"{name} must be a mapping from names to {to}, such as {{'plain': ...}}, got an empty one.")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"the names in {name} must be strings, got {describe(key)}.")


def draw_spectra(
    spectra: Mapping[str, Sequence[LayerSpectrum]], ratio: float, path: str | PathLike[str] | None
) -> Figure:
    """Draw what :func:`torchsmooth.plot_spectra` says."""
    names = list(dict.fromkeys(layer.name for layers in spectra.values() for layer in layers))
    height = 1.2 + max(2.4, (0.1 + 0.07 * len(spectra)) * len(names))
    figure = _new_figure(3.0 * len(spectra) + 8.0, min(_TALLEST, height))
    grid = figure.add_gridspec(1, len(spectra) + len(_BARS), width_ratios=[3] * len(spectra) + [2] * len(_BARS))
    shades = _shades(len(names))
    first: Axes | None = None
    for column, (title, layers) in enumerate(spectra.items()):
        axes = figure.add_subplot(grid[column], sharey=first)
        _draw_lines(axes, layers, dict(zip(names, shades, strict=True)))
        axes.set(title=title, xlabel="rank / full rank", ylabel="" if first else "singular value / the largest")
        first = first or axes
    first = None
    for column, (what, value, end) in enumerate(_BARS, start=len(spectra)):
        axes = figure.add_subplot(grid[column], sharey=first)
        _draw_bars(
            axes, {title: [(names.index(one.name), value(one, ratio)) for one in spectra[title]] for title in spectra}
        )
        axes.set(xlabel=what.format(ratio=100 * ratio), xlim=(0, end))
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(labelleft=first is None)
        first = first or axes
    if first is not None:
        _name_layers(first, names, shades)
    handles: Any = figure.axes[-1].containers
    if any(spectra):
        figure.legend(handles, list(spectra), loc="outside upper right", ncols=len(spectra))
    return _finished(figure, path)


def _shades(number: int) -> list[Any]:
    """Return a colour for each layer, dark for the first; not up to the yellow end, which is hard to read."""
    from matplotlib import colormaps  # noqa: PLC0415 - optional

    return [colormaps["viridis"](0.85 * place / max(1, number - 1)) for place in range(number)]


def _draw_lines(axes: Axes, layers: Sequence[LayerSpectrum], colours: Mapping[str, Any]) -> None:
    axes.set_yscale("log")
    for layer in layers:
        places = [(rank + 1) / layer.full_rank for rank in range(layer.full_rank)]
        few = layer.full_rank <= 2  # noqa: PLR2004 - too short for a line to be seen
        axes.plot(
            places,
            layer.relative_values.tolist(),
            label=layer.name,
            color=colours[layer.name],
            marker="." if few else "",
        )
    axes.set(xlim=(0, 1.02), ylim=(_FLOOR, 1.5))
    axes.grid(alpha=0.3)


def _draw_bars(axes: Axes, values: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Draw the values of each spectrum beside each other, at the places of the layers."""
    thickness = 0.8 / len(values)
    for number, (title, points) in enumerate(values.items()):
        offset = (number + 0.5) * thickness - 0.4
        axes.barh([place + offset for place, _ in points], [value for _, value in points], thickness, label=title)


def _name_layers(axes: Axes, names: Sequence[str], shades: Sequence[Any]) -> None:
    """Write the layers at the left, the first on top, each in the colour of its line."""
    axes.set_yticks(range(len(names)), [name or "(the model)" for name in names], fontsize="x-small")
    axes.set_ylim(len(names) - 0.5, -0.5)
    for label, shade in zip(axes.get_yticklabels(), shades, strict=True):
        label.set_color(shade)


def plot_weights(
    weights: Mapping[str, Tensor | nn.Module],
    path: str | PathLike[str] | None = None,
    *,
    position: Sequence[int] | None = None,
    relative: bool = False,
) -> Figure:
    """Draw weights side by side in one colour scale: say, that of a layer trained plainly and that trained smooth.

    Each picture has a row for each output channel and a column for each input channel; of a kernel it shows one
    position. Groups are stacked on one another.

    Args:
        weights: one or more, by what to call them: tensors ``(out, in / groups, *kernel)``, or modules with such a
            ``weight``, low-rank ones included; any real floating dtype, any device, finite.
        path: where to write the picture, in the format of its suffix; None writes nothing.
        position: which kernel entry to show, an index for each kernel axis; None shows the central one.
        relative: whether to divide each picture by its root mean square, which shows the structure of weights that a
            penalty has made small.

    Returns:
        The figure, which pyplot knows nothing of.

    Raises:
        TypeError: if ``weights`` is not a mapping from strings to tensors or modules, or one is not floating.
        ValueError: if it is empty; or a weight has fewer than two axes, is empty, sharded or without finite values, or
            has no such position; it is named.
        ImportError: if matplotlib is not installed.

    Example:
        >>> import torch, torchsmooth
        >>> plain = torch.nn.Conv2d(3, 8, 3)
        >>> figure = torchsmooth.plot_weights({"plain": plain, "half as large": plain.weight / 2})
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['plain', 'half as large']
    """
    check_mapping(weights, "weights", "tensors or modules")
    if position is not None and not isinstance(position, Sequence):
        raise TypeError(f"position must be a sequence of one index for each kernel axis, got {describe(position)}.")
    pictures = {name: _picture(weight, name, position) for name, weight in weights.items()}
    if relative:
        pictures = {name: _over_its_own(picture) for name, picture in pictures.items()}
    largest = max(float(picture.abs().max()) for picture in pictures.values()) or 1.0
    figure = _new_figure(1.2 + 3.4 * len(pictures), 3.6)
    shown: Any = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axes, (name, picture) in zip(shown, pictures.items(), strict=True):
        # Blue below zero, red above, white at zero, in every picture the same.
        image = axes.imshow(picture.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        axes.set(title=name, xlabel="input channel", ylabel="output channel")
    figure.colorbar(image, ax=list(shown), label="weight / its root mean square" if relative else "weight")
    return _finished(figure, path)


def _over_its_own(picture: Tensor) -> Tensor:
    """Divide by the root mean square; first by the largest, whose square may be out of range."""
    picture = picture / (float(picture.abs().max()) or 1.0)
    return picture / (float(picture.square().mean().sqrt()) or 1.0)


def _picture(source: object, name: str, position: Sequence[int] | None) -> Tensor:
    """Return the entries to show, ``(out, in)`` in float64 on the CPU."""
    groups, transposed = 1, False
    if isinstance(source, nn.Module):
        source = unwrapped(source)
        weight = read_weight(source, f"{name!r} ({type(source).__name__})")
        groups, transposed = geometry_of(source)
    elif isinstance(source, Tensor):
        weight = source.detach()
        check_weight(weight, f"weight {name!r}")
    else:
        raise TypeError(f"weights must be tensors or modules, got for {name!r} {describe(source)}.")
    if weight.is_meta or not weight.numel() or not bool(weight.isfinite().all()):
        what = "one on the meta device" if weight.is_meta else "NaN or infinite ones" if weight.numel() else "none"
        raise ValueError(f"weight {name!r} of shape {tuple(weight.shape)} must have finite values to draw, got {what}.")
    kernel = tuple(weight.shape[2:])
    at: tuple[Any, ...] = tuple(size // 2 for size in kernel) if position is None else tuple(position)
    if len(at) != len(kernel) or not all(
        type(index) is int and 0 <= index < size for index, size in zip(at, kernel, strict=True)
    ):
        raise ValueError(
            f"position must have an index for each kernel axis of every weight, got {at} for weight {name!r} with a "
            f"kernel of {kernel}."
        )
    view = channel_view(weight, groups, transposed=transposed)
    return working_copy(view[(..., *at)]).flatten(0, 1).cpu()
