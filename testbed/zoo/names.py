"""All entries of the zoo."""

from __future__ import annotations

from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import TYPE_CHECKING

from testbed.zoo.torchvision_models import torchvision_entries
from testbed.zoo.transformers_models import transformers_entries

if TYPE_CHECKING:
    from testbed.zoo.entry import Entry


def entries(pattern: str = "*") -> dict[str, Entry]:
    """List the architectures of the packages that are installed.

    Args:
        pattern: what their names must match, with ``*`` for anything: ``"torchvision/resnet*"``.

    Returns:
        The entries by name.

    Raises:
        ValueError: if no name matches.
    """
    makers = {"torchvision": torchvision_entries, "transformers": transformers_entries}
    every = [one for package, make in makers.items() if find_spec(package) for one in make()]
    found = {one.name: one for one in every if fnmatchcase(one.name, pattern)}
    if not found:
        raise ValueError(f"no architecture matches {pattern!r}; there are {', '.join(one.name for one in every)}.")
    return found
