"""What descriptions of penalties answer to wrong arguments."""

from __future__ import annotations

import math

import torch

from tests.mistakes import Mistake, check, table
from torchsmooth import (
    Constrained,
    FirstDerivative,
    NuclearNorm,
    NuclearRatio,
    RankTail,
    SecondDerivative,
    StrengthSchedule,
)

DESCRIPTIONS = [
    Mistake(
        "a negative strength",
        lambda model: NuclearNorm(-1e-3),
        ValueError,
        ("strength of NuclearNorm must be ≥ 0, got -0.001: a negative one would reward rough weights without bound."),
    ),
    Mistake(
        "a strength that is NaN",
        lambda model: FirstDerivative(math.nan),
        ValueError,
        "strength of FirstDerivative must be finite, got nan.",
    ),
    Mistake(
        "an infinite strength",
        lambda model: SecondDerivative(math.inf),
        ValueError,
        "strength of SecondDerivative must be finite, got inf.",
    ),
    Mistake(
        "a strength as text",
        lambda model: NuclearNorm("1e-3"),
        TypeError,
        "strength of NuclearNorm must be a real number, got str '1e-3'.",
    ),
    Mistake(
        "a strength as a tensor",
        lambda model: NuclearNorm(torch.tensor(1e-3)),
        TypeError,
        "strength of NuclearNorm must be a real number, got Tensor tensor(0.0010).",
    ),
    Mistake(
        "a strength of None",
        lambda model: NuclearRatio(None),
        TypeError,
        "strength of NuclearRatio must be a real number, got None.",
    ),
    Mistake(
        "a scheme misspelt",
        lambda model: NuclearNorm(1e-3, scheme="chanel"),
        ValueError,
        (
            "scheme must be one of 'channel', 'input', 'spatial', 'spatial_transposed'; got str "
            "'chanel': did you mean 'channel'?"
        ),
    ),
    Mistake(
        "a scheme of plans",
        lambda model: NuclearNorm(1e-3, scheme="tucker"),
        ValueError,
        ("scheme must be one of 'channel', 'input', 'spatial', 'spatial_transposed'; got str 'tucker'."),
    ),
    Mistake(
        "a method misspelt",
        lambda model: NuclearNorm(1e-3, method="polar-express"),
        ValueError,
        (
            "method must be one of 'auto', 'svd', 'eigh', 'polar_express', 'polar_express_bf16'; got "
            "str 'polar-express': did you mean 'polar_express'?"
        ),
    ),
    Mistake(
        "a model for a strength",
        NuclearNorm,
        TypeError,
        "strength of NuclearNorm must be a real number, got Sequential.",
    ),
    Mistake(
        "a bound in percent",
        lambda model: Constrained(NuclearNorm(), bound=50),
        ValueError,
        ("bound must lie strictly between 0 and 1 (the fraction of the first value), got 50.0: 50 % is written 0.5."),
    ),
    Mistake(
        "a constraint on nothing",
        lambda model: Constrained(0.5),
        TypeError,
        ("Constrained needs a penalty such as NuclearNorm() that is not adaptive itself, got float 0.5."),
    ),
    Mistake(
        "a constraint on a class",
        lambda model: Constrained(NuclearNorm),
        TypeError,
        ("Constrained needs a penalty such as NuclearNorm() that is not adaptive itself, got the class NuclearNorm."),
    ),
    Mistake(
        "a constraint on what adapts",
        lambda model: Constrained(RankTail(0.5)),
        TypeError,
        ("Constrained needs a penalty such as NuclearNorm() that is not adaptive itself, got RankTail."),
    ),
    Mistake(
        "a tail in percent",
        lambda model: RankTail(80),
        ValueError,
        (
            "ratio must lie strictly between 0 and 1 (the fraction of the parameters to remove), got "
            "80.0: 80 % is written 0.8."
        ),
    ),
    Mistake(
        "a tail with several schemes",
        lambda model: RankTail(0.8, scheme=["channel", "input"]),
        ValueError,
        ("scheme must be one of 'auto', 'channel', 'input', 'spatial', 'tucker'; got list ['channel', 'input']."),
    ),
    Mistake(
        "a tail that is never planned",
        lambda model: RankTail(0.8, replan_every=0),
        ValueError,
        "replan_every must be at least 1 (optimizer steps), got 0.",
    ),
    Mistake(
        "a schedule of no steps",
        lambda model: StrengthSchedule(0),
        ValueError,
        "total_steps must be at least 1 (optimizer steps of the whole training), got 0.",
    ),
    Mistake(
        "a schedule of epochs and a half",
        lambda model: StrengthSchedule(12.5),
        TypeError,
        "total_steps must be an integer, got float 12.5.",
    ),
    Mistake(
        "a schedule in percent",
        lambda model: StrengthSchedule(100, begin=25, full=75),
        ValueError,
        (
            "begin, full and end are fractions of the training with 0 ≤ begin ≤ full ≤ end ≤ 1, got "
            "begin=25.0, full=75.0, end=1.0."
        ),
    ),
    Mistake(
        "a schedule of another shape",
        lambda model: StrengthSchedule(100, "cosin"),
        ValueError,
        ("shape must be one of 'constant', 'linear', 'cosine'; got str 'cosin': did you mean 'cosine'?"),
    ),
]


@table(DESCRIPTIONS)
def test_a_mistake_is_answered_in_these_words(mistake):
    check(mistake)
