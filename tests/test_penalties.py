"""The descriptions of penalties: frozen values without tensors, validated when made."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import penalties as reference
from tests.strategies import fill_, randn, seeds
from torchsmooth import (
    FirstDerivative,
    NuclearNorm,
    NuclearRatio,
    SecondDerivative,
    functional,
    penalty_loss,
    register_penalty,
)
from torchsmooth.penalties import Penalty

KINDS = (NuclearNorm, NuclearRatio, FirstDerivative, SecondDerivative)
SCHEMES = ("channel", "input", "spatial", "spatial_transposed")
METHODS = ("auto", "svd", "eigh", "polar_express", "polar_express_bf16")

each_kind = pytest.mark.parametrize("kind", KINDS)
strengths = st.floats(0.0, 1e6)


@dataclass(frozen=True)
class PowerSum(Penalty):
    """A penalty of a user's own: the sum of |w| to a power."""

    strength: float = 0.5
    power: int = 1

    def __call__(self, weight, *, groups=1, transposed=False):
        return weight.abs().pow(self.power).sum()


every_penalty = st.one_of(
    st.builds(NuclearNorm, strengths, st.sampled_from(SCHEMES), st.sampled_from(METHODS)),
    st.builds(NuclearRatio, strengths, st.sampled_from(SCHEMES), st.sampled_from(METHODS)),
    st.builds(FirstDerivative, strengths),
    st.builds(SecondDerivative, strengths),
    st.builds(PowerSum, strengths, st.integers(1, 3)),
)


@given(penalty=every_penalty)
def test_fields_cannot_be_set(penalty):
    before = penalty.strength
    with pytest.raises(dataclasses.FrozenInstanceError):
        penalty.strength = before + 1.0
    assert penalty.strength == before


@given(penalty=every_penalty, other=every_penalty)
def test_penalties_are_equal_exactly_when_type_and_fields_are(penalty, other):
    same = type(penalty) is type(other) and dataclasses.asdict(penalty) == dataclasses.asdict(other)
    assert (penalty == other) == same
    assert not same or hash(penalty) == hash(other)


@given(strength=strengths)
def test_penalties_of_different_types_are_never_equal(strength):
    assert len({kind(strength) for kind in KINDS}) == len(KINDS)


@given(penalty=every_penalty)
def test_copies_and_pickles_are_equal(penalty):
    for twin in (copy.copy(penalty), copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert type(twin) is type(penalty)
        assert twin == penalty
        assert hash(twin) == hash(penalty)


@given(strength=strengths, scheme=st.sampled_from(SCHEMES))
def test_repr_is_how_the_penalty_was_written(strength, scheme):
    numbers = f"strength={strength!r}, scheme={scheme!r}, method='auto'"
    assert repr(NuclearNorm(strength, scheme)) == f"NuclearNorm({numbers})"
    assert repr(NuclearRatio(strength, scheme)) == f"NuclearRatio({numbers})"
    assert repr(FirstDerivative(strength)) == f"FirstDerivative(strength={strength!r})"
    assert repr(SecondDerivative(strength)) == f"SecondDerivative(strength={strength!r})"


@each_kind
def test_default_strength_is_a_small_positive_number(kind):
    assert 0.0 < kind().strength < 0.1


@each_kind
@pytest.mark.parametrize("strength", [0, 2, Fraction(1, 2), np.float32(0.25), np.int64(3), -0.0])
def test_every_real_number_becomes_a_float(kind, strength):
    penalty = kind(strength)
    assert type(penalty.strength) is float
    assert penalty.strength == strength
    assert penalty == kind(float(strength))


@given(penalty=every_penalty, strength=strengths)
def test_replace_makes_a_validated_twin_of_another_strength(penalty, strength):
    assert dataclasses.replace(penalty, strength=strength).strength == strength
    with pytest.raises(ValueError, match="strength"):
        dataclasses.replace(penalty, strength=-1.0)


@pytest.mark.parametrize("kind", [*KINDS, PowerSum])
@pytest.mark.parametrize(
    ("strength", "error", "message"),
    [
        (-1e-9, ValueError, "must be ≥ 0"),
        (math.nan, ValueError, "must be finite, got nan"),
        (math.inf, ValueError, "must be finite, got inf"),
        (-math.inf, ValueError, "must be finite, got -inf"),
        (True, TypeError, "must be a real number, got bool True"),
        ("1e-3", TypeError, "must be a real number, got str '1e-3'"),
        (None, TypeError, "must be a real number, got None"),
        (1j, TypeError, "must be a real number, got complex 1j"),
        (torch.tensor(1.0), TypeError, "must be a real number, got Tensor"),
    ],
)
def test_wrong_strength_is_refused_by_name(kind, strength, error, message):
    with pytest.raises(error, match=f"strength of {kind.__name__} {message}"):
        kind(strength)


@pytest.mark.parametrize("scheme", ["Spatial", "", "channels", None, 1, ["channel"]])
def test_wrong_scheme_is_refused_by_name(scheme):
    with pytest.raises(ValueError, match="scheme must be one of 'channel', 'input', 'spatial', 'spatial_transposed'"):
        NuclearNorm(1e-3, scheme)


def test_base_class_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Penalty(1.0)


@pytest.mark.parametrize("transposed", [False, True])
@given(seed=seeds, groups=st.integers(1, 3), kernel=st.lists(st.integers(1, 3), max_size=3), strength=strengths)
def test_call_is_the_function_without_the_strength(transposed, seed, groups, kernel, strength):
    weight = randn(groups * 3, 2, *kernel, seed=seed)
    layout = {"groups": groups, "transposed": transposed}
    assert torch.equal(NuclearNorm(strength)(weight, **layout), functional.nuclear_norm(weight, **layout))
    assert torch.equal(FirstDerivative(strength)(weight, **layout), functional.first_derivative(weight, **layout))
    assert torch.equal(SecondDerivative(strength)(weight, **layout), functional.second_derivative(weight, **layout))


@pytest.mark.parametrize("scheme", SCHEMES)
@given(seed=seeds, groups=st.integers(1, 2), kernel=st.lists(st.integers(1, 3), min_size=2, max_size=2))
def test_scheme_is_handed_on(scheme, seed, groups, kernel):
    weight = randn(groups * 3, 2, *kernel, seed=seed)
    value = NuclearNorm(scheme=scheme)(weight, groups=groups)
    assert value.item() == pytest.approx(reference.nuclear_norm(weight, scheme, groups))


@pytest.mark.parametrize("kernel", [(), (3,), (3, 2, 2)])
@pytest.mark.parametrize(
    ("scheme", "used"), list(zip(SCHEMES, ("channel", "input", "channel", "channel"), strict=True))
)
def test_spatial_schemes_turn_to_channel_where_a_kernel_has_not_two_axes(scheme, used, kernel):
    weight = randn(4, 3, *kernel, seed=0)
    value = NuclearNorm(scheme=scheme)(weight)
    assert value.item() == pytest.approx(reference.nuclear_norm(weight, used))


@given(seed=seeds, power=st.integers(1, 3), strength=st.floats(0.01, 100.0))
def test_penalty_of_a_users_own_can_be_registered(seed, power, strength):
    layer = torch.nn.Linear(3, 2, dtype=torch.float64)
    layer.weight = torch.nn.Parameter(randn(2, 3, seed=seed))
    register_penalty(layer, "weight", PowerSum(strength, power))
    slow = sum(strength * abs(entry) ** power for entry in layer.weight.flatten().tolist())
    assert penalty_loss(layer).item() == pytest.approx(slow)


@settings(max_examples=5)
@given(seed=seeds)
def test_training_with_a_nuclear_norm_lowers_it_more_than_training_without(seed):
    x, target = randn(32, 6, seed=seed), randn(32, 5, seed=seed + 1)
    norms = {}
    for strength in (0.0, 0.1):
        layer = fill_(torch.nn.Linear(6, 5, dtype=torch.float64), seed)
        register_penalty(layer, "weight", NuclearNorm(strength))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(layer(x), target) + penalty_loss(layer)
            loss.backward()
            optimizer.step()
        norms[strength] = reference.nuclear_norm(layer.weight)
    # Every step moves each singular value by up to lr · strength.
    assert norms[0.1] < norms[0.0] - 0.1


def test_a_number_too_large_for_a_float_is_refused_as_infinite():
    with pytest.raises(ValueError, match="strength of NuclearNorm must be finite, got inf"):
        NuclearNorm(10**400)
