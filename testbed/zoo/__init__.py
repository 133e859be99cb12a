"""Architectures that other people wrote, by name, with inputs for each; and what all of them must show."""

from testbed.zoo.checks import Outcome, examine
from testbed.zoo.entry import Entry
from testbed.zoo.names import entries

__all__ = ["Entry", "Outcome", "entries", "examine"]
