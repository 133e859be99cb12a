"""Plain-text tables for plans and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Align cells in columns; ``right`` names the columns of numbers."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def format_shape(shape: Sequence[int]) -> str:
    """Write a shape as ``64×3×7×7``."""
    return "×".join(map(str, shape))


def format_rank(rank: int | Sequence[int]) -> str:
    """Write a rank, or a pair of them as ``8×16``."""
    return str(rank) if isinstance(rank, int) else format_shape(rank)


def format_milliseconds(seconds: float) -> str:
    """Write a time in milliseconds with three significant digits."""
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"  # noqa: PLR2004


def format_share(part: float, whole: float) -> str:
    """Write what fraction is gone, with a sign, in percent."""
    return f"{100 * (part / whole - 1):+.1f} %" if whole else "0 %"
