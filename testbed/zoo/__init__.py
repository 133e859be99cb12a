"""Architectures that other people wrote, by name, with inputs for each; and what all of them must show."""

from testbed.zoo.checks import CHECKS, Outcome, examine
from testbed.zoo.entry import Entry
from testbed.zoo.names import entries

__all__ = ["CHECKS", "Entry", "Outcome", "entries", "examine"]
