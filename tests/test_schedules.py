"""Schedules of the strength: where they are zero, rising and one."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchsmooth import StrengthSchedule

SHAPES = ("constant", "linear", "cosine")


@st.composite
def schedules(draw):
    begin, full, end = sorted(draw(st.floats(0.0, 1.0)) for _ in range(3))
    return StrengthSchedule(draw(st.integers(1, 40)), draw(st.sampled_from(SHAPES)), begin, full, end)


def reference(schedule, step):
    """The definition, in exact fractions up to the cosine."""
    done = Fraction(step, schedule.total_steps)
    begin, full, end = map(Fraction, (schedule.begin, schedule.full, schedule.end))
    if done < begin or (end < 1 and done >= end):
        return 0.0
    if done >= full or schedule.shape == "constant":
        return 1.0
    risen = float((done - begin) / (full - begin))
    return risen if schedule.shape == "linear" else (1.0 - math.cos(math.pi * risen)) / 2.0


@given(schedule=schedules())
def test_factor_of_every_step_is_that_of_the_definition(schedule):
    # Beyond the last step, too: a training may be prolonged.
    steps = range(schedule.total_steps + 3)
    # A step that falls on a corner may be rounded to either side of it.
    corners = (schedule.begin, schedule.full, schedule.end)
    for step in steps:
        if all(abs(step / schedule.total_steps - corner) > 1e-12 for corner in corners):
            assert schedule(step) == pytest.approx(reference(schedule, step), abs=1e-9)


@given(schedule=schedules())
def test_factor_is_a_float_from_zero_to_one_that_rises_until_the_end(schedule):
    factors = [schedule(step) for step in range(schedule.total_steps + 3)]
    assert all(type(factor) is float and 0.0 <= factor <= 1.0 for factor in factors)
    rising = [
        factor
        for step, factor in enumerate(factors)
        if step / schedule.total_steps < schedule.end or schedule.end == 1.0
    ]
    assert rising == sorted(rising)
    assert not any(factors[len(rising) :])


@pytest.mark.parametrize("shape", SHAPES)
@given(total=st.integers(1, 50).map(lambda number: 4 * number))
def test_corners_are_where_they_are_said_to_be(shape, total):
    schedule = StrengthSchedule(total, shape, 0.25, 0.5, 0.75)
    assert schedule(total // 4 - 1) == 0.0
    assert schedule(total // 4) == (1.0 if shape == "constant" else 0.0)
    assert schedule(total // 2) == 1.0
    assert schedule(3 * total // 4 - 1) == 1.0 or total == 4
    assert schedule(3 * total // 4) == 0.0


@given(total=st.integers(1, 50), shape=st.sampled_from(SHAPES), corner=st.floats(0.0, 1.0, exclude_max=True))
def test_rise_without_length_is_a_step(total, shape, corner):
    schedule = StrengthSchedule(total, shape, corner, corner)
    assert [schedule(step) for step in range(total)] == [float(step / total >= corner) for step in range(total)]


@given(total=st.integers(1, 100).map(lambda number: 2 * number))
def test_cosine_starts_and_ends_flat_and_meets_the_line_in_the_middle(total):
    line, wave = (StrengthSchedule(total, shape, 0.0, 1.0) for shape in ("linear", "cosine"))
    assert wave(total // 2) == pytest.approx(0.5)
    assert line(total // 2) == 0.5
    for step in range(total // 2 + 1):
        assert wave(step) <= line(step) + 1e-12
        assert wave(step) + wave(total - step) == pytest.approx(1.0)


def test_last_step_is_at_full_strength_unless_an_end_is_set():
    assert StrengthSchedule(10)(9) == 1.0
    assert StrengthSchedule(10)(10) == 1.0
    assert StrengthSchedule(10, end=0.95)(9) == 1.0
    assert StrengthSchedule(10, end=0.9)(9) == 0.0


@given(total=st.integers(1, 50), corners=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2).map(sorted))
def test_constant_strength_needs_no_corner_between_its_ends(total, corners):
    begin, end = corners
    schedule = StrengthSchedule(total, "constant", begin=begin, end=end)
    expected = [float(begin <= step / total and (step / total < end or end == 1.0)) for step in range(total)]
    assert [schedule(step) for step in range(total)] == expected


@given(schedule=schedules())
def test_schedules_are_values(schedule):
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule)), dataclasses.replace(schedule)):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
    assert eval(repr(schedule), {"StrengthSchedule": StrengthSchedule}) == schedule  # noqa: S307 - our own repr
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.begin = 0.0


@pytest.mark.parametrize("number", [1, Fraction(1, 1), np.float32(1.0), np.int64(1)])
def test_every_real_number_is_a_corner(number):
    schedule = StrengthSchedule(np.int64(4), full=number)
    assert [schedule(step) for step in range(4)] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "total_steps must be an integer, got float 10.0", {"total_steps": 10.0}),
        (TypeError, "total_steps must be an integer, got bool True", {"total_steps": True}),
        (TypeError, "total_steps must be an integer, got Tensor", {"total_steps": torch.tensor(3)}),
        (ValueError, "total_steps must be at least 1 .* got 0", {"total_steps": 0}),
        (ValueError, "shape must be one of 'constant', 'linear', 'cosine'; got str 'Linear'", {"shape": "Linear"}),
        (ValueError, "shape must be one of .*; got None", {"shape": None}),
        (TypeError, "begin must be a real number, got str '0'", {"begin": "0"}),
        (TypeError, "full must be a real number, got None", {"full": None}),
        (TypeError, "end must be a real number, got bool True", {"end": True}),
        (ValueError, "end must be finite, got inf", {"end": math.inf}),
        (ValueError, "begin must be finite, got nan", {"begin": math.nan}),
        (ValueError, "0 ≤ begin ≤ full ≤ end ≤ 1, got begin=-0.1, full=0.5, end=1.0", {"begin": -0.1}),
        (
            ValueError,
            "begin ≤ full .* got begin=0.6, full=0.5, end=1.0. Without a value of its own full is",
            {"begin": 0.6},
        ),
        (
            ValueError,
            "full ≤ end .* got begin=0.0, full=0.5, end=0.4. Without a value of its own full is",
            {"end": 0.4},
        ),
        (ValueError, "got begin=0.6, full=0.4, end=1.0.$", {"begin": 0.6, "full": 0.4}),
        (ValueError, "begin ≤ end ≤ 1, got begin=0.6, end=0.5", {"shape": "constant", "begin": 0.6, "end": 0.5}),
        (TypeError, "full must be a real number, got None", {"shape": "constant", "full": None}),
        (ValueError, "end ≤ 1, got begin=0.0, full=0.5, end=1.1", {"end": 1.1}),
    ],
)
def test_wrong_argument_is_named(error, message, arguments):
    with pytest.raises(error, match=message):
        StrengthSchedule(**({"total_steps": 10} | arguments))
