"""The default dtype is for tensors that users make: what the library computes does not depend on it."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.strategies import fill_, randn, seeds
from torchsmooth import (
    Constrained,
    FirstDerivative,
    NuclearNorm,
    NuclearRatio,
    RankTail,
    SecondDerivative,
    attach_,
    fold_batchnorm_,
    load_compressed_,
    penalty_loss,
    recalibrate_batchnorm_,
    restore_dense_,
    smooth_,
    spectrum,
    svd_compress_,
    sweep,
)
from torchsmooth._budget import Frontier, within_budget
from torchsmooth._moments import POSITIONS, drawn_positions

DTYPES = (torch.float64, torch.bfloat16, torch.float16)  # beside float32


@contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def network(seed, dtype=torch.float32):
    """Layers of very different costs, one with more parameters than float16 can count."""
    layers = [
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, groups=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 10, 3),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(90, 750),
        nn.ReLU(),
        nn.Linear(750, 20),
        nn.ConvTranspose1d(1, 4, 3),
    ]
    model = nn.Sequential(*layers[:-1], nn.Unflatten(1, (1, 20)), layers[-1])
    return fill_(model.to(dtype), seed).eval()


def images(seed):
    return [randn(8, 3, 8, 8, seed=seed + batch, dtype=torch.float32) for batch in range(2)]  # 64 positions each


def equal(one, other):
    """Compare tensors in dictionaries, lists and tuples, to the last bit; anything else as it is."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def alike_in_all(compute):
    """Say whether what a function of nothing computes is the same to the last bit under every default dtype."""
    expected = compute()
    assert torch.get_default_dtype() == torch.float32
    for dtype in DTYPES:
        with default(dtype):
            if not equal(compute(), expected):
                return False
    return True


@settings(max_examples=12)
@given(
    seed=seeds,
    goal=st.one_of(
        st.floats(0.2, 0.8).map(lambda ratio: {"ratio": ratio}),
        st.just({"max_error": 0.6}),
        st.just({"ratio": 0.5, "allocation": "uniform"}),
        st.just({"ratio": 0.3, "target": "macs"}),
    ),
    options=st.fixed_dictionaries(
        {"form": st.sampled_from(["auto", "pivoted"]), "scheme": st.sampled_from(["auto", "tucker", "spatial"])}
    ),
    calibrated=st.booleans(),
)
def test_plans_and_factors_are_the_same_to_the_last_bit(seed, goal, options, calibrated):
    model, batches = network(seed), images(seed)
    given_inputs = {"example_inputs": batches[0]} if "target" in goal else {}

    def compress():
        small = copy.deepcopy(model)
        report = svd_compress_(
            small, **goal, **options, **given_inputs, calibration=batches if calibrated else None, progress=False
        )
        return report.to_dict(), dict(small.state_dict())

    assert alike_in_all(compress)


@settings(max_examples=4)
@given(seeds)
def test_so_is_what_is_done_with_the_model_afterwards(seed):
    model, batches = network(seed), images(seed)

    def compress():
        small = copy.deepcopy(model)
        svd_compress_(small, 0.5, form="pivoted")
        again = load_compressed_(copy.deepcopy(model), small.state_dict())
        svd_compress_(again, 0.2)
        recalibrate_batchnorm_(again, batches)
        fold_batchnorm_(small)
        states = [dict(one.state_dict()) for one in (small, again, restore_dense_(copy.deepcopy(again)))]
        with torch.no_grad():
            return [*states, small(batches[0]), [plan.to_json() for plan in sweep(model, [0.3, 0.7])]]

    assert alike_in_all(compress)
    assert alike_in_all(lambda: spectrum(model, ratio=0.5).to_dict())


@pytest.mark.parametrize(
    "penalty",
    [
        NuclearNorm(1e-3, method="svd"),
        NuclearNorm(1e-3, method="eigh"),
        NuclearNorm(1e-3, method="polar_express"),
        NuclearRatio(1e-3),
        FirstDerivative(1e-3),
        SecondDerivative(1e-3),
        Constrained(FirstDerivative(1.0), 0.5),
        RankTail(0.5),
    ],
    ids=repr,
)
def test_so_are_penalties_and_the_steps_that_they_make(penalty):
    model, batches = network(0), images(0)

    def train():
        trained = copy.deepcopy(model).train()
        smooth_(trained, penalty)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        handle = attach_(optimizer, trained)
        for batch in batches:
            optimizer.zero_grad()
            trained(batch).square().mean().backward()
            optimizer.step()
        loss = [] if isinstance(penalty, (Constrained, RankTail)) else [penalty_loss(trained).detach()]
        return [dict(trained.state_dict()), loss, handle.state_dict()]

    assert alike_in_all(train)


@given(seeds, st.integers(2, 6), st.integers(1, 10**6), st.floats(0.05, 0.95))
def test_a_budget_of_any_size_is_spent_in_the_same_way(seed, layers, unit, share):
    decays = randn(layers, seed=seed).exp().tolist()
    ranks = torch.arange(1, 31)
    frontiers = [
        Frontier.of(unit * (1 + place) * ranks, ranks.double() ** -decay) for place, decay in enumerate(decays)
    ]
    least, most = (sum(int(one.costs[end]) for one in frontiers) for end in (0, -1))
    assert alike_in_all(lambda: within_budget(frontiers, least + int(share * (most - least))))


@given(seeds, st.integers(1, 5), st.integers(POSITIONS + 1, 200))
def test_the_same_positions_are_drawn(seed, examples, positions):
    assert alike_in_all(lambda: drawn_positions(examples, positions, seed))
