"""Mistakes that a user can make, each with the whole message that answers it, and how one is tried out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.networks import same, snapshot, two_layers

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class Mistake(NamedTuple):
    """What somebody does, and what they read then.

    Attributes:
        name: the mistake in a few words.
        does: makes it, with a model.
        error: the exact type of the error.
        message: all of it; ``{cause}`` stands for the message of the error that it was raised from.
        model: builds the model, which has to be the same bit for bit afterwards.
    """

    name: str
    does: Callable[[nn.Module], object]
    error: type[Exception]
    message: str
    model: Callable[[], nn.Module] = two_layers


def said(error: BaseException) -> str:
    """Return the message of an error; a KeyError shows its own in quotes."""
    return str(error.args[0]) if isinstance(error, KeyError) else str(error)


def check(mistake: Mistake, **places: object) -> None:
    """Make a mistake: the error is the one foretold, word for word, and the model is as it was.

    Args:
        mistake: what is done, and the message.
        places: what stands in the message in braces, such as ``{folder}``.
    """
    model = mistake.model()
    before = snapshot(model)
    with pytest.raises(mistake.error) as caught:
        mistake.does(model)
    assert type(caught.value) is mistake.error
    expected = mistake.message
    for name, value in {"cause": said(caught.value.__cause__ or Exception()), **places}.items():
        expected = expected.replace(f"{{{name}}}", str(value))
    assert said(caught.value) == expected
    assert same(before, snapshot(model))


def table(mistakes: list[Mistake]) -> pytest.MarkDecorator:
    """Run a test for each mistake of a table."""
    return pytest.mark.parametrize("mistake", [pytest.param(one, id=one.name) for one in mistakes])
