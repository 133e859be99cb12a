"""What the constructors of the low-rank layers answer to mistakes."""

from __future__ import annotations

from tests.mistakes import Mistake, check, table
from torchsmooth import (
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose2d,
    LowRankEmbedding,
    LowRankLinear,
    LowRankMultiheadAttention,
    LowRankRNNCell,
    TuckerConv2d,
)


def made(cls, *args, **kwargs):
    return lambda model: cls(*args, **kwargs)


SIZES = [
    Mistake("no rank", made(LowRankLinear, 6, 5, None), TypeError, "rank must be an integer, got None."),
    Mistake(
        "rank zero", made(LowRankLinear, 6, 5, 0), ValueError, "rank must lie between 1 and 5 (the full rank), got 0."
    ),
    Mistake(
        "a rank too high",
        made(LowRankLinear, 6, 5, 6),
        ValueError,
        "rank must lie between 1 and 5 (the full rank), got 6.",
    ),
    Mistake("a rank as text", made(LowRankLinear, 6, 5, "2"), TypeError, "rank must be an integer, got str '2'."),
    Mistake(
        "a rank as a fraction", made(LowRankLinear, 6, 5, 0.5), TypeError, "rank must be an integer, got float 0.5."
    ),
    Mistake(
        "the pivoted form at full rank",
        made(LowRankLinear, 6, 5, 5, form="pivoted"),
        ValueError,
        (
            "rank must lie between 1 and 4 (one less than the full rank, at which the pivoted form "
            "is the dense weight itself), got 5."
        ),
    ),
    Mistake(
        "the pivoted form of one row",
        made(LowRankLinear, 6, 1, 1, form="pivoted"),
        ValueError,
        (
            "form 'pivoted' needs a matrix with at least two rows and two columns, got one of 1 × 6: "
            "leave the layer dense."
        ),
    ),
    Mistake(
        "a form misspelt",
        made(LowRankLinear, 6, 5, 2, form="pivot"),
        ValueError,
        "form must be one of 'factored', 'pivoted'; got str 'pivot': did you mean 'pivoted'?",
    ),
    Mistake(
        "no features",
        made(LowRankLinear, 0, 5, 1),
        ValueError,
        "in_features must be at least 1 (features of the input), got 0.",
    ),
    Mistake(
        "features as text", made(LowRankLinear, "6", 5, 1), TypeError, "in_features must be an integer, got str '6'."
    ),
    Mistake(
        "no outputs of a convolution",
        made(LowRankConv2d, 4, 0, 3, 1),
        ValueError,
        "out_channels must be at least 1 (channels of the output), got 0.",
    ),
    Mistake(
        "groups that do not divide",
        made(LowRankConv2d, 4, 6, 3, 1, groups=3),
        ValueError,
        "groups must divide in_channels and out_channels, got groups=3 for 4 and 6.",
    ),
    Mistake(
        "a padding mode misspelt",
        made(LowRankConv2d, 4, 6, 3, 1, padding_mode="mirror"),
        ValueError,
        ("padding_mode must be one of 'zeros', 'reflect', 'replicate', 'circular'; got str 'mirror'."),
    ),
    Mistake(
        "a padding misspelt",
        made(LowRankConv2d, 4, 6, 3, 1, padding="full"),
        ValueError,
        "padding by name must be one of 'same', 'valid'; got str 'full'.",
    ),
    Mistake(
        "a kernel of three axes",
        made(LowRankConv2d, 4, 6, (3, 3, 3), 1),
        ValueError,
        "kernel_size must be a number or a pair, got tuple (3, 3, 3).",
    ),
    Mistake(
        "a kernel of size zero",
        made(LowRankConv2d, 4, 6, 0, 1),
        ValueError,
        "kernel_size must be at least 1 (the size of the kernel on each axis), got 0.",
    ),
    Mistake(
        "a kernel as text", made(LowRankConv2d, 4, 6, "3", 1), TypeError, "kernel_size must be an integer, got str '3'."
    ),
    Mistake(
        "a spatial scheme on one axis",
        made(LowRankConv1d, 4, 6, 3, 1, scheme="spatial"),
        ValueError,
        "scheme must be one of 'channel', 'input'; got str 'spatial'.",
    ),
    Mistake(
        "a scheme misspelt",
        made(LowRankConv3d, 4, 6, 3, 1, scheme="chanel"),
        ValueError,
        "scheme must be one of 'channel', 'input'; got str 'chanel': did you mean 'channel'?",
    ),
    Mistake(
        "a rank above that of each group",
        made(LowRankConv2d, 8, 8, 3, 6, groups=2),
        ValueError,
        "rank must lie between 1 and 4 (the full rank of scheme 'channel' in each group), got 6.",
    ),
    Mistake(
        "padding by name of a transposed one",
        made(LowRankConvTranspose2d, 4, 6, 3, 1, padding="same"),
        ValueError,
        (
            "padding of a transposed convolution must be a number or one for each axis, got str "
            "'same': only ordinary convolutions have padding by name."
        ),
    ),
    Mistake(
        "one rank of two too high",
        made(TuckerConv2d, 4, 6, 3, (2, 7)),
        ValueError,
        ("rank (r_out) must lie between 1 and 6 (the full rank of scheme 'tucker' on that side), got 7."),
    ),
    Mistake(
        "three ranks",
        made(TuckerConv2d, 4, 6, 3, (2, 2, 2)),
        ValueError,
        "rank must be a pair (r_in, r_out) in scheme 'tucker', got tuple (2, 2, 2).",
    ),
    Mistake(
        "a kernel of one",
        made(TuckerConv2d, 4, 6, 1, (2, 2)),
        ValueError,
        (
            "scheme 'tucker' needs a kernel larger than 1×1 and at least two input and output "
            "channels in each group, got a weight of shape (6, 4, 1, 1) with groups=1: use "
            "LowRankConv2d."
        ),
    ),
    Mistake(
        "a rank above the rows of a table",
        made(LowRankEmbedding, 9, 5, 6),
        ValueError,
        "rank must lie between 1 and 5 (the full rank), got 6.",
    ),
    Mistake(
        "a padding row that is not there",
        made(LowRankEmbedding, 9, 5, 2, padding_idx=9),
        ValueError,
        "padding_idx must lie between -9 and 8 (the rows of the table), got 9.",
    ),
    Mistake(
        "a padding row as text",
        made(LowRankEmbedding, 9, 5, 2, padding_idx="pad"),
        TypeError,
        "padding_idx must be an integer or None, got str 'pad'.",
    ),
    Mistake(
        "heads that do not divide",
        made(LowRankMultiheadAttention, 10, 4),
        ValueError,
        "embed_dim must be a multiple of num_heads, got 10 and 4.",
    ),
    Mistake(
        "no heads",
        made(LowRankMultiheadAttention, 8, 0),
        ValueError,
        "num_heads must be at least 1 (the number of heads), got 0.",
    ),
    Mistake(
        "a nonlinearity of a cell misspelt",
        made(LowRankRNNCell, 6, 5, nonlinearity="tahn"),
        ValueError,
        "nonlinearity must be one of 'tanh', 'relu'; got str 'tahn': did you mean 'tanh'?",
    ),
]


@table(SIZES)
def test_a_mistake_is_answered_in_these_words(mistake):
    check(mistake)
