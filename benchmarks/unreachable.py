"""Telling a ratio that cannot be reached, which is a result, from every other error."""

from __future__ import annotations


def is_unreachable(error: ValueError) -> bool:
    """Tell whether an error says that a ratio cannot be reached, as those of the library and of the pruning do."""
    return "cannot be reached" in str(error)
